"""Writes functions as LLVM IR text: values, loops and branches, no types of its own.

A `Value` stands for one SSA value; `+`, `*` and so on append the instruction that computes the result. The
language is https://llvm.org/docs/LangRef.html. Knows nothing of what is computed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FLOATS = "<16 x float>"
WORDS = "<32 x i16>"


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a function. Arithmetic is on i64; adding to a pointer counts bytes."""

    function: Function
    type: str
    name: str

    def __add__(self, other: Value | int) -> Value:
        if self.type == "ptr":
            return self.function.emit("ptr", f"getelementptr i8, ptr {self}, i64 {other}")
        return self.function.emit("i64", f"add i64 {self}, {other}")

    def __sub__(self, other: Value | int) -> Value:
        return self.function.emit("i64", f"sub i64 {self}, {other}")

    def __mul__(self, other: Value | int) -> Value:
        return self.function.emit("i64", f"mul i64 {self}, {other}")

    def __floordiv__(self, other: Value | int) -> Value:
        return self.function.emit("i64", f"udiv i64 {self}, {other}")

    def __mod__(self, other: Value | int) -> Value:
        return self.function.emit("i64", f"urem i64 {self}, {other}")

    def minimum(self, other: Value | int) -> Value:
        return self.function.emit("i64", f"call i64 @llvm.smin.i64(i64 {self}, i64 {other})")

    def load(self, kind: str, align: int = 1) -> Value:
        return self.function.emit(kind, f"load {kind}, ptr {self}, align {align}")

    def store(self, value: Value, align: int = 1) -> None:
        self.function.line(f"store {value.type} {value}, ptr {self}, align {align}")

    def __str__(self) -> str:
        return self.name


