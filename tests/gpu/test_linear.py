"""The planar GEMM against float64, and its freedoms against themselves bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bench.gpu.shapes import FORMATS
from kernels.gpu import linear as gemm
from kernels.gpu.chunks import CHUNK, schedule
from kernels.gpu.linear import gated_linear, linear, linear_pair
from kernels.gpu.planar import PlanarWeight, dequantize, prepare, prepare_dense
from kernels.gpu.tree import merges
from kernels.gpu.tuning import HOPPER, Gpu, Tiling, default_tiling
from runtime.weights.planar import Planar
from tests.bits import random
from tests.gpu.device import DEVICE, ON_GPU
from tests.gpu.weights import TYPES, random_planar

TILINGS = (
    Tiling(64, 16),
    Tiling(128, 32, 8, 2),
    Tiling(64, 64, 4, 4, split=1),
    Tiling(128, 16, 4, 3, split=3),
)


def on_device(weight: Planar) -> PlanarWeight:
    return prepare(weight.to(DEVICE))


def folded(partials: torch.Tensor) -> torch.Tensor:
    pending: list[torch.Tensor] = []
    for part, additions in zip(partials.cpu(), merges(len(partials)), strict=True):
        pending.append(part)
        for _ in range(additions):
            right, left = pending.pop(), pending.pop()
            pending.append(left + right)
    return pending[0]


def product(x: torch.Tensor, weight: PlanarWeight, tiling: Tiling | None = None) -> torch.Tensor:
    """Through an output full of NaN, all of which must be overwritten."""
    splits = schedule(weight.width, weight.units, tiling.split if tiling else 0, x.device).splits
    out = torch.full((splits, len(x), weight.rows), float("nan"), device=x.device)
    return folded(linear(x, weight, out, tiling))


def rows_of_x(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Drawn from a seed: what a test drew from torch's own generator would depend on the tests before it."""
    return random(seed, tokens, width, dtype=torch.float16).to(DEVICE)


def error(got: torch.Tensor, wanted: torch.Tensor, size: float = 0.0) -> float:
    """`size`: what to hold it against, where `wanted` is so few numbers that their terms may cancel."""
    return float((got.double().cpu() - wanted).norm() / (size or wanted.norm()))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind: str) -> None:
    planar = random_planar(kind, 83, 512, seed=1)
    x = rows_of_x(19, 512)
    exact = dequantize(planar).double()
    assert error(product(x, on_device(planar)), x.cpu().double() @ exact.t()) < 1e-6
    # fp16 weights lose at most 2**-11 of scale and of offset, and of their sum
    assert error(exact, planar.dequantize().double()) < 5e-4


def test_dense_weights() -> None:
    w = 0.02 * random(1, 70, 200).to(DEVICE)
    x = rows_of_x(5, 200)
    wanted = x.cpu().double() @ w.cpu().half().double().t()
    assert error(product(x, prepare_dense(w)), wanted) < 1e-6
    units = prepare_dense([w[:, :100], w[:, 100:]])
    assert error(product(x, units, Tiling(split=1)), wanted) < 1e-6
    with pytest.raises(ValueError, match="row 3 does not fit fp16"):
        prepare_dense(w.index_fill(0, torch.tensor([3], device=DEVICE), 1e6))


@pytest.mark.parametrize(
    "kind, start, stop", [("Q4_0", 0, 480), ("Q4_K", 32, 288), ("Q6_K", 16, 432), ("Q8_0", 0, 96)]
)
def test_columns_cut_anywhere(kind: str, start: int, stop: int) -> None:
    planar = random_planar(kind, 70, 512).select_cols(start, stop)
    x = rows_of_x(3, stop - start)
    wanted = x.cpu().double() @ dequantize(planar).double().t()
    assert error(product(x, on_device(planar)), wanted) < 1e-6


