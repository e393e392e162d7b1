"""The gated activation of the feed-forward network, silu(gate) * up, on partial sums.

`silu_mul` is what every kernel computes it by, so that fused and split products agree in every bit. It works
channel by channel: no order to keep. Knows no weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.convert import narrowed
from kernels.gpu.fold import check_partials, fold
from kernels.gpu.launch import check, launch, next_power_of_2, same_device

_CHANNELS = 1024  # a program's
_WARPS = 4


@triton.jit
def silu_mul(gate, up):
    """gate / (1 + exp(-gate)) * up, fp32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def silu_mul_fold_kernel(
    partials_ptr, out_ptr, stride, F: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < F
    at = row * (2 * F) + channel
    gate = fold(partials_ptr, stride, at, mask, S)
    up = fold(partials_ptr, stride, at + F, mask, S)
    y = narrowed(silu_mul(gate, up), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * F + channel, y, mask=mask)


def silu_mul_fold(partials: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up, computed in fp32 and rounded once.

    partials: fp32 [S, M, 2 * F], the gate's F channels first; S up to 16, added in the tree's order. out:
    fp16 or bf16 [M, F], overwritten. Raises ValueError naming what does not fit.
    """
    check("silu_mul_fold", "out", out, (torch.float16, torch.bfloat16), -1, -1)
    rows, width = out.shape
    count = check_partials("silu_mul_fold", partials, rows, 2 * width)
    same_device("silu_mul_fold", partials=partials, out=out)
    block = min(_CHANNELS, next_power_of_2(width))
    launch(
        silu_mul_fold_kernel,
        (rows, -(-width // block)),
        partials,
        out,
        rows * 2 * width,
        warps=_WARPS,
        F=width,
        S=count,
        BLOCK=block,
    )
