"""`tramontane compare`: how two models, or two quantisations of one, differ on given prompts.

One after the other they score every prompt and reply to it, in this process. The first one's logits wait in
a temporary file, so that what is compared is exact over the whole vocabulary and no two models need memory at
once.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.commands.divergence import (
    Divergence,
    divergence,
    first_difference,
    joined,
    kl_curve,
)
from runtime.commands.engines import Front, open_front, preview
from runtime.commands.output import loading, working, write_json
from runtime.config import EngineConfig, ModelConfig, ParallelConfig, ServeConfig
from runtime.errors import InvalidArgument, NotEnough, NotFound, Unavailable
from runtime.model.device import resolve_device
from runtime.sizes import show_size
from runtime.tokenizer import Tokenizer
from runtime.types import EngineInfo, Finished, FinishReason, Request, SamplingParams, TokenOutput


@dataclass(frozen=True, slots=True)
class Work:
    """What is compared on."""

    prompts: Path
    max_tokens: int  # of each greedy reply
    plot: Path | None


@dataclass(frozen=True, slots=True)
class Ran:
    """What a model did."""

    info: EngineInfo
    replies: list[list[int]]  # tokens of the greedy reply to each prompt


class Watcher(Protocol):
    def __call__(self, logits, tokens: Sequence[int]) -> None: ...


def compare(a: ModelConfig, b: ModelConfig, parallel: ParallelConfig, work: Work, *, as_json: bool) -> None:
    """Print a table, or JSON, and write the plot if one is asked for. Raises TramontaneError."""
    if work.max_tokens < 0:
        raise InvalidArgument("max-tokens", f"must be at least 0, not {work.max_tokens}")
    if work.plot is not None and not work.plot.parent.is_dir():
        raise NotFound("folder", str(work.plot.parent), "it is to hold the plot")
    texts = read_prompts(work.prompts)
    device = resolve_device(parallel.device)
    fronts = [open_front(model, chat=False, device=device) for model in (a, b)]
    first, second = (front.tokenizer for front in fronts)
    check_vocabularies(first, second)
    prompts = encode_alike(first, second, texts)
    configs = [_config(model, parallel, front, prompts) for model, front in zip((a, b), fronts, strict=True)]

    rows = sum(len(prompt) - 1 for prompt in prompts)
    with tempfile.TemporaryFile() as file:
        sides = _Sides(file, rows, first.vocab_size)
        ran_a = _run("A", configs[0], fronts[0], prompts, work.max_tokens, sides.keep)
        ran_b = _run("B", configs[1], fronts[1], prompts, work.max_tokens, sides.hold_against)
        found = joined(sides.found)
    value = report((a, ran_a), (b, ran_b), prompts, texts, found, work.max_tokens)
    if work.plot is not None:
        title = f"A: {ran_a.info.model}   B: {ran_b.info.model}   {rows} tokens"
        work.plot.write_text(kl_curve(found.kl, title), encoding="utf-8")
    if as_json:
        write_json(value)
    else:
        _show(value)


class _Sides:
    """Keeps A's rows of logits in a file, then holds B's against them; they come in the same order twice.
    Columns that pad an embedding past its vocabulary are no tokens and do not count."""

    def __init__(self, file: BinaryIO, rows: int, vocab: int):
        """Raises NotEnough where the file would not fit."""
        needed, folder = rows * vocab * 4, tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise NotEnough(
                f"logits of {rows} tokens take {show_size(needed)} and {folder} has {show_size(free)}: "
                "give fewer prompts, or set TMPDIR"
            )
        self.found: list[Divergence] = []
        self._kept = np.memmap(file, np.float32, "w+", shape=(rows, vocab))
        self._at = 0

    def keep(self, logits, tokens: Sequence[int]) -> None:
        self._kept[self._next(len(tokens))] = self._cut(logits)

    def hold_against(self, logits, tokens: Sequence[int]) -> None:
        self.found.append(divergence(self._kept[self._next(len(tokens))], self._cut(logits), tokens))

    def _next(self, count: int) -> slice:
        start = self._at % len(self._kept)
        self._at += count
        return slice(start, start + count)

    def _cut(self, logits) -> NDArray[np.float32]:
        return logits[:, : self._kept.shape[1]].cpu().numpy()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line each or, in a .jsonl, a JSON string or an object with "text" a line;
    empty lines are skipped. Raises NotFound, InvalidArgument naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NotFound("file of prompts", str(path), "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("prompts", f"{path} cannot be read: {error}") from None
    found: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line)
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InvalidArgument("prompts", f"line {number} of {path} is not JSON: {error}") from None
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise InvalidArgument("prompts", f'line {number} of {path}: neither a string nor {{"text": ...}}')
        found.append(text)
    if not found:
        raise InvalidArgument("prompts", f"{path} holds none")
    return found


def check_vocabularies(a: Tokenizer, b: Tokenizer) -> None:
    """Refuse two vocabularies that are not the same, saying where they first differ."""
    differ = [
        token
        for token in range(min(a.vocab_size, b.vocab_size))
        if a.token_bytes(token) != b.token_bytes(token) or a.is_special(token) != b.is_special(token)
    ]
    if not differ and a.vocab_size == b.vocab_size:
        return
    words = [
        f"{token} is {a.token_bytes(token)!r} in A and {b.token_bytes(token)!r} in B" for token in differ[:3]
    ]
    if a.vocab_size != b.vocab_size:
        words.append(f"A has {a.vocab_size} tokens and B {b.vocab_size}")
    if differ:
        words.insert(0, f"{len(differ)} ids differ")
    raise InvalidArgument("vocabulary", "the models have different ones: " + "; ".join(words))


def encode_alike(a: Tokenizer, b: Tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of each text, which must be the same for both. Raises InvalidArgument."""
    prompts: list[tuple[int, ...]] = []
    for number, text in enumerate(texts, start=1):
        tokens, other = a.encode(text), b.encode(text)
        at = first_difference(tokens, other)
        if at is not None:
            raise InvalidArgument(
                "prompts", f"the models cut prompt {number} into other tokens from token {at} on"
            )
        if len(tokens) < 2:
            raise InvalidArgument(
                "prompts", f"prompt {number} is a single token; only those after it are compared"
            )
        prompts.append(tuple(tokens))
    return prompts


