"""`bench` on an engine of its own, and its arithmetic."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from runtime.commands import bench
from runtime.commands.bench import Trace, Workload, _decode_rate, _reply_rate, _summary
from tests.cli.command import refused, run


def test_a_local_engine_is_measured(tiny):
    size = ["--streams", "2", "--prompt-tokens", "8", "--max-tokens", "8", "--repeat", "1"]
    value = run("bench", str(tiny), "--local", "--tp", "3", *size, "--json").json
    assert (value["engine"], value["tp"], value["model"]) == ("local", 3, "tiny")
    assert [entry["streams"] for entry in value["runs"]] == [1, 2]


@pytest.mark.parametrize(
    ("option", "value"), [("streams", "0"), ("prompt-tokens", "0"), ("max-tokens", "1"), ("repeat", "0")]
)
def test_sizes_that_cannot_be(tiny, option, value):
    refused(run("bench", str(tiny), "--local", f"--{option}", value), option, value)


def test_rates_of_one_stream():
    run = [Trace(asked=10.0, arrivals=[10.5, 10.6, 10.7, 11.5])]
    assert _decode_rate(run) == pytest.approx(3 / 1.0)  # three tokens after the first
    assert _reply_rate(run) == pytest.approx(4 / 1.5)
    summary = _summary([run], prompt_tokens=100)
    assert summary["time_to_first_token_s"] == pytest.approx(0.5)
    assert summary["inter_token_s"] == pytest.approx(0.1)
    assert summary["prefill_tokens_per_s"] == pytest.approx(200)


def test_streams_together_decode_between_the_last_first_token_and_the_first_last_one():
    run = [Trace(0.0, [1.0, 2.0, 3.0, 4.0]), Trace(0.0, [2.0, 3.0, 4.0, 5.0])]
    assert _decode_rate(run) == pytest.approx(4 / 2.0)  # both have tokens at 3 and at 4
    assert _reply_rate(run) == pytest.approx(8 / 5.0)
    assert "prefill_tokens_per_s" not in _summary([run], prompt_tokens=1)


def test_what_is_measured_is_when_tokens_come(monkeypatch):
    """By a clock that goes on while tokens are waited for, and else stands still."""
    now = 100.0
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now))

    async def ask(prompt: list[int], count: int):
        nonlocal now
        assert len(prompt) == 8 and count == 5
        for seconds, tokens in ((0.5, 1), (0.1, 1), (0.3, 2), (0.1, 1)):
            await asyncio.sleep(0)  # another stream's turn
            now += seconds
            yield tokens

    model = SimpleNamespace(context_length=64, vocab_size=9, model="m", tp=1, numerics="n")
    one, two = asyncio.run(bench._bench(ask, Workload(2, 8, 5, 3), model))["runs"]
    assert one == pytest.approx(
        {
            "streams": 1, "time_to_first_token_s": 0.5, "inter_token_s": 0.1, "decode_tokens_per_s": 4 / 0.5,
            "reply_tokens_per_s": 5 / 1.0, "prefill_tokens_per_s": 8 / 0.5,
        }
    )  # fmt: skip
    # Each waits for the other's tokens too: they come at 0.5 and 1, 1.1 and 1.2, 1.5 and 1.8, 1.9 and 2.
    assert two == pytest.approx(
        {
            "streams": 2, "time_to_first_token_s": 0.75, "inter_token_s": 0.3,
            "decode_tokens_per_s": 7 / 0.9, "reply_tokens_per_s": 10 / 2.0,
        }
    )  # fmt: skip


def test_streams_that_never_decode_together_have_no_rate():
    assert _decode_rate([Trace(0.0, [1.0, 2.0]), Trace(0.0, [3.0, 4.0])]) == 0.0
