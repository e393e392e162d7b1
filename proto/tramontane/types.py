"""What a client is given: plain frozen dataclasses, no protobuf in them."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class FinishReason(enum.Enum):
    """Why a reply ended."""

    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that might have been chosen; `logprob` is natural, before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token of a reply: its own log probability and the most likely candidates, best first."""

    logprob: float
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were already computed for an earlier request;
    `drafted_tokens` were guessed ahead by speculation, and `accepted_tokens` of them were right."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a reply that streams. Texts of a choice joined are its text; text or tokens may be empty,
    since text may come later than its tokens."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Resume:
    """What is needed to go on with a reply whose stream broke, besides the request: see Resume in
    generate.proto. Sampling parameters other than `seed` and `max_tokens` are to be repeated.

    Fields have the contract's names, and so they stand in errors (`resume.seed`), but for the tokens, which
    are by choice: `token_ids[i]` is `resume.choices[i]` there.
    """

    token_ids: tuple[tuple[int, ...], ...]
    numerics: str
    seed: int
    prompt_digest: bytes
    max_tokens: int = 0  # what each choice may have in all; 0: not known, and not compared


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several replies to a prompt. Fields as in Reply."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply; where several were asked for, the first of `choices`, which holds them all.

    `seed` and `max_tokens` with the same `numerics`, prompt and other parameters give the same reply again,
    bit for bit: where the request has none of its own, the server chose them. With STOP, one of
    `stop_string` and `stop_token_id` says what matched. `logprobs` has an entry a token where they were
    asked for, else none. `usage` counts the prompt once and the tokens of all choices. `resumed` is how
    often the stream broke and was taken up again, which changed nothing else.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage
    seed: int
    numerics: str
    model: str
    request_id: str
    choices: tuple[Choice, ...]
    resumed: int
    max_tokens: int = 0  # what each choice might have; 0 from a server that does not say it


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a text and its log probability given those before it; None for the first, which nothing
    precedes. `top` are the most likely tokens at its place, best first."""

    token_id: int
    logprob: float | None
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What a model thinks of a text. The numbers are those of TokenLogprobs, had it been a reply."""

    tokens: tuple[ScoredToken, ...]
    numerics: str
    model: str
    request_id: str

    @property
    def logprob(self) -> float:
        """Natural log of the probability of all tokens after the first."""
        return math.fsum(token.logprob for token in self.tokens if token.logprob is not None)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.logprob / (len(self.tokens) - 1))


@dataclass(frozen=True, slots=True)
class Model:
    """A served model. Counts are of tokens, ranks, KV blocks and sequences; see the .proto."""

    name: str
    numerics: str
    context_length: int
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tp: int
    units: int
    block_size: int
    total_blocks: int
    max_num_seqs: int
    rank_nodes: tuple[str, ...]
    pp: int = 1


@dataclass(frozen=True, slots=True)
class Load:
    """A moment of the engine behind the server; see GetLoadResponse in the .proto."""

    running: int
    waiting: int
    queued_tokens: int
    free_blocks: int
    total_blocks: int
    cached_blocks: int
    steps: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    open_streams: int
    drafted_tokens: int = 0  # 0 from a server that does not count them
    accepted_tokens: int = 0