class Function:
    """One function: `void name(parameters)`. Internal ones are seen by their module alone."""

    def __init__(self, name: str, parameters: dict[str, str], *, internal: bool = True):
        self.name = name
        self._lines: list[str] = []
        self._count = 0
        self._block = "entry"
        self.parameters = {key: Value(self, kind, f"%{key}") for key, kind in parameters.items()}
        declared = ", ".join(f"{kind} %{key}" for key, kind in parameters.items())
        self._head = f"define {'internal ' if internal else ''}void @{name}({declared}) noinline {{"

    def __getitem__(self, parameter: str) -> Value:
        return self.parameters[parameter]

    def arguments(self, kinds: dict[str, str]) -> dict[str, Value]:
        """What a parameter `arguments` points to, 64 bits each."""
        return {
            name: (self["arguments"] + 8 * at).load(kind, 8) for at, (name, kind) in enumerate(kinds.items())
        }

    def text(self) -> str:
        return "\n".join([self._head, "entry:", *self._lines, "  ret void", "}"])

    def line(self, text: str) -> None:
        self._lines.append(f"  {text}")

    def emit(self, kind: str, expression: str) -> Value:
        """A new value of type `kind`."""
        self._count += 1
        value = Value(self, kind, f"%v{self._count}")
        self.line(f"{value} = {expression}")
        return value

    def call(self, function: Function, *arguments: Value | int) -> None:
        kinds = [value.type for value in function.parameters.values()]
        passed = ", ".join(f"{kind} {value}" for kind, value in zip(kinds, arguments, strict=True))
        self.line(f"call void @{function.name}({passed})")

    def loop(
        self,
        count: Value | int,
        body: Callable[[Value, list[Value]], Sequence[Value] | None],
        carried: Sequence[tuple[str, str]] = (),
    ) -> Sequence[Value]:
        """body(i, values) for i = 0 .. count - 1, at least once. `carried` are (type, first value); the body
        returns their next values, and the loop the last ones."""
        label, before = self._label("loop"), self._block
        self.line(f"br label %{label}")
        self._begin(label)
        phis = len(self._lines)
        at = Value(self, "i64", f"%{label}.i")
        values = [Value(self, kind, f"%{label}.c{n}") for n, (kind, _) in enumerate(carried)]
        results = body(at, values) or []
        following, end = at + 1, self._block
        incoming = [(at, "0", following)] + [
            (value, first, result) for value, (_, first), result in zip(values, carried, results, strict=True)
        ]
        self._lines[phis:phis] = [
            f"  {value} = phi {value.type} [{first}, %{before}], [{result}, %{end}]"
            for value, first, result in incoming
        ]
        again = self.emit("i1", f"icmp slt i64 {following}, {count}")
        self.line(f"br i1 {again}, label %{label}, label %{label}.end")
        self._begin(f"{label}.end")
        return results

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        label = self._label("when")
        self.line(f"br i1 {condition}, label %{label}, label %{label}.end")
        self._begin(label)
        body()
        self.line(f"br label %{label}.end")
        self._begin(f"{label}.end")

    def compare(self, kind: str, a: Value, b: Value | int) -> Value:
        return self.emit("i1", f"icmp {kind} i64 {a}, {b}")

    def space(self, size: Value | int) -> Value:
        """`size` bytes on the stack, aligned to 64."""
        return self.emit("ptr", f"alloca i8, i64 {size}, align 64")

    def broadcast(self, scalar: Value) -> Value:
        """An fp32 scalar in all 16 lanes."""
        one = self.emit(FLOATS, f"insertelement {FLOATS} poison, float {scalar}, i32 0")
        return self.emit(FLOATS, f"shufflevector {FLOATS} {one}, {FLOATS} poison, <16 x i32> zeroinitializer")

    def splat(self, number: float) -> Value:
        """A number, rounded to fp32, in all 16 lanes."""
        (rounded,) = struct.unpack("f", struct.pack("f", number))
        (bits,) = struct.unpack("<Q", struct.pack("<d", rounded))  # IR writes a float as the double it equals
        return Value(self, FLOATS, "<" + ", ".join([f"float 0x{bits:016X}"] * 16) + ">")

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.emit(FLOATS, f"call {FLOATS} @llvm.fma.v16f32({FLOATS} {a}, {FLOATS} {b}, {FLOATS} {c})")

    def floats(self, operation: str, a: Value, b: Value) -> Value:
        """fadd, fmul, fdiv and so on of fp32 lanes, rounded."""
        return self.emit(FLOATS, f"{operation} {FLOATS} {a}, {b}")

    def prefetch(self, address: Value) -> None:
        """Bring a line into the second-level cache, if there is such an address."""
        self.line(f"call void @llvm.prefetch.p0(ptr {address}, i32 0, i32 2, i32 1)")

    def widen(self, halves: Value) -> Value:
        """<16 x i16> that are bf16 -> fp32."""
        wide = self.emit("<16 x i32>", f"zext <16 x i16> {halves} to <16 x i32>")
        high = self.emit("<16 x i32>", f"shl <16 x i32> {wide}, {constant('i32', [16] * 16)}")
        return self.emit(FLOATS, f"bitcast <16 x i32> {high} to {FLOATS}")

    def _label(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def _begin(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label


def constant(kind: str, values: Sequence[float]) -> str:
    """A vector constant."""
    return "<" + ", ".join(f"{kind} {value}" for value in values) + ">"


_INTRINSICS = f"""
declare i64 @llvm.smin.i64(i64, i64)
declare {FLOATS} @llvm.fma.v16f32({FLOATS}, {FLOATS}, {FLOATS})
declare {FLOATS} @llvm.sqrt.v16f32({FLOATS})
declare {FLOATS} @llvm.rint.v16f32({FLOATS})
declare {FLOATS} @llvm.x86.avx512.mask.scalef.ps.512({FLOATS}, {FLOATS}, {FLOATS}, i16, i32)
declare {WORDS} @llvm.x86.avx512.permvar.hi.512({WORDS}, {WORDS})
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
"""


def module(functions: Sequence[Function]) -> str:
    """The text of a module that holds `functions` and what they may call."""
    return "\n\n".join(function.text() for function in functions) + _INTRINSICS
