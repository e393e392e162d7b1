"""Linear layers: y = x @ w.T for weights kept as int4 groups, bf16 or fp32.

The rule of rows on a CPU stands on measured behaviour of torch's operators (docs/numerics.md):

* int4 runs on AMX where there is such (`kernels.native`): tiles compute rows and columns independently of
  each other, so it takes any number of rows, columns of several units, and several products in one call.
* Elsewhere `_weight_int4pack_mm_for_cpu` serves, with other bits, rows and columns independent likewise.
* A dense bf16 product is called with exactly 16 rows, padded, so that one kernel with one order of K serves
  every batch. Its columns are those of one unit, whoever holds it. From K = 1536 on, oneDNN splits K among
  threads where N is small, so K is cut into chunks of 1024, each rounded to bf16 and added in fp32, in order.
* A dense fp32 product is called likewise and its K is cut into chunks of 256, added in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.native import int4, machine

TILE = 16  # rows of one dense call
K_CHUNK = 256  # columns of K in one dense fp32 call
BF16_K_CHUNK = 1024  # and in one dense bf16 call
INT4_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Int4Tiles:
    """w[n, k] = (code[n, k] - 8) * scale + zero, bf16 scale and zero a group of k, packed for AMX; or `parts`
    such weights of one shape, one after another."""

    packed: torch.Tensor  # uint8 [parts * N / 16, K / group, bytes]: see kernels/native/int4.py
    group: int
    parts: int
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """The same for torch's operator."""

    packed: torch.Tensor  # uint8 [N, K / 2], in the operator's own order
    scales_and_zeros: torch.Tensor  # bf16 [K / group, N, 2]
    group: int
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros.nbytes


@dataclass(frozen=True, slots=True)
class Bf16Weight:
    chunks: tuple[torch.Tensor, ...]  # [N, <= 1024] each, in oneDNN's blocked order where there is one
    blocked: bool
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.out_features * self.in_features * 2


@dataclass(frozen=True, slots=True)
class Fp32Weight:
    chunks: tuple[torch.Tensor, ...]  # fp32 [N, <= 256] each, covering K in order
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)


Weight = Int4Tiles | Int4Weight | Bf16Weight | Fp32Weight


def int4_takes(out_features: int, in_features: int, group: int) -> bool:
    """Whether the int4 operator takes this shape: N of 16, K of 32 and of the group."""
    return (
        out_features % 16 == 0 and in_features % 32 == 0 and group in INT4_GROUPS and in_features % group == 0
    )


