"""Linear layers: y = x @ w.T for weights kept as codes with scales, bf16 or fp32.

The rule of rows on a CPU stands on measured behaviour of torch's operators (docs/numerics.md):

* Codes of 4 or 8 bits run on AMX where there is such (`kernels.native`): tiles compute rows and columns
  independently of each other, so it takes any number of rows, columns of several units, and several
  products in one call.
* Elsewhere `_weight_int4pack_mm_for_cpu` serves 4 bits, with other sums, rows and columns independent
  likewise.
* A dense bf16 product is called with exactly 16 rows, padded, so that one kernel with one order of K serves
  every batch. Its columns are those of one unit, whoever holds it. From K = 1536 on, oneDNN splits K among
  threads where N is small, so K is cut into chunks of 1024, each rounded to bf16 and added in fp32, in order.
* A dense fp32 product is called likewise and its K is cut into chunks of 256, added in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.native import codes as native_codes
from kernels.native import machine
from kernels.native.packed import LONGEST, Layout, Parts, joined, pack

TILE = 16  # rows of one dense call
K_CHUNK = 256  # columns of K in one dense fp32 call
BF16_K_CHUNK = 1024  # and in one dense bf16 call
INT4_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """w[n, k] = (code[n, k] - 8) * scale + zero, bf16 scale and zero a group of k, for torch's operator."""

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


Codes = Parts  # of one product, or of several
Weight = Codes | Int4Weight | Bf16Weight | Fp32Weight


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
    if machine.supported() and k <= LONGEST:
        return pack(codes, scales, zeros, Layout(4, group, True))
    return pack_int4_for_torch(codes, scales, zeros, group)


def pack_int4_for_torch(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int
) -> Int4Weight:
    n, k = codes.shape
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    pair = torch.stack((scales.t(), zeros.t()), dim=-1).to(torch.bfloat16).contiguous()
    return Int4Weight(packed, pair, group, n, k)


def int8_takes(out_features: int, in_features: int, group: int) -> bool:
    """Whether codes of 8 bits of this shape are served here: on AMX alone."""
    fits = out_features % 16 == 0 and in_features % group == 0 and (group == 16 or group % 32 == 0)
    return fits and in_features <= LONGEST and machine.supported()


def pack_int8(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, group: int) -> Codes:
    """Pack codes int8 [N, K] with w = code * scale + offset, fp32 [N, K / group]; nothing is rounded.

    Raises ValueError for what `int8_takes` refuses."""
    n, k = codes.shape
    alike = all(t is None or t.shape == (n, k // group) for t in (scales, offsets))
    if not int8_takes(n, k, group) or codes.dtype != torch.int8 or not alike:
        raise ValueError(
            f"int8 weight: codes {codes.dtype} {tuple(codes.shape)}, scales {tuple(scales.shape)}, "
            f"group {group} do not fit"
        )
    return pack(codes, scales, offsets, Layout(8, group, offsets is not None))


def stack(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Weights with a share of x each, for `linear_parts`: as one where they are packed alike for AMX."""
    together = joined(weights) if all(isinstance(w, Codes) for w in weights) else None
    return tuple(weights) if together is None else (together,)


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


def linear(x: torch.Tensor, weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N], in `out` if given.

    x is bf16, for fp32 weights fp32; the result has its type. Neighbouring columns of `out` are neighbours in
    memory. Raises ValueError naming what does not fit.
    """
    if isinstance(weight, Codes):
        if out is None:
            out = torch.empty(x.shape[0], weight.out_features, dtype=torch.bfloat16)
        _by_codes(x, weight, out[None])
        return out
    y = _linear(x, weight)
    return y if out is None else out.copy_(y)


def _linear(x: torch.Tensor, weight: Int4Weight | Bf16Weight | Fp32Weight) -> torch.Tensor:
    if isinstance(weight, Int4Weight):
        if x.dtype is not torch.bfloat16 or x.shape[-1] != weight.in_features or x.ndim != 2 or not x.is_cpu:
            raise _misfit(x, weight, weight.in_features)
        return torch._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.packed, weight.group, weight.scales_and_zeros
        )
    wanted = torch.float32 if isinstance(weight, Fp32Weight) else torch.bfloat16
    if x.dtype is not wanted or x.shape[-1] != weight.in_features or x.ndim != 2 or not x.is_cpu:
        raise _misfit(x, weight, weight.in_features)
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


def linear_parts(x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    """x [M, K], cut into a share of K for each weight that `stack` was given, in their order, by these
    -> [parts, M, N]."""
    if len(weights) == 1 and isinstance(weights[0], Codes):
        (weight,) = weights
        out = torch.empty(len(weight.widths), x.shape[0], weight.out_features, dtype=torch.bfloat16)
        _by_codes(x, weight, out)
        return out
    widths = [weight.in_features for weight in weights]
    if x.ndim != 2 or x.shape[1] != sum(widths):
        raise _misfit(x, weights[0], sum(widths))
    if len(weights) == 1:
        return linear(x, weights[0])[None]
    out = x.new_empty(len(weights), x.shape[0], weights[0].out_features)
    for share, weight, place in zip(x.split(widths, dim=1), weights, out, strict=True):
        linear(share, weight, place)
    return out


def _by_codes(x: torch.Tensor, weight: Codes, out: torch.Tensor) -> None:
    """x [M, K] by the weights of all parts -> out [parts, M, N]."""
    if x.ndim != 2 or x.shape[1] != weight.in_features or x.dtype is not torch.bfloat16 or not x.is_cpu:
        raise _misfit(x, weight, weight.in_features)
    if out.shape != (len(weight.widths), x.shape[0], weight.out_features) or out.dtype is not x.dtype:
        raise ValueError(
            f"linear: {len(weight.widths)} products of {x.shape[0]} rows and {weight.out_features} columns "
            f"do not fit {tuple(out.shape)} {out.dtype}"
        )
    if out.stride(2) != 1:
        raise ValueError("linear: neighbouring columns of the result must be neighbours in memory")
    native_codes.product(x if x.stride(1) == 1 else x.contiguous(), weight, out)


def _misfit(x: torch.Tensor, weight: Weight, width: int) -> ValueError:
    return ValueError(
        f"linear: x is {tuple(x.shape)} {x.dtype} on {x.device}; a {type(weight).__name__} takes [M, K] with "
        f"K = {width}, {'fp32' if isinstance(weight, Fp32Weight) else 'bf16'} on the CPU"
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
