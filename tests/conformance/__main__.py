"""`python -m tests.conformance`: the whole suite on tiny models and on the real ones that are there.

Ends with one line, runs compared and bits that differ, and with status 1 if a bit does, or if a way did not
meet what it is about.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported below

import torch

from runtime.model.load import numerics
from tests.conformance.cluster import run_cluster
from tests.conformance.compare import Tally
from tests.conformance.gateway import run_gateway
from tests.conformance.models import LARGE_CONTEXT, TINY, Model, real_paths, write_tiny
from tests.conformance.replicas import run_replicas
from tests.conformance.search import search
from tests.conformance.ways import Idle, run_way, ways


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--model", type=Path, help="this file alone, instead of the tiny and the real models")
    parser.add_argument("--scenarios", type=int, default=300, help="random ones in all")
    parser.add_argument("--seed", type=int, help="of scenarios and shuffles (default: drawn, and printed)")
    parser.add_argument(
        "--minutes", type=float, help="most time for a model's scenarios; what ran is counted"
    )
    parser.add_argument("--record", type=Path, help="write what was run and what came of it, as JSON")
    return parser.parse_args()


def models(named: Path | None, folder: Path, scenarios: int) -> Iterator[tuple[str, Model, int]]:
    """(name, model, how many of the scenarios it plays). Where the real models are among others, they play
    few, and the large ones answer fewer requests: they take their time."""
    if named is not None:
        yield named.name, Model(named, every=3), scenarios
        return
    for name in TINY:
        yield name, Model(write_tiny(name, folder)), -(-scenarios // len(TINY))
    for found in real_paths():
        if isinstance(found, str):
            print(found, flush=True)
            continue
        large = found.stat().st_size > 1 << 24
        yield (
            found.name,
            Model(found, every=5, longest=5, context=LARGE_CONTEXT) if large else Model(found, every=3),
            min(20, scenarios // 20),
        )


def main() -> int:
    given = arguments()
    seed = given.seed if given.seed is not None else int.from_bytes(os.urandom(4), "little")
    torch.set_num_threads(1)
    print(f"seed {seed}", flush=True)
    total, begun, parts, idle = Tally(), time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, model, count in models(given.model, Path(folder), given.scenarios):
            tally, started = Tally(), time.monotonic()
            for way in ways(model):
                try:
                    tally.take(run_way(model, way, seed))
                except Idle as error:
                    idle.append(f"{name}: {error}")
                    print(idle[-1], flush=True)
            tally.take(run_gateway(model))
            tally.take(run_replicas(model, seed))
            if model.units > 1:
                tally.take(run_cluster(model, min(3, model.units), seed))
            if count:
                until = time.monotonic() + 60 * given.minutes if given.minutes else None
                tally.take(search(model, count, seed, until=until))
            took = time.monotonic() - started
            print(f"{name}: {tally.runs} runs, {tally.bits} bits differ, {took:.0f} s", flush=True)
            for line in tally.differences:
                print(line, flush=True)
            parts.append({"model": name, "numerics": numerics(model.opened), **summary(tally, took)})
            total.take(tally)
            if given.record:
                write_record(given.record, seed, summary(total, time.monotonic() - begun), parts)
    for name, times in total.seen.items():
        print(f"{times} {name}")
    if idle:
        print(f"{len(idle)} ways showed nothing: {'; '.join(idle)}")
    print(total.line())
    return 1 if total.bits or idle else 0


def write_record(path: Path, seed: int, whole: dict, parts: list[dict]) -> None:
    """After each model: a run that is cut short leaves what it has done."""
    record = {
        "command": " ".join(["python -m tests.conformance", *(a.rpartition("/")[2] for a in sys.argv[1:])]),
        "date": str(date.today()),
        "machine": {"cpu": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "hypothesis", "ray")}
        | {"python": platform.python_version()},
        "seed": seed,
        **whole,
        "models": parts,
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def summary(tally: Tally, seconds: float) -> dict:
    return {
        "runs": tally.runs,
        "differing_bits": tally.bits,
        "seconds": round(seconds),
        "seen": tally.seen,
        "differences": tally.differences,
    }


def processor() -> str:
    """As Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    sys.exit(main())
