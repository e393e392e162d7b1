"""`compare`: what two models say of the same tokens."""

from __future__ import annotations

import itertools
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.commands.divergence import divergence, first_difference, joined, kl_curve
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


def test_the_table(tiny, quantised, prompts):
    result = run("compare", str(tiny), str(quantised), "--prompts", str(prompts), "--max-tokens", "4")
    assert result.status == 0
    for words in ("same most likely token", "KL(A || B)", "perplexity", "greedy replies", "Once upon"):
        assert words in result.out


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
