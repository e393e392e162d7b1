"""From what a user asks to a stream of pieces of text.

Stands between the tokenizer and an engine: encodes and checks the prompt, fills in what the request left
open, turns tokens back into text, finds stop strings, and says how it ended. Serves the gRPC service and
the command line alike; knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import struct
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from runtime.errors import InvalidArgument
from runtime.sampling.params import validate, validate_choices, validate_received, validate_top
from runtime.server.engine_client import EngineClient
from runtime.server.reply import Begun, Final, Piece, Reply, TokenLogprobs
from runtime.tokenizer.chat import ChatTemplate, render_chat
from runtime.tokenizer.tokenizer import Tokenizer
from runtime.types import Branch, EngineInfo, Finished, Request, SamplingParams, ScoreOutput

# Tokens and alternatives in one piece: an engine's chunk of scores may have a hundred times as many.
_SCORED_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Resume:
    """What a user has of a reply already: tokens by choice, and what they were made under."""

    choices: Sequence[Sequence[int]] = ()
    numerics: str = ""
    seed: int | None = None
    prompt_digest: bytes = b""  # empty: not compared
    max_tokens: int = 0  # 0: not compared, and as many as the context leaves

    @property
    def has_tokens(self) -> bool:
        return any(self.choices)


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
    n: int = 1
    resume: Resume | None = None


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
            _check_unicode("prompt", completion.text)
            # A text of megabytes takes seconds to encode: not if it cannot fit anyway.
            self._check_fits(self.tokenizer.fewest_tokens(completion.text), "at least ")
            return self.encode_text(completion.text)
        if completion.messages is not None:
            return self.encode_chat(completion.messages)
        self._check_fits(len(completion.token_ids))
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
        """The engine's request, everything filled in and checked: a branch a choice, with the tokens that
        the user has, of which the last may end it. Raises InvalidArgument."""
        started = time.monotonic()
        # Tokenising a long prompt or rendering a template takes long enough to stall other streams.
        prompt = await asyncio.to_thread(self.encode, completion)
        for number, stop in enumerate(completion.params.stop):
            _check_unicode(f"stop[{number}]", stop)
        params, resume = completion.params, completion.resume
        if resume is not None:
            params = self._resumed(resume, params, prompt)
        params = validate(
            params,
            vocab_size=self.info.vocab_size,
            context_length=self.info.context_length,
            prompt_length=len(prompt),
        )
        choices = range(validate_choices(completion.n))
        received: Sequence[Sequence[int]] = ()
        if resume is not None:
            limit = "max_tokens"
            if completion.params.max_tokens is None:  # the user must not be told of what the user did not say
                limit = "resume.max_tokens" if resume.max_tokens else self._room(len(prompt))
            received = validate_received(
                resume.choices, len(choices), params.max_tokens, self.info.vocab_size, limit
            )
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(64))
        deadline = completion.deadline
        if deadline is not None:
            deadline -= time.monotonic() - started
        eos = () if params.ignore_eos else tuple(self.tokenizer.eos_ids)
        stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
        if params.min_tokens and len(stop_ids) >= self.info.vocab_size:
            raise InvalidArgument("min_tokens", "cannot be met: every token is one that ends the reply")
        return Request(
            request_id=completion.request_id,
            prompt=prompt,
            params=params,
            stop_ids=stop_ids,
            deadline=deadline,
            priority=completion.priority,
            cache_salt=completion.cache_salt,
            branches=tuple(Branch(i, tuple(received[i]) if i < len(received) else ()) for i in choices),
        )

    def _resumed(self, resume: Resume, params: SamplingParams, prompt: tuple[int, ...]) -> SamplingParams:
        """The parameters with the seed and the length of the reply that goes on, not yet validated. Raises
        InvalidArgument where this server would not go on with the same bits."""
        needed = resume.has_tokens
        if resume.numerics != self.info.numerics and (needed or resume.numerics):
            made = f"made under {resume.numerics!r}" if resume.numerics else "must say what made the tokens"
            raise InvalidArgument("resume.numerics", f"{made}; this server computes {self.info.numerics!r}")
        if resume.prompt_digest and resume.prompt_digest != prompt_digest(prompt):
            raise InvalidArgument("resume.prompt_digest", "the tokens followed another prompt than this")
        if resume.max_tokens:
            params = self._as_long(resume.max_tokens, params, len(prompt))
        if resume.seed is None:
            if needed and params.seed is None:
                raise InvalidArgument("resume.seed", "must say which seed made the tokens")
            return params
        if params.seed not in (None, resume.seed):
            raise InvalidArgument("resume.seed", f"{resume.seed} is not the request's own, {params.seed}")
        return replace(params, seed=resume.seed)

    def _as_long(self, most: int, params: SamplingParams, prompt_length: int) -> SamplingParams:
        """The parameters of a reply that was to have at most `most` tokens. Where the request leaves that
        open, the first server filled in its own context's room: another's must not cut the reply short."""
        own, room = params.max_tokens, self.info.context_length - prompt_length
        if own not in (None, most):
            raise InvalidArgument("resume.max_tokens", f"{most} is not the request's own, {own}")
        if most > room >= 1:  # with none at all, the prompt is at fault
            raise InvalidArgument(
                "resume.max_tokens", f"{most} tokens are more than {self._room(prompt_length)}, {room}"
            )
        return replace(params, max_tokens=most)

    def _room(self, prompt_length: int) -> str:
        context = self.info.context_length
        return f"the room a prompt of {prompt_length} tokens leaves in this server's context of {context}"

    async def run(self, completion: Completion) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all choices as they come; the last one of each carries its Final. Closing it
        aborts the request.

        Raises InvalidArgument, QueueFull, Unavailable.
        """
        request = await self.prepare(completion)
        # A long reply that goes on is detokenised once more: not on the thread of all streams.
        replies = await asyncio.to_thread(
            lambda: {branch.choice: Reply(self.tokenizer, request, branch) for branch in request.branches}
        )
        params = request.params
        begun = Begun(params.seed, self.info.numerics, prompt_digest(request.prompt), params.max_tokens)
        async with aclosing(self._pieces(request, replies)) as pieces:
            async for piece in pieces:
                yield piece if begun is None else replace(piece, begun=begun)
                begun = None

    async def _pieces(self, request: Request, replies: dict[int, Reply]) -> AsyncGenerator[Piece, None]:
        for reply in replies.values():
            if reply.ended is not None:  # by the tokens that came with the request
                yield reply.finish(reply.ended, self.info.numerics)
        branches = tuple(branch for branch in request.branches if not replies[branch.choice].finished)
        if not branches:
            return
        async with aclosing(self.client.generate(replace(request, branches=branches))) as outputs:
            async for output in outputs:
                reply = replies[output.choice]
                if isinstance(output, Finished):
                    # An engine that failed may have but one last output for all that is left.
                    for each in replies.values() if output.last else [reply]:
                        if not each.finished:
                            yield each.finish(output, self.info.numerics)
                    if output.last:
                        return
                elif reply.matched_stop is None:  # else it was sampled before the engine heard of the match
                    piece = reply.push(output)
                    if reply.matched_stop is not None:
                        await self.client.stop_at(request.request_id, reply.tokens, output.choice)
                    yield piece

    async def prepare_score(self, completion: Completion) -> Request:
        """The engine's request for scores of a prompt's tokens. `params.logprobs` is how many most likely
        tokens to name. Raises InvalidArgument."""
        started = time.monotonic()
        prompt = await asyncio.to_thread(self.encode, completion)
        top = validate_top(completion.params.logprobs)
        self._check_fits(len(prompt))
        if len(prompt) < 2:
            raise InvalidArgument(
                "prompt", f"holds {len(prompt)} tokens; only those after the first have scores"
            )
        deadline = completion.deadline
        return Request(
            request_id=completion.request_id,
            prompt=prompt,
            params=SamplingParams(temperature=0.0, seed=0, logprobs=top),
            deadline=None if deadline is None else deadline - (time.monotonic() - started),
            priority=completion.priority,
            cache_salt=completion.cache_salt,
            scores=True,
        )

    async def scores(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Yield the prompt's tokens with what the model thought of each: pieces without text, whose last one
        carries a Final. Closing it aborts.

        Raises InvalidArgument, QueueFull, Unavailable.
        """
        prompt = request.prompt
        count = max(1, _SCORED_AT_ONCE // (1 + request.params.logprobs))
        yield Piece("", prompt[:1], (TokenLogprobs(None, ()),))
        async with aclosing(self.client.generate(request)) as outputs:
            async for output in outputs:
                if isinstance(output, ScoreOutput):
                    for start in range(0, len(output.scores), count):
                        scores = output.scores[start : start + count]
                        first = output.first + start
                        entries = tuple(TokenLogprobs(score.logprob, score.top) for score in scores)
                        yield Piece("", prompt[first : first + len(scores)], entries)
                elif isinstance(output, Finished):
                    yield Piece("", final=_scored(output, self.info.numerics))

    def _check_fits(self, tokens: int, about: str = "") -> None:
        """Whether so many tokens of a prompt fit the context."""
        context = self.info.context_length
        if tokens > context:
            raise InvalidArgument("prompt", f"holds {about}{tokens} tokens; the context is of {context}")

    def _checked_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        for place, token in enumerate(token_ids):
            if not 0 <= token < self.info.vocab_size:
                raise InvalidArgument(
                    "token_ids", f"[{place}] is {token}; the vocabulary has {self.info.vocab_size} tokens"
                )
        return tuple(token_ids)


def prompt_digest(prompt: Sequence[int]) -> bytes:
    """A name for a prompt: SHA-256 of its tokens as 32-bit little-endian numbers."""
    return hashlib.sha256(struct.pack(f"<{len(prompt)}I", *prompt)).digest()


def _scored(finished: Finished, numerics: str) -> Final:
    return Final(
        finish_reason=finished.reason,
        matched_stop=None,
        stop_token=None,
        prompt_tokens=finished.prompt_tokens,
        cached_tokens=finished.cached_tokens,
        completion_tokens=0,
        seed=0,
        numerics=numerics,
        detail=finished.detail,
    )


def _check_unicode(name: str, text: str) -> None:
    """Python strings can hold lone surrogates (undecodable bytes of a command line); UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(name, f"is not valid Unicode at character {error.start}") from None
