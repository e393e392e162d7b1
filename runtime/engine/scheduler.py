"""Builds step plans: decode first, then prompts in chunks, then admissions; preempts when blocks run out.

Owns the waiting and running sequences, slots, blocks and plans in flight. Knows nothing of outputs or of
why a sequence ends.

What makes it safe to plan ahead is that ranks run plans in order:
- a block is findable by others once the plan that fills it was issued: whoever finds it is in a later plan;
- a slot is reused in the very plan that ends it, since ends come before starts;
- blocks are nonetheless not reused while a plan in flight names them.
What makes it progress: sequences are served in one order (priority, then arrival), a sequence takes blocks
only from those behind it, and no request is accepted that would not fit alone.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from copy import copy
from itertools import islice
from operator import attrgetter

from runtime.config import EngineConfig
from runtime.engine.allotment import allotted, decodes, pays_to_wait
from runtime.engine.blocks import BlockPool
from runtime.engine.queue import SequenceQueue
from runtime.engine.sequence import Sequence
from runtime.types import Chunk, SequenceStart, StepPlan

# Rows up to which one more costs a step little, so that guesses may fill them.
GUESSING_ROWS = 64

_by_order = attrgetter("order")


class Scheduler:
    """At most `steps_in_flight` plans are out at once."""

    def __init__(self, config: EngineConfig, steps_in_flight: int):
        self.config = config
        self.steps_in_flight = steps_in_flight
        self.budget = config.max_step_tokens
        self.max_chunk = min(config.max_chunk or self.budget, self.budget)
        # No more sequences than tokens in a step: each running one advances in every step.
        self.slots = min(config.max_num_seqs, self.budget)
        # New sequences leave this many blocks to those that run, which would else preempt them at once.
        self.headroom = config.total_blocks // 100
        self.step = 0  # the last plan issued
        self.done = 0  # the last plan completed
        self.last_admitted = 0.0  # when the last one to start had arrived
        self.preemptions = 0
        self.hit_tokens = 0
        self.query_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.reset()

    def reset(self) -> None:
        """Forgets sequences, plans and cached blocks; counters go on."""
        self.pool = BlockPool(self.config.total_blocks)
        self.waiting = SequenceQueue()
        self.waiting_tokens = 0  # prompt tokens
        self.held_back = 0  # sequences that wait for their leaders' prefill
        self.running: list[Sequence] = []  # in order
        self.free_slots = list(range(self.slots))  # heap
        self.ends: list[int] = []  # slots whose end the next plan carries
        # Plans with who samples in them, and who is scored.
        self.in_flight: deque[tuple[StepPlan, list[Sequence], list[Sequence]]] = deque()
        self.held: dict[int, list[list[int]]] = {}  # plan -> tables to release when it completes
        self.done = self.step

    # ---- a sequence comes and goes -------------------------------------------------------------

    def enqueue(self, sequence: Sequence) -> None:
        self.waiting.push(sequence.order, sequence)
        self.waiting_tokens += len(sequence.prompt)

    def hold_back(self, followers: list[Sequence], leader: Sequence) -> None:
        """Keeps sequences of the same prompt until the leader's prompt is planned: they then find its full
        blocks in the prefix cache, and compute only what is left of the last one."""
        leader.followers = followers
        for sequence in followers:
            sequence.leader = leader
        self.held_back += len(followers)

    def _let_go(self, leader: Sequence) -> None:
        """The leader's prompt is planned: its followers wait in the queue like everyone else."""
        for sequence in leader.followers:
            sequence.leader = None
            sequence.cached_tokens = leader.cached_tokens  # the request's own blocks are no hits
            self.enqueue(sequence)
        self.held_back -= len(leader.followers)
        leader.followers = []

    def remove(self, sequence: Sequence) -> None:
        """Drops a sequence that was just marked finished, whatever it does."""
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            self.held_back -= 1
        elif sequence.slot is None:
            self.waiting.note_finished()
            self.waiting_tokens -= len(sequence.prompt)
        else:
            del self.running[bisect_left(self.running, sequence.order, key=_by_order)]
            self._vacate(sequence)
        if sequence.followers:  # the next one leads
            first, *others = sequence.followers
            sequence.followers, first.leader = [], None
            first.cached_tokens = sequence.cached_tokens
            self.held_back -= 1 + len(others)
            self.enqueue(first)
            self.hold_back(others, first)

    def _vacate(self, sequence: Sequence) -> None:
        """Takes slot and blocks from a sequence that no longer stands in `running`."""
        self.ends.append(sequence.slot)
        heapq.heappush(self.free_slots, sequence.slot)
        if sequence.last_step > self.done:
            self.held.setdefault(sequence.last_step, []).append(sequence.table)
        else:
            self.pool.release(sequence.table)
        sequence.slot = None
        sequence.table = []
        sequence.capacity = 0
        sequence.computed = 0

    def _preempt_last(self) -> None:
        """Sends the last running sequence back to wait. Tokens of it in flight are still good: they are
        taken when they come, and it is not started again before."""
        victim = self.running.pop()
        self._vacate(victim)
        self.enqueue(victim)
        self.preemptions += 1

    def forget(self, sequence: Sequence) -> None:
        """Nobody finds the blocks of this sequence any more; those who share them already go on."""
        for key in sequence.block_keys:  # its blocks may be released by now
            if (block := self.pool.block_of.get(key)) is not None:
                self.pool.unname(block)

    def restart(self, sequence: Sequence) -> None:
        """Has a sequence computed anew from the tokens that are known, by itself. What is in flight for it
        is void."""
        gone = copy(sequence)
        gone.finished = True
        for _, samplers, _ in self.in_flight:
            samplers[:] = [gone if each is sequence else each for each in samplers]
        sequence.total = sequence.known
        sequence.guessing = False
        sequence.fresh = True
        if sequence.slot is not None:
            del self.running[bisect_left(self.running, sequence.order, key=_by_order)]
            self._vacate(sequence)
            self.enqueue(sequence)

    # ---- plans ---------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next plan, or None if there is nothing to do before a result comes back."""
        if len(self.in_flight) >= self.steps_in_flight or self._waits():
            return None
        step = self.step + 1
        chunks: list[Chunk] = []
        samplers: list[Sequence] = []
        filled: list[Sequence] = []  # sequences that may have full blocks to name, or others to let go
        budget = self._decode(step, chunks, samplers, filled)
        if budget and len(samplers) < len(self.running):
            budget = self._prefill(step, budget, chunks, samplers, filled)
        starts = self._admit(step, budget, chunks, samplers, filled) if budget else ()
        if not chunks and not (self.ends and not self.in_flight):
            return None
        for sequence in filled:  # only now: a plan must not read what it is itself about to write
            self.name_full_blocks(sequence)
            if sequence.followers and sequence.computed >= len(sequence.prompt):
                self._let_go(sequence)
        plan = StepPlan(step, tuple(self.ends), tuple(starts), tuple(chunks))
        self.ends.clear()
        self.step = step
        self.in_flight.append((plan, samplers, [sequence for sequence in filled if sequence.scores]))
        return plan

    def _decode(self, step: int, chunks: list, samplers: list, filled: list) -> int:
        """One token, and guesses at more, for every sequence that lacks just one; returns the budget left."""
        running = self.running
        staged = self.config.microbatches > 1
        most = -(-len(running) // self.config.microbatches)
        spare = self._spare_rows()
        counts: dict[int, int] = {}
        if spare > 0 and (staged or not self.in_flight):
            certain = (s for s in running if s.known == s.total and decodes(s))
            counts = allotted(list(islice(certain, most)), spare)
        rows = 0
        # A preemption pops from the end of `running`, never what this loop has passed.
        for sequence in running:
            start = sequence.computed
            total = sequence.total
            if total - start != 1 or total == sequence.limit:
                continue
            guesser = sequence.guesser
            steady = spare > 0 and guesser is not None and guesser.steady
            # Whoever guesses must know its last token. With stages, a plan that goes on from a token in
            # flight would wait for it at the first stage, with all others behind it. Once it has guessed,
            # nobody knows where it stands before its tokens are back.
            if sequence.known != total and (steady or staged or sequence.guessing):
                continue
            if len(chunks) == most:
                break
            new_blocks = ()
            if start == sequence.capacity:
                if not self._make_room(sequence):
                    continue
                new_blocks = self._grow(sequence, 1)
            drafts, guesses = (), 0
            if not sequence.fresh and (wanted := steady or counts.get(sequence.slot, 0)):
                drafts, guesses, more = self._guess(sequence, min(wanted, spare))
                new_blocks += more
                spare -= len(drafts) + guesses
                rows += len(drafts) + guesses
            chunks.append(Chunk(sequence.slot, start, 1, new_blocks, True, False, drafts, guesses))
            samplers.append(sequence)
            sequence.computed = total
            sequence.total = total + 1
            sequence.last_step = step
            if sequence.next_named <= sequence.known or sequence.followers:
                filled.append(sequence)
        return self.budget - len(chunks) - rows

    def _spare_rows(self) -> int:
        """Rows for guesses, once every running sequence has its one."""
        return min(self.budget, GUESSING_ROWS) - len(self.running) if self.config.draft_tokens else 0

    def _waits(self) -> bool:
        """Whether the next plan is better made once the result in flight is back. With stages, a sequence
        is in one of several plans, and waits for that alone."""
        spare = self._spare_rows() if self.in_flight and self.config.microbatches == 1 else 0
        return spare > 0 and pays_to_wait(self.running, spare)

    def _guess(self, sequence: Sequence, most: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """Up to `most` guesses at what follows a sequence's last token: tokens to try, how many to ask of the
        draft model, and blocks for them, of those that are empty."""
        # The token at `limit - 1` is sampled, never run.
        drafts, guesses = sequence.guesser.propose(min(most, sequence.limit - sequence.total - 1))
        room = sequence.capacity - sequence.total
        new_blocks = ()
        if short := max(0, -(-(len(drafts) + guesses - room) // self.config.block_size)):
            if short <= self.pool.empty.count:
                new_blocks = self._grow(sequence, short)
            else:
                drafts, guesses = drafts[:room], min(guesses, room)
        sequence.guessing = bool(drafts or guesses)
        return drafts, guesses, new_blocks

    def _grow(self, sequence: Sequence, blocks: int) -> tuple[int, ...]:
        """Gives a running sequence so many more blocks, which are there."""
        new_blocks = tuple(self.pool.take(blocks, after=sequence.table[-1]))
        sequence.table += new_blocks
        sequence.capacity += blocks * self.config.block_size
        return new_blocks

    def _make_room(self, sequence: Sequence) -> bool:
        """Tries to have a block available, preempting those behind `sequence`. False: not in this step."""
        while not self.pool.available:
            # Held tables come back by themselves; behind the last one there is no one to take from, and
            # those before it, or the held tables, will give theirs back in time.
            if self.held or self.running[-1] is sequence:
                return False
            self._preempt_last()
        return True

    def _prefill(self, step: int, budget: int, chunks: list, samplers: list, filled: list) -> int:
        """Chunks of started prompts with what decode left; their blocks were taken at admission."""
        for sequence in self.running:
            left = sequence.total - sequence.computed
            if left > 1 or (left and sequence.scores):
                budget -= self._chunk(sequence, step, budget, (), chunks, samplers, filled)
                if not budget:
                    break
        return budget

    def _chunk(
        self,
        sequence: Sequence,
        step: int,
        budget: int,
        new_blocks: tuple[int, ...],
        chunks: list,
        samplers: list,
        filled: list,
    ) -> int:
        start = sequence.computed
        length = min(sequence.total - start, budget, self.max_chunk)
        end = start + length
        samples = end == sequence.total and not sequence.scores
        chunks.append(Chunk(sequence.slot, start, length, new_blocks, samples, sequence.scores))
        sequence.computed = end
        sequence.last_step = step
        if samples:
            samplers.append(sequence)
            sequence.total += 1
        filled.append(sequence)
        return length

    def _admit(self, step: int, budget: int, chunks: list, samplers: list, filled: list) -> list:
        """Starts waiting sequences, first come first; the first that does not fit holds up the rest, so
        that no stream of small requests can starve a large one."""
        starts = []
        while budget and self.free_slots and (first := self.waiting.peek()):
            sequence = first[1]
            if sequence.known != sequence.total:  # preempted, and its last tokens are still in flight
                break
            cached = self._find_cached(sequence)
            blocks = -(-sequence.known // self.config.block_size)
            wanted = blocks - len(cached) + (self.headroom if self.running else 0)
            if self.pool.available - self.pool.idle_among(cached) < wanted:
                break
            self.waiting.pop()
            self._start(sequence, cached, blocks)
            tokens = sequence.tokens()
            request = sequence.request
            starts.append(
                SequenceStart(
                    sequence.slot,
                    tokens,
                    len(request.prompt),
                    request.params,
                    request.stop_ids,
                    sequence.choice,
                )
            )
            table = tuple(sequence.table)
            budget -= self._chunk(sequence, step, budget, table, chunks, samplers, filled)
        return starts

    def _start(self, sequence: Sequence, cached: list[int], blocks: int) -> None:
        """Gives a sequence its slot and all blocks its known tokens need: at once, so that they can be
        contiguous, and so that a prompt never waits half way for blocks."""
        size = self.config.block_size
        self.waiting_tokens -= len(sequence.prompt)
        self.last_admitted = sequence.arrived
        self.pool.share(cached)
        new = self.pool.take(blocks - len(cached), after=cached[-1] if cached else None)
        sequence.table = cached + new
        sequence.shared = len(cached)
        sequence.capacity = blocks * size
        sequence.computed = len(cached) * size
        sequence.next_named = sequence.computed + size
        sequence.slot = heapq.heappop(self.free_slots)
        insort(self.running, sequence, key=_by_order)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, len(sequence.prompt))
            self.hit_tokens += sequence.computed
            self.query_tokens += sequence.known

    # ---- the prefix cache ----------------------------------------------------------------------

    def _find_cached(self, sequence: Sequence) -> list[int]:
        """Cached blocks a sequence can start from; at least one token is left to compute."""
        full = (sequence.known - 1) // self.config.block_size
        if not self.config.prefix_cache or not full or sequence.scores or sequence.fresh:
            return []
        sequence.key_of_block(full - 1, self.config.block_size)
        return self.pool.find(sequence.block_keys[:full])

    def name_full_blocks(self, sequence: Sequence) -> None:
        """Makes a running sequence's blocks findable whose tokens are all known and computed or planned."""
        if not self.config.prefix_cache or sequence.fresh:
            return
        size = self.config.block_size
        end = min(sequence.known, sequence.computed)
        while sequence.next_named <= end:
            index = sequence.next_named // size - 1
            self.pool.name(sequence.table[index], sequence.key_of_block(index, size))
            sequence.next_named += size

    # ---- results -------------------------------------------------------------------------------

    def complete(self) -> tuple[list[Sequence], list[Sequence]]:
        """The oldest plan in flight is done: frees what only it still named, returns who sampled in it and
        who was scored, in the order of its chunks."""
        plan, samplers, scored = self.in_flight.popleft()
        self.done = plan.step
        for table in self.held.pop(plan.step, ()):
            self.pool.release(table)
        return samplers, scored

    def settle(self, sequence: Sequence, chunk: Chunk, sampled: int) -> None:
        """`sampled` tokens came of a chunk of a live sequence: one, and one for each guess that was right."""
        right = sampled - 1
        sequence.total += right
        if sequence.slot is not None:  # else it was preempted meanwhile
            sequence.computed += right
        if drafted := len(chunk.drafts) + chunk.guesses:
            sequence.guessing = False
            sequence.guesser.settle(len(chunk.drafts), chunk.guesses, right)
            self.drafted_tokens += drafted
            self.accepted_tokens += right
