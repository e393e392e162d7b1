"""Compiles LLVM IR with the LLVM in Triton's library, places the code in memory, runs it on torch's threads.

Triton's library carries LLVM's x86 back end and exports its initialisers (3.7 and later). What it returns is
an ELF relocatable object (System V ABI, AMD64 supplement); code here refers to nothing outside itself, so
that placing it means copying its sections and resolving their references to each other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
from functools import cache

import torch

TRIPLE = "x86_64-unknown-linux-gnu"
PROCESSOR = "sapphirerapids"  # the first with AMX

_ALLOCATED, _PROGRESS_BITS, _NO_BITS, _RELOCATIONS, _SYMBOLS = 2, 1, 8, 4, 2
_PC32, _PLT32 = 2, 4  # relocation types: 32-bit distances


@cache
def supported() -> bool:
    """Whether code for AMX can be compiled and run here."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not torch.cpu._is_amx_tile_supported():
        return False
    try:
        _threads()
        compile_and_place("define void @nothing(ptr %arguments) {\n ret void\n}\n")["nothing"]()
    except (ImportError, OSError, AttributeError, TypeError):
        return False
    return torch.cpu._init_amx()


def compile_and_place(ir: str) -> dict[str, Code]:
    """The functions of a module, ready to be called, by name."""
    torch.cpu._init_amx()  # the kernel grants tile registers to processes that ask
    llvm = _llvm()
    arguments = (ir, TRIPLE, PROCESSOR, "", [], False, True)
    try:
        image = llvm.translate_to_asm(*arguments)
    except TypeError:  # Triton 3.8 and later ask whether address arithmetic is to be rewritten
        image = llvm.translate_to_asm(*arguments, False)
    return _place(image)


class Code:
    """A function in memory: `void f(void *arguments)`, called once on each of torch's threads."""

    def __init__(self, address: int, memory: mmap.mmap):
        self._memory = memory  # keeps the code alive
        self._address = address
        self._parallel, self.thread_number, self.thread_count = _threads()

    def __call__(self, *arguments: int, threads: int | None = None) -> None:
        """`arguments`, 64 bits each, are what the function's argument points to; `threads`: on so many."""
        block = _layout(len(arguments)).pack(*arguments)
        self._parallel(self._address, block, threads or torch.get_num_threads(), 0)


@cache
def _layout(arguments: int) -> struct.Struct:
    return struct.Struct(f"={arguments}q")


@cache
def _threads():
    """OpenMP's parallel region as GCC's libgomp offers it, from the library that torch runs on, and the
    addresses of the two functions by which a thread learns its number and their count."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    number, count = (
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (library.omp_get_thread_num, library.omp_get_num_threads)
    )
    return parallel, number, count


@cache
def _llvm():
    from triton._C import libtriton

    library = ctypes.CDLL(libtriton.__file__)
    for part in ("TargetInfo", "Target", "TargetMC", "AsmParser", "AsmPrinter"):
        getattr(library, f"LLVMInitializeX86{part}")()
    return libtriton.llvm


def _place(image: bytes) -> dict[str, Code]:
    """Load a relocatable object: memory is written first and made executable, and read-only, then."""
    (sections_at,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, sections_at + i * size) for i in range(count)]
    places: dict[int, int] = {}
    end = 0
    for i, (_, _, flags, _, _, length, _, _, alignment, _) in enumerate(sections):
        if flags & _ALLOCATED and length:
            places[i] = -(-end // max(1, alignment)) * max(1, alignment)
            end = places[i] + length
    memory = mmap.mmap(-1, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for i, place in places.items():
        _, kind, _, _, at, length, *_ = sections[i]
        if kind != _NO_BITS:
            memory[place : place + length] = image[at : at + length]
    symbols = _symbols(image, sections)
    for _, kind, _, _, at, length, _, target, _, _ in sections:
        if kind == _RELOCATIONS and target in places:
            for entry in range(at, at + length, 24):
                offset, info, addend = struct.unpack_from("<QQq", image, entry)
                name, section, value = symbols[info >> 32]
                if section not in places or info & 0xFFFFFFFF not in (_PC32, _PLT32):
                    raise ValueError(f"compiled code refers to {name!r}, which is not part of it")
                here = places[target] + offset
                struct.pack_into("<i", memory, here, places[section] + value + addend - here)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(len(memory)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "this system allows no memory to become executable")
    return {
        name: Code(base + places[section] + value, memory)
        for name, section, value in symbols
        if name and section in places
    }


def _symbols(image: bytes, sections: list[tuple]) -> list[tuple[str, int, int]]:
    """(name, section, value) of each symbol."""
    table = next(section for section in sections if section[1] == _SYMBOLS)
    names_at = sections[table[6]][4]
    symbols = []
    for entry in range(table[4], table[4] + table[5], 24):
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", image, entry)
        start = names_at + name
        symbols.append((image[start : image.index(b"\0", start)].decode(), section, value))
    return symbols
