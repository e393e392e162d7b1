"""Linear layers: a row depends on itself alone, bit for bit, an int4 column too, and both are right.

"int4" is the operator that serves here, "int4 of torch" the one that serves where there is no AMX. "int8" has
zeros, "int8 plain" none; they are served on AMX alone.
"""

from __future__ import annotations

import pytest
import torch

from kernels.linear import (
    BF16_K_CHUNK,
    Weight,
    int4_takes,
    int8_takes,
    linear,
    linear_parts,
    pack_bf16,
    pack_fp32,
    pack_int4,
    pack_int4_for_torch,
    pack_int8,
    stack,
)
from kernels.native import machine
from kernels.native.packed import LONGEST
from tests.bits import random, same_bits, torch_threads
from tests.cancel import cancelling_product

AMX = machine.supported()
ROWS = (1, 2, 8, 15, 16, 17, 21, 29, 64, 256)
# Shapes (N, K) that models have: a unit's share of something, of SmolLM2 and of stories260K; the ends of
# what int4 takes; and odd ones, which only the dense operators take.
INT4 = [(16, 32, 32), (192, 576, 32), (960, 576, 32), (576, 512, 32), (64, 256, 256), (48, 640, 128)]
INT8 = [(16, 16, 16), (192, 576, 16), (64, 192, 32), (576, 512, 64), (64, 256, 256), (48, 624, 16)]
INT4_KINDS = ("int4", "int4 of torch")
INT8_KINDS = ("int8", "int8 plain") if AMX else ()
CODES = (*INT4_KINDS, *INT8_KINDS)
DENSE = [(1, 1), (64, 64), (43, 64), (64, 172), (192, 576), (1024, 576), (33, 1000)]


