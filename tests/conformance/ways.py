"""Every named way to run the whole list of requests, through the loop that serves and its ranks.

A way says what surrounds the requests and nothing of what they ask. Threads and clocks decide the details
here, as they do when users come; scenarios (`scenario.py`) are the ones that repeat to the plan.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace

from runtime.types import Branch, Load, Request
from tests.conformance.compare import (
    EVICTED,
    FOUND,
    MODEL,
    PREEMPTED,
    RIGHT,
    TEXT,
    WRONG,
    Tally,
    encode_reply,
    encode_scores,
)
from tests.conformance.models import Model, Serving
from tests.replies import ask_all, ask_choices, ask_in_turn
from tests.rule.engines import at_once, check_idle
from tests.rule.requests import named
from tests.rule.test_score import scores_of


@dataclass(frozen=True)
class Way:
    """`settings`: of the engine, with tp, pp and threads. `copies`: how often each request is in the batch.
    `rounds`: how often all is asked, one time after the other. `ask`: what is asked, by name in ASKS.
    `growing`: short prompts with long replies are asked, in a room that hardly holds one of them.
    `batch`: sequences that one plan must have sampled for. `meets`: what must be met on the way, as it is
    called in the tally; a way that did not meet it has shown nothing."""

    name: str
    settings: dict = field(default_factory=dict)
    ask: str = "together"
    copies: int = 1
    rounds: int = 1
    growing: bool = False
    batch: int = 1
    meets: tuple[str, ...] = ()


SMALL = 16  # positions a block where blocks are to be shared
TINY_BLOCK = 4  # where they are to be fought for


def ways(model: Model) -> Iterator[Way]:
    """Those that the model can run."""
    room = {"max_num_seqs": 64, "block_size": SMALL}
    per_context = -(-model.context // SMALL)
    # For the list, in which some have much to begin with, and for those that grow.
    small = {"block_size": TINY_BLOCK, "total_blocks": model.room(model.requests, TINY_BLOCK)}
    fought = {"block_size": TINY_BLOCK, "total_blocks": model.room(model.growing, TINY_BLOCK)}
    preempted = {"growing": True, "meets": (PREEMPTED,)}
    guessed = {"meets": (RIGHT.format(MODEL), WRONG.format(MODEL))}

    def batch(n: int) -> Way:
        settings = {"max_num_seqs": n, "block_size": SMALL, "max_step_tokens": 8192}
        if n > 16:
            settings["total_blocks"] = n * per_context
        return Way(f"in batches of {n}", settings, copies=-(-n // len(model.requests)), batch=n)

    made = [
        Way("one after the other", ask="in turn", meets=(RIGHT.format(TEXT),)),
        *[batch(n) for n in (2, 3, 5, 8, 16, 32, 64)],
        *[
            Way(f"chunks of {n}", {"max_chunk": n, "prefix_cache": False, "block_size": SMALL})
            for n in (1, 7, 16, 33, 64)
        ],
        Way("chunks without bound", {"max_step_tokens": 8192, "prefix_cache": False}),
        Way("a budget of 13 tokens a step", {"max_step_tokens": 13}),
        *[Way(f"blocks of {n}", {"block_size": n}) for n in (1, 8, 128)],
        Way("no prefix cache", {**room, "prefix_cache": False}, copies=2),
        Way("prefix cache, cold and warm", room, "in turn", rounds=2, meets=(FOUND,)),
        Way("prefix cache, shared while it is made", room, copies=3, meets=(FOUND,)),
        Way("prefix cache, evicted all the time", small, "in turn", rounds=2, meets=(FOUND, EVICTED)),
        Way("preempted again and again", fought, copies=2, **preempted),
        Way("preempted, in chunks of 5", {**fought, "max_chunk": 5}, copies=2, **preempted),
        Way("a small room", small, copies=2),
        Way("without guesses", {"draft_tokens": 0}),
        Way("guesses that are right", {**room, "draft": "right"}, meets=(RIGHT.format(MODEL),)),
        Way("guesses that are doubtful, one after the other", {"draft": "doubtful"}, "in turn", **guessed),
        Way(
            "guesses that are doubtful, preempted, in chunks of 5",
            {"draft": "doubtful", **fought, "max_chunk": 5},
            copies=2,
            **preempted,
        ),
        Way("two threads", {"threads": 2}),
        Way("resumed after every number of tokens", room, "resumed"),
        Way("resumed, in a small room", small, "resumed"),
        Way("three choices each", room, "choices"),
        Way("prompts scored beside replies", {**room, "max_chunk": 11}, "scores"),
    ]
    for tp in range(2, model.units + 1):
        made += [
            Way(f"{tp} ranks", {"tp": tp, "block_size": SMALL}),
            Way(
                f"{tp} ranks, preempted, in chunks of 13",
                {"tp": tp, **fought, "max_chunk": 13},
                copies=2,
                **preempted,
            ),
        ]
    made += [
        Way("2 stages", {"pp": 2, "block_size": SMALL}),
        Way(
            "2 stages, preempted, in chunks of 13",
            {"pp": 2, **fought, "max_chunk": 13},
            copies=2,
            **preempted,
        ),
        Way("a stage a layer, at most 6", {"pp": min(6, model.layers), **room}, "together", copies=2),
    ]
    if model.units > 1:
        made += [
            Way(
                "2 stages of 2 ranks, resumed after every number of tokens",
                {"pp": 2, "tp": 2, **room},
                "resumed",
            ),
            Way("2 stages of all ranks, three choices each", {"pp": 2, "tp": model.units, **room}, "choices"),
            Way("2 stages of 2 ranks, prompts scored beside replies", {"pp": 2, "tp": 2, **room}, "scores"),
            Way("2 ranks, one after the other", {"tp": 2}, "in turn", meets=(RIGHT.format(TEXT),)),
            Way("2 ranks, guesses that are doubtful", {"tp": 2, "draft": "doubtful", **room}, **guessed),
            Way(
                "all ranks, guesses that are doubtful, resumed",
                {"tp": model.units, "draft": "doubtful", **room},
                "resumed",
            ),
            Way("2 ranks, resumed after every number of tokens", {"tp": 2, **room}, "resumed"),
            Way("all ranks, three choices each", {"tp": model.units, **room}, "choices"),
        ]
    yield from made


class Idle(AssertionError):
    """A way that did not meet what it is about."""


def run_way(model: Model, way: Way, seed: int) -> Tally:
    """Serve and compare. `seed` shuffles the arrivals. Raises Idle."""
    settings = {"max_num_seqs": 16, **way.settings}
    with model.serving(**settings) as serving:
        tally = serve_way(model, way, seed, lambda: nullcontext(serving.client), serving)
        check_idle(serving)
    tally.note(EVICTED, serving.watch.evicted)
    if tally.bits:  # which says enough
        return tally
    if serving.watch.largest < way.batch:
        raise Idle(f"{way.name}: no plan sampled for more than {serving.watch.largest}")
    if missed := [name for name in way.meets if not tally.seen[name]]:
        raise Idle(f"{way.name}: no {', no '.join(missed)}")
    return tally


def serve_way(
    model: Model,
    way: Way,
    seed: int,
    connect: Callable[[], AbstractAsyncContextManager],
    serving: Serving | None = None,
) -> Tally:
    """The same against any engine with the way's settings; `connect` gives its client. `serving`: that engine
    where it is in this process, and is made to wait until all that comes together is there."""

    async def rounds() -> tuple[Tally, Load]:
        async with connect() as client:
            return await _rounds(client, model, way, seed, serving)

    tally, load = asyncio.run(rounds())
    source = MODEL if way.settings.get("draft") else TEXT
    tally.note("ways", 1)
    tally.note(PREEMPTED, load.preemptions)
    tally.note(FOUND, load.prefix_hit_tokens)
    tally.note(RIGHT.format(source), load.accepted_tokens)
    tally.note(WRONG.format(source), load.drafted_tokens - load.accepted_tokens)
    tally.differences = [f"{way.name}: {line}" for line in tally.differences]
    return tally


async def _rounds(client, model: Model, way: Way, seed: int, serving: Serving | None) -> tuple[Tally, Load]:
    tally = Tally()
    for n in range(way.rounds):
        listed = model.growing if way.growing else model.requests
        asked = [request for copy in range(way.copies) for request in named(listed, f".{n}.{copy}")]
        random.Random(f"{seed} {way.name} {n}").shuffle(asked)
        work = _ASKS[way.ask](client, model, asked)
        if serving is not None and way.ask == "together":
            for request in asked:
                model.plain.reply(request)  # which takes the processor from the engine, at the latest now
            tally.take(await at_once(serving, work, len(asked)))
        else:
            tally.take(await work)
    return tally, await client.load()


async def _together(client, model: Model, asked: list[Request]) -> Tally:
    tally = Tally()
    for request, reply in zip(asked, await ask_all(client, asked, limit=600), strict=True):
        tally.compare(request.request_id, encode_reply(reply), encode_reply(model.plain.reply(request)))
    return tally


async def _in_turn(client, model: Model, asked: list[Request]) -> Tally:
    tally = Tally()
    for request, reply in zip(asked, await ask_in_turn(client, asked, limit=600), strict=True):
        tally.compare(request.request_id, encode_reply(reply), encode_reply(model.plain.reply(request)))
    return tally


async def _resumed(client, model: Model, asked: list[Request]) -> Tally:
    """Each request goes on after each number of its tokens, all at once."""
    tally, parts, wants = Tally(), [], []
    for request in asked:
        whole = model.plain.reply(request)
        for known in range(1, len(whole.tokens)):
            branch = Branch(0, whole.tokens[:known])
            parts.append(replace(request, request_id=f"{request.request_id}+{known}", branches=(branch,)))
            wants.append(encode_reply(whole)[known:])
    for part, reply, want in zip(parts, await ask_all(client, parts, limit=600), wants, strict=True):
        tally.compare(part.request_id, encode_reply(reply), want)
    tally.note("replies resumed", len(parts))
    return tally


async def _choices(client, model: Model, asked: list[Request]) -> Tally:
    tally = Tally()
    several = [replace(r, branches=tuple(Branch(choice) for choice in range(3))) for r in asked]
    async with asyncio.timeout(600):
        found = await asyncio.gather(*(ask_choices(client, request) for request in several))
    for request, replies in zip(several, found, strict=True):
        for branch, (reply, _) in zip(request.branches, replies, strict=True):
            want = encode_reply(model.plain.reply(request, branch.choice))
            tally.compare(f"{request.request_id}, choice {branch.choice}", encode_reply(reply), want)
    return tally


async def _scores(client, model: Model, asked: list[Request]) -> Tally:
    """Half of the requests as they are, and all prompts that have something to score."""
    tally = Tally()
    texts = [
        replace(r, request_id=f"{r.request_id}?", scores=True, stop_ids=())
        for r in asked
        if len(r.prompt) > 1
    ]
    async with asyncio.timeout(600):
        scored = asyncio.gather(*(scores_of(client, text) for text in texts))
        beside, found = await asyncio.gather(_together(client, model, asked[::2]), scored)
    tally.take(beside)
    for text, scores in zip(texts, found, strict=True):
        tally.compare(text.request_id, encode_scores(scores), encode_scores(model.plain.scores(text)))
    tally.note("prompts scored", len(texts))
    return tally


_ASKS = {
    "together": _together,
    "in turn": _in_turn,
    "resumed": _resumed,
    "choices": _choices,
    "scores": _scores,
}
