"""Narrow types against torch's own conversions, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.gpu.convert import e4m3_bits, narrowed
from kernels.gpu.launch import launch
from tests.gpu.device import DEVICE

N = 8192


@triton.jit
def _narrow(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, narrowed(tl.load(x_ptr + at), out_ptr.dtype.element_ty))


@triton.jit
def _encode(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, e4m3_bits(tl.load(x_ptr + at)))


def values() -> torch.Tensor:
    """All sorts of fp32: any bits, ties of the narrow types, the edges of e4m3."""
    generator = torch.Generator().manual_seed(3)
    anything = torch.randint(-(2**31), 2**31, (N // 2,), generator=generator).int().view(torch.float32)
    near = torch.randn(N // 4, generator=generator) * 10 ** torch.randn(N // 4, generator=generator)
    ties = (torch.arange(N // 4).float() - N // 8) / 2048  # every midpoint of the small numbers
    x = torch.cat([anything, near, ties])
    x[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 464.0])
    return x


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got[number], want[number])
    assert torch.equal(got[number].signbit(), want[number].signbit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrowed(dtype: torch.dtype) -> None:
    x = values().to(DEVICE)
    out = torch.full((N,), float("nan"), dtype=dtype, device=DEVICE)
    launch(_narrow, (1,), x, out, N=N)
    same(out, x.to(dtype))


def test_e4m3_saturates_and_rounds_to_even() -> None:
    x = values().to(DEVICE)
    out = torch.full((N,), 0x55, dtype=torch.uint8, device=DEVICE)
    launch(_encode, (1,), x, out, N=N)
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(want.float().isnan(), x.isnan())
    same(out.view(torch.float8_e4m3fn).float(), want.float())


def test_every_e4m3_comes_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(N // 256).to(DEVICE)
    x = codes.view(torch.float8_e4m3fn).float()
    out = torch.empty_like(codes)
    launch(_encode, (1,), x, out, N=N)
    number = ~x.isnan()
    assert torch.equal(out[number], codes[number])
