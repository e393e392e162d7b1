"""Decode and prefill rates of llama.cpp, through llama-cpp-python's low-level (ctypes) calls.

Prints one JSON object. Knows nothing of this project's engine; `bench/peers/README.md` says how to make its
environment. The file is not called llama_cpp.py because that would hide the package of that name.
"""

import argparse
import ctypes
import json
import resource
import sys
import time
from pathlib import Path

import llama_cpp as llama
import numpy as np
from measure import machine, process_age, prompt_ids, summary


class Session:
    """A llama.cpp context for `parallel` sequences of at most `length` tokens each, on `threads` threads."""

    def __init__(self, model: int, parallel: int, length: int, threads: int) -> None:
        params = llama.llama_context_default_params()
        # Without kv_unified (the default) n_ctx is shared out evenly, and a sequence reads its own cells
        # only. llama.cpp pads a share to 256 cells.
        params.n_ctx = parallel * (-(-length // 256) * 256)
        params.n_seq_max = parallel
        params.n_threads = params.n_threads_batch = threads
        self.ctx = llama.llama_init_from_model(model, params)
        if not self.ctx:
            raise RuntimeError(f"llama.cpp made no context of {parallel} x {length} tokens")
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.capacity = max(length, parallel)
        self.batch = llama.llama_batch_init(self.capacity, 0, 1)

    def close(self) -> None:
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.ctx)

    def clear(self) -> None:
        """Forget every sequence."""
        llama.llama_memory_clear(llama.llama_get_memory(self.ctx), True)

    def forward(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """One llama_decode over rows of (token, position, sequence, wants logits).

        Returns the greedy next token of each row that wanted logits, in the order of the rows. Raises
        RuntimeError with llama.cpp's code.
        """
        if len(rows) > self.capacity:
            raise ValueError(f"{len(rows)} rows in a batch of {self.capacity}")
        batch = self.batch
        wanted = 0
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
            wanted += logits
        batch.n_tokens = len(rows)
        code = llama.llama_decode(self.ctx, batch)
        if code:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens answered {code}")
        # Waits for the step; the rows that wanted logits lie one behind the other.
        logits = llama.llama_get_logits(self.ctx)
        table = np.ctypeslib.as_array(logits, shape=(wanted, self.n_vocab))
        return [int(token) for token in table.argmax(axis=1)]

    def prefill(self, prompt: list[int], sequence: int) -> int:
        """Run a whole prompt as one batch; returns the greedy token after it."""
        last = len(prompt) - 1
        return self.forward([(token, i, sequence, i == last) for i, token in enumerate(prompt)])[0]


def decode_rate(session: Session, prompts: list[list[int]], steps: int) -> float:
    """Tokens a second, all sequences together, of `steps` decode steps that follow the prompts.

    A step is one llama_decode with one token of every sequence. Prompts are run before the clock starts.
    """
    session.clear()
    tokens = [session.prefill(prompt, sequence) for sequence, prompt in enumerate(prompts)]
    context = len(prompts[0])
    begin = time.perf_counter()
    for step in range(steps):
        rows = [(token, context + step, sequence, True) for sequence, token in enumerate(tokens)]
        tokens = session.forward(rows)
    return len(prompts) * steps / (time.perf_counter() - begin)


def prefill_rate(session: Session, prompt: list[int]) -> float:
    """Tokens a second of one prompt from an empty cache to its greedy next token."""
    session.clear()
    begin = time.perf_counter()
    session.prefill(prompt, 0)
    return len(prompt) / (time.perf_counter() - begin)


@llama.llama_log_callback
def silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Takes llama.cpp's log lines and drops them."""


def load(path: Path) -> int:
    """The model at `path`, memory-mapped, all of it on the CPU. Raises RuntimeError if llama.cpp refuses."""
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}; --verbose shows why")
    return model


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All measures asked for, as the object that is printed."""
    before = machine()
    model = load(args.model)
    loaded = process_age()
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    result: dict[str, object] = {
        "engine": "llama.cpp",
        "version": f"llama-cpp-python {llama.__version__}",
        "build": llama.llama_print_system_info().decode().strip(" |"),
        "model": args.model.name,
        "machine": before,
        "threads": args.threads,
        "context": args.context,
        "decode": args.decode,
        "prefill": args.prefill,
        "repeats": args.repeats,
        "loaded_s": round(loaded, 2),
    }
    decode: dict[str, object] = {}
    for parallel in args.parallel:
        session = Session(model, parallel, args.context + args.decode + 1, args.threads)
        prompts = [prompt_ids(n_vocab, args.context, seed) for seed in range(parallel)]
        if "first_token_s" not in result:
            session.prefill(prompts[0], 0)
            result["first_token_s"] = round(process_age(), 2)
        decode_rate(session, prompts, args.warm_up)
        decode[str(parallel)] = summary(
            [decode_rate(session, prompts, args.decode) for _ in range(args.repeats)]
        )
        session.close()
    result["decode_tok_s"] = decode
    if args.prefill:
        session = Session(model, 1, args.prefill + 1, args.threads)
        prompt = prompt_ids(n_vocab, args.prefill, 1000)
        prefill_rate(session, prompt)
        result["prefill_tok_s"] = summary([prefill_rate(session, prompt) for _ in range(args.repeats)])
        session.close()
    # Kibibytes on Linux; given in MB of 10^6 bytes, the mapped weights included.
    result["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode and prefill rates of llama.cpp, as one JSON object.")
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=64, help="prompt tokens before decoding starts")
    parser.add_argument("--decode", type=int, default=128, help="decode steps that are timed")
    parser.add_argument(
        "--parallel",
        type=int,
        nargs="+",
        default=[1, 16],
        help="sequences that decode together; several are run in turn",
    )
    parser.add_argument("--prefill", type=int, default=512, help="prompt length to time; 0 leaves it out")
    parser.add_argument("--warm-up", type=int, default=16, help="decode steps before the first timed run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--verbose", action="store_true", help="let llama.cpp log to stderr")
    args = parser.parse_args()
    if not args.model.is_file():
        sys.exit(f"no such file: {args.model}")
    if not args.verbose:
        llama.llama_log_set(silent, None)
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
