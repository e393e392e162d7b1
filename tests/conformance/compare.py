"""How far two replies are apart, in bits, and the tally of a run."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from runtime.types import TokenLogprob, TokenScore
from tests.replies import Reply

# What runs meet on their way, as a tally calls it. Guesses come from the text, from a draft model, or from a
# scenario that knows the reply.
PREEMPTED, FOUND, EVICTED = "preemptions", "tokens found in the prefix cache", "blocks evicted from it"
RIGHT, WRONG = "guesses from {} that were right", "guesses from {} that were wrong"
TEXT, MODEL, PLAN = "the text", "a draft model", "the plain reply"


@dataclass
class Tally:
    """What was compared, and how it came out. `seen` counts what happened on the way, by name."""

    runs: int = 0  # replies (or scores of a prompt) held against their reference
    bits: int = 0  # that differ
    differences: list[str] = field(default_factory=list)  # a line for each run that differs
    seen: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, count: int) -> None:
        self.seen[name] = self.seen.get(name, 0) + count

    def compare(self, what: str, got: Sequence[bytes], want: Sequence[bytes]) -> None:
        """Both encoded by `encode_reply` or `encode_scores`."""
        self.runs += 1
        if bits := differing_bits(got, want):
            self.bits += bits
            first = next(
                i
                for i, (a, b) in enumerate(zip_longest(got, want, fillvalue=b""))
                if differing_bits([a], [b])
            )
            self.differences.append(f"{what}: {bits} bits differ, first in item {first} of {len(want)}")

    def take(self, other: Tally, where: str = "") -> None:
        self.runs += other.runs
        self.bits += other.bits
        self.differences += [where + line for line in other.differences]
        for name, count in other.seen.items():
            self.note(name, count)

    def line(self) -> str:
        """The one line that says it all."""
        return f"conformance: {self.runs} runs compared, {self.bits} bits differ"


def encode_reply(reply: Reply, *, whole: bool = True) -> list[bytes]:
    """An item a token: its id, logprob and the likeliest ones, doubles to the last bit; then, of a `whole`
    reply, how it ended."""
    items = [
        struct.pack("<Bq", 1, token) + _logprob(logprob) + _top(top)
        for token, logprob, top in zip(reply.tokens, reply.logprobs, reply.tops, strict=True)
    ]
    if whole:
        end = -1 if reply.stop_token is None else reply.stop_token
        items.append(b"\x02" + reply.reason.value.encode() + struct.pack("<q", end))
    return items


def encode_scores(scores: Sequence[TokenScore]) -> list[bytes]:
    return [b"\x03" + _logprob(score.logprob) + _top(score.top) for score in scores]


def differing_bits(got: Sequence[bytes], want: Sequence[bytes]) -> int:
    """Bits set in one and not in the other, item by item; an item that is missing counts as zeros."""
    return sum(
        (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).bit_count()
        for a, b in zip_longest(got, want, fillvalue=b"")
    )


def _logprob(value: float | None) -> bytes:
    return b"\x00" if value is None else struct.pack("<Bd", 1, value)


def _top(top: Sequence[TokenLogprob]) -> bytes:
    return struct.pack("<H", len(top)) + b"".join(struct.pack("<qd", t.token, t.logprob) for t in top)
