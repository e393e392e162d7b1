"""The examples of deploy/ray and the container's script against a Ray head with its job server and a token:
all of it for real, on one machine."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.server.lifecycle import SERVICE
from tests.cli.command import run
from tests.deploy.cluster import STARTED, Head, free_ports, ray_head, stop, wait_until
from tests.deploy.manifests import DEPLOY
from tests.support import REPOSITORY
from tramontane import Client, FinishReason
from tramontane.errors import Unavailable

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROMPT = "In an age"
ENDLESS = 60_000  # tokens, and the least that they take is half a minute
KV = ["--kv-memory", "64MiB"]  # a rank, which is room for two such replies
SOME = 500  # tokens of a reply that ends within the 30 s that a server has for it


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(REPOSITORY) as started:
        yield started


@pytest.fixture(scope="module")
def model(tiny) -> str:
    return str(tiny(context=ENDLESS + 64, heads=4, kv_heads=2))


@pytest.fixture(scope="module")
def expected(model) -> str:
    return run("generate", model, "--prompt", PROMPT, "--max-tokens", "20", "--local", "--json", *KV).json[
        "text"
    ]


@pytest.fixture(scope="module")
def short_jobs(head, model) -> Iterator[dict[str, Future]]:
    """Jobs that end by themselves, submitted at once: what takes their time is Ray's, and mostly waiting. A
    test with them waits for both: the next one may look for actors that are left."""
    options = ["--max-tokens", "20", "--tp", "2", "--json", *KV]
    generate = [str(DEPLOY / "ray/generate.sh"), model, PROMPT, *options]
    wrong = [str(DEPLOY / "ray/serve.sh"), "wrong", model, "--tp", "9"]
    with ThreadPoolExecutor() as pool:
        yield {
            "generate": pool.submit(head.run, *generate, timeout=200),
            "wrong": pool.submit(head.run, *wrong, timeout=200),
        }


def ask(port: int, **options) -> str:
    with Client(f"127.0.0.1:{port}") as client:
        return client.generate(PROMPT, max_tokens=20, temperature=0.0, timeout=60, **options).text


def ready(port: int) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status


def nothing_left(head: Head) -> None:
    wait_until(lambda: not head.processes("ray::RankActor", "ray::EngineActor"), 60)


def test_a_service_as_a_ray_job(head, short_jobs, model, expected):
    (port,) = free_ports(1)
    served = head.run(
        str(DEPLOY / "ray/serve.sh"), "service", model, "--tp", "2", "--port", str(port), *KV, timeout=150
    )
    assert served.returncode == 0, served.stderr
    assert f"on 127.0.0.1:{port} (tp 2" in served.stdout
    assert ready(port) == health_pb2.HealthCheckResponse.SERVING
    assert ask(port) == expected

    # Stopping it lets replies go on for longer than Ray itself would wait, and finish. On a slow machine one
    # that takes so long for certain would not end in time, so here one goes on and the other ends.
    with Client(f"127.0.0.1:{port}", resumes=0) as client:
        options = {"temperature": 1.0, "seed": 1, "ignore_eos": True, "timeout": 120}
        with (
            client.stream_generate(PROMPT, max_tokens=ENDLESS, **options) as endless,
            client.stream_generate(PROMPT, max_tokens=SOME, **options) as some,
        ):
            next(endless), next(some)
            stopper = threading.Thread(target=partial(head.ray, "job", "stop", "service", timeout=200))
            stopper.start()
            wait_until(lambda: ready(port) == health_pb2.HealthCheckResponse.NOT_SERVING, 60)
            time.sleep(4)  # Ray by itself gives a job 3 s
            assert ready(port) == health_pb2.HealthCheckResponse.NOT_SERVING
            next(endless)
            assert some.result().finish_reason is FinishReason.LENGTH
            assert some.result().usage.completion_tokens == SOME
        stopper.join(60)
        assert not stopper.is_alive()
    assert "was stopped" in (out := head.ray("job", "status", "service")).stdout + out.stderr
    wait([*short_jobs.values()])  # the actors of one are others'
    nothing_left(head)


def test_a_reply_as_a_ray_job(short_jobs, expected):
    wait([*short_jobs.values()])
    done = short_jobs["generate"].result()
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(line)["text"] == expected


def test_a_job_that_fails_says_so(short_jobs):
    wait([*short_jobs.values()])
    done = short_jobs["wrong"].result()
    assert done.returncode == 1 and done.stdout == ""
    assert "error: tp: " in done.stderr
    assert done.stderr.splitlines()[-1] == "error: the job wrong ended before it served"


def test_a_gateway_joins_serves_and_leaves(head, model, expected):
    """What the container of the gateway's Deployment runs."""
    (port,) = free_ports(1)
    arguments = [model, "--tp", "2", "--port", str(port), "--json", *KV]
    before = {process.pid for process in head.processes("raylet/raylet")}
    process = subprocess.Popen(
        [str(DEPLOY / "docker/node.sh"), "gateway", head.address, *arguments],
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=(head.folder / "gateway.log").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        line = process.stdout.readline()
        assert line, (head.folder / "gateway.log").read_text()
        assert json.loads(line)["port"] == port
        raylets = {process.pid for process in head.processes("raylet/raylet")}
        assert len(raylets - before) == 1
        assert ready(port) == health_pb2.HealthCheckResponse.SERVING
        assert ask(port) == expected
    finally:
        status = stop(process)
    assert status == 0, (head.folder / "gateway.log").read_text()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in raylets - before), 60)
    nothing_left(head)


