"""`plan`: bytes are those that shards take, floors those worked out by hand, refusals say what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.capacity import GPU_SPARE
from runtime.commands.plan_layouts import make_layouts, parse_machines
from runtime.config import ModelConfig
from runtime.footprint import rank_footprint
from runtime.gpus import GPUS
from runtime.model.header import open_model
from runtime.model.layout import shard_slices
from runtime.model.units import rank_units
from runtime.roofline import Rank, Shape, Stage, decode, prefill
from runtime.weights.loader import load
from tests.cli.command import environment, refused, run
from tests.gpu.folder import write_folder
from tests.weights.sparse import write_sparse_70b
from tests.weights.tiny import write_tiny_llama
from tests.weights.tiny_packed import write_tiny_packed


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_sparse_70b(tmp_path_factory.mktemp("large") / "hole.gguf")


def plan(model, *options: str) -> dict:
    return run("plan", str(model), "--json", *options).json


# ---- bytes ----------------------------------------------------------------------------------------------

MIXES = {
    "k-quants": (
        {"*": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q5_K", "token_embd": "Q2_K", "output": "Q3_K"},
        512,
    ),
    "paired": ({"*": "Q2_K", "ffn_down": "Q3_K", "output": "Q6_K", "token_embd": "Q4_K"}, 768),
    "old": ({"*": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q5_1", "token_embd": "Q4_1", "output": "Q5_0"}, 416),
    "dense": ({"*": "F32", "ffn_down": "F16"}, 160),
}


def held_by_a_real_shard(opened, run, layers=None) -> tuple[int, int]:
    """Bytes of weights, and of the embedding among them."""
    from runtime.model.gpu.shard import build_gpu_shard

    slices = shard_slices(opened.spec, opened.units, run, layers)
    loaded = load(opened.checkpoint, slices, quantize=opened.quantize)
    shard = build_gpu_shard(opened.spec, opened.units, run, iter(loaded), device="cpu", layers=layers)
    vectors = 0 if shard.output_norm is None else shard.output_norm.nbytes
    vectors += sum(layer.attention_norm.nbytes + layer.ffn_norm.nbytes for layer in shard.layers)
    return shard.nbytes + vectors, 0 if shard.embedding is None else shard.embedding.nbytes


def check_all_degrees(opened) -> None:
    for tp in range(1, len(opened.units) + 1):
        for run_ in rank_units(len(opened.units), tp):
            found = rank_footprint(opened, run_)
            held, embedding = held_by_a_real_shard(opened, run_)
            assert (found.held, found.held - found.streamed) == (held, embedding), (tp, run_)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_bytes_are_those_of_real_shards(tmp_path, mix, tied):
    types, ffn = MIXES[mix]
    shape = {"hidden": 256, "heads": 8, "kv_heads": 4, "layers": 1, "ffn": ffn, "vocab": 301}
    path = write_tiny_llama(tmp_path / "m.gguf", types=types, tied=tied, **shape)
    check_all_degrees(open_model(ModelConfig(str(path)), "cuda"))


def test_heads_that_cut_a_super_group(tmp_path):
    path = write_tiny_llama(
        tmp_path / "m.gguf", types={"*": "Q4_K", "attn_output": "Q6_K"}, hidden=256, heads=4, kv_heads=2,
        head_dim=64, ffn=256, layers=1,
    )  # fmt: skip
    check_all_degrees(open_model(ModelConfig(str(path)), "cuda"))


@pytest.mark.parametrize(("method", "symmetric"), [("gptq", False), ("gptq", True), ("awq", False)])
def test_packed_folders(tmp_path, method, symmetric):
    model = write_tiny_llama(tmp_path / "m.gguf", hidden=128, ffn=256)
    folder = write_tiny_packed(tmp_path / "m", model, method, group=64, symmetric=symmetric)
    check_all_degrees(open_model(ModelConfig(str(folder)), "cuda"))


def test_quantised_on_load(tmp_path):
    folder = write_folder(
        tmp_path / "m", hidden=128, layers=1, heads=4, kv_heads=2, head_dim=64, ffn=160, vocab=260
    )
    check_all_degrees(open_model(ModelConfig(str(folder), quantize="int4"), "cuda"))


# ---- the flagship's shape -------------------------------------------------------------------------------


def test_the_flagships_bytes(large):
    """41.27 GB a step in the file's form, 42.19 GB in planar form, 327,680 bytes of KV a token: worked out by
    hand from the shape and the types' bits. Scales of the down projection, in words for a unit's 3584
    columns, fill whole blocks of four: 31 MB more."""
    assert large.stat().st_blocks * 512 < 1 << 20  # the file is a hole
    value = plan(large, "--gpus", "8xH200", "--context", "8192", "--users", "32")
    assert value["kv_bytes_per_token"] == 327_680
    scales = 8192 * 8 * 40 * (16 - 14 + 8 - 7) * 4
    assert round((value["streamed_bytes_per_step"] - scales) / 1e9, 2) == 42.19
    inspected = run("inspect", str(large), "--json").json["tensor_parallel"]
    for layout, split in zip(value["layouts"], inspected, strict=True):
        assert [r["file_bytes"] for r in layout["ranks"]] == [r["weight_bytes"] for r in split["ranks"]]
        assert sum(r["gpu_bytes"] for r in layout["ranks"]) >= value["streamed_bytes_per_step"]
    whole = value["layouts"][0]["ranks"][0]["file_bytes"]
    embedding = 32000 * 8192 // 256 * 144
    assert round((whole - embedding) / 1e9, 2) == 41.27


FLAGSHIP = Shape(hidden=8192, head_dim=128, vocab=32000)
IN_FILE_FORM = Rank(streamed=41_270_000_000, weights=68_700_000_000, kv_bytes=327_680, heads=64)
WHOLE = [Stage(80, (IN_FILE_FORM,))]


@pytest.mark.parametrize(
    ("context", "users", "milliseconds"),
    [(1024, 1, 9.7), (1024, 8, 10.2), (1024, 32, 12.1), (1024, 64, 16.1), (8192, 1, 10.2), (8192, 8, 14.6),
     (8192, 32, 29.6)],
)  # fmt: skip
def test_floors_of_a_step(context, users, milliseconds):
    """Worked out by hand for one H200 at 4.3 TB/s and 790 TFLOP/s."""
    step = decode(GPUS["H200"], FLAGSHIP, WHOLE, users, context)
    assert 1000 * step.seconds == pytest.approx(milliseconds, abs=0.06)
    assert step.bound == ("matrix" if users == 64 else "kv" if (context, users) == (8192, 32) else "weights")


@pytest.mark.parametrize(("context", "seconds"), [(2048, 0.36), (8192, 1.53), (32768, 7.46)])
def test_floors_of_prefill(context, seconds):
    assert prefill(GPUS["H200"], FLAGSHIP, WHOLE, context) == pytest.approx(seconds, rel=0.02)


def test_ranks_share_the_work_and_wait_for_each_other(large):
    value = plan(large, "--gpus", "8xH200", "--context", "1024", "--users", "8")
    one, two, four = (value["layouts"][i]["predicted"]["one_stream"] for i in (0, 1, 3))
    assert one["exchange_s"] == 0 < two["exchange_s"]
    assert value["layouts"][1]["predicted"]["exchanges_per_token"] == 162
    assert two["exchange_s"] >= 162 * value["constants"]["one exchange"]["value"]
    for name in ("weights_s", "kv_s", "matrix_s"):
        assert one[name] == pytest.approx(2 * two[name], rel=0.01) == pytest.approx(4 * four[name], rel=0.02)
    for entry in (one, two, four):
        terms = max(entry["weights_s"], entry["matrix_s"]) + entry["kv_s"] + entry["exchange_s"]
        assert entry["step_s"] == pytest.approx(terms)
        assert entry["tokens_per_s_stream"] == pytest.approx(1 / terms)


def test_room_for_kv(large):
    """By hand: what the fullest rank leaves, in blocks of 64 positions of the largest share."""
    opened = open_model(ModelConfig(str(large)), "cuda")
    machines = parse_machines("8xH100", 2)
    for layout in make_layouts(opened, machines, 4096, 100):
        if layout.pp > 1:
            continue
        units = max(stop - start for start, stop in rank_units(8, layout.tp))
        left = 80e9 - 1e9 - GPU_SPARE - max(layout.gpu_bytes)
        assert layout.kv_blocks == left // (64 * 327_680 * units // 8)
        assert layout.sequences == layout.kv_blocks // 64
        assert layout.replicas == 2 * (8 // layout.tp)
        assert layout.users == -(-100 // layout.replicas)
        assert layout.tokens_per_second == pytest.approx(100 / layout.full.seconds)


def test_fp8_keys_and_values_take_half(large):
    """A byte an element and 4 a token and head: 132 where fp16 has 256."""
    plain, small = (
        run("plan", str(large), "--gpus", "2xH200", "--users", "16", "--json", *more).json
        for more in ((), ("--kv-dtype", "fp8"))
    )
    assert small["kv_bytes_per_token"] * 256 == plain["kv_bytes_per_token"] * 132
    assert small["layouts"][-1]["kv"]["tokens"] > 1.9 * plain["layouts"][-1]["kv"]["tokens"]
    assert "--kv-dtype fp8" in small["command"]
    assert "--kv-dtype" not in plain["command"]


# ---- what is said ---------------------------------------------------------------------------------------


def test_what_fits_is_told_apart(large):
    value = plan(large, "--gpus", "8xH200", "--context", "32768", "--users", "64")
    assert value["context"] == 32764 and "32764" in value["notes"][0]  # the model takes four tokens fewer
    for layout in value["layouts"]:
        assert layout["fits"] == (layout["kv"]["sequences"] >= layout["users_per_replica"])
    assert {layout["fits"] for layout in value["layouts"]} == {True, False}
    best = value["layouts"][value["best"]["tp"] - 1]
    assert best["fits"] and f"--tp {best['tp']} " in value["command"]
    totals = [x["predicted"]["all_users"]["tokens_per_s_all"] for x in value["layouts"] if x["fits"]]
    assert best["predicted"]["all_users"]["tokens_per_s_all"] == max(totals)


def test_every_constant_says_where_it_is_from(large):
    value = plan(large, "--gpus", "8xH200", "--users", "1")
    sources = {name: constant["source"] for name, constant in value["constants"].items()}
    assert sources["bandwidth"].startswith("measured") and sources["memory"] == "datasheet"
    for gpu in GPUS.values():
        for constant in (gpu.memory, gpu.bandwidth, gpu.flops, gpu.link, gpu.exchange):
            assert constant.source.startswith(("datasheet", "measured", "assumed")) and constant.value > 0


def test_people_get_tables(large):
    result = run(
        "plan", str(large), "--gpus", "8xh200", "--nodes", "2", "--users", "300", "--context", "4096"
    )
    assert result.status == 0, result.err
    for words in ("2 nodes of 8xH200", "What fits", "not measured", "assumed", "datasheet", "--max-num-seqs"):
        assert words in result.out, words
    assert "alone: " in result.out and "tok/s" in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--gpus", "8xL40S", "--users", "64"],
            ["64 users of 32764 tokens", "--users ", "--context ", "--tp 8"],
        ),
        (["--gpus", "1xH100", "--users", "1000000"], ["do not fit", "--users ", "larger GPUs"]),
        (["--gpus", "1xA100-40"], ["the weights do not fit", "42.4 GB", "larger GPUs"]),
        (["--gpus", "8xH900"], ["gpus", "H200", "A100-40"]),
        (["--gpus", "0xH200"], ["gpus"]),
        (["--gpus", "eight"], ["gpus"]),
        (["--gpus", "8xH200", "--nodes", "0"], ["nodes"]),
        (["--gpus", "8xH200", "--users", "0"], ["users"]),
        (["--gpus", "8xH200", "--context", "-1"], ["context"]),
        (["--gpus", "8xH200", "--quantize", "int4"], ["quantize"]),
    ],
)
def test_what_does_not_fit_is_one_line(large, options, words):
    refused(run("plan", str(large), *options), *words)


def test_the_way_out_is_one(large):
    """What a refusal offers, fits."""
    said = run("plan", str(large), "--gpus", "8xL40S").err
    users = said.split("--users ")[1].split(",")[0]
    context = said.split("--context ")[1].split(",")[0]
    assert plan(large, "--gpus", "8xL40S", "--users", users)["users"] == int(users)
    assert plan(large, "--gpus", "8xL40S", "--context", context)["context"] == int(context)
    refused(run("plan", str(large), "--gpus", "8xL40S", "--users", str(int(users) + 1)), "do not fit")
    refused(run("plan", str(large), "--gpus", "8xL40S", "--context", str(int(context) + 64)), "do not fit")


def test_a_plan_needs_no_torch(large):
    code = (
        f"import sys; from runtime.cli import main; status = main(['plan', {str(large)!r}, '--gpus', 'H200',"
        " '--users', '1']); sys.exit(status or ' '.join({'torch', 'ray', 'grpc'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
