"""Decode and prefill rates, and the start-up time, of vLLM's CPU build.

Prints one JSON object. Knows nothing of this project's engine; `bench/peers/README.md` says how to make its
environment and the model folder. Prompts are token ids, so no tokenizer is needed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from measure import machine, process_age, prompt_ids, summary


def step_until(engine, count: dict[str, int], enough) -> None:
    """Step the engine until enough(count), where `count` keeps the tokens each request has had so far."""
    while not enough(count):
        for output in engine.step():
            count[output.request_id] = len(output.outputs[0].token_ids)


def sampling(tokens: int):
    """Greedy, exactly `tokens` tokens, no text."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
    )


def add(engine, name: str, prompts: list[list[int]], tokens: int) -> dict[str, int]:
    """Queue the prompts as requests `name-i`; returns a count of zero tokens for each."""
    count = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, sampling(tokens))
        count[f"{name}-{i}"] = 0
    return count


def decode_rate(engine, name: str, prompts: list[list[int]], steps: int) -> float:
    """Tokens a second, all requests together, from when every one has its first token (prefill is done)."""
    count = add(engine, name, prompts, steps + 1)
    step_until(engine, count, lambda c: all(c.values()))
    already = sum(count.values())
    begin = time.perf_counter()
    step_until(engine, count, lambda c: all(tokens == steps + 1 for tokens in c.values()))
    return (sum(count.values()) - already) / (time.perf_counter() - begin)


def prefill_rate(engine, name: str, prompt: list[int]) -> float:
    """Tokens a second of one prompt, from its arrival to its first token."""
    begin = time.perf_counter()
    step_until(engine, add(engine, name, [prompt], 1), lambda c: all(c.values()))
    return len(prompt) / (time.perf_counter() - begin)


def environment(args: argparse.Namespace, cache: str | None) -> None:
    """Settings that vLLM reads from the environment; must run before vllm is imported."""
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(cores) < args.threads:
        sys.exit(f"--threads {args.threads}: this process may use {len(cores)} cores only")
    # Left to itself vLLM takes one thread of a physical core and keeps a core back for its front end.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cores)
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    # What 0.32.0 saves ahead of time it cannot load again here ("no attribute 'finalize_loading'"), and so
    # compiles at every start. Without it, a second start finds inductor's cache.
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if cache is not None:
        os.environ["VLLM_CACHE_ROOT"] = cache
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/inductor"


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All measures asked for, as the object that is printed."""
    before = machine()
    import vllm

    imported = process_age()
    length = max(args.context + args.decode + 1, args.prefill + 1)
    engine = vllm.LLM(
        model=str(args.folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=-(-length // 128) * 128,
        max_num_seqs=max(args.parallel),
        max_num_batched_tokens=2048,
        enforce_eager=args.eager,
        disable_log_stats=True,
    ).llm_engine
    ready = process_age()
    n_vocab = engine.model_config.get_vocab_size()
    prompts = [prompt_ids(n_vocab, args.context, seed) for seed in range(max(args.parallel))]
    step_until(engine, add(engine, "first", prompts[:1], 1), lambda c: all(c.values()))
    first_token = process_age()

    decode: dict[str, object] = {}
    for parallel in args.parallel:
        decode_rate(engine, f"warm-{parallel}", prompts[:parallel], args.warm_up)
        decode[str(parallel)] = summary(
            [
                decode_rate(engine, f"decode-{parallel}-{i}", prompts[:parallel], args.decode)
                for i in range(args.repeats)
            ]
        )
    result = {
        "engine": "vllm-cpu",
        "version": vllm.__version__,
        "model": args.folder.name,
        "dtype": "bfloat16",
        "mode": "eager" if args.eager else "compiled",
        "cache": "empty" if args.cold else "as found",
        "preload": sorted(Path(lib).name for lib in os.environ.get("LD_PRELOAD", "").split(":") if lib),
        "machine": before,
        "threads": args.threads,
        "context": args.context,
        "decode": args.decode,
        "prefill": args.prefill,
        "repeats": args.repeats,
        "imported_s": round(imported, 2),
        "ready_s": round(ready, 2),
        "first_token_s": round(first_token, 2),
        "decode_tok_s": decode,
    }
    if args.prefill:
        prompt = prompt_ids(n_vocab, args.prefill, 1000)
        prefill_rate(engine, "warm-prefill", prompt)
        result["prefill_tok_s"] = summary(
            [prefill_rate(engine, f"prefill-{i}", prompt) for i in range(args.repeats)]
        )
    # Left to the interpreter's exit, the engine's processes wait for each other for ever.
    engine.engine_core.shutdown()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Rates and start-up of vLLM's CPU build, as one JSON object."
    )
    parser.add_argument(
        "folder", type=Path, help="a Hugging Face model folder (make_hf_folder.py writes one)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=64, help="prompt tokens before decoding starts")
    parser.add_argument("--decode", type=int, default=128, help="tokens a sequence whose decoding is timed")
    parser.add_argument(
        "--parallel",
        type=int,
        nargs="+",
        default=[1, 16],
        help="sequences that decode together; several are run in turn",
    )
    parser.add_argument("--prefill", type=int, default=512, help="prompt length to time; 0 leaves it out")
    parser.add_argument(
        "--warm-up", type=int, default=16, help="tokens a sequence before the first timed run"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--eager", action="store_true", help="without torch.compile: starts sooner, decodes slower"
    )
    parser.add_argument(
        "--cold", action="store_true", help="with compile caches of this run only, empty at its start"
    )
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        sys.exit(f"no config.json in {args.folder}")
    # vLLM and its child processes log to stdout; keep that for the one JSON object.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as cache:
        environment(args, cache if args.cold else None)
        print(json.dumps(measure(args)), file=out, flush=True)


if __name__ == "__main__":
    main()