def _config(
    model: ModelConfig, parallel: ParallelConfig, front: Front, prompts: Sequence[Sequence[int]]
) -> ServeConfig:
    config = ServeConfig(model, EngineConfig(max_num_seqs=1, prefix_cache=False), parallel)
    context = preview(front, config).context_length
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > context:
            raise InvalidArgument(
                "prompts",
                f"prompt {number} has {len(prompt)} tokens; the context of {model.path} is {context}",
            )
    return config


def _run(
    name: str,
    config: ServeConfig,
    front: Front,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    watch: Watcher,
) -> Ran:
    """Load a model, show `watch` the logits of every prompt in order, and reply to each."""
    with working("importing torch"):
        from runtime.local import LocalEngine
    with loading(f"loading {name}") as progress:
        engine = LocalEngine(config.model, config.engine, config.parallel, progress=progress, watch=watch)
    try:
        with working(f"{name}: scoring") as say:
            return asyncio.run(_ask(name, engine, prompts, max_tokens, front.tokenizer.eos_ids, say))
    finally:
        engine.close()


async def _ask(name: str, engine, prompts, max_tokens: int, eos_ids, say) -> Ran:
    info = await engine.client.info()
    replies: list[list[int]] = []
    for number, prompt in enumerate(prompts, start=1):
        say(f"{name}: prompt {number} of {len(prompts)}")
        greedy = SamplingParams(temperature=0.0, seed=0)
        await _tokens(engine.client, Request(f"score-{number}", prompt, greedy, scores=True))
        room = min(max_tokens, info.context_length - len(prompt))
        tokens: list[int] = []
        if room > 0:
            params = replace(greedy, max_tokens=room)
            tokens = await _tokens(
                engine.client, Request(f"reply-{number}", prompt, params, stop_ids=tuple(eos_ids))
            )
        replies.append(tokens)
    return Ran(info, replies)


