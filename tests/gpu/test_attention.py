"""Paged attention: close to float64, and the same bits whatever shares its tile, batch, program or page."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gpu.attention import AttentionTuning, paged_attention, workspace_floats
from kernels.gpu.attention_fold import power_of_2, tile_sum
from kernels.gpu.launch import launch
from tests.gpu.device import DEVICE, ON_GPU
from tests.gpu.paged import FP8, Shape, attend, expected, narrow, sequence

BF16 = torch.bfloat16
SPARSE = not ON_GPU  # under the interpreter only exact products have bits of their own
THIN = narrow(16)


def close(shape: Shape, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within what rounding of probabilities and of the result to their type can cost."""
    step = torch.finfo(shape.dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=2 * step, atol=2 * step)


CASES = {
    "mixed": (Shape(), [(5, 5), (700, 1), None, (130, 20), (1, 1)], None),
    "segments": (Shape(heads=2, kv_heads=1), [(1100, 3), (512, 1), (513, 1), (1024, 2)], None),
    "window": (Shape(heads=2, kv_heads=1), [(1100, 40), (1090, 1), (30, 30)], 100),
    "window across a segment": (Shape(heads=1, kv_heads=1), [(600, 1), (575, 70)], 90),
    "window of one": (Shape(heads=1, kv_heads=1), [(70, 70), (65, 1)], 1),
    "dim 80, group 3": (Shape(heads=6, kv_heads=2, dim=80), [(90, 11), (200, 1)], None),
    "dim 96, group 7": (Shape(heads=7, kv_heads=1, dim=96, block=32), [(90, 9), (70, 1)], None),
    "dim 128, group 8": (Shape(heads=16, kv_heads=2, dim=128, block=64), [(90, 3), (70, 1)], None),
    "dim 192, group 1": (Shape(heads=2, kv_heads=2, dim=192), [(66, 3), (70, 1)], None),
    "dim 256, group 16": (Shape(heads=16, kv_heads=1, dim=256, block=128), [(70, 3), (140, 1)], None),
    "dim 8": (Shape(heads=4, kv_heads=2, dim=8), [(66, 3), (70, 1)], None),
    "bf16": (Shape(dtype=BF16), [(90, 5), (600, 1)], None),
    "fp8": (Shape(kv_dtype=FP8), [(90, 5), (600, 1)], None),
    "fp8 scaled": (Shape(kv_dtype=FP8, scaled=True), [(90, 5), (600, 1)], None),
    "fp8 scaled bf16": (Shape(dtype=BF16, kv_dtype=FP8, scaled=True), [(40, 5), (600, 1)], 70),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    shape, lengths, window = CASES[name]
    batch = [n and sequence(shape, *n, seed=i) for i, n in enumerate(lengths)]
    got = attend(shape, batch, window=window, split_rows=3 if name == "segments" else 1, tuning=THIN)
    for s, rows in zip(batch, got, strict=True):
        if s:
            close(shape, rows, expected(shape, s, shape.dim**-0.5, window))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 200),
    split_rows=st.integers(0, 9),
    block=st.sampled_from([16, 32, 64, 128]),
)
def test_ragged_batches(lengths, window, split_rows, block) -> None:
    shape = Shape(heads=2, kv_heads=1, block=block)
    batch = [sequence(shape, max(n, rows), rows, seed=i) for i, (n, rows) in enumerate(lengths)]
    got = attend(shape, batch, window=window, split_rows=split_rows, tuning=THIN)
    for s, rows in zip(batch, got, strict=True):
        close(shape, rows, expected(shape, s, shape.dim**-0.5, window))


