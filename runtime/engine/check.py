"""Integrity of the scheduler's state: every block and slot accounted for exactly once.

Recounts from the tables what the scheduler keeps incrementally. Knows nothing of how it got there.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from runtime.engine.blocks import BlockPool

if TYPE_CHECKING:
    from runtime.engine.scheduler import Scheduler


class IntegrityError(AssertionError):
    """The engine's state, or a result it was given, contradicts itself: a defect, never a user's fault."""


def fail_unless(holds: bool, problem: str) -> None:
    if not holds:
        raise IntegrityError(problem)


def check_scheduler(scheduler: Scheduler) -> None:
    """Raises IntegrityError with what is wrong."""
    running = scheduler.running
    held = [table for tables in scheduler.held.values() for table in tables]
    check_pool(scheduler.pool, Counter(b for table in [*(s.table for s in running), *held] for b in table))
    _check_slots(scheduler)
    _check_sequences(scheduler)
    steps = [plan.step for plan, _, _ in scheduler.in_flight]
    fail_unless(len(steps) <= scheduler.steps_in_flight, f"plans {steps} in flight")
    fail_unless(
        steps == list(range(scheduler.done + 1, scheduler.step + 1)),
        f"plans {steps} in flight, but {scheduler.done} is done and {scheduler.step} was the last",
    )
    fail_unless(set(scheduler.held) <= set(steps), f"blocks held for plans {list(scheduler.held)}")


def check_pool(pool: BlockPool, holders: Counter[int]) -> None:
    """`holders`: how many tables hold each block."""
    empty = pool.empty.ids()
    fail_unless(len(empty) == pool.empty.count, f"{len(empty)} empty blocks, counted {pool.empty.count}")
    for start, length in pool.empty.length_at.items():
        fail_unless(start + length not in pool.empty.length_at, f"runs meet at {start + length}")
    for block in range(pool.total):
        count = pool.references[block]
        fail_unless(count == holders[block], f"block {block}: {count} references, {holders[block]} holders")
        places = (count > 0) + (block in pool.cached) + (block in empty)
        fail_unless(places == 1, f"block {block} is in {places} of held, cached and empty")
        fail_unless(block not in pool.cached or block in pool.key_of, f"cached block {block} has no key")
        fail_unless(block not in empty or block not in pool.key_of, f"empty block {block} has a key")
    fail_unless(
        {block: key for key, block in pool.block_of.items()} == pool.key_of, "keys and blocks do not match"
    )


def _check_slots(scheduler: Scheduler) -> None:
    used = [sequence.slot for sequence in scheduler.running]
    fail_unless(
        sorted(used + scheduler.free_slots) == list(range(scheduler.slots)),
        f"slots {used} used, {scheduler.free_slots} free",
    )
    fail_unless(
        len(set(scheduler.ends)) == len(scheduler.ends) and set(scheduler.ends) <= set(scheduler.free_slots),
        f"slots {scheduler.ends} to end, {scheduler.free_slots} free",
    )


def _check_sequences(scheduler: Scheduler) -> None:
    size = scheduler.config.block_size
    orders = [sequence.order for sequence in scheduler.running]
    fail_unless(orders == sorted(orders), "the running sequences are out of order")
    waiting = scheduler.waiting.live()
    fail_unless(len(waiting) == len(scheduler.waiting), "the waiting sequences are miscounted")
    tokens = sum(len(sequence.prompt) for sequence in waiting)
    fail_unless(tokens == scheduler.waiting_tokens, f"{tokens} wait, counted {scheduler.waiting_tokens}")
    in_flight = Counter(id(s) for _, samplers, _ in scheduler.in_flight for s in samplers)
    followers = [f for leader in [*scheduler.running, *waiting] for f in leader.followers]
    fail_unless(
        len(followers) == scheduler.held_back,
        f"{len(followers)} held back, counted {scheduler.held_back}",
    )
    for leader in [*scheduler.running, *waiting]:
        fail_unless(leader.leader is None, f"{leader.request.request_id} is held back, but has its turn")
        fail_unless(
            all(f.leader is leader and not f.followers and f.slot is None for f in leader.followers),
            f"{leader.request.request_id}: its followers do not follow it",
        )
        fail_unless(
            not leader.followers or leader.computed < len(leader.prompt) or leader.slot is None,
            f"{leader.request.request_id} holds others back for nothing",
        )
    for sequence in [*scheduler.running, *waiting, *followers]:
        name = sequence.request.request_id
        fail_unless(not sequence.finished, f"{name} has finished, but stays")
        fail_unless(
            sequence.total - sequence.known == in_flight[id(sequence)],
            f"{name}: {sequence.total - sequence.known} tokens expected, {in_flight[id(sequence)]} in flight",
        )
        fail_unless(
            len(sequence.prompt) + len(sequence.reply) == sequence.known <= sequence.total <= sequence.limit,
            f"{name}: {sequence.known} tokens known, {sequence.total} planned, limit {sequence.limit}",
        )
        fail_unless(
            sequence.known == sequence.limit if sequence.scores else sequence.known < sequence.limit,
            f"{name}: {sequence.known} tokens known of {sequence.limit}, but it runs on",
        )
        fail_unless(
            0 <= sequence.computed < sequence.total + sequence.scores
            and sequence.computed <= sequence.capacity,
            f"{name}: {sequence.computed} of {sequence.total} computed, room for {sequence.capacity}",
        )
        fail_unless(
            sequence.capacity == len(sequence.table) * size
            and len(set(sequence.table)) == len(sequence.table),
            f"{name}: table {sequence.table} for {sequence.capacity} positions",
        )
        fail_unless(sequence.slot is not None or not sequence.table, f"{name} waits with blocks")
        fail_unless(sequence.last_step <= scheduler.step, f"{name} is in plan {sequence.last_step}")