async def _tokens(client, request: Request) -> list[int]:
    tokens: list[int] = []
    async for output in client.generate(request):
        if isinstance(output, TokenOutput):
            tokens.append(output.token)
        elif isinstance(output, Finished) and output.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise Unavailable(output.detail or "the engine failed")
    return tokens


def report(
    a: tuple[ModelConfig, Ran],
    b: tuple[ModelConfig, Ran],
    prompts: Sequence[tuple[int, ...]],
    texts: Sequence[str],
    rows: Divergence,
    max_tokens: int,
) -> dict:
    """All that was found, in plain values."""
    each = []
    at = 0
    for prompt, text, one, other in zip(prompts, texts, a[1].replies, b[1].replies, strict=True):
        part = rows.part(at, at + len(prompt) - 1)
        at += len(prompt) - 1
        each.append(
            {"prompt": text}
            | part.summary()
            | {"reply_tokens": [len(one), len(other)], "first_divergence": first_difference(one, other)}
        )
    parted = sorted(entry["first_divergence"] for entry in each if entry["first_divergence"] is not None)
    return {
        "a": _model_json(*a),
        "b": _model_json(*b),
        **rows.summary(),
        "replies": {
            "max_tokens": max_tokens,
            "identical": len(each) - len(parted),
            "of": len(each),
            "first_divergence_min": parted[0] if parted else None,
            "first_divergence_median": parted[len(parted) // 2] if parted else None,
        },
        "prompts": each,
    }


def _model_json(model: ModelConfig, ran: Ran) -> dict:
    return {"model": ran.info.model, "path": model.path, "numerics": ran.info.numerics}


def _show(value: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for name in ("a", "b"):
        model = value[name]
        console.print(f"{name.upper()}: {model['model']}, {model['path']}, {model['numerics']}", markup=False)
    replies = value["replies"]
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("tokens compared", f"{value['tokens']} of {replies['of']} prompts")
    facts.add_row("same most likely token", f"{100 * value['top1_agreement']:.2f}%")
    facts.add_row("KL(A || B) a token", _nats(value))
    facts.add_row("perplexity", f"A {value['perplexity_a']:.4f}   B {value['perplexity_b']:.4f}")
    if replies["max_tokens"]:
        facts.add_row(
            "greedy replies",
            f"{replies['identical']} of {replies['of']} the same over {replies['max_tokens']} tokens"
            + (
                f"; the others part after {replies['first_divergence_min']} at the least, "
                f"{replies['first_divergence_median']} in the middle"
                if replies["identical"] < replies["of"]
                else ""
            ),
        )
    console.print(facts)
    table = Table(box=None)
    table.add_column("prompt", no_wrap=True)
    for name in ("tokens", "same", "KL mean", "KL max", "ppl A", "ppl B", "part at"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    for entry in value["prompts"]:
        after = entry["first_divergence"]
        table.add_row(
            _short(entry["prompt"]),
            str(entry["tokens"]),
            f"{100 * entry['top1_agreement']:.1f}%",
            f"{entry['kl_mean']:.1e}",
            f"{entry['kl_max']:.1e}",
            f"{entry['perplexity_a']:.3f}",
            f"{entry['perplexity_b']:.3f}",
            "-" if after is None else str(after),
        )
    console.print(table)


def _nats(value: dict) -> str:
    names = ("mean", "median", "p99", "max")
    return "   ".join(f"{name} {value['kl_' + name]:.3e}" for name in names) + "   nats"


def _short(text: str) -> str:
    from rich.markup import escape

    line = " ".join(text.split())
    return escape(line if len(line) <= 16 else line[:15] + "…")
