"""q, k, v: folded, turned, stored; against float64 and against every rounding done apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from kernels.gpu.rope import rope_store
from tests.gpu.device import DEVICE
from tests.gpu.test_norm import drawn, folded

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Step:
    """Arguments of one call, outputs poisoned."""

    partials: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    q: torch.Tensor
    cache: torch.Tensor
    heads: int
    kv_heads: int
    head_dim: int
    scales: torch.Tensor | None = None

    def run(self) -> Step:
        rope_store(
            self.partials, self.positions, self.slots, self.cos, self.sin, self.q, self.cache,
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, scales=self.scales,
        )  # fmt: skip
        return self


def step(
    rows=3, count=2, heads=4, kv_heads=2, head_dim=16, page=16, dtype=torch.float16, cache=None, scaled=False
) -> Step:
    blocks, table = 3, 40
    angle = torch.outer(torch.arange(table), 10000.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2)))
    generator = torch.Generator().manual_seed(rows)
    held = torch.full((blocks, 2, kv_heads, page, head_dim), float("nan"), device=DEVICE)
    return Step(
        drawn(count, rows, (heads + 2 * kv_heads) * head_dim, seed=rows),
        torch.randint(0, table, (rows,), generator=generator).to(DEVICE),
        torch.randperm(blocks * page, generator=generator)[:rows].to(DEVICE),
        angle.cos().float().to(DEVICE),
        angle.sin().float().to(DEVICE),
        torch.full((rows, heads, head_dim), float("nan"), dtype=dtype, device=DEVICE),
        held.to(cache or dtype),
        heads,
        kv_heads,
        head_dim,
        torch.full((blocks, 2, kv_heads, page), float("nan"), device=DEVICE) if scaled else None,
    )


def turned(s: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 q [M, heads, D] and keys with values [M, 2 * kv_heads, D], each operation rounded by itself."""
    x = folded(s.partials).view(len(s.slots), s.heads + 2 * s.kv_heads, s.head_dim).clone()
    both = s.heads + s.kv_heads
    low, high = x[:, :both].chunk(2, dim=-1)
    cos, sin = s.cos[s.positions.long()][:, None], s.sin[s.positions.long()][:, None]
    x[:, :both] = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    return x[:, : s.heads], x[:, s.heads :]


