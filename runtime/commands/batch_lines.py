"""The lines of a batch: what one asks for, and what is written for it. No I/O.

Two forms, told apart line by line, and each answered in its own:

    {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}     OpenAI's batch form
    {"custom_id": ..., "prompt" or "messages": ..., sampling fields}                       plain

The body's fields are OpenAI's, and the client library's beside them; a plain line's are the client library's
alone. A field that is not served is refused, but for a few without influence on a reply.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import InvalidArgument
from tramontane.messages import Routing, Sampling
from tramontane.types import Choice, Reply

MAX_ID = 512  # characters
_FIELDS = {*Sampling.__annotations__, *Routing.__annotations__, "n"}
_SILENT = {"user", "metadata", "store"}  # OpenAI's, without influence on a reply
_OFF = {"stream", "echo"}  # taken where they are false
_URLS: dict[str, Literal["chat", "completions"]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}

Form = Literal["chat", "completions", "plain"]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a line asks for: `prompt` (text or token ids) or `messages`, and the client library's options."""

    custom_id: str
    form: Form
    prompt: str | list[int] | None
    messages: list[dict] | None
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no reply, in the words and with the status of an HTTP API."""

    status: int
    kind: str
    message: str
    field: str | None = None


def read_line(line: bytes) -> dict[str, Any]:
    """A line as an object with a "custom_id". ValueError saying what is wrong with it."""
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    name = value.get("custom_id")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_ID:
        raise ValueError(f'needs a "custom_id", a string of 1 to {MAX_ID} characters')
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def form_of(value: dict[str, Any]) -> Form:
    """How a line is to be answered, whatever else is wrong with it."""
    if not value.keys() & {"method", "url", "body"}:
        return "plain"
    url = value.get("url")
    return _URLS.get(url, "chat") if isinstance(url, str) else "chat"


def parse(value: dict[str, Any]) -> Ask:
    """Of an object that `read_line` returned. Raises InvalidArgument naming the field."""
    form = form_of(value)
    if form == "plain":
        fields = {key: field for key, field in value.items() if key != "custom_id"}
        prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    else:
        fields = _body(value)
        prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
        if (messages is None) != (form == "completions"):
            raise InvalidArgument(
                "body", f"{value['url']} takes {'messages' if form == 'chat' else 'a prompt'}"
            )
        _rename(fields, form)
    if (prompt is None) == (messages is None):
        raise InvalidArgument("prompt", "give one of prompt and messages")
    options = {key: field for key, field in fields.items() if field is not None}
    for key in options.keys() - _FIELDS:
        raise InvalidArgument(key[:60], "is not a field that is served")
    if "logit_bias" in options:
        options["logit_bias"] = _bias(options["logit_bias"])
    return Ask(
        value["custom_id"],
        form,
        None if prompt is None else _prompt(prompt),
        None if messages is None else _messages(messages),
        options,
    )


def _body(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("method", "POST") != "POST":
        raise InvalidArgument("method", "must be POST")
    if not isinstance(value.get("url"), str) or value["url"] not in _URLS:
        raise InvalidArgument("url", f"must be one of {', '.join(_URLS)}")
    if not isinstance(value.get("body"), dict):
        raise InvalidArgument("body", "must be an object")
    for key in value.keys() - {"custom_id", "method", "url", "body"}:
        raise InvalidArgument(key[:60], "is not a field of a batch's line")
    return {key: field for key, field in value["body"].items() if key not in _SILENT}


def _rename(fields: dict[str, Any], form: Form) -> None:
    """OpenAI's spellings to the client library's, in place."""
    for name in _OFF:
        if fields.pop(name, None):
            raise InvalidArgument(name, "is not possible in a batch")
    most = fields.pop("max_completion_tokens", None)
    if most is not None:
        if fields.get("max_tokens") not in (None, most):
            raise InvalidArgument("max_completion_tokens", "differs from max_tokens")
        fields["max_tokens"] = most
    if form == "chat":
        wanted, top = fields.pop("logprobs", None), fields.pop("top_logprobs", None)
        if not isinstance(wanted, bool | None) or (top is not None and not wanted):
            raise InvalidArgument("logprobs", "must be true where top_logprobs is given, and true or false")
        if wanted:
            fields["logprobs"] = top or 0


def _bias(value: Any) -> dict[int, float]:
    """JSON's keys are strings."""
    if not isinstance(value, dict):
        raise InvalidArgument("logit_bias", "must be an object of token ids and numbers")
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise InvalidArgument("logit_bias", "its keys must be token ids") from None


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise InvalidArgument("prompt", "must be one text or one list of token ids; give several a line each")


