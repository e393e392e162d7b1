"""int4 on load: near, deterministic, and the same however a rank cuts it."""

import numpy as np
import pytest
import torch

from runtime.weights.quantize import quantize_int4


def dense(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed))


def test_each_weight_is_within_half_a_step():
    weight = dense(40, 256)
    planar = quantize_int4(weight)
    assert (planar.type, planar.group, planar.bits, planar.zero_point) == ("INT4", 32, (4,), 0)
    step = planar.scales().repeat_interleave(32, 1)
    # Half a step, and what rounding the minimum and the scale to fp16 (2**-11 relative) may add.
    slack = 2**-11 * (planar.offsets().abs().repeat_interleave(32, 1) + 15 * step)
    assert ((planar.dequantize() - weight).abs() <= step / 2 + slack).all()


def test_the_smallest_and_largest_of_a_group_take_the_end_codes():
    codes = quantize_int4(dense(16, 320)).codes().view(16, -1, 32)
    assert (codes.amin(-1) == 0).all() and (codes.amax(-1) == 15).all()


def test_a_constant_group_is_its_value():
    weight = torch.zeros(2, 64)
    weight[1, 32:] = 0.75
    assert torch.equal(quantize_int4(weight).dequantize(), weight)


def test_a_slice_on_a_group_boundary_quantises_as_within_the_whole():
    weight = dense(8, 172)
    whole = quantize_int4(weight)
    for start, stop in [(0, 64), (64, 128), (96, 172), (160, 172)]:
        part = quantize_int4(weight[:, start:stop])
        assert torch.equal(part.codes(), whole.codes()[:, start:stop])
        assert torch.equal(part.dequantize(), whole.dequantize()[:, start:stop])
        assert torch.equal(part.dequantize(), whole.select_cols(start, stop).dequantize())


def test_rows_do_not_depend_on_each_other():
    weight = dense(50, 96)
    whole = quantize_int4(weight)
    assert torch.equal(quantize_int4(weight[11:12]).dequantize(), whole.dequantize()[11:12])


def test_a_short_last_group_has_its_own_scale():
    weight = dense(4, 40)
    planar = quantize_int4(weight)
    assert planar.group == 8
    assert torch.equal(planar.dequantize()[:, 32:], quantize_int4(weight[:, 32:]).dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_quantise_as_their_fp32_values(dtype):
    weight = dense(4, 64).to(dtype)
    assert torch.equal(quantize_int4(weight).dequantize(), quantize_int4(weight.float()).dequantize())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -3e38])
def test_weights_that_fp16_scales_cannot_hold_are_refused(value):
    weight = dense(4, 64)
    weight[2, 40] = value
    with pytest.raises(ValueError, match="int4"):
        quantize_int4(weight)
