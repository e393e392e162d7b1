"""The gated activation against float64, and each channel for itself."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu.activation import silu_mul_fold
from tests.gpu.device import DEVICE
from tests.gpu.test_norm import drawn, folded, poisoned


def expected(partials: torch.Tensor) -> torch.Tensor:
    gate, up = folded(partials).double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("width", [1, 64, 301, 1100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_against_float64(width: int, dtype: torch.dtype) -> None:
    partials, out = drawn(3, 2, 2 * width, seed=width), poisoned(2, width, dtype=dtype)
    silu_mul_fold(partials, out)
    want = expected(partials)
    near = want.abs() < 60000  # beyond, fp16 has no numbers
    error = (out.double() - want).abs()[near]
    tolerance = torch.finfo(dtype).eps / 2 + 4e-6
    assert (error <= tolerance * want.abs()[near] + 6e-8).all()
    assert not out.isnan().any()


def test_far_gates() -> None:
    """exp overflows or vanishes: the product is up's, or nothing."""
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0], device=DEVICE)
    partials = torch.cat([gate, torch.full_like(gate, 2.0)]).view(1, 1, -1)
    out = poisoned(1, 6, dtype=torch.float16)
    silu_mul_fold(partials, out)
    assert out[0].tolist() == [0, 0, 0, 0, 180, 400]


def test_a_row_stands_alone() -> None:
    partials, out = drawn(5, 4, 2 * 301), poisoned(4, 301, dtype=torch.float16)
    silu_mul_fold(partials, out)
    for row in range(4):
        for parts in (partials, folded(partials)[None]):
            alone = poisoned(1, 301, dtype=torch.float16)
            silu_mul_fold(parts[:, row : row + 1].clone(), alone)
            assert torch.equal(alone[0], out[row])


def test_refusals() -> None:
    partials, out = drawn(2, 3, 64), torch.empty(3, 32, dtype=torch.float16, device=DEVICE)
    refused = [
        ("out is torch.float32", (partials, out.float())),
        ("partials is", (partials, out[:, 1:].contiguous())),
        ("partials is torch.float16", (partials.half(), out)),
        ("17 sums", (drawn(17, 3, 64), out)),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=message):
            silu_mul_fold(*arguments)