@pytest.mark.parametrize("window", [None, 530])
def test_split_and_streamed_give_the_same_bits(window: int | None) -> None:
    shape = Shape(heads=2, kv_heads=1)
    batch = [sequence(shape, *n, seed=i, sparse=SPARSE) for i, n in enumerate([(1300, 2), (600, 5)])]
    streamed = attend(shape, batch, window=window, split_rows=0, tuning=THIN)
    for programs in (1, 2048):  # one program for all segments, and one for each
        tuning = narrow(16, split_programs=programs)
        split = attend(shape, batch, window=window, split_rows=5, seed=7, tuning=tuning)
        for a, b in zip(streamed, split, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_tiles_width_shows_in_no_bit(width: int) -> None:
    shape = Shape(heads=6, kv_heads=2)  # a group that does not fill a tile
    s = sequence(shape, 580, 13, seed=1, sparse=SPARSE)
    (thin,) = attend(shape, [s], tuning=THIN)
    wide = narrow(width, stream_warps=4, split_warps=4)
    (streamed,) = attend(shape, [s], tuning=wide)
    (split,) = attend(shape, [s], split_rows=13, tuning=wide)
    assert torch.equal(thin, streamed)
    assert torch.equal(thin, split)


@pytest.mark.parametrize(("window", "kv"), [(None, None), (77, None), (None, FP8)])
def test_a_row_alone_and_in_company(window: int | None, kv: torch.dtype | None) -> None:
    """A prompt at once, in chunks, and token by token; in other batches, pages and block sizes."""
    shape = Shape(heads=2, kv_heads=1, kv_dtype=kv)
    s = sequence(shape, 560, 30, seed=3, sparse=SPARSE)
    others = [sequence(shape, n, m, seed=9 + n, sparse=SPARSE) for n, m in [(80, 1), (9, 9), (70, 1)]]
    (whole,) = attend(shape, [s], window=window, tuning=THIN)
    company = attend(shape, [others[0], None, s, *others[1:]], window=window, tuning=narrow(32), seed=1)
    assert torch.equal(whole, company[2])
    other_pages = Shape(heads=2, kv_heads=1, kv_dtype=kv, block=128)
    (chunk,) = attend(other_pages, [s.first(13)], window=window, tuning=narrow(64))
    assert torch.equal(whole[:13], chunk)
    (token,) = attend(other_pages, [s.last(1)], window=window)
    assert torch.equal(whole[-1:], token)
    draft = attend(shape, [others[2], s.last(4)], window=window, split_rows=4, tuning=THIN)[1]
    assert torch.equal(whole[-4:], draft)


def test_a_rows_heads_are_their_own() -> None:
    """A rank that holds one KV head of two gets the bits of that head."""
    shape = Shape(heads=6, kv_heads=2)
    s = sequence(shape, 150, 4, seed=5, sparse=SPARSE)
    (whole,) = attend(shape, [s], tuning=THIN)
    s.q, s.keys, s.values, s.scales = s.q[:, 3:], s.keys[:, 1:], s.values[:, 1:], s.scales[..., 1:]
    (share,) = attend(Shape(heads=3, kv_heads=1), [s], tuning=THIN)
    assert torch.equal(whole[:, 3:], share)


@pytest.mark.parametrize("factor", [0.0, 1e-3, 300.0])
def test_scores_of_any_size(factor: float) -> None:
    """All alike, and so far apart that all but the highest vanish, in a later segment or an earlier."""
    shape = Shape(heads=2, kv_heads=1)
    s = sequence(shape, 1100, 1, seed=8)
    s.q = (s.q * factor).to(shape.dtype)
    got = [attend(shape, [s], split_rows=n, tuning=THIN)[0] for n in (0, 1)]
    close(shape, got[0], expected(shape, s, shape.dim**-0.5, None))
    close(shape, got[1], got[0].double())


@triton.jit
def _probe(exponents, powers, rows, sums):
    i = tl.arange(0, 256)
    tl.store(powers + i, power_of_2(tl.load(exponents + i)))
    r = tl.arange(0, 16)
    x = tl.load(rows + r[:, None] * 64 + tl.arange(0, 64)[None, :])
    tl.store(sums + r, tile_sum(x, 16))


def test_powers_are_exact_and_sums_in_order() -> None:
    exponents = -torch.arange(256.0)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 6, 64)
    powers, sums = torch.full((256,), torch.nan), torch.full((16,), torch.nan)
    tensors = [t.to(DEVICE) for t in (exponents, powers, x, sums)]
    launch(_probe, (1,), *tensors)
    assert torch.equal(
        tensors[1].cpu(), torch.where(exponents > -127, torch.exp2(exponents.double()).float(), 0)
    )
    wanted = x
    for half in (32, 16, 8):
        wanted = wanted[:, :half] + wanted[:, half:]
    wanted = wanted[:, ::2] + wanted[:, 1::2]
    wanted = wanted[:, :2] + wanted[:, 2:]
    assert torch.equal(tensors[3].cpu(), wanted[:, 0] + wanted[:, 1])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: a CUDA graph is captured")
