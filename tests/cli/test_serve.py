"""`serve`, `chat` and `bench --target` against each other, over real gRPC, in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cli.command import finish, refused, run, serving, spawn
from tests.weights.tiny import write_tiny_llama
from tramontane import Client, FinishReason, Reply, Unavailable

ENDLESS = 60_000  # tokens, and the least that they take is half a minute
WAITING = "tramontane: waiting for Ray: "


def unhurried(err: str) -> str:
    """Standard error without what is said while Ray takes more than a second over a place for the ranks."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(WAITING))


def test_the_ready_line_says_where_and_what(server):
    assert server["address"] == f"127.0.0.1:{server['port']}"
    assert server["model"] == "small"
    assert (server["tp"], server["units"], server["context_length"]) == (2, 3, 256)
    with Client(server["address"]) as client:
        model = client.model(timeout=60)
    assert (model.name, model.numerics, model.tp) == ("small", server["numerics"], 2)


def test_the_ready_line_says_where_the_metrics_are(server):
    text, until = "", time.monotonic() + 60
    # An engine has a second to say how it is, and counts as down while the machine stands still.
    while "tramontane_engine_up 1.0" not in text and time.monotonic() < until:
        with urllib.request.urlopen(server["metrics"], timeout=60) as answer:
            text = answer.read().decode()
    assert 'tramontane_server_info{model="small"' in text
    assert "tramontane_ready 1.0" in text and "tramontane_engine_up 1.0" in text
    assert server["metrics"].startswith("http://127.0.0.1:")


def test_a_served_reply_is_the_local_one(server, tiny):
    options = {"max_tokens": 20, "seed": 5, "temperature": 1.1, "ignore_eos": True, "logprobs": 2}
    with Client(server["address"]) as client:
        reply = client.generate("In an age", timeout=60, **options)
    arguments = ["--prompt", "In an age", "--max-tokens", "20", "--seed", "5", "--temperature", "1.1"]
    local = run(
        "generate", str(tiny), "--local", "--json", "--ignore-eos", "--logprobs", "2", *arguments
    ).json
    assert local["text"] == reply.text
    assert local["token_ids"] == list(reply.token_ids)
    assert [entry["logprob"] for entry in local["logprobs"]] == [entry.logprob for entry in reply.logprobs]


def test_chat_answers_one_message(server):
    options = ["--target", server["address"], "--message", "hello", "--max-tokens", "8"]
    plain = run("chat", *options)
    assert plain.status == 0, plain.err
    reply = run("chat", *options, "--json").json
    assert reply["text"] + "\n" == plain.out
    assert reply["usage"]["completion_tokens"] <= 8
    assert reply["finish_reason"] in ("length", "stop")
    assert reply["model"] == "small"


def test_chat_passes_its_options_on(server):
    options = ["--target", server["address"], "--message", "hello", "--max-tokens", "12"]
    options += ["--temperature", "1.3"]
    seeded = [run("chat", *options, "--seed", seed, "--json").json for seed in ("1", "1", "2")]
    assert [reply["seed"] for reply in seeded] == [1, 1, 2]
    assert seeded[0]["token_ids"] == seeded[1]["token_ids"] != seeded[2]["token_ids"]
    led = run("chat", *options, "--seed", "1", "--system", "sing", "--json").json
    assert led["usage"]["prompt_tokens"] > seeded[0]["usage"]["prompt_tokens"]


def test_a_conversation_keeps_its_history_until_reset(server):
    arguments = ["chat", "--target", server["address"], "--max-tokens", "8"]
    process = spawn(*arguments, stdin=-1)
    result = finish(process, input="hello\n\nhello\n/reset\nhello\n/exit\nnever\n")
    assert (result.status, result.err) == (0, "")
    alone = run(*arguments, "--message", "hello").out
    assert result.out.startswith(alone)
    assert result.out.endswith(alone)
    assert len(result.out) > 2 * len(alone)


def test_a_conversation_survives_what_the_server_refuses(server):
    process = spawn("chat", "--target", server["address"], "--max-tokens", "4", stdin=-1)
    result = finish(process, input="many words " * 300 + "\nhello\n")
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("error: ") and "context" in lines[0]
    assert len(lines) >= 2


def test_what_the_server_refuses_is_one_line(server):
    refused(
        run("chat", "--target", server["address"], "--message", "x", "--temperature", "-1"), "temperature"
    )


def test_bench_measures_a_server(server):
    size = ["--streams", "3", "--prompt-tokens", "8", "--max-tokens", "16", "--repeat", "2"]
    began = time.perf_counter()
    value = run("bench", "--target", server["address"], *size, "--json").json
    took = time.perf_counter() - began
    assert [entry["streams"] for entry in value["runs"]] == [1, 3]
    # A reader that is held up gets many tokens at once, so that no time need pass between them, and streams
    # may follow each other. What comes of tokens that do come in turn: test_bench.py.
    for entry in value["runs"]:
        assert 0 < entry["time_to_first_token_s"] < took and 0 <= entry["inter_token_s"] < took
        assert entry["decode_tokens_per_s"] >= 0
        assert 16 * entry["streams"] / took < entry["reply_tokens_per_s"]
    # Both of the same two replies, which end no sooner than they begin.
    alone = value["runs"][0]
    assert 0 < alone["reply_tokens_per_s"] / 16 <= alone["prefill_tokens_per_s"] / 8
    assert value["numerics"] == server["numerics"]
    table = run("bench", "--target", server["address"], *size)
    assert table.status == 0 and "time to first token" in table.out


