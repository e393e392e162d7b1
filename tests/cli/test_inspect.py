"""`inspect`: what it says of a file is what is in the file, and what ranks really read."""

from __future__ import annotations

import re

import gguf
import pytest
from safetensors.torch import load_file

from runtime.config import ModelConfig
from runtime.model.header import open_model
from runtime.model.load import load_shard
from tests.cli.command import run
from tests.weights.tiny import write_tiny_llama
from tests.weights.tiny_packed import write_tiny_packed


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mixed.gguf"
    types = {"*": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "output": "Q6_K"}
    return write_tiny_llama(path, hidden=256, heads=8, kv_heads=4, ffn=768, types=types)


def test_counts_and_sizes_are_the_files(mixed):
    value = run("inspect", str(mixed), "--json").json
    expected: dict[str, list[int]] = {}
    for tensor in gguf.GGUFReader(mixed).tensors:
        expected.setdefault(tensor.tensor_type.name, []).append(int(tensor.n_bytes))
    assert {entry["type"]: (entry["count"], entry["bytes"]) for entry in value["tensors"]} == {
        name: (len(sizes), sum(sizes)) for name, sizes in expected.items()
    }
    assert value["file_bytes"] == mixed.stat().st_size
    assert value["path"] == str(mixed)


def test_the_architecture_is_the_files(mixed):
    value = run("inspect", str(mixed), "--json").json
    known = {
        "kind": "llama",
        "layers": 2,
        "hidden": 256,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 32,
        "ffn": 768,
    }
    assert known.items() <= value["architecture"].items()
    assert value["units"] == 4
    assert value["kv_bytes_per_token"] == 2 * 2 * 4 * 32 * 2  # layers, K and V, heads, width, bf16
    assert value["tokenizer"]["model"] == "llama"
    assert re.fullmatch(r"cpu\..*/u4/w[0-9a-f]{8}", value["numerics"])


def test_bytes_a_rank_are_those_it_reads(mixed):
    value = run("inspect", str(mixed), "--json").json
    opened = open_model(ModelConfig(str(mixed)))
    assert [split["tp"] for split in value["tensor_parallel"]] == [1, 2, 3, 4]
    for split in value["tensor_parallel"]:
        ranks = split["ranks"]
        assert len(ranks) == split["tp"]
        assert [rank["units"][0] for rank in ranks[1:]] == [rank["units"][1] for rank in ranks[:-1]]
        assert (ranks[0]["units"][0], ranks[-1]["units"][1]) == (0, 4)
        for number, rank in enumerate(ranks):
            _, report = load_shard(opened, number, split["tp"])
            assert rank["weight_bytes"] == report.bytes_read


def test_people_get_a_table(mixed):
    result = run("inspect", str(mixed))
    assert result.status == 0
    for fragment in ("llama", "Q4_K", "Q6_K", "--tp 1 to 4", "1 + 1 + 1 + 1", "256 tokens"):
        assert fragment in result.out


def test_a_name_may_look_like_markup(tmp_path):
    path = tmp_path / "m.gguf"
    write_tiny_llama(path, metadata={"general.name": "[bold]x[/nonsense]"})
    result = run("inspect", str(path))
    assert result.status == 0
    assert "[bold]x[/nonsense]" in result.out


def test_quantising_changes_what_is_computed_not_what_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    write_tiny_llama(path)
    exact = run("inspect", str(path), "--json").json
    rounded = run("inspect", str(path), "--json", "--dtype", "bf16").json
    assert exact["numerics"] != rounded["numerics"]
    assert exact["tensor_parallel"] == rounded["tensor_parallel"]
    assert exact["kv_bytes_per_token"] == 2 * rounded["kv_bytes_per_token"]


def test_a_packed_folder_says_its_format(tmp_path):
    model = write_tiny_llama(tmp_path / "m.gguf", hidden=128, ffn=256)
    folder = write_tiny_packed(tmp_path / "m", model, "gptq", group=64, symmetric=True)
    value = run("inspect", str(folder), "--json").json
    assert value["format"] == "safetensors" and value["quantization"] == "GPTQ 4-bit g64 symmetric"
    shown = {entry["type"]: entry for entry in value["tensors"]}
    assert shown["GPTQ 4-bit g64 symmetric"]["count"] == 14 and set(shown) > {"F16"}
    held = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert sum(entry["bytes"] for entry in value["tensors"]) == held
    assert value["tensor_parallel"][0]["ranks"][0]["weight_bytes"] == held
    assert "bf16" in value["numerics"]
    assert "GPTQ 4-bit g64 symmetric" in run("inspect", str(folder)).out
