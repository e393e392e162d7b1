"""From what a user asks to a stream of pieces of text.

Stands between the tokenizer and an engine: encodes and checks the prompt, fills in what the request left
open, turns tokens back into text, finds stop strings, and says how it ended. Serves the gRPC service and
the command line alike; knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from runtime.errors import InvalidArgument
from runtime.sampling.params import validate
from runtime.server.engine_client import EngineClient
from runtime.server.stops import StopMatcher
from runtime.tokenizer.chat import ChatTemplate, render_chat
from runtime.tokenizer.tokenizer import Tokenizer
from runtime.types import (
    EngineInfo,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a user asks. Exactly one of `text`, `token_ids` and `messages` is given."""

    request_id: str
    text: str | None = None
    token_ids: Sequence[int] | None = None  # taken as they are: no special tokens are added
    messages: Sequence[Mapping[str, str]] | None = None  # each has "role" and "content"
    params: SamplingParams = field(default_factory=SamplingParams)
    deadline: float | None = None  # seconds from now
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token of the reply. As in TokenOutput."""

    logprob: float
    top: tuple[TokenLogprob, ...]


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


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a reply. The pieces' texts joined are the reply's text, their tokens its tokens; text
    comes later than its token while it may still become a stop string. Only the last has a `final`."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token where the request asked for them, else none
    final: Final | None = None


class Pipeline:
    """Runs completions on an engine. Many may run at once."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, client: EngineClient, info: EngineInfo
    ):
        """`template` may be None for a model that cannot chat."""
        self.tokenizer = tokenizer
        self.template = template
        self.client = client
        self.info = info

    def encode(self, completion: Completion) -> tuple[int, ...]:
        """The prompt's tokens. Raises InvalidArgument naming `prompt`, `token_ids` or `messages`."""
        given = [completion.text, completion.token_ids, completion.messages]
        if sum(form is not None for form in given) != 1:
            raise InvalidArgument("prompt", "give exactly one of text, token ids and messages")
        if completion.text is not None:
            return self.encode_text(completion.text)
        if completion.messages is not None:
            return self.encode_chat(completion.messages)
        return self._checked_ids(completion.token_ids)

    def encode_text(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> tuple[int, ...]:
        """Tokens of a text. Raises InvalidArgument("prompt", ...) if it is not Unicode."""
        _check_unicode("prompt", text)
        return tuple(self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The prompt that a conversation makes. Raises InvalidArgument("messages", ...)."""
        if self.template is None:
            raise InvalidArgument("messages", f"{self.info.model} has no chat template; send text instead")
        return tuple(render_chat(self.tokenizer, self.template, [dict(message) for message in messages]))

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of tokens. Raises InvalidArgument("token_ids", ...) if one is outside the vocabulary."""
        return self.tokenizer.decode(list(self._checked_ids(token_ids)), skip_special=skip_special)

    async def prepare(self, completion: Completion) -> Request:
        """The engine's request, everything filled in and checked. Raises InvalidArgument."""
        started = time.monotonic()
        # Tokenising a long prompt or rendering a template takes long enough to stall other streams.
        prompt = await asyncio.to_thread(self.encode, completion)
        for number, stop in enumerate(completion.params.stop):
            _check_unicode(f"stop[{number}]", stop)
        params = validate(
            completion.params,
            vocab_size=self.info.vocab_size,
            context_length=self.info.context_length,
            prompt_length=len(prompt),
        )
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(64))
        deadline = completion.deadline
        if deadline is not None:
            deadline -= time.monotonic() - started
        eos = () if params.ignore_eos else tuple(self.tokenizer.eos_ids)
        return Request(
            request_id=completion.request_id,
            prompt=prompt,
            params=params,
            stop_ids=tuple(dict.fromkeys((*params.stop_token_ids, *eos))),
            deadline=deadline,
            priority=completion.priority,
            cache_salt=completion.cache_salt,
        )

    async def run(self, completion: Completion) -> AsyncGenerator[Piece, None]:
        """Yield a reply's pieces; the last one carries its Final. Closing it aborts the request.

        Raises InvalidArgument, QueueFull, Unavailable.
        """
        request = await self.prepare(completion)
        reply = _Reply(self.tokenizer, request)
        async with aclosing(self.client.generate(request)) as outputs:
            async for output in outputs:
                if isinstance(output, Finished):
                    yield reply.finish(output, self.info.numerics)
                    return
                if reply.matched_stop is not None:
                    continue  # sampled before the engine heard of the match: not part of the reply
                piece = reply.push(output)
                if reply.matched_stop is not None:
                    await self.client.stop_at(request.request_id, reply.tokens)
                yield piece

    def _checked_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        for place, token in enumerate(token_ids):
            if not 0 <= token < self.info.vocab_size:
                raise InvalidArgument(
                    "token_ids", f"[{place}] is {token}; the vocabulary has {self.info.vocab_size} tokens"
                )
        return tuple(token_ids)


class _Reply:
    """One reply as it grows: tokens in, pieces out."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.tokens = 0
        self.matched_stop: str | None = None
        self._request = request
        self._text = tokenizer.stream(prompt_ids=request.prompt)
        self._stops = StopMatcher(request.params.stop)

    def push(self, output: TokenOutput) -> Piece:
        """The piece of one more token. Sets `matched_stop` if it completed a stop string."""
        self.tokens += 1
        ends = output.token in self._request.stop_ids and self._armed
        text = "" if ends else self._scan(self._text.push(output.token))
        logprobs = ()
        if self._request.params.logprobs is not None:
            logprobs = (TokenLogprobs(output.logprob, output.top),)
        return Piece(text, (output.token,), logprobs)

    def finish(self, finished: Finished, numerics: str) -> Piece:
        """The last piece: the text still held back, and how it all ended."""
        text = ""
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
        )
        return Piece(text, final=final)

    @property
    def _armed(self) -> bool:
        """Whether the reply may end with the token at hand."""
        return self.tokens >= self._request.params.min_tokens

    def _scan(self, text: str) -> str:
        text, self.matched_stop = self._stops.push(text, armed=self._armed)
        return text


def _check_unicode(name: str, text: str) -> None:
    """Python strings can hold lone surrogates (undecodable bytes of a command line); UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(name, f"is not valid Unicode at character {error.start}") from None
