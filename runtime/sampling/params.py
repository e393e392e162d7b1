"""Checks a request's sampling parameters. Standard library only; knows no tokenizer and no model.

Every refusal is an InvalidArgument that names the field as the API spells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from runtime.errors import InvalidArgument
from runtime.types import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 512  # characters
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 100
MAX_TOP_K = 2**31 - 1
MAX_CHOICES = 64


def validate(
    params: SamplingParams, *, vocab_size: int, context_length: int, prompt_length: int
) -> SamplingParams:
    """`params` with max_tokens filled in and its numbers in their own types; None for `seed` stays.

    `context_length` counts the tokens of prompt and reply together. Raises InvalidArgument for the first
    field that cannot be served, "prompt" where the prompt leaves no room for a reply.
    """
    room = context_length - prompt_length
    if prompt_length < 1:
        raise InvalidArgument("prompt", "holds no tokens")
    if room < 1:
        raise InvalidArgument(
            "prompt", f"holds {prompt_length} tokens; the context of {context_length} leaves no room to reply"
        )
    max_tokens = room if params.max_tokens is None else _integer("max_tokens", params.max_tokens, 1)
    if max_tokens > room:
        raise InvalidArgument(
            "max_tokens",
            f"{_shown(max_tokens)} is too many; a prompt of {prompt_length} tokens leaves room for {room} "
            f"in the context of {context_length} (leave it out to ask for all of them)",
        )
    min_tokens = _integer("min_tokens", params.min_tokens, 0)
    if min_tokens > max_tokens:
        reason = f"{_shown(min_tokens)} is more than max_tokens, {max_tokens}"
        if params.max_tokens is None:
            reason += f" (not set: what a prompt of {prompt_length} tokens leaves of {context_length})"
        raise InvalidArgument("min_tokens", reason)
    logit_bias = _logit_bias(params.logit_bias, vocab_size)
    stop_token_ids = _stop_token_ids(params.stop_token_ids, vocab_size)
    if min_tokens > 0 and len(set(stop_token_ids)) >= vocab_size:
        raise InvalidArgument("min_tokens", "cannot be met: stop_token_ids holds every token")
    if not isinstance(params.ignore_eos, bool):
        raise InvalidArgument("ignore_eos", f"must be true or false, not {params.ignore_eos!r}")
    return replace(
        params,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_number("temperature", params.temperature, 0.0, 100.0),
        top_k=_integer("top_k", params.top_k, 0, MAX_TOP_K),
        top_p=_number("top_p", params.top_p, 0.0, 1.0, above_low=True),
        min_p=_number("min_p", params.min_p, 0.0, 1.0),
        repetition_penalty=_number("repetition_penalty", params.repetition_penalty, 0.01, 100.0),
        presence_penalty=_number("presence_penalty", params.presence_penalty, -2.0, 2.0),
        frequency_penalty=_number("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
        logit_bias=logit_bias,
        seed=None if params.seed is None else _integer("seed", params.seed, 0, 2**64 - 1),
        stop=_stop(params.stop),
        stop_token_ids=stop_token_ids,
        logprobs=None if params.logprobs is None else _integer("logprobs", params.logprobs, 0, MAX_LOGPROBS),
    )


def validate_choices(n: int) -> int:
    """How many replies a request may ask for. Raises InvalidArgument("n", ...)."""
    return _integer("n", n, 1, MAX_CHOICES)


def validate_top(top: int | None) -> int:
    """How many of the most likely tokens a score names. Raises InvalidArgument("top", ...)."""
    return _integer("top", top or 0, 0, MAX_LOGPROBS)


def validate_received(
    choices: Sequence[Sequence[int]], n: int, max_tokens: int, vocab_size: int, limit: str = "max_tokens"
) -> tuple[tuple[int, ...], ...]:
    """Tokens that a user has of each choice already; `limit` says what set `max_tokens`. Raises
    InvalidArgument naming the choice at fault."""
    if len(choices) > n:
        raise InvalidArgument("resume.choices", f"has {len(choices)} entries for {n} choices")
    for number, tokens in enumerate(choices):
        field = f"resume.choices[{number}]"
        for token in tokens:
            _token(field, token, vocab_size)
        if len(tokens) > max_tokens:
            raise InvalidArgument(field, f"{len(tokens)} tokens are more than {limit}, {max_tokens}")
    return tuple(tuple(tokens) for tokens in choices)


def _number(field: str, value: object, low: float, high: float, above_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgument(field, f"must be a number, not {_shown(value)}")
    # Comparisons with NaN are false, so NaN is refused with the rest.
    if not (low < value <= high if above_low else low <= value <= high):
        bounds = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise InvalidArgument(field, f"must be {bounds}, not {_shown(value)}")
    return float(value)


def _integer(field: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(field, f"must be a whole number, not {_shown(value)}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidArgument(field, f"must be {bounds}, not {_shown(value)}")
    return value


def _token(field: str, value: object, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(field, f"a token id must be a whole number, not {_shown(value)}")
    if not 0 <= value < vocab_size:
        raise InvalidArgument(field, f"token {_shown(value)} is outside the vocabulary of {vocab_size}")
    return value


def _logit_bias(entries: object, vocab_size: int) -> tuple[tuple[int, float], ...]:
    checked: dict[int, float] = {}
    for entry in _list("logit_bias", entries, MAX_LOGIT_BIAS):
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise InvalidArgument("logit_bias", f"an entry is a token id and a bias, not {_shown(entry)}")
        token = _token("logit_bias", entry[0], vocab_size)
        if token in checked:
            raise InvalidArgument("logit_bias", f"token {token} is given twice")
        checked[token] = _number("logit_bias", entry[1], -1000.0, 1000.0)
    return tuple(checked.items())


def _stop_token_ids(tokens: object, vocab_size: int) -> tuple[int, ...]:
    entries = _list("stop_token_ids", tokens, MAX_STOP_TOKENS)
    return tuple(_token("stop_token_ids", token, vocab_size) for token in entries)


def _stop(strings: object) -> tuple[str, ...]:
    checked = _list("stop", strings, MAX_STOP_STRINGS)
    for string in checked:
        if not isinstance(string, str):
            raise InvalidArgument("stop", f"must hold strings, not {_shown(string)}")
        if not string:
            raise InvalidArgument("stop", "must not hold an empty string")
        if len(string) > MAX_STOP_LENGTH:
            raise InvalidArgument(
                "stop", f"a string of {len(string)} characters; at most {MAX_STOP_LENGTH} are allowed"
            )
    return tuple(checked)


def _list(field: str, entries: object, limit: int) -> Sequence:
    if not isinstance(entries, tuple | list):
        raise InvalidArgument(field, f"must be a list, not {_shown(entries)}")
    if len(entries) > limit:
        raise InvalidArgument(field, f"has {len(entries)} entries; at most {limit} are allowed")
    return entries


def _shown(value: object) -> str:
    """A value short enough for a line: a hostile integer may have a million digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
