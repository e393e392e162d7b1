"""silu(gate) * up: the same bits in any shape and on any number of threads."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import gate, silu_mul
from tests.bits import random, same_bits, torch_threads

EVERY_BF16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = torch.full(gate.shape, 7.0, dtype=gate.dtype)
    assert silu_mul(gate, up, out) is out
    return out


@pytest.mark.parametrize("width", [1, 3, 7, 31, 33, 63])
def test_every_bf16_number_has_one_silu(width):
    """All 65,536 of them: in one vector loop, and in pieces so short that scalar tails compute them."""
    one = torch.ones_like(EVERY_BF16)
    whole = apply(EVERY_BF16, one)
    pieces = [apply(part, part.new_ones(part.shape)) for part in EVERY_BF16.split(width)]
    together = torch.cat(pieces)
    nan = whole.isnan()
    assert torch.equal(nan, together.isnan())
    assert same_bits(whole[~nan], together[~nan])


def test_every_bf16_silu_is_right():
    x = EVERY_BF16[EVERY_BF16.isfinite()]
    want = x.double() * torch.sigmoid(x.double())
    got = apply(x, torch.ones_like(x)).double()
    # One rounding, and an absolute part: below -88.7 the exponential overflows and the result is -0.
    assert ((got - want).abs() <= want.abs() * 2**-8 + 2**-120).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 43, 64, 172, 512, 1536, 14336])
def test_a_row_does_not_know_its_batch(dtype, width):
    rows = 40 if width < 5000 else 6
    gate, up = (random(i, rows, width, dtype=dtype) * 4 for i in (1, 2))
    with torch_threads(1):
        alone = torch.cat([apply(gate[i : i + 1], up[i : i + 1]) for i in range(rows)])
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for m in (2, 7, rows):
                assert same_bits(apply(gate[-m:], up[-m:]), alone[-m:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_share_of_the_channels_has_the_same_bits(dtype):
    """What a unit computes does not depend on the channels beside it, nor on the stride they come with."""
    both = random(3, 17, 400, dtype=dtype)
    gate, up = both[:, :200], both[:, 200:]
    whole = apply(gate, up)
    assert same_bits(whole, apply(gate.contiguous(), up.contiguous()))
    for start, stop in [(0, 1), (5, 48), (48, 200), (199, 200)]:
        part = apply(gate[:, start:stop], up[:, start:stop])
        assert same_bits(part, whole[:, start:stop].contiguous())


def test_fp32_is_right_and_leaves_its_inputs():
    gate, up = random(1, 9, 1001) * 8, random(2, 9, 1001)
    kept = gate.clone(), up.clone()
    want = gate.double() * torch.sigmoid(gate.double()) * up.double()
    assert ((apply(gate, up).double() - want).abs() <= want.abs() * 2**-20 + 1e-30).all()
    assert same_bits(gate, kept[0]) and same_bits(up, kept[1])


def gated(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(x) * up, both [M, C], by `gate`."""
    out = torch.full(x.shape, 7.0, dtype=x.dtype)
    gate(torch.cat((x, up), dim=1), out)
    return out


def test_every_bf16_number_is_gated_as_silu_mul_does():
    """But for infinities, which may end as NaN, and results too small for a normal bf16, which may be 0."""
    x = EVERY_BF16[EVERY_BF16.isfinite()]
    x = x[: len(x) // 48 * 48].view(-1, 48)
    up = random(1, *x.shape).bfloat16()
    got, want = gated(x, up), apply(x, up)
    small = (x.double() * torch.sigmoid(x.double())).abs() < 2**-125
    small |= want.double().abs() < 2**-125
    assert same_bits(got[~small], want[~small])
    assert (got[small].double().abs() < 2**-120).all()
    nothing = torch.full((1, 16), float("nan"), dtype=torch.bfloat16)
    assert gated(nothing, nothing).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("units", "width"), [(1, 16), (3, 512), (2, 43), (8, 3584)])
def test_gated_rows_and_units_stand_alone(dtype, units, width):
    m = 33 if width < 1000 else 5
    x, up = (random(i, m, units * width, dtype=dtype) * 4 for i in (1, 2))
    shares = [slice(u * width, (u + 1) * width) for u in range(units)]
    with torch_threads(1):
        alone = torch.cat([gated(x[:, share], up[:, share]) for share in shares], dim=1)
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for n in (1, 2, m):
                assert same_bits(gated(x[-n:], up[-n:]), alone[-n:])


@pytest.mark.parametrize("width", [24, 43])
def test_what_a_rank_holds_does_not_choose_the_gate(width):
    """Two units of any width together, and apart, where torch's gate and the compiled one differ: near the
    smallest normal numbers."""
    x = (2.0**-126 * (1 + torch.arange(2 * width) / width)).bfloat16().expand(3, -1).contiguous()
    up = (random(1, 3, 2 * width) * 2.0**100).bfloat16()
    shares = slice(0, width), slice(width, None)
    apart = torch.cat([gated(x[:, share], up[:, share]) for share in shares], dim=1)
    assert same_bits(gated(x, up), apart)
