"""Between a client's plain values and the contract's messages. Makes no calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypedDict

from tramontane.errors import InvalidRequest
from tramontane.types import Load, Model, Resume
from tramontane.v1 import generate_pb2, inference_service_pb2, sampling_pb2, score_pb2

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]


class Sampling(TypedDict, total=False):
    """How tokens are chosen. What is left out, or None, keeps the server's default.

    `stop` may be one string or several. Ranges and meanings are in sampling.proto.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None


class Routing(TypedDict, total=False):
    """Which model replies, and how a request waits and shares. See GenerateRequest in generate.proto."""

    model: str
    priority: int
    cache_salt: str


class Options(Sampling, Routing, total=False):
    """All that a request may say besides its prompt: `n` replies instead of one; `resume` to go on with one
    whose stream broke, of which then only what follows comes."""

    n: int | None
    resume: Resume | None


def prompt_request(prompt: Prompt, options: Options) -> generate_pb2.GenerateRequest:
    """Raises InvalidRequest for a value that the contract cannot carry, TypeError for an unknown option."""
    request = generate_pb2.GenerateRequest()
    _set_prompt(request, prompt)
    return _with_options(request, options)


def _set_prompt(request, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    else:
        request.token_ids.SetInParent()
        _extend(request.token_ids.ids, "prompt", prompt)


def chat_request(messages: Messages, options: Options) -> generate_pb2.GenerateRequest:
    """`messages`: each with "role" and "content". Raises as prompt_request does."""
    request = generate_pb2.GenerateRequest()
    fill_chat(request.messages, messages)
    return _with_options(request, options)


def fill_chat(chat: generate_pb2.ChatMessages, messages: Messages) -> None:
    """Raises InvalidRequest for anything but messages with a role and a content."""
    chat.SetInParent()
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidRequest(f'messages[{number}]: must be {{"role": ..., "content": ...}}')
        turn = chat.messages.add()
        for name, value in message.items():
            _set(turn, name, value, f"messages[{number}].{name}")


def _with_options(request: generate_pb2.GenerateRequest, options: Options) -> generate_pb2.GenerateRequest:
    for name, value in options.items():
        if name in Routing.__annotations__:
            _set(request, name, value)
        elif name == "n":
            if value is not None:
                _set(request, name, value)
        elif name == "resume":
            if value is not None:
                fill_resume(request, value)
        elif name not in Sampling.__annotations__:
            raise TypeError(f"unknown option {name!r}; known are {', '.join(Options.__annotations__)}")
        elif value is not None:
            _set_sampling(request.sampling, name, value)
    return request


def fill_resume(request: generate_pb2.GenerateRequest, resume: Resume) -> None:
    """Ask for what follows these tokens. Raises InvalidRequest."""
    message = request.resume
    message.SetInParent()
    message.ClearField("choices")
    for number, token_ids in enumerate(resume.token_ids):
        _extend(message.choices.add().ids, f"resume.choices[{number}]", token_ids)
    _set(message, "numerics", resume.numerics, "resume.numerics")
    _set(message, "seed", resume.seed, "resume.seed")
    _set(message, "prompt_digest", resume.prompt_digest, "resume.prompt_digest")
    _set(message, "max_tokens", resume.max_tokens, "resume.max_tokens")


def _set_sampling(params: sampling_pb2.SamplingParams, name: str, value: object) -> None:
    match name:
        case "logit_bias":
            try:
                params.logit_bias.update(value)
            except (TypeError, ValueError, OverflowError, AttributeError) as error:
                raise InvalidRequest(f"logit_bias: {error}") from None
        case "stop":
            _extend(params.stop, name, [value] if isinstance(value, str) else value)
        case "stop_token_ids":
            _extend(params.stop_token_ids, name, value)
        case _:
            _set(params, name, value)


def _set(message, name: str, value: object, shown: str = "") -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{shown or name}: {error}") from None


def _extend(repeated, name: str, values) -> None:
    try:
        repeated.extend(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name}: {error}") from None


def model(message: inference_service_pb2.Model) -> Model:
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(Model)}
    values["bos_token_id"] = message.bos_token_id if message.HasField("bos_token_id") else None
    values["eos_token_ids"] = tuple(message.eos_token_ids)
    values["rank_nodes"] = tuple(message.rank_nodes)
    return Model(**values)


def load(message: inference_service_pb2.GetLoadResponse) -> Load:
    return Load(**{field.name: getattr(message, field.name) for field in dataclasses.fields(Load)})


def score_request(
    prompt: Prompt, top: int | None, model: str, priority: int | None, cache_salt: str
) -> score_pb2.ScoreRequest:
    """Raises InvalidRequest for a value that the contract cannot carry."""
    request = score_pb2.ScoreRequest()
    _set_prompt(request, prompt)
    for name, value in {"top": top, "model": model, "priority": priority, "cache_salt": cache_salt}.items():
        if value is not None:
            _set(request, name, value)
    return request


def tokenize_request(
    text_or_messages: str | Messages, model: str, add_special: bool, parse_special: bool
) -> inference_service_pb2.TokenizeRequest:
    request = inference_service_pb2.TokenizeRequest(
        model=model, add_special=add_special, parse_special=parse_special
    )
    if isinstance(text_or_messages, str):
        _set(request, "text", text_or_messages)
    else:
        fill_chat(request.messages, text_or_messages)
    return request


def detokenize_request(
    token_ids: Sequence[int], model: str, skip_special: bool
) -> inference_service_pb2.DetokenizeRequest:
    request = inference_service_pb2.DetokenizeRequest(model=model, skip_special=skip_special)
    _extend(request.token_ids, "token_ids", token_ids)
    return request
