"""Rows of a table, quantised or not, bit for bit what the planar form says they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.gpu.embedding import embed
from runtime.weights.blocks import SPECS
from runtime.weights.formats import TensorType
from runtime.weights.planar import Planar
from runtime.weights.quantize import quantize_int4
from tests.gpu.device import DEVICE
from tests.gpu.test_norm import drawn, poisoned
from tests.gpu.weights import random_planar

TYPES = [*map(str, SPECS), "INT4"]
ROWS = 11


def table_of(type: str, cols: int) -> Planar:
    if type == "INT4":
        return packed(quantize_int4(drawn(ROWS, cols).clamp(-1000, 1000).cpu()))
    spec = TensorType(type)
    blocks = -(-cols // spec.block)
    return packed(random_planar(type, ROWS, blocks * spec.block, seed=5).select_cols(0, cols))


def packed(table: Planar) -> Planar:
    """On the device, row by row: the reader leaves scales in the order that numpy's indexing gives."""

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.contiguous().to(DEVICE)

    scales = {name: move(getattr(table, name)) for name in ("d", "m", "sub_scales", "sub_mins")}
    return replace(table, planes=tuple(map(move, table.planes)), **scales)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.int32), want.view(torch.int32))


def tokens_of(*ids: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(ids, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("cols", [256, 1280, 352])  # 352: the last block of 128 is not full
def test_every_type(type: str, cols: int) -> None:
    table, tokens = table_of(type, cols), tokens_of(3, 0, 10, 3, dtype=torch.int32)
    out = poisoned(4, cols, dtype=torch.float32)
    embed(table, tokens, out)
    assert same_bits(out, table.dequantize()[tokens.long()])


def test_columns_cut_inside_a_group() -> None:
    """Groups shrink where a unit's cut falls inside them."""
    table = packed(table_of("Q6_K", 256).select_cols(8, 200))
    out = poisoned(2, 192, dtype=torch.float32)
    embed(table, tokens_of(1, 7), out)
    assert table.group == 8 and same_bits(out, table.dequantize()[[1, 7]])


def test_minima_without_scales() -> None:
    """As of GPTQ: one scale a super-group, a zero point a group."""
    plain = table_of("Q4_1", 256)
    mins = torch.randint(-8, 120, (ROWS, 8), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    wide = {"d": plain.d[:, :1].contiguous(), "m": -plain.d[:, :1], "super_group": 256}
    table = replace(plain, sub_mins=mins.to(DEVICE), **wide)
    out = poisoned(2, 256, dtype=torch.float32)
    embed(table, tokens_of(1, 7), out)
    assert same_bits(out, table.dequantize()[[1, 7]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dense(dtype: torch.dtype) -> None:
    table, out = drawn(ROWS, 300).to(dtype), poisoned(3, 300, dtype=torch.float32)
    embed(table, tokens_of(10, 0, 4), out)
    assert torch.equal(out, table[[10, 0, 4]].float())


@pytest.mark.parametrize("type", ["Q4_K", "F32"])
def test_shards_add_up(type: str) -> None:
    table = drawn(ROWS, 256) if type == "F32" else table_of(type, 256)
    tokens, whole = tokens_of(0, 3, 4, 10), poisoned(4, 256, dtype=torch.float32)
    embed(table, tokens, whole)
    total = torch.zeros(4, 256, device=DEVICE)
    for start, stop in ((0, 4), (4, 11)):
        rows = slice(start, stop)
        part = table[rows] if type == "F32" else table.select_rows(rows)
        out = poisoned(4, 256, dtype=torch.float32)
        embed(part, tokens, out, first=start)
        inside = (tokens >= start) & (tokens < stop)
        assert (out[~inside] == 0).all() and torch.equal(out[inside], whole[inside])
        total += out
    assert torch.equal(total, whole)


@pytest.mark.parametrize("type", ["Q8_0", "F32"])
def test_no_such_token(type: str) -> None:
    """-1 (no token was chosen) and ids past the table read nothing."""
    table = drawn(ROWS, 64) if type == "F32" else table_of(type, 64)
    out = poisoned(3, 64, dtype=torch.float32)
    embed(table, tokens_of(-1, ROWS, 2**31 - 1), out)
    assert (out == 0).all()


def test_refusals() -> None:
    table, tokens = table_of("Q4_K", 256), tokens_of(1, 2)
    out = torch.empty(2, 256, device=DEVICE)
    refused = [
        ("tokens is torch.float32", (table, tokens.float(), out)),
        ("out is", (table, tokens, out[:, 1:].contiguous())),
        ("out is torch.float16", (table, tokens, out.half())),
        ("first is -1", (table, tokens, out, -1)),
        ("table is torch.int8", (torch.zeros(3, 256, dtype=torch.int8, device=DEVICE), tokens, out)),
        ("2 planes", (replace(table, planes=table.planes * 2), tokens, out)),
        ("planes of", (replace(table, bits=(3,)), tokens, out)),
        ("plane of 4 bits is", (replace(table, planes=(table.planes[0][:, 1:].contiguous(),)), tokens, out)),
        ("d is torch.float32", (replace(table, d=table.d.float()), tokens, out)),
        ("groups of 32 in 48", (replace(table, super_group=48), tokens, out)),
        ("minima without m", (replace(table, m=None), tokens, out)),
        ("paired scales", (replace(table, paired=True), tokens, out)),
        ("without sub_scales", (replace(table, sub_scales=None, sub_mins=None), tokens, out)),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=message):
            embed(*arguments)