def stored(s: Step) -> torch.Tensor:
    """What stands at the slots: [M, 2 * kv_heads, D]."""
    page = s.cache.shape[3]
    flat = s.cache.view(torch.uint8) if s.cache.dtype == E4M3 else s.cache
    rows = [flat[slot // page, :, :, slot % page].reshape(-1, s.head_dim) for slot in s.slots.tolist()]
    return torch.stack(rows).view(s.cache.dtype)


def untouched(s: Step) -> bool:
    """Only the slots' own places were written."""
    page = s.cache.shape[3]
    held = s.cache.float().permute(0, 3, 1, 2, 4).reshape(-1, 2 * s.kv_heads * s.head_dim).clone()
    keep = torch.ones(len(held), dtype=torch.bool)
    keep[s.slots[s.slots >= 0].cpu()] = False
    assert page * len(s.cache) == len(held)
    return bool(held[keep].isnan().all())


@pytest.mark.parametrize("head_dim", [2, 12, 64, 80, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (9, 1)])
def test_every_bit(head_dim: int, heads: int, kv_heads: int) -> None:
    s = step(heads=heads, kv_heads=kv_heads, head_dim=head_dim, count=3).run()
    q, kv = turned(s)
    assert torch.equal(s.q, q.half()) and torch.equal(stored(s), kv.half()) and untouched(s)


def test_against_float64() -> None:
    """Not the same formula twice: turning is a product of complex numbers."""
    s = step(count=1, head_dim=32).run()
    x = s.partials[0].double().view(len(s.slots), -1, s.head_dim)
    pairs = torch.complex(*x.chunk(2, dim=-1))
    frequency = 10000.0 ** -(torch.arange(16, dtype=torch.float64, device=DEVICE) / 16)
    spun = pairs * torch.polar(torch.ones_like(frequency), s.positions.double()[:, None] * frequency)[:, None]
    want = torch.cat([spun.real, spun.imag], dim=-1)
    size = x.abs().amax(-1, keepdim=True)
    assert ((s.q.double() - want[:, : s.heads]).abs() <= 1e-3 * size[:, : s.heads]).all()
    kv = torch.cat([want[:, s.heads : s.heads + s.kv_heads], x[:, s.heads + s.kv_heads :]], dim=1)
    assert ((stored(s).double() - kv).abs() <= 1e-3 * size[:, s.heads :]).all()


def test_bf16_and_int32() -> None:
    s = step(dtype=torch.bfloat16)
    s = replace(s, positions=s.positions.int(), slots=s.slots.int()).run()
    q, kv = turned(s)
    assert torch.equal(s.q, q.bfloat16()) and torch.equal(stored(s), kv.bfloat16()) and untouched(s)


def test_fp8_saturates() -> None:
    s = step(cache=E4M3)
    s.partials[:, 1] *= 1000
    s.run()
    q, kv = turned(s)
    want = kv.clamp(-448, 448).to(E4M3)
    assert (want[1].float().abs() == 448).any()
    assert torch.equal(stored(s).float(), want.float()) and torch.equal(s.q, q.half()) and untouched(s)


@pytest.mark.parametrize("head_dim", [12, 16])
def test_fp8_with_a_scale_a_token_and_head(head_dim: int) -> None:
    s = step(cache=E4M3, scaled=True, rows=4, head_dim=head_dim)
    s.partials[:, 1] *= 1000
    s.partials[:, 2] *= 1e-30
    s.partials[:, 3] = 0
    s.run()
    _, kv = turned(s)
    scale = kv.abs().amax(-1) / 448
    page = s.cache.shape[3]
    got = torch.stack([s.scales[at // page, :, :, at % page].reshape(-1) for at in s.slots.tolist()])
    assert torch.equal(got, scale)
    assert s.scales.isnan().sum() == s.scales.numel() - scale.numel()
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]
    want = (kv / divisor).clamp(-448, 448).to(E4M3).float()
    assert torch.equal(stored(s).float(), want) and untouched(s)
    error = (stored(s).double() * got.double()[..., None] - kv.double()).abs()
    # Half a step of three bits of mantissa, or of the smallest numbers.
    assert (error <= kv.abs().double() * 2**-4 + got.double()[..., None] * 2**-10).all()


@pytest.mark.parametrize("cache", [None, E4M3])
def test_padding_writes_nothing(cache) -> None:
    s = step(rows=4, cache=cache, scaled=cache is not None)
    s.slots[1], s.slots[2] = -1, 3 * 16  # one past the cache
    s.positions[1] = -1
    s.run()
    q, kv = turned(replace(s, positions=s.positions.clamp(min=0)))
    assert s.q[1:3].isnan().all() and torch.equal(s.q[[0, 3]], q[[0, 3]].half())
    kept = replace(s, slots=s.slots[[0, 3]])
    assert untouched(kept)
    if cache is None:
        assert torch.equal(stored(kept), kv[[0, 3]].half())


def test_a_position_past_the_table_shows() -> None:
    s = step(rows=2)
    s.positions[1] = 40
    s.run()
    assert s.q[1].isnan().all() and not s.q[0].isnan().any()
    assert torch.equal(
        stored(s)[1, s.kv_heads :], turned(replace(s, positions=s.positions % 40))[1][1, 2:].half()
    )


def test_a_row_stands_alone() -> None:
    s = step(rows=5, count=4, cache=E4M3, scaled=True).run()
    for row in (0, 2, 4):
        for parts in (s.partials, folded(s.partials)[None]):
            alone = replace(
                s, partials=parts[:, row : row + 1].clone(), positions=s.positions[row : row + 1].clone(),
                slots=s.slots[row : row + 1].clone(), q=torch.full_like(s.q[:1], float("nan")),
                cache=torch.full_like(s.cache.float(), float("nan")).to(E4M3), scales=s.scales * float("nan"),
            ).run()  # fmt: skip
            assert torch.equal(alone.q[0], s.q[row])
            assert torch.equal(stored(alone)[0].view(torch.uint8), stored(s)[row].view(torch.uint8))


def test_refusals() -> None:
    s = step()
    refused = {
        "0 heads": replace(s, heads=0),
        "q is": replace(s, heads=5),
        "partials is": replace(s, partials=s.partials[:, :, 1:].contiguous()),
        "positions is torch.float32": replace(s, positions=s.positions.float()),
        "slots is": replace(s, slots=s.slots[1:]),
        "sin is": replace(s, sin=s.sin[1:]),
        "cache is torch.bfloat16": replace(s, cache=s.cache.bfloat16()),
        "cache has strides": replace(s, cache=s.cache.transpose(0, 4).contiguous().transpose(0, 4)),
        "blocks of 15 positions": replace(s, cache=s.cache[:, :, :, 1:].contiguous()),
        "scales are for": replace(s, scales=torch.empty(3, 2, 2, 16)),
        "scales is": replace(s, cache=s.cache.to(E4M3), scales=torch.empty(3, 2, 2, 8, device=DEVICE)),
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message):
            wrong.run()