@pytest.mark.parametrize("rows, tokens", [(1, 1), (64, 16), (65, 17), (130, 40)])
def test_ragged_edges(rows: int, tokens: int) -> None:
    planar = random_planar("Q5_K", rows, 256)
    x, w = rows_of_x(tokens, 256), dequantize(planar).double()
    wanted = x.cpu().double() @ w.t()
    size = float(x.double().norm() * w.norm()) / 256**0.5  # that of `wanted`, but for luck
    for tiling in TILINGS[:3]:
        assert error(product(x, on_device(planar), tiling), wanted, size) < 1e-6


def exact_inputs(rows: int, width: int, units: int, tokens: int) -> tuple[torch.Tensor, list[Planar]]:
    """One column of each chunk is not zero, so each chunk's sum is exact; chunks cancel, so the order in
    which they are added shows."""
    draw = np.random.default_rng(3)
    x = torch.zeros(tokens, units * width, dtype=torch.float16)
    sizes = [2.0**15, -(2.0**15), 1.0, 2.0**-9, -(2.0**14), 2.0**14 + 16]
    for unit in range(units):
        for chunk in range(-(-width // CHUNK)):
            column = unit * width + chunk * CHUNK + int(draw.integers(0, min(CHUNK, width - chunk * CHUNK)))
            for token in range(tokens):
                x[token, column] = sizes[int(draw.integers(0, len(sizes)))]
    parts = [random_planar("Q4_0", rows, width, seed=unit) for unit in range(units)]
    return x, parts


def chunk_sums(x: torch.Tensor, parts: list[Planar]) -> list[torch.Tensor]:
    """fp32 [tokens, rows] of each unit, its chunks folded by the definition of the tree."""

    def tree(leaves: list[torch.Tensor]) -> torch.Tensor:
        if len(leaves) == 1:
            return leaves[0]
        half = 1 << ((len(leaves) - 1).bit_length() - 1)
        return tree(leaves[:half]) + tree(leaves[half:])

    sums = []
    for unit, part in enumerate(parts):
        w, own = dequantize(part).float(), x[:, unit * part.cols : (unit + 1) * part.cols].float()
        cuts = range(0, part.cols, CHUNK)
        sums.append(tree([own[:, at : at + CHUNK] @ w[:, at : at + CHUNK].t() for at in cuts]))
    return [tree(sums)]


@pytest.mark.parametrize("width, units", [(6 * CHUNK, 1), (CHUNK + 128, 3), (256, 7)])
def test_sums_fold_in_the_tree_however_they_are_split(width: int, units: int) -> None:
    x, parts = exact_inputs(64, width, units, 2)
    wanted = chunk_sums(x, parts)[0]
    assert not torch.equal(wanted, x.float() @ torch.cat([dequantize(p) for p in parts], 1).float().t())
    weight = prepare([part.to(DEVICE) for part in parts])
    for split in range(4):
        assert torch.equal(product(x.to(DEVICE), weight, Tiling(64, 16, split=split)), wanted), split


def test_many_tiles_to_a_program() -> None:
    """Sums that wait are kept apart, where a program goes through several tiles."""
    x, parts = exact_inputs(130, 256, 7, 40)
    weight = prepare([part.to(DEVICE) for part in parts])
    got = product(x.to(DEVICE), weight, Tiling(64, 16, blocks=1))
    assert torch.equal(got, chunk_sums(x, parts)[0])


def test_side_by_side() -> None:
    first, second = random_planar("Q4_K", 70, 256), random_planar("Q6_K", 33, 256, seed=5)
    x = rows_of_x(5, 256)
    a, b = on_device(first), on_device(second)
    both = linear_pair(x, a, b, torch.full((1, 5, 103), float("nan"), device=DEVICE))
    assert torch.equal(both, torch.cat((linear(x, a), linear(x, b)), dim=2))


def test_gate_and_up() -> None:
    gate, up = random_planar("Q4_K", 70, 512, seed=1), random_planar("Q5_K", 70, 512, seed=2)
    x = 8 * rows_of_x(18, 512)
    out = torch.full((18, 70), float("nan"), dtype=torch.float16, device=DEVICE)
    gated_linear(x, on_device(gate), on_device(up), out)
    g, u = (x.cpu().double() @ dequantize(p).double().t() for p in (gate, up))
    assert error(out, torch.nn.functional.silu(g) * u) < 5e-4


def test_rows_do_not_know_each_other() -> None:
    """On a GPU with random values; interpreted, numpy's own products may differ, so with exact ones."""
    planar = random_planar("Q4_K", 192, 4096 if ON_GPU else 256)
    weight = on_device(planar)
    if ON_GPU:
        x = rows_of_x(2048, planar.cols)
        counts = (1, 2, 8, 17, 64, 256, 2048)
    else:
        signs = torch.randint(-1, 2, (40, planar.cols), generator=torch.Generator().manual_seed(0))
        x = signs.half() * torch.eye(40, planar.cols).half().flip(0)
        counts = (1, 2, 17, 40)
    whole = product(x, weight)
    for count in counts:
        for tiling in (None, *TILINGS):
            assert torch.equal(product(x[:count].contiguous(), weight, tiling), whole[:count]), (
                count,
                tiling,
            )
        last = product(x[-count:].contiguous(), weight)
        assert torch.equal(last, whole[-count:]), count


@pytest.mark.skipif(not ON_GPU, reason="assembly needs a GPU; the interpreter runs its plain twin")
@pytest.mark.parametrize("kind", TYPES)
def test_assembly_decodes_every_word(kind: str) -> None:
    """x = one column of the identity at a time would be slow: an identity of 128 tokens reads the weights."""
    planar = random_planar(kind, 4096, 128 if not kind.endswith("_K") else 256, seed=9)
    x = torch.eye(planar.cols, device=DEVICE).half()
    assert torch.equal(product(x, on_device(planar)).half(), dequantize(planar).cpu().t())


def test_refusals() -> None:
    weight = on_device(random_planar("Q4_0", 64, 256))
    other = on_device(random_planar("Q4_0", 64, 128))
    x = torch.zeros(2, 256, device=DEVICE).half()
    with pytest.raises(ValueError, match=r"linear: x is torch\.float32"):
        linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"linear: x is \[2, 128\]"):
        linear(x[:, :128].contiguous(), weight)
    with pytest.raises(ValueError, match="strides"):
        linear(torch.zeros(256, 2, device=DEVICE).half().t(), weight)
    with pytest.raises(ValueError, match="linear: weights of 1 x 256 and 1 x 128"):
        linear_pair(x, weight, other)
    with pytest.raises(ValueError, match="linear: out is"):
        linear(x, weight, torch.empty(1, 3, 64, device=DEVICE))
    with pytest.raises(ValueError, match="family"):
        linear(x, weight, tiling=Tiling(32, 16))
    with pytest.raises(ValueError, match="units differ"):
        prepare([random_planar("Q4_0", 64, 256), random_planar("Q4_0", 64, 128)])
    assert gemm.linear(x[:0], weight).shape == (1, 0, 64)


def test_scales_beyond_fp16_are_refused() -> None:
    planar = random_planar("Q4_K", 64, 256)
    planar.d[3, 0] = 60000.0
    with pytest.raises(ValueError, match="scale of row 3"):
        prepare(planar)


SMALL = Gpu((8, 9), 99 << 10)  # L40S, L4


def test_defaults_grow_with_the_rows_and_stay_within_small_gpus() -> None:
    """What they take of shared memory and of registers is for the machine code to say."""
    for gpu, gated, names in itertools.product(
        (SMALL, HOPPER), (False, True), (("Q4_K",), ("Q6_K",), ("fp16",), ("Q8_0",), ("Q4_K", "Q6_K"))
    ):
        formats = tuple(FORMATS[name] for name in names)
        found = [default_tiling(rows, formats, gated, gpu) for rows in (1, 16, 17, 64, 65, 4096)]
        assert [tiling.tokens for tiling in found] == sorted(tiling.tokens for tiling in found)
        assert found[0].tokens == 16
        for tiling in found:
            assert tiling.weights >= 64 and tiling.warps >= 4
            assert gpu is HOPPER or tiling.weights * tiling.tokens <= 64 * 64
    assert default_tiling(2048, (FORMATS["Q4_K"],), False, HOPPER).tokens == 128
