"""The benchmarks run, on a tiny model and at their smallest, and say what a figure has to say of itself."""

from __future__ import annotations

import asyncio
import json
import runpy
import sys

import pytest

from bench.speculation import copied, guess
from kernels.native import machine
from tests.replies import ask, greedy
from tests.rule.engines import engine
from tests.support import REPOSITORY
from tests.weights.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of three units in types that are served as codes, as bf16 and by rows, with heads that
    torch's attention serves."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    kinds = {"*": "Q4_1", "attn_v": "BF16", "ffn_down": "BF16", "token_embd": "Q8_0", "output": "Q8_0"}
    return write_tiny_llama(path, types=kinds, hidden=96, heads=6, kv_heads=3, ffn=192, context=1024)


def run(monkeypatch, capsys, name: str, *arguments: str) -> dict:
    """The JSON of `python bench/NAME.py ARGUMENTS`."""
    script = str(REPOSITORY / "bench" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(script, run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert {"command", "date", "machine", "versions"} <= set(result)
    return result


def test_the_rule(monkeypatch, capsys, tiny):
    result = run(monkeypatch, capsys, "rule", str(tiny), "--quick")
    assert set(result["logprobs_apart"]) >= {"all", "units", "single tokens", "runs", "dense", "noise"}
    for workload in result["workloads"].values():
        assert workload["ruled"]["cost"] == 0
        assert all(of["best_tokens_per_s"] > 0 for of in workload.values())
    # Another order rounds differently; the sampler has no part in a logprob.
    assert 0 < result["logprobs_apart"]["units"]["max"] < 0.1
    assert result["logprobs_apart"]["noise"]["max"] == 0


def test_the_prefix_cache(monkeypatch, capsys, tiny):
    (ways,) = run(monkeypatch, capsys, "prefix", str(tiny), "--quick")["prompts"].values()
    assert [ways[way]["computed_tokens"] for way in ("cold", "warm", "other ending")] == [200, 8, 72]
    assert ways["cold"]["of_cold"] == 1


def test_speculation(monkeypatch, capsys, tiny):
    result = run(monkeypatch, capsys, "speculation", str(tiny), "--quick")
    assert len(result["cases"]) == 8
    assert all(case["gain"] > 0 and case["reply_tokens"] > 0 for case in result["cases"].values())


def test_an_engine_guesses_as_it_is_told(tiny):
    with engine(tiny) as made:
        drafted = []
        for name, most in (("none", 0), ("some", 4), ("none again", 0)):
            guess(made, most)
            _, end = asyncio.run(ask(made.client, greedy(name, (1, 2, 3), 40, logit_bias=((7, 100.0),))))
            drafted.append(end.drafted_tokens)
    assert drafted[1] > 0 and drafted[::2] == [0, 0]


@pytest.mark.cluster
@pytest.mark.slow
def test_replicas(monkeypatch, capsys, local_ray, tiny):
    result = run(monkeypatch, capsys, "replicas", str(tiny), "--quick")
    assert list(result["replicas"]) == ["1", "2"] and result["throughput_ratio"] > 0
    assert all(of["tokens_per_s"] > 0 for of in result["replicas"].values())


def test_copied_tokens_are_those_in_runs_of_eight():
    prompt = list(range(100))
    assert copied(prompt, [7, *range(20, 30), 7, 7, *range(50, 57), 7]) == 10
    assert copied(prompt[:5], prompt[:5]) == 0


@pytest.mark.skipif(not machine.supported(), reason="no AMX, or no compiler for it")
def test_attention(monkeypatch, capsys):
    result = run(monkeypatch, capsys, "attention", "--quick")
    assert all(of["gain"] > 0 and of["apart"] < 2**-5 for of in result["work"].values())


def test_the_scheduler(monkeypatch, capsys):
    result = run(monkeypatch, capsys, "scheduler", "--quick")
    assert result["replies"]["no guesses"]["none_waiting"]["chunks"] == 8
