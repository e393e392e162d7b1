"""Norm, rotary embedding, table rows and head: each row by itself, and right."""

from __future__ import annotations

import pytest
import torch

from kernels.embedding import RowTable, rows
from kernels.head import RESCORED, HeadShare, copied_share, head_logits, head_share
from kernels.native import machine
from kernels.norm import add_norm, rms_norm
from kernels.rope import rope_, rotate_and_store
from tests.bits import random, same_bits, torch_threads

BF16, FP32 = torch.bfloat16, torch.float32


def logits_of(x: torch.Tensor, share: HeadShare) -> torch.Tensor:
    out = torch.full((x.shape[0], share.size + 2), float("nan"))
    head_logits(x, share, out[:, 1:-1])
    assert out[:, [0, -1]].isnan().all()
    return out[:, 1:-1]


@pytest.mark.parametrize("width", [1, 8, 64, 100, 576, 4096, 8192, 32767])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_norm(width, dtype):
    m = 64 if width < 5000 else 9
    x, weight = random(1, m, width) * 30, random(2, width)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    with torch_threads(1):
        alone = torch.cat([rms_norm(x[i : i + 1], weight, 1e-5, dtype) for i in range(m)])
    assert alone.dtype == dtype
    bound = 2**-8 if dtype == BF16 else 2**-20
    assert ((alone.double() - want).abs() <= want.abs() * bound + 1e-12).all()
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for n in (2, 7, m):
                assert same_bits(rms_norm(x[m - n :], weight, 1e-5, dtype), alone[m - n :])
    if dtype == BF16:
        assert same_bits(alone, rms_norm(x, weight, 1e-5, FP32).bfloat16())  # rounded once


def test_norm_of_zeros_and_of_large_rows():
    weight = torch.ones(64)
    assert same_bits(rms_norm(torch.zeros(1, 64), weight, 1e-5, FP32), torch.zeros(1, 64))
    large = torch.full((1, 64), 1e15)
    assert (rms_norm(large, weight, 1e-5, FP32) - 1).abs().max() < 1e-6


def test_norm_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="bfloat16"):
        rms_norm(torch.zeros(1, 8, dtype=BF16), torch.ones(8), 1e-5, BF16)
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        rms_norm(torch.zeros(1, 8), torch.ones(9), 1e-5, FP32)
    with pytest.raises(ValueError, match="32768"):
        rms_norm(torch.zeros(1, 32768), torch.ones(32768), 1e-5, FP32)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 8), (12, 64), (40, 128)])
def test_rope(dtype, heads, dim):
    m, half = 33, dim // 2
    x = random(1, m, heads, dim, dtype=dtype)
    angles = random(2, m, 1, half).double() * 100
    cos = torch.cat((angles.cos(), angles.cos()), -1).float()
    sin = torch.cat((-angles.sin(), angles.sin()), -1).float()
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angles), angles
    )
    want = torch.cat((turned.real, turned.imag), -1)
    with torch_threads(1):
        alone = torch.cat([rope_(x[i : i + 1].clone(), cos[i : i + 1], sin[i : i + 1]) for i in range(m)])
    bound = 2**-8 if dtype == BF16 else 2**-22
    size = x.double().abs() + torch.roll(x.double().abs(), half, -1)
    assert ((alone.double() - want).abs() <= size * bound).all()
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for n in (2, m):
                got = rope_(x[m - n :].clone(), cos[m - n :], sin[m - n :])
                assert same_bits(got, alone[m - n :])
            share = x[:, heads // 2 :].clone()
            assert same_bits(rope_(share, cos, sin), alone[:, heads // 2 :].contiguous())
    wide = torch.zeros(m, heads * dim + 5, dtype=dtype)  # part of a wider row, as q and k are
    wide[:, : heads * dim] = x.view(m, -1)
    rope_(wide[:, : heads * dim].view(m, heads, dim), cos, sin)
    assert same_bits(wide[:, : heads * dim].reshape(m, heads, dim), alone)
    assert (wide[:, heads * dim :] == 0).all()


@pytest.mark.parametrize("width", [48, 100, 576, 4096])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("order", [(), ((0, 1), (0, 2)), ((0, 1), (2, 3), (0, 2), (4, 5), (4, 6), (0, 4))])
def test_add_norm_is_its_parts(width, dtype, order):
    """The sum in the order that is given, in fp32, then the norm: bit for bit, however many rows."""
    m = 33
    count = 1 + max((other for _, other in order), default=0)
    x, weight, parts = random(1, m, width), random(2, width), random(3, count, m, width).to(dtype)
    leaves = list(parts.float())
    for into, other in order:
        leaves[into] = leaves[into] + leaves[other]
    want = x + leaves[0]
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for n in (1, 2, m):
                got, normal = x[m - n :].clone(), torch.empty(n, width, dtype=BF16)
                add_norm(got, parts[:, m - n :], order, weight, 1e-5, normal)
                assert same_bits(got, want[m - n :])
                assert same_bits(normal, rms_norm(want[m - n :], weight, 1e-5, BF16))
                got = x[m - n :].clone()
                add_norm(got, list(parts[:, m - n :]), order, weight, 1e-5, normal)
                assert same_bits(got, want[m - n :])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 32), (2, 1, 128), (3, 1, 8)])
