"""Ranks and engine as Ray actors: the same replies, the share and no more, and an end to everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.config import EngineConfig, ModelConfig, ParallelConfig, ServeConfig
from runtime.errors import BadModelFile, InvalidArgument, NotFound, TramontaneError, Unavailable
from runtime.types import Finished, FinishReason
from tests.replies import ask, ask_all, greedy
from tests.rule.engines import assert_same, plain_replies
from tests.rule.requests import named, others, requests
from tests.support import REPOSITORY

pytestmark = pytest.mark.cluster

CONTEXT = 256  # that requests fit into
LONG = 4096  # the model's
ENDLESS = 65536  # of one whose replies are minutes from their end when something dies
AT_ONCE = 60.0  # seconds for what is to happen at once: a loaded machine may stand still for several
SHAPE = {
    "types": {"*": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q3_K", "ffn_gate": "Q8_0"},
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 16,
    "hidden": 256,
    "ffn": 1280,
    "context": LONG,
}
REQUESTS = requests(384, CONTEXT, longest=20)


@contextlib.contextmanager
def cluster(
    path: Path,
    tp: int,
    *,
    pp: int = 1,
    max_model_len: int | None = None,
    kv_memory: int | None = None,
    **settings,
) -> Iterator:
    from runtime.cluster.launch import Cluster

    made = Cluster(
        ServeConfig(
            ModelConfig(str(path), max_model_len=max_model_len),
            EngineConfig(**settings),
            ParallelConfig(tp=tp, pp=pp, kv_memory=kv_memory, threads=1),
        )
    )
    try:
        yield made
    finally:
        made.close()


def talk(made, body: Callable, limit: float = 240) -> object:
    async def main():
        channel = await made.connect()
        try:
            async with asyncio.timeout(limit):
                return await body(channel)
        finally:
            await channel.close()

    return asyncio.run(main())


def gone(pid: int, seconds: float = AT_ONCE) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def path(tiny) -> Path:
    return tiny(**SHAPE)


@pytest.fixture
def endless(local_ray, tiny) -> Iterator:
    """Two ranks that have room for the longest replies."""
    with cluster(tiny(**{**SHAPE, "context": ENDLESS}), 2, kv_memory=64 << 20) as made:
        assert made.info.context_length == ENDLESS
        yield made


@pytest.fixture(scope="module")
def plain(path):
    return plain_replies(path, REQUESTS)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (2, 2)])
def test_replies_are_those_of_one_plain_process(local_ray, path, plain, tp, pp):
    """Alone and in company, cold and warm, cut and whole: ranks on Ray change no bit."""
    with cluster(path, tp, pp=pp, block_size=16, max_chunk=50, max_num_seqs=40) as made:
        assert (made.info.tp, made.info.pp, len(made.reports)) == (tp, pp, tp * pp)
        assert len(set(made.rank_pids)) == tp * pp and os.getpid() not in made.rank_pids

        async def body(channel):
            together = await ask_all(channel, [*REQUESTS, *others(384, CONTEXT, 16)])
            alone = [(await ask(channel, request))[0] for request in named(REQUESTS[:4], ".alone")]
            load = await channel.load()
            assert load.prefix_hit_tokens > 0 and load.running == 0
            return together[: len(REQUESTS)], alone

        together, alone = talk(made, body)
        assert_same(together, plain)
        assert_same(alone, plain[:4])
        assert made.check() is None
        pids = made.rank_pids
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_each_rank_reads_and_keeps_its_share(local_ray, tiny):
    """As the actors themselves count: three ranks over eight units, uneven, within 15%."""
    path = tiny(**{**SHAPE, "types": "Q4_0", "hidden": 512, "vocab": 16384, "ffn": 2048})
    with cluster(path, 1) as alone:
        [whole], [kept] = alone.reports, alone.memory()
    # What a rank takes besides: Python, torch and Ray, of which nobody here can tell; and some for chance.
    bare = kept["resident"] - kept["weights"] - kept["kv"] + (64 << 20)
    with cluster(path, 3) as made:
        memory = made.memory()
        for report, part, units in zip(made.reports, memory, (3, 3, 2), strict=True):
            share = units / 8
            assert report.bytes_read <= 1.15 * share * whole.bytes_read
            assert report.weight_bytes == part["weights"] <= 1.15 * share * kept["weights"]
            assert part["kv"] == pytest.approx(
                share * kept["kv"] * made.info.total_blocks / alone.info.total_blocks
            )
            check_memory(report, part, bare)
        assert sum(report.bytes_read for report in made.reports) >= whole.bytes_read


def check_memory(report, part: dict[str, int], bare: int = 450 << 20) -> None:
    assert part["resident"] <= 2 * report.bytes_read + part["kv"] + bare, part


@pytest.mark.slow
def test_smollm2_on_two_ranks(local_ray, smollm2):
    """A real model: what it says, what each rank holds, and how much memory it takes."""
    from runtime.tokenizer import load_tokenizer
    from runtime.weights.gguf import read_gguf

    tokenizer = load_tokenizer(read_gguf(str(smollm2)).metadata)
    prompt = tokenizer.encode(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        parse_special=True,
    )
    [end] = tokenizer.encode("<|im_end|>", parse_special=True)
    with cluster(smollm2, 2, max_model_len=512, max_num_seqs=4) as made:
        reply, _ = talk(made, lambda channel: ask(channel, greedy("r", prompt, 30, (end,), logprobs=0)))
        assert tokenizer.decode([t for t in reply.tokens if t != end]).startswith(
            "The capital of France is Paris."
        )
        size = smollm2.stat().st_size
        for report, part, units in zip(made.reports, made.memory(), (2, 1), strict=True):
            assert report.bytes_read <= 1.15 * size * units / 3
            check_memory(report, part)
    want = plain_replies(smollm2, [greedy("r", prompt, 30, (end,), logprobs=0)])
    assert_same([reply], want)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_every_stream_at_once(endless, victim):
    made = endless
    pids = made.rank_pids

    async def body(channel):
        tasks = [asyncio.create_task(ask(channel, greedy(f"r{i}", (1, i), ENDLESS - 8))) for i in range(4)]
        while (await channel.load()).running < 4:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - started < AT_ONCE / 2  # the replies themselves go on for minutes
        for end in ends:
            if isinstance(end, tuple):
                assert end[1].reason is FinishReason.ERROR and end[1].detail
            else:
                assert isinstance(end, Unavailable), end
        assert await asyncio.wait_for(channel.wait_lost(), AT_ONCE)
        with pytest.raises(Unavailable):
            await ask(channel, greedy("later", (1,), 5))

    talk(made, body)
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < AT_ONCE  # it waits for nobody who is gone
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_a_frozen_rank_is_missed(endless):
    """A rank that neither computes nor hangs up is noticed by its silence."""
    made = endless
    pids = made.rank_pids

    async def body(channel):
        task = asyncio.create_task(ask(channel, greedy("r", (1, 2), ENDLESS - 8)))
        while (await channel.load()).running < 1:
            await asyncio.sleep(0.01)
        os.kill(pids[1], signal.SIGSTOP)
        started = time.monotonic()
        with contextlib.suppress(Unavailable):
            _, end = await task
            assert isinstance(end, Finished) and end.reason is FinishReason.ERROR
        assert time.monotonic() - started < AT_ONCE / 2  # the reply itself goes on for minutes

    try:
        talk(made, body)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGCONT)
    made.close()
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_an_engine_that_dies_is_noticed(endless):
    import ray

    made = endless
    pids = made.rank_pids

    async def body(channel):
        task = asyncio.create_task(ask(channel, greedy("r", (1, 2), ENDLESS - 8)))
        while (await channel.load()).running < 1:
            await asyncio.sleep(0.01)
        ray.kill(made._engine, no_restart=True)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(task, AT_ONCE / 2)

    talk(made, body)
    made.close()
    assert all(gone(pid) for pid in pids)


@pytest.fixture
def no_ray(monkeypatch) -> None:
    """Ray is neither started nor joined, whether or not this process has one."""

    def start_ray(address: str | None) -> bool:
        raise AssertionError("Ray is not needed to say so")

    monkeypatch.setattr("runtime.cluster.launch.start_ray", start_ray)


@pytest.mark.parametrize("tp", [0, -1, 9])
def test_a_wrong_tp_is_refused_before_anything_starts(no_ray, path, tp):
    with pytest.raises(InvalidArgument, match=rf"^tp: {tp} .* 1 to 8$"), cluster(path, tp):
        pass


def test_a_bad_file_is_refused_before_anything_starts(no_ray, path, tmp_path):
    bad = tmp_path / "cut.gguf"
    bad.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match=r"cut\.gguf"), cluster(bad, 2):
        pass


def actors() -> list[psutil.Process]:
    """Our actors' processes below this one that live."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "Actor" in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


