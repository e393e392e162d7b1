"""Chat templates: Jinja programs out of model files, rendered where they can do no harm.

Each template has a small process of its own (template_worker.py). Threads of the gateway render, so no signal
handler can bound them, and neither counting loop iterations nor checking a deadline bounds what one operation
does: 'a' * 10**10, a filter, a comparison of lists nested into themselves. A process the kernel bounds, in
processor time, clock time and memory, and once it is dead it has left nothing behind. It costs 0.2 s at the
start, some 20 MB, and 0.1 ms a rendering.

A rendering is a pure function of template, date and messages. `strftime_now` gives the date the template
object was made with (by default the one that Llama 3.1's template falls back to), never the clock's. Knows
nothing of tokens.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from runtime.errors import BadModelFile, InvalidArgument, UnsupportedModel

__all__ = ["ChatTemplate"]

MAX_SOURCE = 1 << 18  # characters; the longest in use have some 30,000
MAX_OUTPUT = 1 << 23  # characters
MEMORY = 1 << 29  # bytes of address space of the worker
CPU_SECONDS = 1.0  # a rendering of a long conversation takes some milliseconds
WALL_SECONDS = 10.0
DATE = datetime.date(2024, 7, 26)

# The worker needs no more of the environment than what finds its modules; secrets stay out of it.
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


class ChatTemplate:
    """A compiled template. Any number of threads may render; they take turns.

    `bos` and `eos` are the texts of these tokens, `file` names the model in errors, `date` is what
    strftime_now formats. Raises BadModelFile for a template that is not Jinja or too long,
    UnsupportedModel for one that cannot even be compiled within the limits."""

    def __init__(self, source: str, *, bos: str, eos: str, file: str = "", date: datetime.date = DATE):
        if len(source) > MAX_SOURCE:
            raise BadModelFile(file, "chat_template", f"longer than {MAX_SOURCE} characters")
        self.source, self.bos, self.eos, self.file = source, bos, eos, file
        self._setup = {
            "source": source, "date": date.isoformat(), "memory": MEMORY, "max_output": MAX_OUTPUT,
            "cpu_seconds": CPU_SECONDS, "wall_seconds": WALL_SECONDS,
        }  # fmt: skip
        self._lock = threading.Lock()
        self._worker: subprocess.Popen | None = None
        self._closer: weakref.finalize | None = None
        with self._lock:
            self._start()

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text. Raises InvalidArgument("messages", ...) with what the template says where it
        refuses the messages, fails on them, or comes upon a limit."""
        request = {
            "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None,
            "documents": None, "bos_token": self.bos, "eos_token": self.eos,
        }  # fmt: skip
        with self._lock:
            if self._worker is None:
                self._start()
            reply = self._ask(request)
        if reply is None:
            raise InvalidArgument("messages", f"the chat template {_LIMIT}")
        if "raised" in reply:
            raise InvalidArgument("messages", reply["raised"])
        if "ok" not in reply:
            raise InvalidArgument("messages", "the chat template failed: " + "".join(reply.values()))
        return reply["ok"]

    def close(self) -> None:
        """Ends the process; a later rendering starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT if name in os.environ} | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # an interrupt at the terminal is the gateway's to handle
        )
        self._worker, self._closer = worker, weakref.finalize(self, _end, worker)
        reply = self._ask(self._setup)
        if reply is not None and "ok" in reply:
            return
        self._stop()
        if reply is None:
            raise UnsupportedModel(f"{self.file}: chat_template: compiling it {_LIMIT}".lstrip(": "))
        raise BadModelFile(self.file, "chat_template", "".join(reply.values()))

    def _ask(self, request: dict[str, Any]) -> dict[str, str] | None:
        """One frame out, one in; None where the worker died of it."""
        payload = json.dumps(request).encode()
        try:
            self._worker.stdin.write(struct.pack("<I", len(payload)) + payload)
            self._worker.stdin.flush()
            header = self._worker.stdout.read(4)
            body = self._worker.stdout.read(struct.unpack("<I", header)[0]) if len(header) == 4 else b""
            return json.loads(body)
        except (BrokenPipeError, ValueError):
            self._stop()
            return None

    def _stop(self) -> None:
        if self._closer is not None:
            self._closer()
        self._worker = self._closer = None


_LIMIT = f"ran out of its limits ({CPU_SECONDS:g} s of processor time, {MEMORY >> 20} MiB of memory)"


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(BrokenPipeError):  # what was not written yet is of no use to the dead
            pipe.close()
    worker.wait()
