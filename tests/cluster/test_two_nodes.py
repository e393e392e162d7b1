"""Stages on two hosts: a stream, the loss of a node by power and by cable, its return, a batch, a bad start.

The hosts are network namespaces (hosts.py); where those are not allowed, all of it is skipped, and
tests/deploy/test_ray.py has two nodes on one host. A loss is to be an end to everything within 6 s, which is
printed; what is asserted leaves room for a machine that stands still, and tells it from the minute that Ray
takes and the quarter of an hour that the kernel does.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from runtime.types import Request, SamplingParams
from tests.cli.command import Result, finish, refused, run
from tests.cluster.hosts import RAY_PORT, Host, nothing_left, raylet, two_hosts
from tests.cluster.observer import Observer
from tests.deploy.cluster import wait_until
from tests.replies import Reply
from tests.rule.engines import plain_replies
from tests.support import fixture_path
from tramontane import Client
from tramontane.errors import Unavailable

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPT = (1, 70, 71, 200, 3, 70)
SAMPLING = {"temperature": 0.9, "seed": 7, "ignore_eos": True}
SHORT, LONG = 24, 1200
ENDS_WITHIN = 40.0
AT_ONCE = 120.0  # seconds for whatever is not about time
# Ray by itself takes a node that is silent for dead after a minute; the head decides.
NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Pair:
    """A cluster's head, which stays, and a second node, which comes and goes."""

    one: Host
    two: Host
    observer: Observer
    _node: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def ray(self) -> list[str]:
        return ["--ray-address", f"{self.one.address}:{RAY_PORT}", "--device", "cpu"]

    def join(self) -> None:
        """Have the second host be a node."""
        if self.two.cut or not self.two.processes("/raylet/raylet"):
            self._node.close()  # it powers off
            self.two.cable("up")
            self._node.enter_context(raylet(self.two, self.one))
        # What was there before has been missed.
        wait_until(lambda: self.observer.look()["nodes"] == 2, AT_ONCE)

    def command(self, *arguments: str) -> subprocess.Popen:
        """`tramontane ARGUMENTS` on the first host."""
        return self.one.start(
            "tramontane", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    @contextlib.contextmanager
    def serving(self, model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, dict]]:
        options = ["--port", "0", "--host", self.one.front, "--json", *self.ray]
        process = self.command("serve", str(model), *options, *arguments)
        try:
            line = process.stdout.readline()
            assert line, finish(process).err
            yield process, json.loads(line)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


