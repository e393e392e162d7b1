"""What crosses the parts of the runtime, as plain frozen data of the standard library.

Model, sampling and weights code reads these where neither Ray, gRPC nor msgspec is installed; the wire
encodes them as they are. Positions are absolute (0 is the first prompt token), tokens are vocabulary ids.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class FinishReason(enum.Enum):
    """Why a request ended. Every request gets exactly one."""

    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"  # the engine lost its ranks
    FAILED = "failed"  # the model gave no number to choose a token by; asked again, it would not either


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. The engine and the ranks see it only after the gateway resolved the Nones."""

    max_tokens: int | None = None  # None: as many as the context leaves
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and reply
    presence_penalty: float = 0.0  # over the reply
    frequency_penalty: float = 0.0  # over the reply
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # 0 <= seed < 2**64; None: the gateway draws one and reports it
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n >= 0: the chosen token's and the n most likely


@dataclass(frozen=True, slots=True)
class Branch:
    """One of the replies to a prompt. `choice` keys its noise; `reply` is what is known of it already:
    it goes on after these tokens as if it had never stopped."""

    choice: int = 0
    reply: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine computes from one prompt: a reply for each of `branches`, whose choices differ.

    `stop_ids` are the tokens that end a reply: stop_token_ids and, unless ignore_eos, the model's
    end-of-sequence tokens. `params` has max_tokens and seed filled in. `deadline` is in seconds of the
    engine's monotonic clock; on the wire it is what remains."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    deadline: float | None = None
    priority: int = 0  # larger is sooner
    cache_salt: str = ""  # requests share cached prefixes only under the same salt
    branches: tuple[Branch, ...] = (Branch(),)
    scores: bool = False  # no reply, but what the model thought of the prompt's own tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: int
    logprob: float  # natural log, raw: before temperature, penalties and filters


# ---- engine -> ranks -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """Gives a slot its sequence. `tokens` is all that is known: the prompt and, where it goes on after a
    preemption or elsewhere, the reply so far; `prompt_length` says where the prompt ends (penalties and
    min_tokens count from there). `choice` keys the noise."""

    slot: int
    tokens: tuple[int, ...]
    prompt_length: int
    params: SamplingParams
    stop_ids: tuple[int, ...]
    choice: int = 0


class Chunk(NamedTuple):
    """Run positions start .. start + length - 1 of a slot through the model.

    A token at a position that the engine does not know yet (sampled by a plan still in flight) is known
    to the ranks. `new_blocks` are appended to the slot's block table before the step; the first chunk of
    a slot brings its cached blocks too. If `samples`, the token at position start + length is sampled
    from the last row. If `scores`, every row says what it thought of the token after it, which is known,
    and names the `params.logprobs` most likely ones.

    A chunk that samples may carry guesses at what follows: `drafts`, or as many of the ranks' draft model
    as `guesses` says. They run as further rows, and each row samples as long as the guesses before it were
    right: one token comes of such a chunk at least, one more than it has guesses at most.

    A tuple, which is made sooner than a frozen dataclass: a plan makes one for every running sequence."""

    slot: int
    start: int
    length: int
    new_blocks: tuple[int, ...]
    samples: bool
    scores: bool = False
    drafts: tuple[int, ...] = ()
    guesses: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward step. Applied in the order: ends, starts, chunks."""

    step: int
    ends: tuple[int, ...]  # slots whose state is dropped
    starts: tuple[SequenceStart, ...]
    chunks: tuple[Chunk, ...]


# ---- ranks -> engine -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampledToken:
    slot: int
    token: int
    logprob: float | None = None  # set where the request asked for logprobs
    top: tuple[TokenLogprob, ...] = ()  # most likely first; ties by lower token id


@dataclass(frozen=True, slots=True)
class TokenScore:
    """What the model thought of a token that was given. As in SampledToken."""

    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """`tokens` has one entry for each chunk with `samples`, in the plan's order, and after it one more for
    each guess that was right; `scores` one for each chunk with `scores`, of the chunk's length."""

    step: int
    tokens: tuple[SampledToken, ...]
    scores: tuple[tuple[TokenScore, ...], ...] = ()


# ---- engine -> gateway -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One token of a reply; `index` counts from 0 within the reply, tokens that came with the request
    included. A stop token is sent too, as the last one, so that the reply's tokens are exactly what was
    sampled."""

    request_id: str
    index: int
    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Scores of the prompt's tokens from position `first` on. The first of all, at position 0, has none."""

    request_id: str
    first: int
    scores: tuple[TokenScore, ...]
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last output of one of a request's replies. Tokens that came with the request count."""

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV came from the prefix cache at first admission
    completion_tokens: int
    stop_token: int | None = None
    detail: str = ""  # for ERROR and FAILED: one line
    choice: int = 0
    last: bool = True  # no other reply of the request is left
    drafted_tokens: int = 0  # guessed ahead by speculation
    accepted_tokens: int = 0  # of those, the ones that were right


Output = TokenOutput | ScoreOutput | Finished


@dataclass(frozen=True, slots=True)
class Load:
    """A moment of an engine."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    cached_blocks: int  # free, but still holding a reusable prefix
    queued_tokens: int  # prompt tokens that wait
    steps: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    preemptions: int
    drafted_tokens: int = 0  # guessed ahead by speculation
    accepted_tokens: int = 0  # of those, the ones that were right


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a gateway must know of the engine behind it."""

    model: str  # the name it is served under
    numerics: str
    context_length: int  # most tokens of prompt and reply together
    vocab_size: int
    tp: int
    units: int
    block_size: int
    total_blocks: int
    max_num_seqs: int
    rank_nodes: tuple[str, ...] = ()  # one line a rank, for people
    pp: int = 1
