"""The assembly that unpacks codes, run instruction by instruction on every word, against its definition."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kernels.gpu.codes import assembly, shifts

PLANES = ((4, 0, 0), (4, 0, 8), (4, 1, 0), (4, 1, 16), (4, 2, 32), (2, 0, 0), (2, 1, 4))
Register = np.ndarray  # uint32, one element a lane


def halves(register: Register) -> np.ndarray:
    return register.view(np.float16).reshape(-1, 2)


def run(text: str, operands: dict[str, Register]) -> dict[str, Register]:
    """A machine of six instructions, as PTX defines them; shifts go over the whole register."""
    registers = dict(operands)

    def value(name: str) -> Register:
        return np.uint32(int(name, 16)) if name.startswith("0x") else registers[name]

    def packed(operation: Callable[..., np.ndarray]) -> Callable[..., Register]:
        def apply(*args: Register) -> Register:
            lanes = max(np.size(a) for a in args)
            wide = [halves(np.ascontiguousarray(np.broadcast_to(a, lanes))) for a in args]
            return operation(*(w.astype(np.float64) for w in wide)).astype(np.float16).view(np.uint32)[:, 0]

        return apply

    def lop3(a: Register, b: Register, c: Register, table: Register) -> Register:
        assert table == 0xEA, "only (a & b) | c is known here"
        return (a & b) | c

    known = {
        "mov.b32": lambda a: a,
        "shr.b32": lambda a, n: a >> n,
        "shl.b32": lambda a, n: a << n,
        "lop3.b32": lop3,
        "sub.f16x2": packed(lambda a, b: a - b),
        "fma.rn.f16x2": packed(lambda a, b, c: a * b + c),
    }
    for line in text.strip(" {}\n").replace("\n", " ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.strip().split(" ", 1)
        into, *args = (part.strip() for part in rest.split(","))
        converted = [np.uint32(int(a)) if re.fullmatch(r"\d+", a) else value(a) for a in args]
        registers[into] = known[name](*converted)
    return registers


@pytest.mark.parametrize("low, high, zero", PLANES)
def test_every_word(low: int, high: int, zero: int) -> None:
    draw = np.random.default_rng(0)
    words = np.arange(1 << 16, dtype=np.uint32)
    others = draw.permutation(words)  # what stands in the other half of the register
    highs, other_highs = (draw.integers(0, 1 << 16, 1 << 16).astype(np.uint32) for _ in range(2))
    table = shifts(low, high, torch.device("cpu")).numpy().astype(np.uint32)
    for column in range(0, 32, 2):
        by_low, by_high = table[column], table[32 + column]
        assert table[column + 1] == by_low and table[33 + column] == by_high, "a register has one shift"
        names = ["$4", *(["$5", "$6"] if low < 4 else [])]
        values = [words | others << 16, *([np.full(1 << 16, by_low)] * 2 if low < 4 else [])]
        if high:
            names += [f"${len(names) + 4 + i}" for i in range(3)]
            values += [highs | other_highs << 16, *[np.full(1 << 16, by_high)] * 2]
        done = run(assembly(low, high, zero), dict(zip(names, values, strict=True)))
        for quarter in range(4):
            for half, word, more in ((0, words, highs), (1, others, other_highs)):
                code = (word >> (by_low + 4 * quarter)) & ((1 << low) - 1)
                code |= ((more >> (by_high + 4 * quarter)) & ((1 << high) - 1)) << low
                got = halves(done[f"${quarter}"])[:, half]
                assert np.array_equal(got, code.astype(np.float64) - zero), (column, quarter, half)
