"""The life of requests: admission checks, tokens out, and exactly one end for each.

Events are method calls, their outputs are returned at once; nothing here blocks. The caller owns the clock
(`now`, seconds, monotonic) and carries plans to the ranks and results back, in order. Knows nothing of how
either travels, nor of text: stop strings are the gateway's, which ends a request with `abort(keep=n)`.
"""

from __future__ import annotations

from itertools import takewhile

from runtime.config import EngineConfig
from runtime.engine.check import IntegrityError, check_scheduler, fail_unless
from runtime.engine.queue import SequenceQueue
from runtime.engine.scheduler import GUESSING_ROWS, Scheduler
from runtime.engine.sequence import Sequence
from runtime.engine.speculation import Guesser
from runtime.errors import InvalidArgument, QueueFull
from runtime.types import (
    Branch,
    Chunk,
    Finished,
    FinishReason,
    Load,
    Output,
    Request,
    SampledToken,
    ScoreOutput,
    StepPlan,
    StepResult,
    TokenOutput,
)

STEPS_IN_FLIGHT = 2  # the one that runs and the one behind it

_POSITIVE = (
    "block_size",
    "total_blocks",
    "max_num_seqs",
    "max_step_tokens",
    "max_chunk",
    "max_model_len",
    "max_waiting",
    "microbatches",
)


NO_NUMBER = "the model's logits hold NaN or infinity here, or allow no token"


