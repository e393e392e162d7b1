"""One reply as it grows: tokens in, pieces of text out, and how it ended.

Detokenises and finds stop strings. Text that may still become a stop string, or is half a character, waits;
so the text sent is a function of the tokens so far, and a reply goes on from its tokens alone. Knows nothing
of engines or connections.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import InvalidArgument
from runtime.server.stops import StopMatcher
from runtime.tokenizer.tokenizer import Tokenizer
from runtime.types import Branch, Finished, FinishReason, Request, TokenLogprob, TokenOutput


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token of a reply, or of a text that is scored: None for its first one. As in TokenOutput."""

    logprob: float | None
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Begun:
    """What is settled before the first token."""

    seed: int
    numerics: str
    prompt_digest: bytes
    max_tokens: int  # of each choice


@dataclass(frozen=True, slots=True)
class Final:
    """How a reply ended. At most one of `matched_stop` and `stop_token` is set, and with STOP one is."""

    finish_reason: FinishReason
    matched_stop: str | None
    stop_token: int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seed: int
    numerics: str
    detail: str = ""  # for ERROR: one line
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a reply. The pieces' texts joined are the reply's text, their tokens its tokens; text
    comes later than its token while it may still become a stop string. Only the last has a `final`, and
    only the first of all choices' has a `begun`."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token where the request asked for them, else none
    final: Final | None = None
    choice: int = 0
    begun: Begun | None = None


class Reply:
    """One of a request's replies. `ended` says how, where the tokens it began with end it already."""

    def __init__(self, tokenizer: Tokenizer, request: Request, branch: Branch):
        """Takes in the branch's tokens. Raises InvalidArgument if some come after the reply's end."""
        self.tokens = 0
        self.matched_stop: str | None = None
        self.finished = False
        self.ended: Finished | None = None
        self._request = request
        self._choice = branch.choice
        self._text = tokenizer.stream(prompt_ids=request.prompt)
        self._stops = StopMatcher(request.params.stop)
        for token in branch.reply:
            if self.ended is not None:
                raise InvalidArgument(
                    f"resume.choices[{branch.choice}]",
                    f"holds {len(branch.reply)} tokens, but the reply ends after {self.tokens}",
                )
            self._take(token)
            self.ended = self._end_after(token)

    def push(self, output: TokenOutput) -> Piece:
        """The piece of one more token. Sets `matched_stop` if it completed a stop string."""
        text = self._take(output.token)
        logprobs = ()
        if self._request.params.logprobs is not None:
            logprobs = (TokenLogprobs(output.logprob, output.top),)
        return Piece(text, (output.token,), logprobs, choice=self._choice)

    def finish(self, finished: Finished, numerics: str) -> Piece:
        """The last piece: how it all ended and, unless it was cut off, the text still held back."""
        self.finished = True
        text = ""
        if finished.reason in (FinishReason.STOP, FinishReason.LENGTH):
            if self.matched_stop is None:
                text = self._scan(self._text.finish())
            if self.matched_stop is None:
                text += self._stops.flush()
        stopped = self.matched_stop is not None
        final = Final(
            # A match stands even where the engine ended the request before it heard of it.
            finish_reason=FinishReason.STOP if stopped else finished.reason,
            matched_stop=self.matched_stop,
            stop_token=None if stopped else finished.stop_token,
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            completion_tokens=self.tokens if stopped else finished.completion_tokens,
            seed=self._request.params.seed,
            numerics=numerics,
            detail="" if stopped else finished.detail,
            drafted_tokens=finished.drafted_tokens,
            accepted_tokens=finished.accepted_tokens,
        )
        return Piece(text, final=final, choice=self._choice)

    def _take(self, token: int) -> str:
        """Count a token; the text that is certain now."""
        self.tokens += 1
        return "" if self._is_stop(token) else self._scan(self._text.push(token))

    def _is_stop(self, token: int) -> bool:
        """Whether the reply ends with this token, the last one taken."""
        return token in self._request.stop_ids and self.tokens > self._request.params.min_tokens

    def _end_after(self, token: int) -> Finished | None:
        """How the reply ended with this token, the last one taken, if it did."""
        stop = token if self._is_stop(token) else None
        if stop is not None or self.matched_stop is not None:
            reason = FinishReason.STOP
        elif self.tokens == self._request.params.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return None
        request = self._request
        return Finished(
            request.request_id, reason, len(request.prompt), 0, self.tokens, stop, choice=self._choice
        )

    def _scan(self, text: str) -> str:
        """Text that is certain now. Stop strings count once the reply has min_tokens."""
        armed = self.tokens >= self._request.params.min_tokens
        text, self.matched_stop = self._stops.push(text, armed=armed)
        return text
