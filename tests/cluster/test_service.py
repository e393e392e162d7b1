"""Servers that live on Ray by themselves: left running, found by name, outliving their ranks, stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import trustme

from runtime.cluster.service import services
from tests.cli.command import refused, run
from tests.cluster.test_cluster import actors, none_left
from tramontane import Client, FinishReason, Unauthenticated

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ON = ("--ray-address", "auto")


@pytest.fixture(scope="module")
def model(tiny) -> str:
    return str(tiny(context=1024, heads=4, kv_heads=2))


def groups() -> set[str]:
    """Placement groups that have not been removed."""
    from ray.util import placement_group_table

    return {name for name, entry in placement_group_table().items() if entry["state"] != "REMOVED"}


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_from_its_start_to_its_stop(local_ray, model, tmp_path, monkeypatch):
    """With TLS and a token, whose files are named as this process sees them."""
    monkeypatch.chdir(tmp_path)
    authority = trustme.CA()
    authority.cert_pem.write_to_path("ca.crt")
    pair = authority.issue_cert("127.0.0.1")
    pair.cert_chain_pems[0].write_to_path("tls.crt")
    pair.private_key_pem.write_to_path("tls.key")
    Path("tokens").write_text("0123456789abcdef\n")
    assert none_left()
    before = groups()
    arguments = [model, "--tp", "2", "--port", "0", "--detach", "--name", "mine"]
    arguments += ["--tls-cert", "tls.crt", "--tls-key", "tls.key", "--auth-token-file", "tokens"]
    ready = run("serve", *arguments, "--json", *ON).json
    assert (ready["model"], ready["tp"], ready["replicas"], len(ready["ranks"])) == ("mine", 2, 1, 2)
    refused(run("serve", *arguments, *ON), "name: ", "'mine' runs already", "tramontane stop mine")
    assert run("services", "--json", *ON).json == {"mine": ready}
    assert run("services", *ON).out == f"mine  {ready['address']}  tp 2, 1 replica(s)\n"

    with Client(ready["address"], resumes=0, tls_ca="ca.crt") as client, pytest.raises(Unauthenticated):
        client.models(timeout=120)
    options = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.8, "seed": 3, "logprobs": 0}
    with Client(ready["address"], resumes=0, tls_ca="ca.crt", token="0123456789abcdef") as client:
        want = client.generate("x", timeout=120, **options)
        with client.stream_generate("x", timeout=120, **options) as stream:
            next(stream)
            os.kill(int(ready["ranks"][1].rpartition("pid ")[2]), signal.SIGKILL)
            reply = stream.result()
        assert (reply.token_ids, reply.logprobs) == (want.token_ids, want.logprobs)
        # Stopped, it lets a reply finish.
        with client.stream_generate("x", timeout=120, **options) as stream:
            next(stream)
            replies: list = []
            reader = threading.Thread(target=lambda: replies.append(stream.result()))
            reader.start()
            stopped = run("stop", "mine", *ON)
            reader.join()
    assert (stopped.status, stopped.out) == (0, "tramontane: mine is stopped\n")
    assert replies[0].finish_reason is FinishReason.LENGTH
    assert none_left()
    until(lambda: groups() <= before and services("auto") == {})
    refused(run("stop", "mine", *ON), "service 'mine' not found", "tramontane services")


def test_one_that_fails_leaves_nothing(local_ray, model, tmp_path):
    """On the way up, with what its command says; later, by itself."""
    before = groups()
    arguments = ["--port", "0", "--detach", "--name", "other", "--rebuilds", "0", *ON]
    refused(run("serve", model, "--kv-memory", "1", *arguments), "--kv-memory")
    assert none_left()
    until(lambda: groups() <= before)
    ready = run("serve", model, *arguments, "--json").json
    os.kill(int(ready["ranks"][0].rpartition("pid ")[2]), signal.SIGKILL)
    until(lambda: services("auto") == {})
    assert none_left() and not actors()
    until(lambda: groups() <= before)


def test_what_cannot_be_detached_is_refused(model):
    refused(run("serve", model, "--detach"), "detach: ", "--ray-address")
    refused(run("serve", model, "--detach", "--local", *ON), "detach: ")