class Engine:
    """A replica's scheduler and the state of every reply it has accepted.

    Raises InvalidArgument if a setting of `config` cannot work."""

    def __init__(self, config: EngineConfig, steps_in_flight: int = STEPS_IN_FLIGHT):
        for name in _POSITIVE:
            value = getattr(config, name)
            if value is not None and value < 1:
                raise InvalidArgument(name, f"must be at least 1, not {value}")
        if not 0 <= config.draft_tokens < GUESSING_ROWS:
            raise InvalidArgument(
                "draft_tokens", f"must be from 0 to {GUESSING_ROWS - 1}, not {config.draft_tokens}"
            )
        self.config = config
        self._scheduler = Scheduler(config, steps_in_flight)
        self._live: dict[str, list[Sequence]] = {}  # replies that have not ended, in order of arrival
        self._deadlines = SequenceQueue()
        self._arrivals = 0
        self._lost_step = 0  # results up to this plan are void
        self._last_wait = 0.0  # seconds the last admitted request had waited

    # ---- requests ------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> list[Output]:
        """Accepts a request. A reply ends with LENGTH at max_tokens or at the end of the context.

        The prompt is computed for the first branch; the others begin once that is planned.
        Raises InvalidArgument naming what can never be served, QueueFull when too many wait already."""
        if request.request_id in self._live:
            raise InvalidArgument("request_id", f"{request.request_id!r} is already being served")
        limit = self._score_limit(request) if request.scores else self._limit(request)
        if not request.scores:
            self._check_branches(request, limit)
        scheduler = self._scheduler
        waiting = len(scheduler.waiting) + scheduler.held_back
        if waiting + len(request.branches) > self.config.max_waiting:
            raise QueueFull(self._retry_after(now))
        sequences = []
        for branch in request.branches:
            self._arrivals += 1
            sequences.append(Sequence(request, branch, self._arrivals, now, limit))
            if request.deadline is not None:
                self._deadlines.push((request.deadline, self._arrivals), sequences[-1])
        self._live[request.request_id] = sequences
        scheduler.enqueue(sequences[0])
        scheduler.hold_back(sequences[1:], sequences[0])
        return self.tick(now)

    def _limit(self, request: Request) -> int:
        """Most tokens of prompt and one reply together; refuses what can never be served."""
        prompt = len(request.prompt)
        context = self.config.max_model_len
        size = self.config.block_size
        capacity = self.config.total_blocks * size
        max_tokens = request.params.max_tokens
        if not prompt:
            raise InvalidArgument("prompt", "has no tokens")
        if prompt >= context:
            raise InvalidArgument("prompt", f"{prompt} tokens leave no room for a reply in {context}")
        if prompt > capacity:
            raise InvalidArgument("prompt", f"{prompt} tokens, but the KV cache holds {capacity}")
        if max_tokens is not None and max_tokens < 1:
            raise InvalidArgument("max_tokens", f"must be at least 1, not {max_tokens}")
        limit = context if max_tokens is None else min(context, prompt + max_tokens)
        # The last token is sampled and sent, but never run through the model.
        if limit - 1 > capacity:
            raise InvalidArgument(
                "max_tokens",
                f"{limit - prompt} after a prompt of {prompt} tokens: the KV cache holds {capacity}",
            )
        return limit

    def _score_limit(self, request: Request) -> int:
        """Tokens to run through the model for the scores of a prompt; refuses what can never be served."""
        prompt, context = len(request.prompt), self.config.max_model_len
        capacity = self.config.total_blocks * self.config.block_size
        if prompt < 2:
            raise InvalidArgument("prompt", f"has {prompt} tokens; only those after the first have scores")
        if prompt > context or prompt - 1 > capacity:
            raise InvalidArgument("prompt", f"{prompt} tokens are more than {min(context, capacity + 1)}")
        if request.branches != (Branch(),):
            raise InvalidArgument("branches", "a prompt that is scored has no replies")
        return prompt - 1

    def _check_branches(self, request: Request, limit: int) -> None:
        choices = [branch.choice for branch in request.branches]
        if not choices or len(set(choices)) < len(choices) or not all(0 <= c < 2**32 for c in choices):
            raise InvalidArgument("branches", f"choices {choices[:8]} are not distinct numbers below 2**32")
        if len(choices) > self.config.max_waiting:
            raise InvalidArgument("n", f"{len(choices)} replies; at most {self.config.max_waiting} can wait")
        ending = frozenset(request.stop_ids)
        for choice, reply in ((branch.choice, branch.reply) for branch in request.branches):
            if len(request.prompt) + len(reply) >= limit:
                most = limit - len(request.prompt)
                raise InvalidArgument(
                    f"resume.choices[{choice}]", f"{len(reply)} tokens leave none to compute of {most}"
                )
            stops = (i for i, t in enumerate(reply) if t in ending)
            if any(i >= request.params.min_tokens for i in stops):
                raise InvalidArgument(f"resume.choices[{choice}]", "holds a token that ends the reply")

    def _retry_after(self, now: float) -> float:
        """Seconds in which about a tenth of the queue should have been admitted."""
        first = self._scheduler.waiting.peek()
        stalled = now - first[1].arrived if first else 0.0
        return min(max(max(self._last_wait, stalled) / 10, 0.1), 30.0)

    def abort(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.CANCELLED,
        keep: int | None = None,
        choice: int | None = None,
    ) -> list[Output]:
        """Ends a request, or one of its replies alone, at once; no outputs if it is unknown or has ended.
        `keep`: how many of the tokens sent count as the reply (all of them if None), InvalidArgument if
        more than were sent."""
        ending = [s for s in self._live.get(request_id, ()) if choice is None or s.choice == choice]
        for sequence in ending:
            if keep is not None and not 0 <= keep <= len(sequence.reply):
                raise InvalidArgument("keep", f"{keep} of {len(sequence.reply)} tokens sent")
        # Those that are held back go before their leader.
        return [self._finish(sequence, reason, keep=keep) for sequence in reversed(ending)]

    def tick(self, now: float) -> list[Output]:
        """Ends every request whose deadline has come."""
        outputs: list[Output] = []
        while (first := self._deadlines.peek()) and first[0][0] <= now:
            outputs.append(self._finish(first[1], FinishReason.DEADLINE))
        return outputs

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        keep: int | None = None,
        stop_token: int | None = None,
        detail: str = "",
    ) -> Finished:
        request_id = sequence.request.request_id
        left = self._live[request_id]
        left.remove(sequence)
        if not left:
            del self._live[request_id]
        sequence.finished = True
        self._scheduler.remove(sequence)
        if sequence.request.deadline is not None:
            self._deadlines.note_finished()
        return Finished(
            request_id=request_id,
            reason=reason,
            prompt_tokens=len(sequence.request.prompt),
            cached_tokens=sequence.cached_tokens or 0,
            completion_tokens=len(sequence.reply) if keep is None else keep,
            stop_token=stop_token,
            detail=detail,
            choice=sequence.choice,
            last=not left,
            drafted_tokens=sequence.guesser.drafted if sequence.guesser else 0,
            accepted_tokens=sequence.guesser.accepted if sequence.guesser else 0,
        )

    # ---- steps ---------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step for the ranks, or None: nothing to do, or nothing before a result comes back.
        A plan may have no chunks, to end slots when idle; its result has no tokens."""
        plan = self._scheduler.plan()
        if plan is not None and plan.starts:
            self._last_wait = now - self._scheduler.last_admitted
        return plan

    def step_finished(self, result: StepResult, now: float) -> list[Output]:
        """The tokens and scores of the oldest plan in flight, and what ends with them or by its deadline.

        Raises IntegrityError if the result is not that plan's. Results of plans that were lost with their
        ranks are ignored."""
        if result.step <= self._lost_step:
            return []
        scheduler = self._scheduler
        plan = scheduler.in_flight[0][0] if scheduler.in_flight else None
        expected = plan.step if plan else None
        fail_unless(result.step == expected, f"result of step {result.step}, expected {expected}")
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        answers = _by_chunk(sampling, result)
        scoring = [chunk for chunk in plan.chunks if chunk.scores]
        lengths = [len(scores) for scores in result.scores]
        fail_unless(
            [chunk.length for chunk in scoring] == lengths, f"step {plan.step} scored runs of {lengths}"
        )
        samplers, scored = scheduler.complete()
        outputs: list[Output] = []
        for sequence, chunk, scores in zip(scored, scoring, result.scores, strict=True):
            # After a preemption, what was sent already is computed once more.
            new = scores[sequence.scored - chunk.start :]
            if sequence.finished or not new:
                continue
            sound = tuple(takewhile(lambda entry: entry.logprob == entry.logprob, new))  # not NaN
            if sound:
                first = sequence.scored + 1
                sequence.scored += len(sound)
                outputs.append(ScoreOutput(sequence.request.request_id, first, sound))
            if len(sound) < len(new):
                self._spoiled(sequence, False, outputs)
            elif sequence.scored == sequence.limit:
                outputs.append(self._finish(sequence, FinishReason.LENGTH))
        for sequence, chunk, tokens in zip(samplers, sampling, answers, strict=True):
            if not sequence.finished:  # else it ended while its tokens were in flight
                scheduler.settle(sequence, chunk, len(tokens))
                self._take(sequence, bool(chunk.drafts or chunk.guesses), tokens, outputs)
        return outputs + self.tick(now)

    def _spoiled(self, sequence: Sequence, guessed: bool, outputs: list[Output]) -> None:
        """Its logits hold no number. In a step, NaN of later positions reaches earlier ones: so it may have
        that from blocks it shares, whose text went on otherwise, or from a guess. It fails only of itself,
        and with it other replies to the same prompt that have not begun."""
        self._scheduler.forget(sequence)
        if (sequence.shared or guessed) and not sequence.fresh:
            self._scheduler.restart(sequence)
            return
        alike = [sequence]
        if not sequence.reply:
            alike = [each for each in self._live[sequence.request.request_id] if not each.reply]
        # Those that are held back go before their leader.
        outputs += [self._finish(each, FinishReason.FAILED, detail=NO_NUMBER) for each in reversed(alike)]

    def _take(
        self, sequence: Sequence, guessed: bool, tokens: list[SampledToken], outputs: list[Output]
    ) -> None:
        """What was sampled for a live sequence, up to its end. `guessed`: with guesses at what follows."""
        name = sequence.request.request_id
        guesser = sequence.guesser
        if guesser is None and self.config.draft_tokens:
            guesser = sequence.guesser = self._guesser(sequence)
        reply = sequence.reply
        for sampled in tokens:
            token = sampled.token
            if token < 0:
                self._spoiled(sequence, guessed, outputs)
                return
            index = len(reply)
            reply.append(token)
            sequence.known += 1
            if guesser is not None:
                guesser.push(token)
                guesser.accepted += sampled is not tokens[0]
            outputs.append(TokenOutput(name, index, token, sampled.logprob, sampled.top, sequence.choice))
            if sequence.next_named <= sequence.known:
                self._scheduler.name_full_blocks(sequence)
            if token in sequence.stop_ids and index >= sequence.min_tokens:
                outputs.append(self._finish(sequence, FinishReason.STOP, stop_token=token))
                return
        if sequence.known == sequence.limit:
            outputs.append(self._finish(sequence, FinishReason.LENGTH))

    def _guesser(self, sequence: Sequence) -> Guesser:
        return Guesser(sequence.tokens(), self.config.draft_tokens, self.config.draft_cost)

    def ranks_lost(self, detail: str) -> list[Output]:
        """The ranks and all KV are gone: every request ends with ERROR, plans in flight are void. The
        engine can go on with new ranks that hold no slot."""
        self._lost_step = self._scheduler.step
        outputs: list[Output] = [
            self._finish(sequence, FinishReason.ERROR, detail=detail)
            for sequences in list(self._live.values())
            for sequence in sequences[::-1]
        ]
        self._scheduler.reset()
        return outputs

    # ---- state ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Something runs, waits, is in flight, or is yet to be ended on the ranks."""
        return bool(self._live or self._scheduler.in_flight or self._scheduler.ends)

    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + scheduler.held_back,
            free_blocks=scheduler.pool.available,
            total_blocks=scheduler.pool.total,
            cached_blocks=len(scheduler.pool.cached),
            queued_tokens=scheduler.waiting_tokens,
            steps=scheduler.step,
            prefix_hit_tokens=scheduler.hit_tokens,
            prefix_query_tokens=scheduler.query_tokens,
            preemptions=scheduler.preemptions,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_tokens=scheduler.accepted_tokens,
        )

    def check(self) -> None:
        """Raises IntegrityError if blocks, slots, queues and requests disagree. Costs as much as there is
        state: for tests, and for when nothing runs."""
        check_scheduler(self._scheduler)
        live = [sequence for sequences in self._live.values() for sequence in sequences]
        placed = self._scheduler.running + self._scheduler.waiting.live()
        placed += [follower for leader in placed for follower in leader.followers]
        fail_unless(
            len(placed) == len(live) and {id(s) for s in placed} == {id(s) for s in live},
            "the live replies are not those that run, wait or are held back",
        )
        timed = sorted(s.order[1] for s in live if s.request.deadline is not None)
        fail_unless(
            sorted(s.order[1] for s in self._deadlines.live()) == timed
            and len(self._deadlines) == len(timed),
            "the deadlines are not those of the live replies",
        )


def _by_chunk(sampling: list[Chunk], result: StepResult) -> list[list[SampledToken]]:
    """The tokens of each chunk. Raises IntegrityError if they are not what the chunks can have yielded."""
    answers: list[list[SampledToken]] = []
    last = None
    for sampled in result.tokens:
        if sampled.slot != last:
            answers.append([])
            last = sampled.slot
        answers[-1].append(sampled)
    slots = [chunk.slot for chunk in sampling]
    answered = [tokens[0].slot for tokens in answers]
    fail_unless(slots == answered, f"step {result.step} sampled for slots {answered}, planned {slots}")
    for chunk, tokens in zip(sampling, answers, strict=True):
        most = 1 + len(chunk.drafts) + chunk.guesses
        said = f"step {result.step} sampled {len(tokens)} tokens for slot {chunk.slot}, at most {most}"
        fail_unless(len(tokens) <= most, said)
    return answers


__all__ = ["STEPS_IN_FLIGHT", "Engine", "IntegrityError"]