def test_a_captured_call_serves_other_lengths() -> None:
    g = torch.Generator().manual_seed(0)
    cache = torch.randn(200, 2, 2, 16, 128, generator=g).half().to(DEVICE)
    table = torch.randperm(200, generator=g)[:160].view(2, 80).int().to(DEVICE)
    q = torch.randn(2, 16, 128, generator=g).half().to(DEVICE)
    start = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    context = torch.tensor([600, 5], dtype=torch.int32, device=DEVICE)
    workspace = torch.empty(workspace_floats(2, 16, 128, 1280), device=DEVICE)

    def call(out: torch.Tensor) -> torch.Tensor:
        paged_attention(q, cache, table, start, context, out, workspace, scale=0.1, longest=1)
        return out

    out = call(torch.empty_like(q))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out)
    for lengths in ([1280, 0], [1, 700], [513, 512]):
        context.copy_(torch.tensor(lengths))
        graph.replay()
        again = call(torch.empty_like(q))
        live = [b for b, n in enumerate(lengths) if n]
        assert torch.equal(out[live], again[live])


def call_with(**changed) -> None:
    tensors = {
        "q": torch.zeros(3, 4, 64, dtype=torch.float16, device=DEVICE),
        "cache": torch.zeros(4, 2, 2, 16, 64, dtype=torch.float16, device=DEVICE),
        "block_table": torch.zeros(2, 2, dtype=torch.int32, device=DEVICE),
        "query_start": torch.zeros(3, dtype=torch.int32, device=DEVICE),
        "context_len": torch.zeros(2, dtype=torch.int32, device=DEVICE),
        "out": torch.zeros(3, 4, 64, dtype=torch.float16, device=DEVICE),
        "workspace": torch.zeros(workspace_floats(2, 4, 64, 32), device=DEVICE),
        "scale": 0.1,
    }
    paged_attention(**(tensors | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(3, 4, 64)}, "q is torch.float32"),
        ({"q": torch.zeros(3, 4, 68, dtype=torch.float16)}, "head dimension 68"),
        ({"q": torch.zeros(3, 4, 512, dtype=torch.float16)}, "head dimension 512"),
        ({"cache": torch.zeros(4, 2, 2, 16, 64, dtype=BF16)}, "cache is torch.bfloat16"),
        ({"cache": torch.zeros(4, 2, 2, 24, 64, dtype=torch.float16)}, "block size 24"),
        ({"cache": torch.zeros(4, 2, 3, 16, 64, dtype=torch.float16)}, "4 heads do not share 3"),
        ({"cache": torch.zeros(4, 2, 2, 16, 128, dtype=torch.float16)[..., :64]}, "cache has strides"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int64)}, "block_table is torch.int64"),
        ({"query_start": torch.zeros(2, dtype=torch.int32)}, "query_start is"),
        ({"context_len": torch.zeros(3, dtype=torch.int32)}, "context_len is"),
        ({"out": torch.zeros(2, 4, 64, dtype=torch.float16)}, "out is"),
        ({"scales": torch.zeros(4, 2, 2, 16)}, "scales belong to an fp8 cache"),
        ({"workspace": torch.zeros(7)}, "workspace has 7 elements, not 528"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"split_rows": -1}, "split_rows is -1"),
        ({"tuning": AttentionTuning(stream_width=96)}, "stream_width is 96"),
    ],
)
def test_what_is_not_taken_is_named(changed: dict, message: str) -> None:
    call_with()
    changed = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in changed.items()}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        call_with(**changed)