def test_a_node_with_another_token_is_told_so(head):
    environment = head.environment | {"RAY_AUTH_TOKEN": "f" * 64}
    command = [str(DEPLOY / "docker/node.sh"), "worker", head.address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    *said, last = done.stderr.splitlines()
    assert last == f"error: the Ray head at {head.address} refuses the token here: see RAY_AUTH_TOKEN"
    # Where Ray's own command takes more than its 15 s, it is asked again, and that is said.
    assert all(
        line.startswith(f"tramontane-node: waiting for the Ray head at {head.address}") for line in said
    )


@pytest.mark.parametrize("arguments", [[], ["worker"], ["boss", "host:1"], ["worker", "host:1", "--tp"]])
def test_a_wrong_command_line_of_the_node(arguments):
    done = subprocess.run(
        [str(DEPLOY / "docker/node.sh"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: give one of: gateway HEAD:PORT") and done.stderr.count("\n") == 1


def test_two_nodes_hold_a_stage_each_until_one_is_lost(head, model, expected):
    """The reply is that of one rank; when the second node dies, all ends at once, nothing left."""
    log = head.folder / "node.log"
    command = ["ray", "start", "--block", "--address", head.address, "--num-cpus", "1"]
    with log.open("w") as out:
        node = subprocess.Popen(
            [*command, "--object-store-memory", str(80 << 20)],
            env=head.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = None
    try:
        wait_until(lambda: STARTED in log.read_text() or node.poll() is not None, 120)
        assert node.poll() is None, log.read_text()
        options = ["--pp", "2", "--rebuilds", "0", "--device", "cpu", "--port", "0", "--json", *KV]
        server = subprocess.Popen(
            ["tramontane", "serve", model, "--ray-address", head.address, *options],
            env=head.environment,
            stdout=subprocess.PIPE,
            stderr=(head.folder / "serve.log").open("w"),
            text=True,
            start_new_session=True,
        )
        line = server.stdout.readline()
        assert line, (head.folder / "serve.log").read_text()
        served = json.loads(line)
        assert (served["tp"], served["pp"], len(served["ranks"])) == (1, 2, 2)
        there = {process.pid: process for process in psutil.Process(node.pid).children(recursive=True)}
        pids = [int(rank.rpartition("pid ")[2]) for rank in served["ranks"]]
        assert sum(pid in there for pid in pids) == 1, "the stages are not spread over the nodes"
        assert ask(served["port"]) == expected
        with Client(f"127.0.0.1:{served['port']}", resumes=0) as client:
            options = {"max_tokens": ENDLESS, "temperature": 1.0, "seed": 1, "ignore_eos": True}
            with client.stream_generate(PROMPT, timeout=120, **options) as stream:
                next(iter(stream))
                for process in [*there.values(), psutil.Process(node.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                begun = time.monotonic()
                with pytest.raises(Unavailable):
                    for _ in stream:
                        pass
        assert server.wait(60) == 1
        # Whoever did not watch the connections would know by Ray alone, which takes a silent node for dead
        # after a minute; some 4 s are usual.
        assert time.monotonic() - begun < 30
        said = (head.folder / "serve.log").read_text()
        assert re.search(r"error: (rank \d is lost: |the engine is gone: )", said), said
        assert "nothing was heard" not in said, "a connection that ends says so itself"
        nothing_left(head)
    finally:
        for process in (server, node):
            if process is not None:
                stop(process)