def test_bench_refuses_what_does_not_fit(server):
    size = ["--prompt-tokens", "250", "--max-tokens", "16"]
    refused(run("bench", "--target", server["address"], *size), "prompt-tokens", "256")


def test_a_second_server_on_the_port(server, tiny):
    taken = str(server["port"])
    refused(run("serve", str(tiny), "--local", "--port", taken), "busy", taken)
    refused(run("serve", str(tiny), "--local", "--port", "0", "--metrics-port", taken), "busy", taken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_replies_finish(tiny, number):
    with serving(tiny, "--local") as (process, ready), Client(ready["address"]) as client:
        with client.stream_generate("x", max_tokens=200, ignore_eos=True, temperature=0.0) as stream:
            next(stream)
            process.send_signal(number)
            reply = stream.result()
        assert reply.finish_reason is FinishReason.LENGTH
        assert reply.usage.completion_tokens == 200
        ended = finish(process)
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.cluster
@pytest.mark.slow
def test_replies_outlive_their_ranks_while_some_replica_can_be_had(tmp_path):
    """With one replica lost, clients that never resume see nothing of it. With all lost, and none to be built
    again, streams end UNAVAILABLE and the server fails with one line."""
    model = tmp_path / "model.gguf"
    write_tiny_llama(model, hidden=96, heads=6, kv_heads=3, ffn=160, context=ENDLESS + 64)
    arguments = ["--tp", "2", "--replicas", "2", "--rebuilds", "1", "--kv-memory", "64MiB"]
    lost = (
        r"(rank \d is lost|the engine is gone): "  # whichever is heard of first: it ends soon after its rank
    )
    with serving(model, *arguments) as (process, ready), Client(ready["address"], resumes=0) as client:
        assert ready["replicas"] == 2
        pids = [int(line.rpartition("pid ")[2]) for line in ready["ranks"]]

        def ask(seed: int, tokens: int = 1500) -> Reply:
            options = {"max_tokens": tokens, "ignore_eos": True, "logprobs": 1, "temperature": 0.9}
            return client.generate("x", seed=seed, timeout=200, **options)

        def ask_together_and_kill(*ranks: int, tokens: int = 1500) -> list[Reply | Exception]:
            """Two replies, which go to a replica each."""
            with ThreadPoolExecutor() as pool:
                asked = [pool.submit(ask, seed, tokens) for seed in (1, 2)]
                while client.load(timeout=60).running < 2 and not any(each.done() for each in asked):
                    time.sleep(0.01)
                for rank in ranks:
                    os.kill(pids[rank], signal.SIGKILL)
                return [each.exception() or each.result() for each in asked]

        want = [ask(1), ask(2)]
        replies = ask_together_and_kill(1)
        for reply, same in zip(replies, want, strict=True):
            assert (reply.token_ids, reply.logprobs) == (same.token_ids, same.logprobs)
            assert (reply.resumed, reply.text, reply.usage) == (0, same.text, same.usage)
        log = []
        while not log or (log[-1] and "serves again" not in log[-1]):
            log.append(process.stderr.readline())
        log = [line for line in log if not line.startswith(WAITING)]
        assert re.match(rf"tramontane: replica 0 is lost: {lost}", log[0]), log
        assert log[1] == "tramontane: rebuilding replica 0 (try 1 of 1)\n"
        assert log[2].startswith("tramontane: replica 0 serves again ")
        pids[:2] = [int(pid) for pid in re.findall(r"pid (\d+)", log[2])]
        model.unlink()
        for failed in ask_together_and_kill(0, 3, tokens=ENDLESS):
            assert isinstance(failed, Unavailable), failed
        ended = finish(process)
    assert ended.status == 1
    *log, last = ended.err.splitlines()
    assert re.match(rf"error: {lost}", last), ended.err
    assert all(line.startswith("tramontane: ") for line in log)
    assert any("replica 1 was not rebuilt" in line and "not found" in line for line in log)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_demo_runs_from_pull_to_a_clean_stop(tiny):
    result = finish(spawn("demo", "--model", str(tiny), "--question", "hello", "--tp", "3"))
    assert (result.status, unhurried(result.err)) == (0, "")
    for fragment in ("ready in", "rank 0", "rank 1", "rank 2", "time to first token", "Stopped cleanly."):
        assert fragment in result.out
    assert result.out.splitlines()[-1].startswith("3 rank actors: ")


@pytest.mark.cluster
@pytest.mark.slow
def test_replies_through_ray_are_the_local_ones(tiny):
    options = ["--prompt", "In an age", "--max-tokens", "20", "--temperature", "1", "--seed", "3"]
    options += ["--logprobs", "2"]
    local = run("generate", str(tiny), "--json", "--local", *options).json
    for tp in ("1", "3"):
        result = finish(spawn("generate", str(tiny), "--json", "--tp", tp, *options))
        assert unhurried(result.err) == ""
        assert result.json == local