@dataclass
class Stream:
    """A reply that another thread receives."""

    ready: dict
    tokens: int = LONG
    begun: threading.Event = field(default_factory=threading.Event)
    reply: Reply | None = None
    error: Exception | None = None
    ended: float = 0.0  # time.monotonic()

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the stream has not ended"

    def _run(self) -> None:
        try:
            with (
                Client(self.ready["address"], resumes=0) as client,
                client.stream_generate(
                    PROMPT, max_tokens=self.tokens, logprobs=1, timeout=600, **SAMPLING
                ) as stream,
            ):
                next(stream)
                self.begun.set()
                self.reply = stream.result()
        except Exception as error:
            self.error = error
        self.ended = time.monotonic()
        self.begun.set()

    def same(self, want: Reply) -> bool:
        """Whether the tokens and every bit of their logprobs are those."""
        assert self.error is None, self.error
        logprobs = tuple(each.logprob for each in self.reply.logprobs)
        return (self.reply.token_ids, logprobs) == (want.tokens[: self.tokens], want.logprobs[: self.tokens])


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with two_hosts() as (one, two), raylet(one, one, env=NOTICE), contextlib.ExitStack() as stack:
        address = f"{one.address}:{RAY_PORT}"
        watching = one.start(
            "python", "-m", "tests.cluster.observer", address,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(watching.wait, AT_ONCE)
        stack.callback(watching.kill)
        made = Pair(one, two, Observer(watching))
        stack.push(made._node)
        yield made


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny(context=4096, heads=8, kv_heads=4, layers=3)


@pytest.fixture(scope="module")
def stories(model) -> Path:
    """A real model, small as it is, where the fixtures are there."""
    try:
        return fixture_path("stories260K/stories260K.f32.gguf")
    except pytest.skip.Exception:
        return model


@pytest.fixture(scope="module")
def want(model) -> Reply:
    """What one local rank says."""
    params = SamplingParams(max_tokens=LONG, logprobs=1, **SAMPLING)
    (reply,) = plain_replies(model, [Request("r", PROMPT, params)])
    return reply


def hosts_of(ready: dict) -> list[str]:
    return [rank.split(" on ")[1].partition(",")[0] for rank in ready["ranks"]]


def report(what: str, begun: float) -> None:
    print(f"{time.monotonic() - begun:6.2f} s  {what}", file=sys.stderr)


def fails(result: Result, *fragments: str) -> None:
    """One line that says so, besides what the server remarks on as it starts."""
    lines = [line for line in result.err.splitlines(True) if not line.startswith("tramontane: ")]
    refused(Result(result.status, result.out, "".join(lines)), *fragments)


def all_given_back(pair: Pair) -> None:
    """No actor, no file, no placement."""
    nothing_left(pair.one, pair.two)
    wait_until(lambda: pair.observer.look()["groups"] == 0, AT_ONCE)


def test_a_stream_waits_for_its_node_and_goes_on(pair, model, want):
    """The engine is lost with the node. Nothing else has room, which is said, until the node is back."""
    pair.join()
    pair.observer.look({pair.one.address: 0.999})
    with pair.serving(model, "--pp", "2", "--rebuilds", "9") as (process, ready):
        log: list[str] = []
        threading.Thread(target=lambda: log.extend(process.stderr), daemon=True).start()
        # What a host says of itself is where the other one reaches it, not its first interface.
        assert hosts_of(ready) == [pair.two.address, pair.one.address]
        with pair.two.steps_held(after=40):
            stream = Stream(ready)
            assert stream.begun.wait(AT_ONCE)
            pair.two.power_off()
        lost = time.monotonic()
        assert stream.reply is None and stream.error is None
        wait_until(lambda: any("replica 0 is lost" in line for line in log), ENDS_WITHIN)
        report("a node without power is missed", lost)
        lacking = "waiting for Ray: needs a share of 0.003 CPUs: 0.001 free in 1 node"
        wait_until(lambda: any(lacking in line for line in log), AT_ONCE)
        report("what is missing is said", lost)
        pair.join()
        back = time.monotonic()
        report("the node is back", lost)
        stream.wait(2 * AT_ONCE)
        report("the stream has ended", lost)
        report("... after the node was back", back)
        assert stream.same(want), "the reply is not that of one rank"
        wait_until(lambda: any("serves again" in line for line in log), AT_ONCE)
        assert sum("serves again" in line for line in log) == 1, log
        process.terminate()
        assert process.wait(AT_ONCE) == 0
    pair.observer.look({})
    all_given_back(pair)


def test_a_batch_over_both_nodes_comes_to_its_end(pair, stories, tmp_path):
    pair.join()
    lines = [{"custom_id": f"r{i}", "prompt": "In an age" * (i % 3 + 1), "seed": i} for i in range(40)]
    asked = tmp_path / "in.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = ["--model", str(stories), "--max-tokens", "5"]
    there = pair.command("batch", str(asked), str(tmp_path / "two.jsonl"), *batch, "--pp", "2", *pair.ray)
    alone = run("batch", str(asked), str(tmp_path / "one.jsonl"), *batch, "--local")
    done = finish(there)
    assert (done.status, alone.status) == (0, 0), (done.err, alone.err)
    replies = []
    for name in ("two", "one"):
        found = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert sorted(each["custom_id"] for each in found) == sorted(line["custom_id"] for line in lines)
        replies.append({each["custom_id"]: (each["text"], each["finish_reason"]) for each in found})
    assert replies[0] == replies[1]
    all_given_back(pair)


def test_nodes_of_two_versions_are_named(pair, model):
    """The second host has another version of one package, as far as it knows."""
    pair.join()
    info = pair.two.packages / "ray-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 0.1\n")
    try:
        process = pair.command("serve", str(model), "--pp", "2", "--port", "0", *pair.ray)
        fails(finish(process), "ray is ", f"0.1 on {pair.two.address}", "install the same versions")
    finally:
        shutil.rmtree(info)
    all_given_back(pair)


def test_a_node_that_leaves_on_the_way_up_is_said_in_one_line(pair, model):
    pair.join()
    with pair.two.starts_held():
        process = pair.command("serve", str(model), "--pp", "2", "--port", "0", *pair.ray)
        wait_until(lambda: pair.two.processes("ray::RankActor"), AT_ONCE)
        pair.two.power_off()
    fails(finish(process), "node left", "`ray status` shows the nodes, then start again")
    all_given_back(pair)


def test_the_last_node_cut_off_ends_everything_on_both_sides(pair, model, want):
    """The engine stays, and nobody tells it that it has lost half its ranks, nor them."""
    pair.join()
    pair.observer.look({pair.one.address: 0.997, pair.two.address: 0.998})
    with pair.serving(model, "--pp", "2", "--tp", "2", "--rebuilds", "0") as (process, ready):
        assert hosts_of(ready) == [pair.one.address] * 2 + [pair.two.address] * 2
        short = Stream(ready, SHORT)
        short.wait(AT_ONCE)
        assert short.same(want)

        with pair.two.steps_held(after=40):
            stream = Stream(ready)
            assert stream.begun.wait(AT_ONCE)
            assert stream.reply is None and stream.error is None
            pair.two.cable("down")
        lost = time.monotonic()
        stream.wait(AT_ONCE)
        report("the stream ends", lost)
        assert isinstance(stream.error, Unavailable), stream.error
        assert stream.ended - lost < ENDS_WITHIN
        result = finish(process)
        report("the server ends", lost)
        assert time.monotonic() - lost < ENDS_WITHIN
        fails(result, "is lost", "the server stops")
    nothing_left(pair.one, pair.two, seconds=ENDS_WITHIN - (time.monotonic() - lost))
    report("nothing is left on either host", lost)
    pair.observer.look({})
    all_given_back(pair)