def int4_parts(seed: int, n: int, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    scales = (random(seed + 1, n, k // group).abs() + 0.1) / (7 * k**0.5)
    return codes, scales, -8 * scales * (1 + 0.1 * random(seed + 2, n, k // group))


def int4_weight(
    codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, group: int, kind: str = "int4"
) -> Weight:
    if kind == "int4":
        return pack_int4(codes, scales, offsets, group)
    return pack_int4_for_torch(codes, scales, offsets + 8 * scales, group)


def int8_parts(seed: int, n: int, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=draw).to(torch.int8)
    scales = (random(seed + 1, n, k // group).abs() + 0.1) / (70 * k**0.5)
    return codes, scales, 20 * scales * random(seed + 2, n, k // group)


def int8_weight(
    codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, group: int, kind: str
) -> Weight:
    return pack_int8(codes, scales, None if kind == "int8 plain" else offsets, group)


def weight_of(kind: str, n: int, k: int, group: int = 0) -> Weight:
    if kind in INT8_KINDS:
        return int8_weight(*int8_parts(n + k, n, k, group), group, kind)
    if kind in INT4_KINDS:
        return int4_weight(*int4_parts(n + k, n, k, group), group, kind)
    dense = random(n * 7 + k, n, k) / k**0.5
    return pack_bf16(dense) if kind == "bf16" else pack_fp32(dense)


CASES = [
    *((kind, *shape) for kind in INT4_KINDS for shape in INT4),
    *((kind, *shape) for kind in INT8_KINDS for shape in INT8),
    *((kind, n, k, 0) for kind in ("bf16", "fp32") for n, k in DENSE),
]


@pytest.mark.parametrize(("kind", "n", "k", "group"), CASES)
def test_a_row_does_not_know_its_batch(kind, n, k, group):
    """Each row of every batch, wherever it stands and whatever stands beside it, equals the row alone."""
    weight = weight_of(kind, n, k, group)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    x = random(3, max(ROWS), k, dtype=dtype)
    x[5] = 0
    with torch_threads(1):
        alone = torch.cat([linear(x[i : i + 1], weight) for i in range(40)])
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for m in ROWS:
                order = torch.randperm(max(ROWS), generator=torch.Generator().manual_seed(m))[:m]
                y = linear(x[order].contiguous(), weight)
                at = (order < 40).nonzero()[:, 0]
                assert same_bits(y[at], alone[order[at]]), (m, threads)
    with torch_threads(2):
        assert same_bits(linear(x[:40].contiguous(), weight), alone)


def cancelling(kind: str, n: int, k: int) -> tuple[torch.Tensor, Weight]:
    """17 rows and a weight whose products are nothing but rounding: see tests/cancel.py."""
    x, w = cancelling_product(17, n, k, codes=kind in CODES, block=BF16_K_CHUNK if kind == "bf16" else None)
    if kind == "fp32":
        return x, pack_fp32(w)
    if kind == "bf16":
        return x.bfloat16(), pack_bf16(w)
    scales = torch.full((n, k // 32), 0.125)
    if kind in INT8_KINDS:
        return x.bfloat16(), int8_weight(w.to(torch.int8), scales, torch.zeros_like(scales), 32, kind)
    return x.bfloat16(), int4_weight((w + 8).to(torch.uint8), scales, -8 * scales, 32, kind)


@pytest.mark.parametrize("kind", [*CODES, "bf16", "fp32"])
@pytest.mark.parametrize(
    ("n", "k"),
    [(16, 64), (48, 576), (192, 1536), (16, 2048), (64, 2048), (128, 4096), (576, 1536), (32, 14336)],
)
def test_not_even_the_rounding_knows_batch_or_threads(kind, n, k):
    """Up to the threads of a large machine: some libraries share out a long K where N is small for them."""
    x, weight = cancelling(kind, n, k)
    with torch_threads(1):
        alone = torch.cat([linear(x[i : i + 1], weight) for i in range(17)])
    assert kind in CODES or k < 500 or (alone != 0).double().mean() > 0.5
    for threads in (1, 2, 3, 4, 8, 16):
        with torch_threads(threads):
            assert same_bits(linear(x, weight), alone), threads
            assert same_bits(linear(x.flip(0), weight).flip(0), alone), threads


def test_a_long_fp32_row_does_not_know_its_batch():
    """K 8192 on two threads: a plain 16-row product of this shape changes with the threads."""
    weight = weight_of("fp32", 256, 8192)
    x = random(4, 17, 8192)
    with torch_threads(1):
        alone = linear(x[:1], weight)
    for threads in (1, 2, 4):
        with torch_threads(threads):
            assert same_bits(linear(x, weight)[:1], alone)
            assert same_bits(linear(x.flip(0), weight)[16:], alone)


@pytest.mark.parametrize("kind", [*CODES, "bf16", "fp32"])
@pytest.mark.parametrize("loud", [float("inf"), float("nan"), 1e30])
def test_a_loud_neighbour_is_not_heard(kind, loud):
    weight = weight_of(kind, 48, 320, 32)
    x = random(5, 16, 320, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    quiet = linear(x, weight)
    x[1::2] = loud
    assert same_bits(linear(x, weight)[::2], quiet[::2])


@pytest.mark.parametrize("kind", INT4_KINDS)
@pytest.mark.parametrize(("n", "k", "group"), [(96, 576, 32), (192, 256, 64)])
@pytest.mark.parametrize("m", [1, 7, 16, 40])
def test_int4_columns_do_not_know_their_neighbours(kind, n, k, group, m):
    """A unit's columns alone equal the same ones of the fused call, so ranks may fuse what they hold."""
    codes, scales, offsets = int4_parts(1, n, k, group)
    x = random(2, m, k, dtype=torch.bfloat16)
    whole = linear(x, int4_weight(codes, scales, offsets, group, kind))
    for start, stop in [(0, 16), (16, 64), (n - 48, n), (0, n - 16)]:
        rows = slice(start, stop)
        for threads in (1, 2):
            with torch_threads(threads):
                part = linear(x, int4_weight(codes[rows], scales[rows], offsets[rows], group, kind))
            assert same_bits(part, whole[:, rows].contiguous())


@pytest.mark.parametrize("kind", INT4_KINDS)
@pytest.mark.parametrize(("n", "k", "group"), INT4)
@pytest.mark.parametrize("m", [1, 16, 33])
def test_int4_is_right(kind, n, k, group, m):
    """Within the rounding of the result to bf16, of weights to bf16 inside torch's operator, and fp32 sums;
    scale and zero rounded to bf16, once each."""
    codes, scales, offsets = int4_parts(9, n, k, group)
    weight = int4_weight(codes, scales, offsets, group, kind)
    x = random(8, m, k, dtype=torch.bfloat16)
    scale, zero = (
        t.bfloat16().double().repeat_interleave(group, dim=1) for t in (scales, offsets + 8 * scales)
    )
    w = (codes.double() - 8) * scale + zero
    want, size = x.double() @ w.t(), x.double().abs() @ ((codes.double() - 8).abs() * scale + zero.abs()).t()
    error = (linear(x, weight).double() - want).abs()
    assert (error <= want.abs() * 2**-8 + size * (2**-18 if kind == "int4" and AMX else 2**-9)).all()


@pytest.mark.skipif(not AMX, reason="no AMX, or no compiler for it")
@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize(("n", "k", "group"), INT8)
@pytest.mark.parametrize("m", [1, 16, 33])
def test_int8_is_right_and_its_columns_stand_alone(kind, n, k, group, m):
    """Within the rounding of the result to bf16 and of fp32 sums: weights are what codes and scales say."""
    codes, scales, offsets = int8_parts(9, n, k, group)
    weight = int8_weight(codes, scales, offsets, group, kind)
    x = random(8, m, k, dtype=torch.bfloat16)
    scale, offset = (t.double().repeat_interleave(group, dim=1) for t in (scales, offsets))
    offset = offset * (kind == "int8")
    want = x.double() @ (codes.double() * scale + offset).t()
    size = x.double().abs() @ (codes.double().abs() * scale + offset.abs()).t()
    y = linear(x, weight)
    assert ((y.double() - want).abs() <= want.abs() * 2**-8 + size * 2**-18).all()
    for start, stop in {(0, 16), (n - 16, n)}:
        part = int8_weight(codes[start:stop], scales[start:stop], offsets[start:stop], group, kind)
        assert same_bits(linear(x, part), y[:, start:stop].contiguous())


@pytest.mark.skipif(not AMX, reason="no AMX, or no compiler for it")
def test_every_code_of_8_bits_is_multiplied():
    codes = torch.arange(-128, 128).to(torch.int8).view(16, 16)
    weight = pack_int8(codes, torch.ones(16, 1), None, 16)
    y = linear(torch.eye(16, dtype=torch.bfloat16), weight)
    assert torch.equal(y, codes.t().to(torch.bfloat16))


@pytest.mark.parametrize("m", [1, 16, 40, 130])
@pytest.mark.parametrize("kind", [*CODES, "bf16", "fp32"])
@pytest.mark.parametrize("widths", [(192, 192, 192), (256, 512, 64, 512)], ids=["alike", "uneven"])
def test_parts_together_equal_parts_apart(kind, m, widths):
    """What units do in one call equals a call a unit, whatever each one's share of K."""
    weights = [weight_of(kind, 48, k, 32) for k in widths]
    x = random(1, m, sum(widths), dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    apart = [linear(part, weight) for part, weight in zip(x.split(widths, dim=1), weights, strict=True)]
    for threads in (1, 2, 4):
        with torch_threads(threads):
            together = linear_parts(x, stack(weights))
            assert together.shape == (len(widths), m, 48)
            assert all(same_bits(a, b) for a, b in zip(together, apart, strict=True))
    assert (len(stack(weights)) == 1) == (AMX and kind in ("int4", *INT8_KINDS))


@pytest.mark.skipif(not AMX, reason="no AMX, or no compiler for it")
def test_parts_of_two_kinds_are_called_apart():
    weights = [weight_of("int4", 48, 64, 32), weight_of("int8", 48, 128, 16), weight_of("bf16", 48, 32)]
    assert stack(weights) == tuple(weights)
    x = random(1, 5, 224, dtype=torch.bfloat16)
    shares = x.split((64, 128, 32), dim=1)
    apart = [linear(part, weight) for part, weight in zip(shares, weights, strict=True)]
    assert all(same_bits(a, b) for a, b in zip(linear_parts(x, weights), apart, strict=True))
    joined = stack(weights[:1] * 2)
    with pytest.raises(ValueError, match=r"\(5, 64\).*K = 128"):
        linear_parts(x[:, :64], joined)
    with pytest.raises(ValueError, match="2 products of 5 rows"):
        linear(x[:, :128], joined[0])
    with pytest.raises(ValueError, match=r"\(5, 64\).*K = 224"):
        linear_parts(x[:, :64], weights)


@pytest.mark.skipif(not AMX, reason="no AMX, or no compiler for it")
def test_a_place_that_does_not_fit_is_refused():
    weight = weight_of("int4", 48, 64, 32)
    x, right = random(1, 4, 64, dtype=torch.bfloat16), torch.zeros(4, 48, dtype=torch.bfloat16)
    for out in (right[:, :16], right[:1], right.float(), right.view(48, 4).t()):
        with pytest.raises(ValueError, match=r"do not fit|neighbours"):
            linear(x, weight, out)
    assert not right.any()


def test_a_result_may_be_written_into_columns_of_another():
    for kind in (*CODES, "bf16", "fp32"):
        weight = weight_of(kind, 48, 64, 32)
        x = random(1, 20, 64, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
        wide = torch.full((20, 80), 7.0, dtype=x.dtype)
        linear(x, weight, wide[:, 16:64])
        assert same_bits(wide[:, 16:64].contiguous(), linear(x, weight))
        assert (wide[:, :16] == 7).all() and (wide[:, 64:] == 7).all()


@pytest.mark.skipif(not AMX, reason="no AMX, or no compiler for it")
def test_a_k_too_long_for_amx_is_left_to_torch():
    k = LONGEST
    x = random(2, 3, 2 * k, dtype=torch.bfloat16)
    for wide in (k, k + 32):
        parts = int4_parts(3, 16, wide, 32)
        weight, other = pack_int4(*parts, 32), int4_weight(*parts, 32, "int4 of torch")
        assert (type(weight) is type(other)) == (wide > k) != int8_takes(16, wide, 32)
        y, want = linear(x[:, :wide], weight).double(), linear(x[:, :wide], other).double()
        assert (y - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize(("n", "k"), DENSE)
@pytest.mark.parametrize("m", [1, 16, 33])
def test_dense_is_right(n, k, m):
    dense, x = random(6, n, k), random(7, m, k)
    size = x.double().abs() @ dense.double().abs().t()
    error = (linear(x, pack_fp32(dense)).double() - x.double() @ dense.double().t()).abs()
    assert (error <= size * (k + 8) * 2**-24).all()
    x, rounded = x.bfloat16(), dense.bfloat16().double()
    want = x.double() @ rounded.t()
    error = (linear(x, pack_bf16(dense)).double() - want).abs()
    assert (error <= want.abs() * 2**-8 + size * (k + 8) * 2**-24).all()


def test_inputs_are_left_alone():
    for kind in (*CODES, "bf16", "fp32"):
        x = random(1, 20, 64, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
        before = x.clone()
        linear(x, weight_of(kind, 16, 64, 32))
        assert same_bits(x, before)


@pytest.mark.parametrize("kind", [*CODES, "bf16", "fp32"])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 320), (64, 1376)])
def test_a_strided_view_is_the_same_rows(kind, n, k):
    """The stride is the rank's share of K: even where all that is left of a sum is its rounding."""
    x, weight = cancelling(kind, n, k)
    wide = torch.full((17, k + 96), 3.0, dtype=x.dtype)
    wide[:, 32 : 32 + k] = x
    for rows in (slice(0, 16), slice(0, 17)):
        assert same_bits(linear(wide[rows, 32 : 32 + k], weight), linear(x[rows].contiguous(), weight))


@pytest.mark.parametrize("kind", [*CODES, "bf16", "fp32"])
def test_bad_input_is_named(kind):
    weight = weight_of(kind, 16, 64, 32)
    right = torch.float32 if kind == "fp32" else torch.bfloat16
    wrong = torch.bfloat16 if kind == "fp32" else torch.float32
    with pytest.raises(ValueError, match=r"\(4, 63\).*K = 64"):
        linear(torch.zeros(4, 63, dtype=right), weight)
    with pytest.raises(ValueError, match=r"\(64,\)"):
        linear(torch.zeros(64, dtype=right), weight)
    with pytest.raises(ValueError, match="float"):
        linear(torch.zeros(4, 64, dtype=wrong), weight)
    with pytest.raises(ValueError, match="meta"):
        linear(torch.zeros(4, 64, dtype=right, device="meta"), weight)


@pytest.mark.parametrize(
    ("n", "k", "group"), [(15, 64, 32), (16, 48, 32), (16, 64, 48), (16, 96, 64), (16, 64, 16)]
)
def test_a_shape_the_int4_operator_refuses_is_refused_here(n, k, group):
    assert not int4_takes(n, k, group)
    codes = torch.zeros(n, k, dtype=torch.uint8)
    scales = torch.zeros(n, max(1, k // group))
    with pytest.raises(ValueError, match="int4 weight"):
        pack_int4(codes, scales, scales, group)


def test_int4_scales_of_another_shape_are_refused():
    codes, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.zeros(16, 2)
    with pytest.raises(ValueError, match="int4 weight"):
        pack_int4(codes, torch.zeros(16, 3), scales, 32)
    with pytest.raises(ValueError, match="int4 weight"):
        pack_int4(codes, scales, torch.zeros(16, 1), 32)


@pytest.mark.parametrize(("n", "k", "group"), [(15, 64, 32), (16, 48, 32), (16, 48, 48), (16, 64, 8)])
def test_a_shape_int8_is_not_served_in_is_refused(n, k, group):
    assert not int8_takes(n, k, group)
    with pytest.raises(ValueError, match="int8 weight"):
        pack_int8(torch.zeros(n, k, dtype=torch.int8), torch.zeros(n, k // group), None, group)


@pytest.mark.skipif(not AMX, reason="no AMX, or no compiler for it")
def test_int8_codes_and_scales_that_do_not_fit_are_refused():
    codes, scales = torch.zeros(16, 64, dtype=torch.int8), torch.zeros(16, 2)
    for bad in (
        (codes.to(torch.uint8), scales, None),
        (codes, scales[:, :1], None),
        (codes, scales, scales[:8]),
    ):
        with pytest.raises(ValueError, match="int8 weight"):
            pack_int8(*bad, 32)


def test_bytes_are_counted():
    if AMX:
        assert weight_of("int8", 64, 256, 32).nbytes == 64 * 256 + 64 * 8 * 8
        assert weight_of("int8 plain", 64, 256, 16).nbytes == 64 * 256 + 64 * 16 * 4
    assert weight_of("int4", 64, 256, 32).nbytes == 64 * 256 // 2 + 64 * 8 * 4
    assert weight_of("bf16", 64, 256).nbytes == 64 * 256 * 2
    assert weight_of("fp32", 64, 600).nbytes == 64 * 600 * 4
