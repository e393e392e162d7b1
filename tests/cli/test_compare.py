"""`compare`: what two models say of the same tokens."""

from __future__ import annotations

import errno
import itertools
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.commands.compare_plot import plot_file
from runtime.commands.compare_prompts import read_prompts
from runtime.commands.divergence import divergence, first_difference, joined, kl_curve
from runtime.errors import Unavailable
from tests.cli.command import refused, run
from tests.support import fixture_path
from tests.weights.tiny import write_tiny_llama

SHAPE = {"hidden": 96, "heads": 6, "kv_heads": 3, "ffn": 160, "context": 256}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The model of `tiny`, its weights rounded to eight bits."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "q8.gguf", types="Q8_0", **SHAPE)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Once upon a time\n\nIn an age of iron, é\n", encoding="utf-8")
    return path


def compare(a, b, prompts, *options: str) -> dict:
    return run("compare", str(a), str(b), "--prompts", str(prompts), "--json", *options).json


def test_a_model_and_itself(tiny, prompts):
    value = compare(tiny, tiny, prompts, "--max-tokens", "8")
    assert (value["top1_agreement"], value["kl_mean"], value["kl_max"]) == (1.0, 0.0, 0.0)
    assert value["perplexity_a"] == value["perplexity_b"]
    assert value["replies"]["identical"] == value["replies"]["of"] == 2
    assert [entry["first_divergence"] for entry in value["prompts"]] == [None, None]
    assert [entry["prompt"] for entry in value["prompts"]] == ["Once upon a time", "In an age of iron, é"]


def test_two_quantisations(tiny, quantised, prompts, tmp_path):
    plot = tmp_path / "kl.svg"
    value = compare(tiny, quantised, prompts, "--max-tokens", "40", "--plot", str(plot))
    assert 0 < value["kl_median"] <= value["kl_p99"] <= value["kl_max"] < 1
    assert 0.2 < value["top1_agreement"] <= 1
    assert value["perplexity_a"] != value["perplexity_b"]
    assert value["a"]["numerics"] != value["b"]["numerics"]
    assert value["tokens"] == sum(entry["tokens"] for entry in value["prompts"])
    whole = math.fsum(entry["kl_mean"] * entry["tokens"] for entry in value["prompts"]) / value["tokens"]
    assert math.isclose(whole, value["kl_mean"])
    assert ElementTree.fromstring(plot.read_text(encoding="utf-8")).tag.endswith("svg")
    # The replies are those of generate, which part where it says.
    for entry in value["prompts"]:
        ask = ["--prompt", entry["prompt"], "--max-tokens", "40", "--local", "--json"]
        one, other = (run("generate", str(model), *ask).json["token_ids"] for model in (tiny, quantised))
        assert first_difference(one, other) == entry["first_divergence"]
        assert [len(one), len(other)] == entry["reply_tokens"]


def test_ranks_change_nothing(tiny, quantised, prompts):
    once = compare(tiny, quantised, prompts, "--max-tokens", "0")
    assert once == compare(tiny, quantised, prompts, "--max-tokens", "0", "--tp", "3")
    assert once["replies"]["max_tokens"] == 0 and once["prompts"][0]["reply_tokens"] == [0, 0]


def test_replies_that_were_not_made_are_not_the_same(tiny, prompts):
    replies = compare(tiny, tiny, prompts, "--max-tokens", "0")["replies"]
    assert (replies["identical"], replies["of"]) == (None, 0)
    table = run("compare", str(tiny), str(tiny), "--prompts", str(prompts), "--max-tokens", "0").out
    assert "none: --max-tokens 0" in table and "part at" not in table


def test_a_prompt_that_fills_the_context_has_no_reply(tiny, prompts):
    tokens = [entry["tokens"] + 1 for entry in compare(tiny, tiny, prompts, "--max-tokens", "0")["prompts"]]
    options = ["--max-tokens", "4", "--max-model-len", str(max(tokens))]
    value = compare(tiny, tiny, prompts, *options)
    assert (value["replies"]["identical"], value["replies"]["of"]) == (1, 1)
    assert [entry["reply_tokens"] == [0, 0] for entry in value["prompts"]] == [
        n == max(tokens) for n in tokens
    ]
    table = run("compare", str(tiny), str(tiny), "--prompts", str(prompts), *options).out
    assert "1 of 1 the same over 4 tokens; no room for 1 more" in table


