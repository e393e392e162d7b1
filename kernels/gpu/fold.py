"""Adds partial sums up in the order of the one tree (`tree.py`), inside whatever kernel consumes them.

A product that was cut hands over S matrices that still have to be added. S is known when the kernel is
compiled, so the tree unrolls into S loads and S - 1 additions. Knows nothing of what is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import check

MOST = 16  # partial sums that `fold` takes


@triton.jit
def fold(partials_ptr, stride, offsets, mask, S: tl.constexpr):
    """The sum of partials_ptr[s * stride + offsets] over s < S, fp32; 0 where mask is False.

    partials_ptr: fp32. stride: elements from one partial sum to the next; any integer type, products with it
    are 64 bits wide. offsets, mask: blocks of one shape (mask may be None). S: at most MOST."""
    if S == 1:
        return tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    else:
        # The largest power of two below S.
        left: tl.constexpr = 8 if S > 8 else (4 if S > 4 else (2 if S > 2 else 1))
        right: tl.constexpr = S - left
        far = partials_ptr + tl.full((), left, tl.int64) * stride
        low = fold(partials_ptr, stride, offsets, mask, left)
        return low + fold(far, stride, offsets, mask, right)


def check_partials(operation: str, partials: torch.Tensor, rows: int, width: int) -> int:
    """S of partials [S, rows, width], fp32 and contiguous. Raises ValueError where they are not that."""
    check(operation, "partials", partials, torch.float32, -1, rows, width)
    count = partials.shape[0]
    if not 1 <= count <= MOST:
        raise ValueError(f"{operation}: partials hold {count} sums to add, not 1 to {MOST}")
    return count


def check_aligned(operation: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that do not start on a multiple of 16 bytes: how wide loads are decides the layout in
    which an operation sums, and with it the order. Raises ValueError naming the tensor."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(f"{operation}: {name} does not start on a multiple of 16 bytes")
