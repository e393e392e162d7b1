"""Compiles a kernel for a GPU that is not there, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gpu.specimens import Specimen

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\.[A-Z0-9_.]*)?([^;]*);")
_GLOBAL = {"LD", "LDG", "LDGSTS", "ST", "STG", "UBLKCP", "RED", "ATOMG"}


@dataclass(frozen=True, slots=True)
class Loop:
    """A backward branch and what lies between: instructions by name, and the range of them."""

    first: int
    last: int
    mix: Counter

    @property
    def length(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class MachineCode:
    """`instructions`: (name, suffix) of each, in order. `warps` are those of the launch."""

    instructions: list[tuple[str, str]]
    loops: list[Loop]
    registers: int
    shared: int
    warps: int

    def count(self, name: str) -> int:
        return sum(op == name for op, _ in self.instructions)

    @property
    def spills(self) -> int:
        """Accesses of local memory: registers that did not fit, or arrays indexed at run time."""
        return self.count("LDL") + self.count("STL")

    def accesses_before(self, name: str) -> list[str]:
        """Accesses of global memory that come before the first instruction `name`; all if there is none."""
        names = [op for op, _ in self.instructions]
        before = names[: names.index(name)] if name in names else names
        return [op for op in before if op in _GLOBAL]

    def hot_loop(self, holding: str) -> Loop | None:
        """The largest innermost loop with such an instruction."""
        with_it = [loop for loop in self.loops if loop.mix[holding]]
        inner = [
            a
            for a in with_it
            if not any(b is not a and a.first <= b.first and b.last <= a.last for b in with_it)
        ]
        return max(inner, key=lambda loop: loop.length, default=None)

    def lane_instructions(self, holding: str) -> int:
        """Instructions times lanes of one turn of the hot loop."""
        loop = self.hot_loop(holding)
        return loop.length * self.warps * 32 if loop else 0


def compile_for(specimen: Specimen, architecture: int) -> MachineCode:
    """Raises what Triton raises where the kernel does not compile."""
    kernel = specimen.kernel
    names = kernel.arg_names
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    left_out = [n for n in names if n not in specimen.signature and n not in specimen.constants]
    if left_out:
        raise ValueError(f"{specimen.name}: neither signature nor constants give {left_out}")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in specimen.signature
        and name not in specimen.unaligned
        and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": specimen.warps,
            "num_stages": specimen.stages,
            "enable_fp_fusion": False,
        },
    )
    return read(compiled.asm["cubin"], compiled.metadata.shared, specimen.warps)


def read(cubin: bytes, shared: int, warps: int) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("-sass", file.name)
        usage = _tool("-res-usage", file.name)
    found = [(int(a, 16), op, suffix or "", rest) for a, op, suffix, rest in _LINE.findall(sass)]
    at = {address: i for i, (address, *_) in enumerate(found)}
    loops = []
    for i, (address, op, _, rest) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", rest) if op == "BRA" else None
        if target and int(target[1], 16) < address and int(target[1], 16) in at:
            first = at[int(target[1], 16)]
            loops.append(Loop(first, i, Counter(o for _, o, _, _ in found[first : i + 1])))
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    return MachineCode([(op, suffix) for _, op, suffix, _ in found], loops, registers, shared, warps)


def _tool(flag: str, path: str) -> str:
    done = subprocess.run([str(_TOOLS / "cuobjdump"), flag, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
