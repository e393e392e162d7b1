"""Lets a kernel start while the one before it ends: programmatic dependent launch, from sm_90 on.

A kernel launched so may begin as soon as every program of the kernel before has passed its own wait, in
whatever room is left, and waits where it says so until that one has ended and its writes can be seen. What
the start of a kernel costs then runs beside the end of another; a step of an 80-layer model has some 700.

The waits chain. A kernel that waits does not end before the one it waits for has, so by the time a third
one's wait returns the first has ended, too. Hence every program of every kernel launched so must wait, those
without work included, and before it touches anything that a kernel of the step writes. Kernels that know
nothing of this (torch's) start, as ever, when all before them have ended. PTX ISA, griddepcontrol; CUDA C++
Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.gpu.launch import INTERPRETED

OLDEST = (9, 0)  # compute capability
_chosen: ContextVar[bool] = ContextVar("overlap", default=False)


@contextlib.contextmanager
def overlap(chosen: bool = True) -> Iterator[None]:
    """Kernels that are launched, or captured, inside may overlap the one before them. Changes no bit."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


def overlapping(device: torch.device) -> bool:
    """Whether a kernel launched now may overlap the one before it: inside `overlap`, on a GPU that can."""
    return _chosen.get() and not INTERPRETED and torch.cuda.get_device_capability(device) >= OLDEST


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """What comes behind this happens after the kernel before has ended; the next one may begin to start."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_ahead(pointers):
    """Asks for the cache lines (128 bytes) that hold `pointers`, into the L2 cache, without waiting. Only for
    what no kernel of the step writes: weights."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
