"""`serve`, `chat` and `bench --target` against each other, over real gRPC, in processes of their own."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request

import pytest

from tests.cli.command import finish, refused, run, serving, spawn
from tramontane import Client, FinishReason, Unavailable


def test_the_ready_line_says_where_and_what(server):
    assert server["address"] == f"127.0.0.1:{server['port']}"
    assert server["model"] == "small"
    assert (server["tp"], server["units"], server["context_length"]) == (2, 3, 256)
    with Client(server["address"]) as client:
        model = client.model(timeout=10)
    assert (model.name, model.numerics, model.tp) == ("small", server["numerics"], 2)


def test_the_ready_line_says_where_the_metrics_are(server):
    with urllib.request.urlopen(server["metrics"], timeout=10) as answer:
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
    value = run("bench", "--target", server["address"], *size, "--json").json
    assert [entry["streams"] for entry in value["runs"]] == [1, 3]
    for entry in value["runs"]:
        assert 0 < entry["inter_token_s"] < entry["time_to_first_token_s"] * 100
        assert entry["decode_tokens_per_s"] > 0 and entry["reply_tokens_per_s"] > 0
    assert value["runs"][0]["prefill_tokens_per_s"] > 0
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
def test_when_a_rank_dies_streams_end_unavailable_and_the_server_fails_with_one_line(tiny):
    with serving(tiny, "--tp", "2") as (process, ready), Client(ready["address"]) as client:
        pid = int(ready["ranks"][1].rpartition("pid ")[2])
        failed: list[Exception] = []

        def read() -> None:
            try:
                while True:
                    client.generate("x", max_tokens=250, ignore_eos=True, timeout=60)
            except Exception as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        reader.join(60)
        ended = finish(process)
    assert failed and isinstance(failed[0], Unavailable)
    assert ended.status == 1
    lines = ended.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "rank" in lines[0], ended.err


@pytest.mark.cluster
@pytest.mark.slow
def test_the_demo_runs_from_pull_to_a_clean_stop(tiny):
    result = finish(spawn("demo", "--model", str(tiny), "--question", "hello", "--tp", "3"))
    assert (result.status, result.err) == (0, "")
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
        assert result.err == ""
        assert result.json == local
