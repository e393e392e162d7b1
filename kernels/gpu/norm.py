"""Adds a layer's partial sums into the residual stream and normalises it: tree, addition, RMSNorm, one pass.

residual += fold(partials);  y = residual / sqrt(mean(residual**2) + eps) * weight  (Zhang and Sennrich 2019),
all in fp32, the result rounded once. One program a row, so a row's bits cannot depend on the others. The sum
of squares runs in the order of the layout that Triton gives it, which comes from the row's width, the type of
`out` and 16-byte alignment, and not from how many rows or partial sums there are: a test reads the layouts,
and tensors that are not aligned are refused. Knows no model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.convert import narrowed
from kernels.gpu.fold import check_aligned, check_partials, fold
from kernels.gpu.launch import check, launch, next_power_of_2, same_device
from kernels.gpu.overlap import after_previous, overlapping

WIDEST = 32768
# What fixes the order of the sum of squares, together with the width: part of `numerics`.
_WHOLE = 8192  # columns that stay in registers from the sum to the scaling
_PIECE = 4096  # of wider rows, columns at a time
_A_THREAD = 8  # of these, a thread's


@triton.jit
def _added(residual_ptr, partials_ptr, at, mask, stride, S: tl.constexpr):
    x = tl.load(residual_ptr + at, mask=mask, other=0.0)
    if S > 0:
        x += fold(partials_ptr, stride, at, mask, S)
        tl.store(residual_ptr + at, x, mask=mask)
    return x


@triton.jit
def _scaled(out_ptr, weight_ptr, x, factor, columns, at, mask):
    y = x * factor * tl.load(weight_ptr + columns, mask=mask, other=0.0)
    tl.store(out_ptr + at, narrowed(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_kernel(
    residual_ptr,
    partials_ptr,
    weight_ptr,
    out_ptr,
    stride,
    eps,
    S: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first BLOCK columns stay in registers from the sum to the scaling, the others are read again."""
    after_previous(OVERLAP)
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * H
    first = _added(residual_ptr, partials_ptr, row + columns, columns < H, stride, S)
    squares = first * first
    for start in range(BLOCK, H, BLOCK):
        here = start + columns
        x = _added(residual_ptr, partials_ptr, row + here, here < H, stride, S)
        squares += x * x
    if NORM:
        factor = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), H * 1.0) + eps))
        _scaled(out_ptr, weight_ptr, first, factor, columns, row + columns, columns < H)
        if H > BLOCK:
            tl.debug_barrier()  # what is read again may have been written by other threads
        for start in range(BLOCK, H, BLOCK):
            here = start + columns
            x = tl.load(residual_ptr + row + here, mask=here < H, other=0.0)
            _scaled(out_ptr, weight_ptr, x, factor, here, row + here, here < H)


def add_norm(
    residual: torch.Tensor,
    partials: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
) -> None:
    """residual += fold(partials), then out = RMSNorm(residual) * weight.

    residual: fp32 [M, H], changed in place. partials: fp32 [S, M, H], S up to 16, or None: nothing is added.
    weight: fp32 [H]. out: fp16, bf16 or fp32 [M, H], overwritten; None: addition alone (weight is not read).
    H: 1 to 32768. All start on a multiple of 16 bytes. Raises ValueError naming what does not fit.
    """
    check("add_norm", "residual", residual, torch.float32, -1, -1)
    rows, width = residual.shape
    if not 1 <= width <= WIDEST:
        raise ValueError(f"add_norm: rows of {width} elements, not 1 to {WIDEST}")
    count = 0 if partials is None else check_partials("add_norm", partials, rows, width)
    if out is not None:
        check("add_norm", "out", out, (torch.float16, torch.bfloat16, torch.float32), rows, width)
        if weight is None:
            raise ValueError("add_norm: out is wanted, but weight is None")
        check("add_norm", "weight", weight, torch.float32, width)
    elif partials is None:
        raise ValueError("add_norm: partials and out are both None: nothing to do")
    tensors = {"residual": residual, "partials": partials, "weight": weight, "out": out}
    same_device("add_norm", **tensors)
    check_aligned("add_norm", **tensors)
    launch(
        add_norm_kernel,
        (rows,),
        residual,
        residual if partials is None else partials,
        residual if weight is None else weight,
        residual if out is None else out,
        rows * width,
        eps,
        warps=warps_of(width),
        S=count,
        H=width,
        BLOCK=block_of(width),
        NORM=out is not None,
        OVERLAP=overlapping(residual.device),
    )


def block_of(width: int) -> int:
    """Columns that a row's program holds at a time."""
    return next_power_of_2(width) if width <= _WHOLE else _PIECE


def warps_of(width: int) -> int:
    """Warps of a row's program: a function of its width alone, since they shape the sum of squares."""
    return max(1, block_of(width) // (32 * _A_THREAD))
