"""Whether stages overlap: serves a model in stages, each rank a process, and records when each one worked.

    python bench/pipeline.py MODEL --pp 2 --streams 8 --out timeline.json

The engine, its plans over TCP and the pipe between the stages are those that serve; Ray alone is missing,
which places processes and carries no step. Each microbatch count is served in turn: with one, a stage idles
while the others work; with as many as there are stages, all can. Prints one JSON object: of every stage, the
share of the time that it idled while all streams decoded; a stretch of the timeline goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.local import Trace, ask, decode_rate
from bench.report import about, show
from runtime.capacity import kv_blocks
from runtime.cluster.mesh import Mesh, PeerListener
from runtime.cluster.peers import SocketCommunicator
from runtime.cluster.rank_loop import run_rank
from runtime.cluster.stage_pipe import StagePipe
from runtime.cluster.step_channel import TcpRanks
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.local import LocalClient
from runtime.loop import EngineLoop
from runtime.model.communicator import Alone
from runtime.model.header import open_model
from runtime.model.load import engine_info, load_shard
from runtime.model.runners import make_runner
from runtime.types import Request, SamplingParams
from runtime.wire.connection import Listener

HOST = "127.0.0.1"
DRAWN = 100  # columns of the drawn timeline


@dataclass(frozen=True, slots=True)
class Span:
    """A step at work in one stage: monotonic seconds, which processes of one host share."""

    step: int
    began: float
    ended: float


def serve_rank(
    pipe: Pipe, rank: int, model: ModelConfig, config: EngineConfig, parallel: ParallelConfig, token: str
) -> None:
    """One rank's process. Sends its address, takes all of them and the engine's; in the end, its steps."""
    torch.set_num_threads(parallel.threads or 1)
    listener = PeerListener(HOST, token)
    pipe.send(listener.address)
    addresses, engine = pipe.recv()
    mesh = Mesh(rank, addresses, listener, token)
    first = rank // parallel.tp * parallel.tp
    comm = SocketCommunicator(mesh, first, parallel.tp) if parallel.tp > 1 else Alone()
    shard, _ = load_shard(open_model(model), rank, parallel.tp, pp=parallel.pp)
    runner = make_runner(
        shard,
        comm,
        total_blocks=config.total_blocks,
        block_size=config.block_size,
        max_positions=config.max_model_len,
        pipe=StagePipe(mesh, parallel.tp),
    )
    spans: list[Span] = []
    runner.observe = lambda step, began, ended: spans.append(Span(step, began, ended))
    run_rank(runner, rank, *engine, token)
    mesh.close()
    pipe.send(spans)


class Served:
    """What `bench.local.ask` needs of an engine, and the steps of each rank once it is closed."""

    def __init__(self, client: LocalClient):
        self.client = client
        self.spans: list[list[Span]] = []


@contextmanager
def served(model: ModelConfig, config: EngineConfig, parallel: ParallelConfig):
    """An engine in this process and its ranks, each in one of its own."""
    ranks, token = parallel.tp * parallel.pp, secrets.token_hex(16)
    opened = open_model(model)
    settled = kv_blocks(opened, config, parallel, model.max_model_len)
    settled = replace(settled, microbatches=config.microbatches)  # even fewer than stages
    context = multiprocessing.get_context("spawn")
    channel = TcpRanks(ranks)
    listener = Listener(HOST, token, channel.join)
    pipes, processes = [], []
    for rank in range(ranks):
        here, there = context.Pipe()
        arguments = (there, rank, model, settled, parallel, token)
        processes.append(context.Process(target=serve_rank, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(here)
    try:
        addresses = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send((addresses, (listener.host, listener.port)))
        channel.wait_joined()
        loop = EngineLoop(settled, channel, opened.spec.vocab)
        loop.start()
        info = engine_info(opened, model, settled, parallel.tp, pp=parallel.pp)
        made = Served(LocalClient(loop, info))
        yield made
        loop.close()
        made.spans = [pipe.recv() for pipe in pipes]
    finally:
        listener.close()
        for process in processes:
            process.join(timeout=10)
            process.kill()


def clipped(spans: Sequence[Span], start: float, end: float) -> list[tuple[float, float]]:
    """The parts of spans within [start, end], in order."""
    parts = ((max(span.began, start), min(span.ended, end)) for span in spans)
    return sorted((began, ended) for began, ended in parts if began < ended)


def idle_share(spans: Sequence[Span], start: float, end: float) -> float:
    """The share of [start, end] in which a stage did not work. Its spans do not overlap."""
    return 1.0 - sum(ended - began for began, ended in clipped(spans, start, end)) / (end - start)


def all_busy_share(stages: Sequence[Sequence[Span]], start: float, end: float) -> float:
    """The share of [start, end] in which every stage worked."""
    changes = []
    for spans in stages:
        for began, ended in clipped(spans, start, end):
            changes += [(began, 1), (ended, -1)]
    busy, since, total = 0, start, 0.0
    for at, change in sorted(changes):
        if busy == len(stages):
            total += at - since
        busy, since = busy + change, at
    return total / (end - start)


def drawn(stages: Sequence[Sequence[Span]], start: float, end: float) -> list[str]:
    """A line a stage: the last digit of the step at work, or a dot, at DRAWN moments."""
    lines = []
    for spans in stages:
        moments = (start + (end - start) * (n + 0.5) / DRAWN for n in range(DRAWN))
        working = (next((s.step for s in spans if s.began <= at < s.ended), None) for at in moments)
        lines.append("".join("." if step is None else str(step % 10) for step in working))
    return lines


def measure(options: argparse.Namespace, microbatches: int) -> dict:
    model = ModelConfig(options.model, max_model_len=options.context)
    config = EngineConfig(max_num_seqs=options.streams, microbatches=microbatches, draft_tokens=0)
    parallel = ParallelConfig(tp=options.tp, pp=options.pp, device="cpu", threads=options.threads)
    with served(model, config, parallel) as engine:
        vocabulary = asyncio.run(engine.client.info()).vocab_size
        ask(engine, requests(options, vocabulary, "warm", 4))
        traces: list[Trace] = ask(engine, requests(options, vocabulary, "timed", options.tokens))
    # `perf_counter` and `monotonic` are one clock where there is a /proc; elsewhere this would have to map.
    shift = time.monotonic() - time.perf_counter()
    start = max(trace.arrivals[0] for trace in traces) + shift
    end = min(trace.arrivals[-1] for trace in traces) + shift
    firsts = engine.spans[:: options.tp]  # one rank a stage: the others of it keep its time
    middle = (start + end) / 2
    steps = max(1, sum(start < span.ended <= end for span in firsts[0]))
    stretch = min(end - middle, (end - start) / steps * 8)
    return {
        "microbatches": microbatches,
        "decode_tokens_per_s": decode_rate(traces),
        "seconds": end - start,
        "steps": steps,
        "idle_share": [round(idle_share(spans, start, end), 4) for spans in firsts],
        "all_stages_busy_share": round(all_busy_share(firsts, start, end), 4),
        "drawn": drawn(firsts, middle, middle + stretch),
        "drawn_seconds": stretch,
        "spans": [
            [[span.step, span.began - start, span.ended - start] for span in spans] for spans in firsts
        ],
    }


def requests(options: argparse.Namespace, vocabulary: int, name: str, tokens: int) -> list[Request]:
    """Prompts that share nothing, all of one length, and replies that all have `tokens`."""
    made = []
    for n in range(options.streams):
        generator = torch.Generator().manual_seed(n if name == "timed" else 1000 + n)
        prompt = torch.randint(0, vocabulary, (options.prompt,), generator=generator).tolist()
        params = SamplingParams(max_tokens=tokens, temperature=0.0, seed=0)
        made.append(Request(f"{name}-{n}", tuple(prompt), params))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=96, help="of each reply")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--out", type=Path, help="write the whole timeline there too")
    options = parser.parse_args()
    runs = [measure(options, microbatches) for microbatches in dict.fromkeys((1, options.pp))]
    result = {**about(), "model": Path(options.model).name, "pp": options.pp, "tp": options.tp}
    if options.out:
        options.out.write_text(json.dumps({**result, "runs": runs}))
    shown = [{key: value for key, value in run.items() if key != "spans"} for run in runs]
    show(
        {**result, "runs": shown},
        ("microbatches", "tok/s", "idle share of each stage", "all busy"),
        [
            (
                run["microbatches"],
                f"{run['decode_tokens_per_s']:.1f}",
                ", ".join(f"{share:.0%}" for share in run["idle_share"]),
                f"{run['all_stages_busy_share']:.0%}",
            )
            for run in shown
        ],
    )
    for run in shown:
        print(
            f"\n{run['microbatches']} microbatch(es), {run['drawn_seconds'] * 1000:.0f} ms:", file=sys.stderr
        )
        for stage, line in enumerate(run["drawn"]):
            print(f"stage {stage}  {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
