"""`tramontane chat`: a conversation with a running server, or one answer."""

from __future__ import annotations

import dataclasses
import sys
import time

from runtime.commands.output import note, write_json, write_line, write_text
from runtime.commands.remote import Credentials, check_target, one_line
from runtime.types import SamplingParams
from tramontane import Client, InvalidRequest, Reply

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def chat(
    target: str,
    credentials: Credentials,
    message: str | None,
    *,
    system: str | None,
    params: SamplingParams,
    as_json: bool,
) -> None:
    """Answer `message`, or talk until the input ends. Raises TramontaneError."""
    check_target(target)
    files = credentials.read()
    frame = [{"role": "system", "content": system}] if system else []
    options = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    options["logit_bias"] = None
    with Client(target, **files) as client, one_line(target):
        if message is None:
            _converse(client, frame, options)
            return
        reply = _answer(client, [*frame, {"role": "user", "content": message}], options, silent=as_json)
        if as_json:
            write_json(_json(reply))


def _converse(client: Client, frame: list[dict], options: dict) -> None:
    model = client.model(timeout=10)
    note(f"{model.name} on {model.tp} rank(s); {HELP}")
    turns = list(frame)
    while (line := _read_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            turns = list(frame)
        elif line == "/help":
            write_line(HELP)
        elif line:
            turns.append({"role": "user", "content": line})
            try:
                reply = _answer(client, turns, options)
                turns.append({"role": "assistant", "content": reply.text})
            except KeyboardInterrupt:  # the stream was cancelled on its way out
                write_line("")
                turns.pop()
            except InvalidRequest as error:  # the conversation has outgrown the context, say
                write_line(f"error: {error.message}")
                turns.pop()


def _read_line() -> str | None:
    """A line of the user's, None at the end of the input."""
    prompting = sys.stdin.isatty()
    try:
        return input("> " if prompting else "").strip()
    except EOFError:
        if prompting:
            write_line("")
        return None


def _answer(client: Client, messages: list[dict], options: dict, *, silent: bool = False) -> Reply:
    """Stream one reply."""
    started, first = time.perf_counter(), None
    with client.stream_chat(messages, **options) as stream:
        for chunk in stream:
            first = first or time.perf_counter()
            if not silent:
                write_text(chunk.text)
        reply = stream.result()
    if not silent:
        write_line("")
        rate = speed(reply.usage.completion_tokens, first, time.perf_counter())
        note(f"first token {1000 * (first - started):.0f} ms, then {rate:.1f} tokens/s, seed {reply.seed}")
    return reply


def speed(tokens: int, first: float, last: float) -> float:
    """Tokens a second after the first one; times in seconds."""
    return (tokens - 1) / (last - first) if tokens > 1 and last > first else 0.0


def _json(reply: Reply) -> dict:
    value = dataclasses.asdict(reply)
    del value["choices"]  # there is but one
    value["finish_reason"] = reply.finish_reason.value
    if not reply.logprobs:
        del value["logprobs"]
    return value