def test_the_shorter_context_ends_both_replies(tiny, prompts, tmp_path):
    short = write_tiny_llama(tmp_path / "short.gguf", **{**SHAPE, "context": 64})
    value = compare(tiny, short, prompts, "--max-tokens", "100")
    assert (value["replies"]["identical"], value["replies"]["of"]) == (2, 2)
    for entry in value["prompts"]:
        assert entry["reply_tokens"] == [63 - entry["tokens"]] * 2


def test_a_plot_that_cannot_be_written_is_refused_before_the_work(tiny, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.commands.compare.open_front", None)
    for path in (tmp_path, "/proc/kl.svg"):
        asked = ["compare", str(tiny), str(tiny), "--prompts", str(prompts), "--plot", str(path)]
        refused(run(*asked), "plot: ", str(path), "cannot be written")


def test_a_run_that_fails_leaves_the_plot_as_it_was(tiny, prompts, tmp_path, monkeypatch):
    def fails(*_):
        raise Unavailable("the engine failed")

    monkeypatch.setattr("runtime.commands.compare._run", fails)
    old, new = tmp_path / "old.svg", tmp_path / "new.svg"
    old.write_text("what was there")
    for path in (old, new):
        asked = ["compare", str(tiny), str(tiny), "--prompts", str(prompts), "--plot", str(path)]
        refused(run(*asked), "the engine failed")
    assert old.read_text() == "what was there" and not new.exists()


def test_a_plot_replaces_all_that_was_there(tmp_path):
    path = tmp_path / "kl.svg"
    path.write_text("x" * 100)
    with plot_file(path) as draw:
        assert path.read_text() == "x" * 100
        draw("é")
    assert path.read_text(encoding="utf-8") == "é"


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_plot_that_fails_after_all_takes_nothing_along(tiny, prompts, options):
    asked = ["compare", str(tiny), str(tiny), "--prompts", str(prompts), "--max-tokens", "2"]
    result = run(*asked, "--plot", "/dev/full", *options)
    assert result.status == 1 and result.err.startswith("error: the plot /dev/full cannot be written: ")
    assert result.out == run(*asked, *options).out != ""


def test_numbers_that_cannot_be_printed_do_not_take_the_plot_along(tiny, prompts, tmp_path, monkeypatch):
    def full(value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("runtime.commands.compare.write_json", full)
    plot = tmp_path / "kl.svg"
    asked = ["compare", str(tiny), str(tiny), "--prompts", str(prompts), "--max-tokens", "0", "--json"]
    refused(run(*asked, "--plot", str(plot)), "No space left")
    assert ElementTree.fromstring(plot.read_text(encoding="utf-8")).tag.endswith("svg")


ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj"


def test_lines_end_with_newlines_alone(tmp_path):
    plain, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes(f"{ODD}\r\n \n\r\n{ODD}\nlast".encode())
    assert read_prompts(plain) == [ODD, ODD, "last"]
    objects.write_bytes('"a\u2028b\x85c"\r\n\n{"text": "d\u2029e"}\n'.encode())
    assert read_prompts(objects) == ["a\u2028b\x85c", "d\u2029e"]


def test_prompts_as_json_lines(tiny, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"two\\nlines"\n{"text": "object", "id": 3}\n', encoding="utf-8")
    value = compare(tiny, tiny, path, "--max-tokens", "0")
    assert [entry["prompt"] for entry in value["prompts"]] == ["two\nlines", "object"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", "holds none"),
        ("p.jsonl", '"a"\n{"prompt": "a"}', "line 2"),
        ("p.jsonl", "{", "line 1"),
        ("p.txt", b"\xff\xfe", "cannot be read"),
        ("p.txt", "a" * 3000, "prompt 1 has"),
    ],
)
def test_bad_prompts(tiny, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(run("compare", str(tiny), str(tiny), "--prompts", str(path)), "prompts", words)


def test_what_else_is_refused(tiny, prompts, tmp_path):
    asked = ["compare", str(tiny), str(tiny), "--prompts", str(prompts)]
    refused(run(*asked[:-1], str(tmp_path / "none")), "not found")
    refused(run(*asked, "--max-tokens", "-1"), "max-tokens")
    refused(run(*asked, "--plot", str(tmp_path / "no" / "kl.svg")), "folder")
    other = write_tiny_llama(tmp_path / "other.gguf", vocab=389, **SHAPE)
    refused(
        run("compare", str(tiny), str(other), "--prompts", str(prompts)),
        "vocabulary", "A has 384 tokens and B 389",
    )  # fmt: skip


def test_another_vocabulary_says_which_ids_differ_first(tiny, prompts):
    other = fixture_path("stories260K/stories260K.f32.gguf")
    refused(
        run("compare", str(tiny), str(other), "--prompts", str(prompts)), "ids differ", "in A and", "in B"
    )


def test_real_quantisations(tmp_path):
    """The fewer bits, the further from eight of them."""
    path = tmp_path / "prompts.txt"
    path.write_text("Once upon a time there was a little girl named Lily. She loved to play outside.\n")
    name = "stories260K/stories260K-pad256.{}.gguf"
    q8, q5, q2 = (fixture_path(name.format(kind)) for kind in ("Q8_0", "Q5_K_M", "Q2_K"))
    near, far = (compare(q8, other, path, "--max-tokens", "16") for other in (q5, q2))
    assert near["kl_mean"] < 0.1 < far["kl_mean"]
    assert near["top1_agreement"] > far["top1_agreement"]
    assert near["perplexity_a"] == far["perplexity_a"] < far["perplexity_b"]


rows = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), min_size=1, max_size=4)


@settings(deadline=None)
@given(rows, st.data())
def test_the_numbers_are_those_of_the_textbook(a, data):
    b = [data.draw(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5)) for _ in a]
    tokens = [data.draw(st.integers(0, 4)) for _ in a]
    found = divergence(np.array(a, np.float32), np.array(b, np.float32), tokens)
    for i, token in enumerate(tokens):
        p, q = ([math.exp(x) / math.fsum(math.exp(y) for y in row) for x in row] for row in (a[i], b[i]))
        kl = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)
        assert math.isclose(found.kl[i], max(kl, 0.0), rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(found.logprob_a[i], math.log(p[token]), rel_tol=1e-9, abs_tol=1e-12)
        assert found.agree[i] == (a[i].index(max(a[i])) == b[i].index(max(b[i])))


def test_excluded_tokens_cost_what_the_definition_says():
    inf = float("inf")
    a = np.array([[0.0, -inf, 1.0], [0.0, 1.0, 2.0]], np.float32)
    b = np.array([[0.0, 3.0, 1.0], [0.0, 1.0, -inf]], np.float32)
    found = divergence(a, b, [0, 0])
    assert 0 < found.kl[0] < 10 and found.kl[1] == inf


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([], []) is None
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([9, 2], [1, 2]) == 0


def test_parts_are_put_together_in_order():
    made = [
        divergence(np.eye(3, dtype=np.float32)[:n], np.eye(3, dtype=np.float32)[:n], [0] * n) for n in (1, 2)
    ]
    whole = joined(made)
    assert len(whole.kl) == 3 and whole.logprob_a[0] == whole.logprob_a[1] != whole.logprob_a[2]
    assert whole.part(1, 3).summary()["tokens"] == 2
    json.dumps(whole.summary(), allow_nan=False)


@pytest.mark.parametrize("kl", [[0.0], [0.0, 1e-3, 2.0], np.linspace(0, 5, 2000)])
def test_a_curve_is_drawn_within_its_frame(kl):
    svg = ElementTree.fromstring(kl_curve(np.array(kl), "A < B & C"))
    (line,) = [e for e in svg if e.tag.endswith("polyline")]
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert len(points) == min(len(kl), 500)
    assert all(0 < x < 640 and 0 < y < 400 for x, y in points)
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in itertools.pairwise(points))
