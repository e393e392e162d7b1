"""AMX as IR: tile registers and their configuration; turning 16 by 16 numbers; how threads share work.

Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kernels.native.ir import FLOATS, Function, Value, constant


def configuration(registers: Mapping[int, tuple[int, int]], *tables: torch.Tensor) -> torch.Tensor:
    """What `ldtilecfg` reads: {register: (rows, bytes of a row)}; uint8, aligned to 64, 64 bytes.
    The bytes of `tables` follow, in order."""
    extra = [table.contiguous().view(torch.uint8).view(-1) for table in tables]
    room = torch.zeros(64 + 64 + sum(t.numel() for t in extra), dtype=torch.uint8)
    aligned = room[-room.data_ptr() % 64 :]
    aligned[0] = 1  # the palette
    for register, (rows, row_bytes) in registers.items():
        aligned[16 + 2 * register] = row_bytes
        aligned[48 + register] = rows
    at = 64
    for table in extra:
        aligned[at : at + table.numel()] = table
        at += table.numel()
    return aligned


def load_tile(f: Function, register: int, source: Value, stride: Value | int) -> None:
    f.line(f"call void @llvm.x86.tileloadd64(i8 {register}, ptr {source}, i64 {stride})")


def store_tile(f: Function, register: int, target: Value) -> None:
    f.line(f"call void @llvm.x86.tilestored64(i8 {register}, ptr {target}, i64 64)")


def zero_tile(f: Function, register: int) -> None:
    f.line(f"call void @llvm.x86.tilezero(i8 {register})")


def multiply(f: Function, total: int, a: int, b: int) -> None:
    """total += a by b, of bf16: a rows of pairs, b pairs of rows; in fp32, in one order."""
    f.line(f"call void @llvm.x86.tdpbf16ps(i8 {total}, i8 {a}, i8 {b})")


def threads_share(f: Function, arguments: Mapping[str, Value], items: Value) -> tuple[Value, Value]:
    """(first, count): the run of `items` that the calling thread takes."""
    number, count = (
        f.emit("i64", f"zext i32 {f.emit('i32', f'call i32 {arguments[name]}()')} to i64")
        for name in ("thread_number", "thread_count")
    )
    first = items * number // count
    return first, items * (number + 1) // count - first


def transposed(f: Function, rows: list[Value]) -> list[Value]:
    """16 rows of 16: at each step, blocks of `size` swap across the diagonal."""
    rows = list(rows)
    for size in (1, 2, 4, 8):
        for i in range(16):
            if i & size:
                continue
            a, b = rows[i], rows[i + size]
            for at, lanes in (
                (i, [n if not n & size else 16 + n - size for n in range(16)]),
                (i + size, [n + size if not n & size else 16 + n for n in range(16)]),
            ):
                order = constant("i32", lanes)
                rows[at] = f.emit(FLOATS, f"shufflevector {FLOATS} {a}, {FLOATS} {b}, <16 x i32> {order}")
    return rows
