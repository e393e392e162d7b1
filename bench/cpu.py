"""The CPU figures of docs/performance.md: this engine and its peers, in turn, in one run.

Each round measures every contestant once, one at a time, so that a machine that drifts drifts for all; rounds
give medians, and ratios are taken between medians. `bench/peers/README.md` says how to make the peers. Prints
one JSON object; `--table` adds a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
CONTEXT, DECODE, STREAMS, PREFILL = 64, 128, 16, 512
FIGURES = ("decode_1", "decode_16", "prefill_512")


def ours(model: str, tp: int) -> dict[str, float]:
    """Rates through the engine: requests by its TCP channel, ranks as Ray actors. Without guesses, which the
    peers do not make either."""
    bench = [sys.executable, "-m", "runtime.cli", "bench", model, "--json", "--tp", str(tp), "--repeat", "3"]
    decode = _run([*bench, "--prompt-tokens", str(CONTEXT), "--max-tokens", str(DECODE + 1)])
    prefill = _run([*bench, "--prompt-tokens", str(PREFILL), "--max-tokens", "2", "--streams", "1"])
    one, many = decode["runs"]
    return {
        "decode_1": one["decode_tokens_per_s"],
        "decode_16": many["decode_tokens_per_s"],
        "prefill_512": prefill["runs"][0]["prefill_tokens_per_s"],
    }


def peer(python: str, script: str, model: str, environment: dict[str, str]) -> dict[str, float]:
    command = [python, str(HERE / "peers" / script), model, "--repeats", "3", "--parallel", "1", str(STREAMS)]
    sizes = ["--context", str(CONTEXT), "--decode", str(DECODE), "--prefill", str(PREFILL)]
    result = _run(command + sizes, environment)
    return {
        "decode_1": result["decode_tok_s"]["1"]["median"],
        "decode_16": result["decode_tok_s"][str(STREAMS)]["median"],
        "prefill_512": result["prefill_tok_s"]["median"],
        "first_token_s": result["first_token_s"],
    }


def start(model: str, tp: int) -> dict[str, float]:
    """Seconds from the command to its ready line, and what each rank then holds, in bytes."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "runtime.cli", "serve", model, "--tp", str(tp), "--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        ready = json.loads(server.stdout.readline())
        seconds = time.perf_counter() - began
        pids = [int(rank.rpartition("pid ")[2]) for rank in ready["ranks"]]
        return {"ready_s": seconds, "rank_bytes": [psutil.Process(pid).memory_info().rss for pid in pids]}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def _run(command: list[str], environment: dict[str, str] | None = None) -> dict:
    done = subprocess.run(
        command,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _median(rounds: list[dict]) -> dict:
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0] if name != "rank_bytes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the GGUF file, read by this engine and by llama.cpp")
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter of llama.cpp's environment")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of vLLM's environment")
    parser.add_argument("--folder", help="the same model as a Hugging Face folder, for vLLM")
    parser.add_argument("--preload", default="", help="LD_PRELOAD for vLLM, as its documentation advises")
    parser.add_argument("--tp", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()

    contestants = {f"tramontane tp {tp}": lambda tp=tp: ours(args.model, tp) for tp in args.tp}
    if args.llama:
        contestants["llama.cpp"] = lambda: peer(args.llama, "llamacpp.py", args.model, {})
    if args.vllm:
        preload = {"LD_PRELOAD": args.preload} if args.preload else {}
        contestants["vLLM"] = lambda: peer(args.vllm, "vllm_cpu.py", args.folder, preload)
    rounds: dict[str, list[dict]] = {name: [] for name in contestants}
    starts: dict[str, list[dict]] = {f"tramontane tp {tp}": [] for tp in args.tp}
    for number in range(args.rounds):
        for name, measure in contestants.items():
            rounds[name].append(measure())
            print(f"round {number + 1}, {name}: {rounds[name][-1]}", file=sys.stderr)
        for tp in args.tp:
            starts[f"tramontane tp {tp}"].append(start(args.model, tp))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
        },
        "versions": {name: version(name) for name in ("torch", "ray", "grpcio")}
        | {"python": platform.python_version()},
        "medians": {name: _median(values) for name, values in rounds.items()},
        "rounds": rounds,
        "starts": {
            name: _median(values) | {"rank_bytes": values[-1]["rank_bytes"]}
            for name, values in starts.items()
        },
    }
    print(json.dumps(result, indent=1))
    if args.table:
        _table(result["medians"])


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _table(medians: dict[str, dict]) -> None:
    base = medians["tramontane tp 1"]
    print("\n| | 1 stream | 16 streams | prefill 512 |\n|---|---|---|---|")
    for name, values in medians.items():
        cells = [f"{values[f]:.0f} ({base[f] / values[f]:.2f}x)" for f in FIGURES]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
