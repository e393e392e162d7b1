"""What a request has been answered so far, so that another engine can answer the rest.

A reply is a pure function of the request: asked again with the tokens that have come, any engine of the same
numerics gives exactly what is missing. Pure; knows neither engines nor why one is left for another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from runtime.engine.check import fail_unless
from runtime.types import Branch, Finished, FinishReason, Output, Request, ScoreOutput, TokenOutput


@dataclass(slots=True)
class _Reply:
    """One of the replies that have not ended."""

    tokens: list[int]
    keep: int | None = None  # it is told to end after so many
    # Of engines that lost it; None: none has said.
    cached: int | None = None
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Transcript:
    """Of one request. `context_length`: most tokens of prompt and one reply together."""

    request: Request
    context_length: int
    progress: int = 0  # tokens and scores that have come
    failure: str = ""  # what the last engine that lost it said
    _open: dict[int, _Reply] = field(default_factory=dict)
    _scored: int = 1  # the first position whose score has not come

    def __post_init__(self) -> None:
        for branch in self.request.branches:
            self._open[branch.choice] = _Reply(list(branch.reply))

    @property
    def ended(self) -> bool:
        """Every reply has had its Finished."""
        return not self._open

    def take(self, output: Output) -> Output | None:
        """What to pass on of an engine's output, in the terms of the whole request. None: it came before, or
        says that the engine has lost the reply.

        Raises IntegrityError if something is missing before it."""
        if isinstance(output, TokenOutput):
            reply = self._open.get(output.choice)
            fail_unless(
                reply is not None and output.index == len(reply.tokens),
                f"token {output.index} of choice {output.choice} came out of turn",
            )
            reply.tokens.append(output.token)
            self.progress += 1
            return output
        if isinstance(output, ScoreOutput):
            fail_unless(output.first <= self._scored, f"scores before {output.first} are missing")
            known = self._scored - output.first
            new = output.scores[known:]
            if not new:
                return None
            self._scored += len(new)
            self.progress += len(new)
            return replace(output, first=output.first + known, scores=new)
        return self._take_end(output)

    def _take_end(self, output: Finished) -> Finished | None:
        reply = self._open.get(output.choice)
        if output.reason is FinishReason.ERROR:
            self.failure = output.detail
            if reply is not None:
                reply.cached = output.cached_tokens if reply.cached is None else reply.cached
                reply.drafted += output.drafted_tokens
                reply.accepted += output.accepted_tokens
            return None
        fail_unless(reply is not None, f"choice {output.choice} ended twice")
        return self._end(output.choice, output)

    def _end(self, choice: int, end: Finished) -> Finished:
        """Close a reply with an end that counts what all engines did for it."""
        reply = self._open.pop(choice)
        return replace(
            end,
            cached_tokens=end.cached_tokens if reply.cached is None else reply.cached,
            drafted_tokens=end.drafted_tokens + reply.drafted,
            accepted_tokens=end.accepted_tokens + reply.accepted,
            last=not self._open,
        )

    def stop(self, choice: int, keep: int) -> None:
        """A reply is told to end after its first `keep` tokens, which have come."""
        if reply := self._open.get(choice):
            reply.keep = keep

    def settle(self) -> list[Finished]:
        """The ends of replies that lack nothing else: an engine may be lost just before it says so."""
        return [self._end(choice, end) for choice in list(self._open) if (end := self._due(choice))]

    def _due(self, choice: int) -> Finished | None:
        reply, request = self._open[choice], self.request
        tokens = reply.tokens
        if request.scores:
            if self._scored < len(request.prompt):
                return None
            return self._finished(choice, FinishReason.LENGTH)
        if reply.keep is not None:
            return self._finished(choice, FinishReason.STOP, reply.keep)
        last = tokens[-1] if tokens else None
        if last in request.stop_ids and len(tokens) > request.params.min_tokens:
            return replace(self._finished(choice, FinishReason.STOP), stop_token=last)
        room = self.context_length - len(request.prompt)
        most = room if request.params.max_tokens is None else min(request.params.max_tokens, room)
        return self._finished(choice, FinishReason.LENGTH) if len(tokens) >= most else None

    def _finished(self, choice: int, reason: FinishReason, count: int | None = None) -> Finished:
        tokens = len(self._open[choice].tokens) if count is None else count
        return Finished(self.request.request_id, reason, len(self.request.prompt), 0, tokens, choice=choice)

    def give_up(self, reason: FinishReason, detail: str = "") -> list[Finished]:
        """End whatever is open."""
        ends = []
        for choice in list(self._open):
            ends.append(self._end(choice, replace(self._finished(choice, reason), detail=detail)))
        return ends

    def rest(self, deadline: float | None) -> Request:
        """What another engine is to be asked, with `deadline` seconds left."""
        branches = tuple(Branch(choice, tuple(reply.tokens)) for choice, reply in self._open.items())
        return replace(self.request, branches=branches, deadline=deadline)
