"""`tramontane compare`: how two models, or two quantisations of one, differ on given prompts.

One after the other they score every prompt and reply to it, in this process. The first one's logits wait in
a temporary file, so that what is compared is exact over the whole vocabulary and no two models need memory at
once.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.commands.compare_plot import plot_file
from runtime.commands.compare_prompts import check_vocabularies, encode_alike, read_prompts
from runtime.commands.compare_table import show
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
from runtime.errors import InvalidArgument, NotEnough, Unavailable
from runtime.model.device import resolve_device
from runtime.sizes import show_size
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
    """Print a table, or JSON, then write the plot if one is asked for. Raises TramontaneError."""
    if work.max_tokens < 0:
        raise InvalidArgument("max-tokens", f"must be at least 0, not {work.max_tokens}")
    texts = read_prompts(work.prompts)
    with nullcontext() if work.plot is None else plot_file(work.plot) as draw:
        value, found = _compare(a, b, parallel, texts, work.max_tokens)
        try:  # neither is lost with the other: it may all have taken hours
            write_json(value) if as_json else show(value)
        finally:
            if draw is not None:
                names = f"A: {value['a']['model']}   B: {value['b']['model']}"
                draw(kl_curve(found.kl, f"{names}   {value['tokens']} tokens"))


def _compare(
    a: ModelConfig, b: ModelConfig, parallel: ParallelConfig, texts: Sequence[str], max_tokens: int
) -> tuple[dict, Divergence]:
    """The report, and what it was made of: an entry for every token of a prompt but its first."""
    device = resolve_device(parallel.device)
    fronts = [open_front(model, chat=False, device=device) for model in (a, b)]
    first, second = (front.tokenizer for front in fronts)
    check_vocabularies(first, second)
    prompts = encode_alike(first, second, texts)
    configs = [_config(model, parallel, front, prompts) for model, front in zip((a, b), fronts, strict=True)]

    rows = sum(len(prompt) - 1 for prompt in prompts)
    with tempfile.TemporaryFile() as file:
        sides = _Sides(file, rows, first.vocab_size)
        ran_a = _run("A", configs[0], fronts[0], prompts, max_tokens, sides.keep)
        ran_b = _run("B", configs[1], fronts[1], prompts, max_tokens, sides.hold_against)
        found = joined(sides.found)
    return report((a, ran_a), (b, ran_b), prompts, texts, found, max_tokens), found


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
    """All that was found, in plain values. Replies are held against each other as far as both models'
    contexts let them go; where one leaves no room at all, there is none."""
    context = min(a[1].info.context_length, b[1].info.context_length)
    each = []
    at = made = 0
    for prompt, text, one, other in zip(prompts, texts, a[1].replies, b[1].replies, strict=True):
        part = rows.part(at, at + len(prompt) - 1)
        at += len(prompt) - 1
        room = min(max_tokens, context - len(prompt))
        made += room > 0
        one, other = one[:room], other[:room]
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
            "identical": made - len(parted) if made else None,
            "of": made,
            "first_divergence_min": parted[0] if parted else None,
            "first_divergence_median": parted[len(parted) // 2] if parted else None,
        },
        "prompts": each,
    }


def _model_json(model: ModelConfig, ran: Ran) -> dict:
    return {"model": ran.info.model, "path": model.path, "numerics": ran.info.numerics}