def pack_int4(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, group: int) -> Weight:
    """Pack codes [N, K] in 0..15 with w = code * scale + offset, scale and offset fp32 [N, K / group].

    Scale and zero = offset + 8 * scale are kept in bf16: at most 2**-9 of each is lost.
    Raises ValueError for a shape that `int4_takes` refuses.
    """
    n, k = codes.shape
    if not int4_takes(n, k, group) or scales.shape != (n, k // group) or offsets.shape != scales.shape:
        raise ValueError(
            f"int4 weight: codes {tuple(codes.shape)}, scales {tuple(scales.shape)}, group {group} do not fit"
        )
    zeros = offsets + 8 * scales
    if machine.supported() and k <= int4.LONGEST:
        return Int4Tiles(int4.pack(codes, scales, zeros), group, 1, n, k)
    return pack_int4_for_torch(codes, scales, zeros, group)


def pack_int4_for_torch(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int
) -> Int4Weight:
    n, k = codes.shape
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    pair = torch.stack((scales.t(), zeros.t()), dim=-1).to(torch.bfloat16).contiguous()
    return Int4Weight(packed, pair, group, n, k)


def stack(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Weights with an input each, for `linear_parts`: as one where they are alike and packed for AMX."""
    first = weights[0]
    if not all(
        isinstance(w, Int4Tiles) and isinstance(first, Int4Tiles) and _alike(w, first) for w in weights
    ):
        return tuple(weights)
    packed = torch.cat([w.packed for w in weights if isinstance(w, Int4Tiles)])
    return (replace(first, packed=packed, parts=len(weights)),)


def _alike(a: Int4Tiles, b: Int4Tiles) -> bool:
    return (a.group, a.parts, *a.packed.shape) == (b.group, 1, *b.packed.shape)


def pack_bf16(weight: torch.Tensor) -> Bf16Weight:
    """Keep a dense [N, K] weight in bf16, in the order that oneDNN multiplies fastest."""
    n, k = weight.shape
    blocked = _has_onednn_linear()
    chunks = []
    for at in range(0, k, BF16_K_CHUNK):
        plain = weight[:, at : at + BF16_K_CHUNK].to(torch.bfloat16).contiguous()
        chunks.append(torch.ops.mkldnn._reorder_linear_weight(plain, TILE) if blocked else plain)
    return Bf16Weight(tuple(chunks), blocked, n, k)


def pack_fp32(weight: torch.Tensor) -> Fp32Weight:
    n, k = weight.shape
    full = weight.to(torch.float32)
    chunks = tuple(full[:, at : at + K_CHUNK].contiguous() for at in range(0, k, K_CHUNK))
    return Fp32Weight(chunks, n, k)


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N].

    x is bf16 for int4 and bf16 weights, fp32 for fp32 ones, and contiguous; the result has its type.
    Raises ValueError naming what does not fit.
    """
    if isinstance(weight, Int4Tiles):
        return _int4_tiles(x, weight)
    if isinstance(weight, Int4Weight):
        if x.dtype is not torch.bfloat16 or x.shape[-1] != weight.in_features or x.ndim != 2 or not x.is_cpu:
            raise _misfit(x, weight)
        return torch._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.packed, weight.group, weight.scales_and_zeros
        )
    wanted = torch.float32 if isinstance(weight, Fp32Weight) else torch.bfloat16
    if x.dtype is not wanted or x.shape[-1] != weight.in_features or x.ndim != 2 or not x.is_cpu:
        raise _misfit(x, weight)
    product = _bf16_tile if isinstance(weight, Bf16Weight) else _fp32_tile
    m = x.shape[0]
    if m == TILE:
        return product(x, weight)
    whole = m - m % TILE
    tiles = [product(x[at : at + TILE], weight) for at in range(0, whole, TILE)]
    if m > whole:
        padded = x.new_zeros(TILE, x.shape[1])
        padded[: m - whole] = x[whole:]
        tiles.append(product(padded, weight)[: m - whole])
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def linear_parts(x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor | Sequence[torch.Tensor]:
    """x [parts, M, K] by a weight each, as `stack` returns them -> [parts, M, N], or its parts."""
    if len(weights) < x.shape[0]:
        return _int4_tiles(x, weights[0])
    return [linear(part, weight) for part, weight in zip(x, weights, strict=True)]


def _int4_tiles(x: torch.Tensor, weight: Int4Tiles) -> torch.Tensor:
    """x [M, K], or [parts, M, K] where the weight has several parts -> the same with N columns."""
    shape, parts = x.shape, weight.parts
    fits = len(shape) == (2 if parts == 1 else 3) and shape[-1] == weight.in_features
    if not fits or x.dtype is not torch.bfloat16 or not x.is_cpu or (parts > 1 and shape[0] != parts):
        raise _misfit(x, weight)
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty((*shape[:-1], weight.out_features), dtype=torch.bfloat16)
    int4.product(x, weight.packed, weight.group, parts, out)
    return out


def _misfit(x: torch.Tensor, weight: Weight) -> ValueError:
    return ValueError(
        f"linear: x is {tuple(x.shape)} {x.dtype} on {x.device}; a {type(weight).__name__} takes [M, K] with "
        f"K = {weight.in_features}, {'fp32' if isinstance(weight, Fp32Weight) else 'bf16'} on the CPU"
    )


def _bf16_tile(x: torch.Tensor, weight: Bf16Weight) -> torch.Tensor:
    if len(weight.chunks) == 1:
        return _bf16_product(x, weight.chunks[0], weight.blocked)
    total = torch.zeros(TILE, weight.out_features)
    for i, chunk in enumerate(weight.chunks):
        part = x[:, i * BF16_K_CHUNK : (i + 1) * BF16_K_CHUNK].contiguous()
        total += _bf16_product(part, chunk, weight.blocked)
    return total.to(torch.bfloat16)


def _bf16_product(x: torch.Tensor, chunk: torch.Tensor, blocked: bool) -> torch.Tensor:
    if blocked:
        return torch.ops.mkldnn._linear_pointwise(x, chunk, None, "none", [], None)
    return torch.nn.functional.linear(x, chunk)


def _fp32_tile(x: torch.Tensor, weight: Fp32Weight) -> torch.Tensor:
    # A plain sum of products a chunk at a time: no fused multiply-add across chunks, one order of K.
    total = torch.nn.functional.linear(x[:, :K_CHUNK], weight.chunks[0])
    for i, chunk in enumerate(weight.chunks[1:], start=1):
        total += torch.nn.functional.linear(x[:, i * K_CHUNK : (i + 1) * K_CHUNK].contiguous(), chunk)
    return total


def _has_onednn_linear() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