def none_left(seconds: float = AT_ONCE) -> bool:
    end = time.monotonic() + seconds
    while actors() and time.monotonic() < end:
        time.sleep(0.2)
    return not actors()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_model_len": 100_000}, "max-model-len"),
        ({"block_size": 48}, "block-size"),
        ({"total_blocks": 1 << 40, "max_num_seqs": 1 << 40}, "free"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_starts(no_ray, path, settings, named):
    with pytest.raises(TramontaneError, match=named), cluster(path, 2, **settings):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("the file goes", "starting 2 rank(s)"),
        ("the file goes", "loading weights"),
        ("a rank goes", "loading weights"),
        ("a rank goes", "first forward step"),
    ],
)
def test_what_fails_on_the_way_up_is_one_error_and_leaves_nothing(
    local_ray, path, tmp_path, capfd, how, when
):
    from runtime.cluster.launch import Cluster

    model, seen, phase = tmp_path / "model.gguf", [], 0.0
    model.write_bytes(path.read_bytes())
    assert none_left()

    def progress(said: str) -> None:
        nonlocal phase
        seen.append(said)
        phase = time.monotonic()
        if said == when:
            ranks = [process for process in actors() if "RankActor" in " ".join(process.cmdline())]
            if how == "the file goes":
                model.unlink()
            else:
                ranks[-1].kill()

    config = ServeConfig(ModelConfig(str(model)), EngineConfig(), ParallelConfig(tp=2, threads=1))
    with pytest.raises(NotFound if how == "the file goes" else Unavailable) as caught:
        Cluster(config, progress=progress)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert when in seen
    assert time.monotonic() - phase < 50  # ranks wait a minute for one that does not come
    assert none_left()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_cluster_with_its_own_ray_leaves_no_process(path, tmp_path):
    """In a process of its own: start, answer, close; then nothing of it lives, and no file is left."""
    script = textwrap.dedent(
        """
        import asyncio, json, os, psutil, sys, tempfile, time
        from pathlib import Path
        from runtime.cluster.launch import Cluster
        from runtime.config import EngineConfig, ModelConfig, ParallelConfig, ServeConfig
        from runtime.types import Finished, Request, SamplingParams

        def ours():
            return {str(p) for p in Path(tempfile.gettempdir()).glob("tramontane-*")}

        before, said = ours(), []
        config = ServeConfig(ModelConfig(sys.argv[1]), EngineConfig(), ParallelConfig(tp=2, threads=1))
        made = Cluster(config, progress=said.append)
        started = psutil.Process().children(recursive=True)
        assert len(started) > 3 and said, (started, said)

        async def main():
            channel = await made.connect()
            params = SamplingParams(max_tokens=4, temperature=0.0, seed=0)
            last = [o async for o in channel.generate(Request("r", (1, 2), params))][-1]
            assert isinstance(last, Finished) and last.completion_tokens == 4
            await channel.close()

        asyncio.run(main())
        made.close()
        made.close()
        _, alive = psutil.wait_procs(started, timeout=60)
        print(json.dumps({"alive": [p.name() for p in alive], "left": sorted(ours() - before)}))
        """
    )
    folder = tempfile.mkdtemp(
        prefix="tr", dir="/tmp"
    )  # nobody else's, and short: paths of sockets are limited
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": folder, "PYTHONPATH": paths},
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == '{"alive": [], "left": []}'