def _messages(value: Any) -> list[dict]:
    """Contents in parts of text become one text."""
    if not isinstance(value, list):
        raise InvalidArgument("messages", "must be a list")
    found = []
    for number, message in enumerate(value):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            parts = message["content"]
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
                for p in parts
            ):
                raise InvalidArgument(f"messages[{number}].content", "only parts of text are served")
            message = message | {"content": "".join(part["text"] for part in parts)}
        found.append(message)
    return found


# ---- answers --------------------------------------------------------------------------------------------


def reply_line(ask: Ask, reply: Reply, created: int) -> dict[str, Any]:
    """`created`: seconds since 1970."""
    usage = {
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
    }
    if ask.form == "plain":
        line = {"custom_id": ask.custom_id} | _plain_choice(ask, reply.choices[0])
        if len(reply.choices) > 1:
            line["choices"] = [_plain_choice(ask, choice) for choice in reply.choices]
        usage["cached_tokens"] = reply.usage.cached_tokens
        return line | {
            "usage": usage,
            "seed": reply.seed,
            "numerics": reply.numerics,
            "model": reply.model,
            "error": None,
        }
    usage["total_tokens"] = sum(usage.values())
    usage["prompt_tokens_details"] = {"cached_tokens": reply.usage.cached_tokens}
    chat = ask.form == "chat"
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{reply.request_id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": reply.model,
        "choices": [_choice(ask, index, choice) for index, choice in enumerate(reply.choices)],
        "usage": usage,
        "seed": reply.seed,
        "system_fingerprint": reply.numerics,
    }
    return _enveloped(ask.custom_id, reply.request_id, 200, body, None)


def failure_line(custom_id: str, form: Form, failure: Failure) -> dict[str, Any]:
    """The error stands where either form's readers look for it."""
    error = {"code": failure.kind, "message": failure.message, "param": failure.field}
    if form == "plain":
        return {"custom_id": custom_id, "error": error}
    return _enveloped(custom_id, "", failure.status, {"error": error | {"type": failure.kind}}, error)


def has_failed(line: dict[str, Any]) -> bool:
    """Of a line that `reply_line` or `failure_line` made."""
    return line.get("error") is not None


def _enveloped(custom_id: str, request_id: str, status: int, body: dict, error: dict | None) -> dict:
    response = {"status_code": status, "request_id": request_id, "body": body}
    name = f"batch_req_{request_id or 'none'}"
    return {"id": name, "custom_id": custom_id, "response": response, "error": error}


def _plain_choice(ask: Ask, choice: Choice) -> dict[str, Any]:
    value = {"text": choice.text, "finish_reason": choice.finish_reason.value}
    if choice.stop_string is not None:
        value["stop_string"] = choice.stop_string
    if ask.options.get("logprobs") is not None:
        value["token_ids"] = list(choice.token_ids)
        value["logprobs"] = [
            {"logprob": e.logprob, "top": [{"token_id": c.token_id, "logprob": c.logprob} for c in e.top]}
            for e in choice.logprobs
        ]
    return value


def _choice(ask: Ask, index: int, choice: Choice) -> dict[str, Any]:
    """Tokens are named by their ids: a token's bytes need not be text."""
    named = [f"token_id:{token}" for token in choice.token_ids]
    value: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason.value, "logprobs": None}
    tops = [[(f"token_id:{c.token_id}", c.logprob) for c in entry.top] for entry in choice.logprobs]
    if ask.form == "chat":
        value["message"] = {"role": "assistant", "content": choice.text}
        if choice.logprobs:
            value["logprobs"] = {
                "content": [
                    {
                        "token": token,
                        "logprob": entry.logprob,
                        "bytes": None,
                        "top_logprobs": [{"token": n, "logprob": p, "bytes": None} for n, p in top],
                    }
                    for token, entry, top in zip(named, choice.logprobs, tops, strict=True)
                ]
            }
    else:
        value["text"] = choice.text
        if choice.logprobs:
            value["logprobs"] = {
                "tokens": named,
                "token_logprobs": [entry.logprob for entry in choice.logprobs],
                "top_logprobs": [dict(top) for top in tops],
            }
    return value


_FIELD = re.compile(r"(?:sampling\.)?([A-Za-z_]\w*(?:[.\[\]\w]*)): (.*)", re.DOTALL)


def refusal(message: str) -> Failure:
    """Of a request that cannot be served as it is. `message` begins with the field's name, as the server
    spells it."""
    match = _FIELD.fullmatch(message)
    if match is None:
        return Failure(400, "invalid_request_error", message)
    return Failure(400, "invalid_request_error", f"{match[1]}: {match[2]}", match[1])
