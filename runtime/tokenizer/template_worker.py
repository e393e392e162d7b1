"""The process that renders a chat template: a sandbox inside a sandbox, started by template.py.

A template is a program out of a model file. jinja2's sandbox keeps it from the interpreter, but not from
running for ever or filling the memory inside one C call. Here the kernel does: timers that kill the process,
and a limit on its address space. Runs alone, imports jinja2 and the standard library only.

Frames on standard input and output: four bytes of length, little-endian, then JSON. First comes the setup,
answered like every later request: {"ok": TEXT}, {"raised": TEXT} where the template refuses the messages,
{"failed": TEXT} where it stumbles over them, or {"broken": TEXT} where it cannot be used.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import struct
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class Refusal(Exception):
    """What a template's raise_exception raises."""


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks replies for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    setup = read_frame()
    limit_process(setup["memory"])
    template = None
    request = setup
    while request is not None:
        # Processor time bounds the work whatever else the machine does; the clock is for sleepers.
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_seconds"])
        signal.setitimer(signal.ITIMER_REAL, setup["wall_seconds"])
        try:
            if template is None:
                template = environment(setup["date"]).from_string(setup["source"])
                reply = {"ok": ""}
            else:
                reply = {"ok": render(template, request, setup["max_output"])}
            payload = json.dumps(reply).encode()
        except Exception as error:
            payload = json.dumps(describe(error)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(struct.pack("<I", len(payload)) + payload)
        sys.stdout.buffer.flush()
        request = read_frame()


def read_frame() -> dict | None:
    header = sys.stdin.buffer.read(4)
    if len(header) < 4:
        return None  # the parent is gone or done
    return json.loads(sys.stdin.buffer.read(struct.unpack("<I", header)[0]))


def limit_process(memory: int) -> None:
    wanted = {resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for what, amount in wanted.items():
        ceiling = resource.getrlimit(what)[1]
        amount = amount if ceiling == resource.RLIM_INFINITY else min(amount, ceiling)
        resource.setrlimit(what, (amount, amount))


def environment(date: str) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """As Hugging Face sets it up, but a pure function: no clock, no random choice."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    day = datetime.datetime.fromisoformat(date)
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = day.strftime
    made.filters["tojson"] = to_json
    for impure in ("random", "pprint"):
        del made.filters[impure]
    del made.globals["lipsum"]
    return made


def refuse(message: object) -> None:
    raise Refusal(str(message))


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def render(template: jinja2.Template, request: dict, max_output: int) -> str:
    pieces, length = [], 0
    for piece in template.generate(request):
        length += len(piece)
        if length > max_output:
            raise Refusal(f"the rendered prompt is longer than {max_output} characters")
        pieces.append(piece)
    return "".join(pieces)


def describe(error: Exception) -> dict[str, str]:
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, Refusal):
        return {"raised": text}
    if isinstance(error, jinja2.TemplateSyntaxError):  # unknown filters and tests too
        return {"broken": f"line {error.lineno}: {text}"}
    if isinstance(error, jinja2.sandbox.SecurityError):
        return {"failed": f"it does what the sandbox forbids: {text}"}
    if isinstance(error, MemoryError):
        return {"failed": "it wants too much memory"}
    if isinstance(error, RecursionError):
        return {"failed": "it nests too deeply"}
    return {"failed": f"{type(error).__name__}: {text}"}


if __name__ == "__main__":
    main()
