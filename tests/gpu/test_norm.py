"""Fold, residual and RMSNorm against float64, the tree's order bit for bit, and rows that stand alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

from kernels.gpu.norm import add_norm
from kernels.gpu.tree import merges
from tests.gpu.device import DEVICE
from tests.support import REPOSITORY

EPS = 1e-5


def folded(partials: torch.Tensor) -> torch.Tensor:
    """The tree, from its postfix form."""
    pending: list[torch.Tensor] = []
    for leaf, count in zip(partials, merges(len(partials)), strict=True):
        pending.append(leaf)
        for _ in range(count):
            right = pending.pop()
            pending.append(pending.pop() + right)
    return pending[0]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values of very different sizes, so that another order of additions shows."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)
    return values.to(DEVICE)


def expected(residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = residual.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("count", range(1, 17))
def test_the_tree(count: int) -> None:
    """Addition alone, bit for bit; no column past the row is touched."""
    partials, residual = drawn(count, 2, 45, seed=count), drawn(2, 45)
    want = residual + folded(partials)
    held = partials.clone()
    add_norm(residual, partials, None, EPS, None)
    assert torch.equal(residual, want) and torch.equal(partials, held)


@pytest.mark.parametrize("width", [1, 64, 300, 577])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_against_float64(width: int, dtype: torch.dtype) -> None:
    residual, partials, weight = drawn(3, width), drawn(3, 3, width, seed=1), drawn(width, seed=2)
    want_residual = residual + folded(partials)
    want = expected(want_residual, weight)
    out = poisoned(3, width, dtype=dtype)
    add_norm(residual, partials, weight, EPS, out)
    assert torch.equal(residual, want_residual)
    tolerance = 2e-6 + torch.finfo(dtype).eps / 2
    assert ((out.double() - want).abs() <= tolerance * want.abs() + 1e-7).all()


def test_norm_alone_leaves_the_residual() -> None:
    residual, weight, out = drawn(2, 100), drawn(100, seed=2), poisoned(2, 100, dtype=torch.float32)
    held = residual.clone()
    add_norm(residual, None, weight, EPS, out)
    assert torch.equal(residual, held)
    torch.testing.assert_close(out.double(), expected(held, weight), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("width", [8195, 12289])
def test_rows_in_pieces(width: int) -> None:
    """Rows wider than what stays in registers are read twice."""
    residual, partials, weight = drawn(1, width), drawn(2, 1, width, seed=1), drawn(width, seed=2)
    want_residual = residual + folded(partials)
    out = poisoned(1, width, dtype=torch.float32)
    add_norm(residual, partials, weight, EPS, out)
    assert torch.equal(residual, want_residual)
    torch.testing.assert_close(out.double(), expected(want_residual, weight), rtol=2e-6, atol=1e-7)


def test_zeros_and_large_values() -> None:
    residual = torch.zeros(2, 96, device=DEVICE)
    residual[1] = 1e18  # squares still fit
    out = poisoned(2, 96, dtype=torch.float32)
    add_norm(residual, None, torch.ones(96, device=DEVICE), EPS, out)
    assert torch.equal(out[0], torch.zeros(96, device=DEVICE))
    torch.testing.assert_close(out[1], torch.ones(96, device=DEVICE))


@pytest.mark.parametrize("width", [96, 301])
def test_a_row_stands_alone(width: int) -> None:
    """However many rows there are, and however the same sum comes cut."""
    residual, partials, weight = drawn(7, width), drawn(8, 7, width, seed=1), drawn(width, seed=2)
    whole, out = residual.clone(), poisoned(7, width, dtype=torch.float16)
    add_norm(whole, partials, weight, EPS, out)
    for row in (0, 3, 6):
        for parts in (partials, folded(partials)[None], torch.stack([folded(p) for p in partials.split(4)])):
            alone = residual[row : row + 1].clone()
            got = poisoned(1, width, dtype=torch.float16)
            add_norm(alone, parts[:, row : row + 1].clone(), weight, EPS, got)
            assert torch.equal(alone[0], whole[row]) and torch.equal(got[0], out[row])


def test_refusals() -> None:
    residual, weight = drawn(2, 64), drawn(64)
    out = torch.empty(2, 64, device=DEVICE)
    refused = [
        ("residual is torch.float16", (residual.half(), None, weight, EPS, out)),
        ("partials is", (residual, drawn(2, 3, 64), weight, EPS, out)),
        ("17 sums", (residual, drawn(17, 2, 64), weight, EPS, out)),
        ("0 sums", (residual, drawn(0, 2, 64), weight, EPS, out)),
        ("weight is None", (residual, None, None, EPS, out)),
        ("weight is", (residual, None, drawn(63), EPS, out)),
        ("nothing to do", (residual, None, weight, EPS, None)),
        ("out is torch.float64", (residual, None, weight, EPS, out.double())),
        ("residual has strides", (drawn(64, 2).T, None, weight, EPS, out)),
        ("rows of 32769", (drawn(1, 32769), None, drawn(32769), EPS, drawn(1, 32769))),
        ("residual does not start", (drawn(129)[1:].view(2, 64), None, weight, EPS, out)),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=message):
            add_norm(*arguments)


def test_no_rows() -> None:
    add_norm(drawn(0, 64), drawn(2, 0, 64), drawn(64), EPS, drawn(0, 64))


def test_the_order_comes_from_the_width_alone_and_loads_are_wide() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.order"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    layouts = defaultdict(set)
    for fact in facts:
        layouts[fact["width"]].add(fact["layout"])
    assert layouts and all(len(found) == 1 for found in layouts.values()), layouts
    assert all(fact["wide"] == fact["loads"] > 0 for fact in facts if fact["width"] == 8192), facts
