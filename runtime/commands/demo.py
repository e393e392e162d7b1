"""`tramontane demo`: all of it once. Pull a small chat model, serve it from Ray actors, ask it through gRPC.

The server is a process of its own, started by the command that anyone would type.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.commands.chat import speed
from runtime.commands.output import watched, write_line, write_text
from runtime.commands.remote import one_line
from runtime.errors import TramontaneError
from runtime.hub import resolve
from tramontane import Client

STOP_SECONDS = 60


def demo(source: str, question: str, *, tp: int) -> None:
    """Raises TramontaneError where a part of it fails."""
    write_line(f"Pulling {source}")
    path = resolve(source, verify=True, quiet=not watched())
    write_line(f"  {path}")
    write_line(f"Starting: tramontane serve {path.name} --tp {tp} --port 0")
    started = time.perf_counter()
    with _server(["serve", str(path), "--tp", str(tp), "--port", "0", "--json"]) as ready:
        write_line(f"  ready in {time.perf_counter() - started:.1f} s on {ready['address']}")
        for rank in ready["ranks"]:
            write_line(f"  {rank}")
        write_line(f"  numerics {ready['numerics']}")
        write_line(f"Asking through gRPC: {question}")
        answer = _ask(ready["address"], question)
    write_line("Stopped cleanly.")
    write_line(f"{len(ready['ranks'])} rank actors: {' '.join(answer.split())}")


def _ask(target: str, question: str) -> str:
    with Client(target) as client, one_line(target):
        asked, first = time.perf_counter(), None
        write_text("  ")
        messages = [{"role": "user", "content": question}]
        with client.stream_chat(messages, temperature=0.0, max_tokens=64) as stream:
            for chunk in stream:
                first = first or time.perf_counter()
                write_text(chunk.text)
            reply = stream.result()
        rate = speed(reply.usage.completion_tokens, first, time.perf_counter())
    write_line("")
    write_line(
        f"  time to first token {1000 * (first - asked):.0f} ms, then {rate:.1f} tokens a second "
        f"({reply.usage.prompt_tokens} prompt tokens, {reply.usage.completion_tokens} reply tokens)"
    )
    return reply.text


@contextmanager
def _server(arguments: list[str]) -> Iterator[dict]:
    """A `tramontane serve --json` of our own; yields its ready line. Stopped at the end as anyone would
    stop it, with SIGTERM, and it must then end with status 0."""
    command = [sys.executable, "-m", "runtime.cli", *arguments]
    # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = process.stdout.readline()
        if not line:
            raise TramontaneError(f"the server did not start: it ended with status {process.wait()}")
        yield json.loads(line)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=STOP_SECONDS)
        if status:
            raise TramontaneError(f"the server stopped with status {status}")
    except subprocess.TimeoutExpired:
        raise TramontaneError(f"the server did not stop within {STOP_SECONDS} s") from None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()