def test_rotate_and_store_is_rope_and_a_copy(dtype, heads, kv_heads, dim):
    m = 33
    wide = random(1, m, (heads + 2 * kv_heads) * dim + 5, dtype=dtype)
    angles = random(2, m, 1, dim // 2) * 100
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    places = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:m]
    turned = (heads + kv_heads) * dim
    want = wide[:, :-5].clone()
    with torch_threads(1):
        for i in range(m):
            rope_(want[i : i + 1, :turned].view(1, -1, dim), cos[i : i + 1], sin[i : i + 1])
    kept = torch.zeros(50, 2 * kv_heads * dim, dtype=dtype)
    kept[places] = want[:, heads * dim :]
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for n in (1, m):
                got, cache = wide[:n].clone(), torch.zeros_like(kept)
                rotate_and_store(got[:, :-5], cos[:n], sin[:n], heads, kv_heads, cache, places[:n])
                assert same_bits(got[:, :-5], want[:n]) and same_bits(got[:, -5:], wide[:n, -5:])
                assert same_bits(cache[places[:n]], kept[places[:n]])
                assert cache.count_nonzero() == kept[places[:n]].count_nonzero()


def quantised_table(v: int, k: int, group: int, *, offsets: bool = True) -> tuple[RowTable, torch.Tensor]:
    """A table and its rows in float64."""
    generator = torch.Generator().manual_seed(v + k)
    if offsets:
        codes = torch.randint(0, 16, (v, k), generator=generator, dtype=torch.uint8)
    else:
        codes = torch.randint(-128, 128, (v, k), generator=generator).to(torch.int8)
    scales = random(1, v, k // group).abs() / 50
    minima = random(2, v, k // group) / 10 if offsets else None
    exact = codes.double() * scales.double().repeat_interleave(group, 1)
    if minima is not None:
        exact = exact + minima.double().repeat_interleave(group, 1)
    return RowTable(codes, scales, minima, group), exact


@pytest.mark.parametrize("offsets", [True, False])
def test_table_rows(offsets):
    table, exact = quantised_table(100, 96, 32, offsets=offsets)
    index = torch.tensor([99, 0, 7, 7, 50])
    for threads in (1, 2):
        with torch_threads(threads):
            got = rows(table, index)
    assert got.dtype == FP32 and (got.double() - exact[index]).abs().max() <= exact.abs().max() * 2**-22
    for i, at in enumerate(index.tolist()):
        assert same_bits(rows(table, torch.tensor([at])), got[i : i + 1])
    assert rows(table, torch.tensor([], dtype=torch.int64)).shape == (0, 96)


@pytest.mark.parametrize("dtype", [FP32, torch.float16, BF16])
def test_dense_table_rows_are_what_is_stored(dtype):
    codes = random(1, 10, 48, dtype=dtype)
    table = RowTable(codes, None, None, 0)
    assert same_bits(rows(table, torch.tensor([3, 9])), codes[[3, 9]].float())
    assert table.nbytes == codes.nbytes


def test_table_bytes_are_counted():
    table, _ = quantised_table(100, 96, 32)
    assert table.nbytes == 100 * 96 + 2 * 100 * 3 * 4


def head_of(kind: str, table: RowTable, start: int, stop: int, *, own: bool = False) -> HeadShare:
    """Rows start .. stop - 1 of a head; `own`: from a table of these rows alone, as a rank holds them."""
    if own:
        rows_ = slice(start, stop)
        minima = None if table.offsets is None else table.offsets[rows_]
        table = RowTable(table.codes[rows_], table.scales[rows_], minima, table.group)
        start, stop = 0, stop - start
    if kind == "tiles":
        share = head_share(table, start, stop, BF16)
        assert share.weight is None
        return share
    return copied_share(table, start, stop, FP32 if kind == "fp32" else BF16)


TILES = pytest.param("tiles", marks=pytest.mark.skipif(not machine.supported(), reason="no AMX"))


@pytest.mark.skipif(not machine.supported(), reason="no AMX")
@pytest.mark.parametrize("m", [1, 3, 16, 20])
@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize(
    ("v", "k", "group", "start", "stop"),
    [(1000, 128, 32, 333, 666), (64, 96, 16, 40, 57), (64, 512, 256, 0, 16), (500, 576, 64, 3, 500)],
)
def test_tiles_make_every_logit_exact(m, offsets, v, k, group, start, stop):
    """As exact as fp32 sums are, whatever the size of x."""
    table, exact = quantised_table(v, k, group, offsets=offsets)
    share = head_of("tiles", table, start, stop)
    for size in (1.0, 1e-6, 1e4):
        x = random(5, m, k) * size
        x[0, : k // 2] *= 1e-5
        bound = x.double().abs() @ exact[start:stop].abs().t()
        error = (logits_of(x, share).double() - x.double() @ exact[start:stop].t()).abs()
        assert (error <= bound * 2**-20).all()


@pytest.mark.skipif(not machine.supported(), reason="no AMX")
def test_a_loud_row_of_the_head_is_not_heard():
    x = random(5, 16, 128)
    share = head_of("tiles", quantised_table(100, 128, 32)[0], 0, 100)
    quiet = logits_of(x, share)
    x[1::2] = float("nan")
    x[3] = float("inf")
    assert same_bits(logits_of(x, share)[::2], quiet[::2])
    assert not logits_of(x, share)[1::2].isfinite().any()


@pytest.mark.parametrize(
    ("v", "start", "stop"), [(1000, 0, 1000), (1000, 333, 666), (64, 40, 57), (64, 9, 10)]
)
def test_the_best_logits_are_exact(v, start, stop):
    """As exact as fp32 sums are, for the rows that a bf16 pass ranks first; the others to bf16."""
    table, exact = quantised_table(v, 128, 32)
    x = random(5, 20, 128)
    want = x.double() @ exact[start:stop].t()
    size = x.double().abs() @ exact[start:stop].abs().t()
    got = logits_of(x, head_of("bf16", table, start, stop))
    assert got.dtype == FP32 and got.shape == (20, stop - start)
    error = (got.double() - want).abs()
    assert (error <= size * 2**-7).all()
    best = want.topk(min(RESCORED // 2, stop - start), dim=1).indices
    assert (error.gather(1, best) <= size.gather(1, best) * 2**-20).all()
    assert torch.equal(got.argmax(1), want.argmax(1))


def test_near_ties_in_bf16_are_told_apart():
    """Rows that one bf16 number stands for: what a bf16 head gets wrong."""
    base = random(1, 1, 64)
    codes = base * (1 + torch.arange(40)[:, None] * 1e-5)
    share = head_share(RowTable(codes, None, None, 0), 0, 40, BF16)
    got = logits_of(base, share)[0]
    want = (base.double() @ codes.double().t())[0]
    exact = (got - want).abs() < want.abs() * 2**-20
    assert exact.sum() >= RESCORED and torch.unique(got[exact]).numel() >= RESCORED


@pytest.mark.parametrize("kind", ["bf16", "fp32", TILES])
def test_head_rows_do_not_know_their_batch_nor_the_share_its_rank(kind):
    x = random(5, 40, 128)
    table, _ = quantised_table(1000, 128, 32)
    share, own = (head_of(kind, table, 333, 666, own=own) for own in (False, True))
    with torch_threads(1):
        alone = torch.cat([logits_of(x[i : i + 1], share) for i in range(40)])
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for m in (1, 2, 7, 16, 17, 40):
                assert same_bits(logits_of(x[40 - m :], share), alone[40 - m :])
                assert same_bits(logits_of(x[40 - m :], own), alone[40 - m :])
