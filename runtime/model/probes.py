"""Shows which code the libraries picked on this machine, by what it computes.

torch's version and capability do not settle bits: MKL has kernels for this processor and that, oneDNN
generates its own for what it finds, numpy and the C library have several `exp` and `cos`. Another maker's
processor, another build, an environment variable make them choose others. So the operations whose order of
sums, or whose last bit, is a library's to choose are run once a process, on inputs of fixed bits, and a
digest of what comes out is part of the name (`numerics.py`).

Inputs are whole numbers times powers of two, drawn by integers alone. Each term of a product has its opposite
elsewhere in the sum: the exact result is 0, and what is left is the rounding on the way, in which the order
shows. Of plain random values most of it would be rounded off.

A probe that differed between ranks of one machine would refuse their start. So all are called through
`kernels`, on one thread, in shapes that hold their bits (docs/numerics.md), attention with one head alone;
and they are small. Whether more threads would change bits is told too: MKL's code for processors without
AVX-512 divides sums among them.

Not known from here: shapes for which a library chooses otherwise than for these; a flush of subnormals; what
`kernels.native` and Triton compile, where every rounding is written out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.activation import silu_mul
from kernels.attention import decode_call, paged_attention, tile_buffers
from kernels.linear import BF16_K_CHUNK, K_CHUNK, TILE, linear, pack_bf16, pack_fp32, pack_int4_for_torch
from kernels.norm import rms_norm

_ELEMENTS = 8192  # of numpy's vectors, and the most that the sampler sums at once
_BASES = (1e4, 5e5, 1e6)  # of RoPE
_POSITIONS = 512  # what attention is padded to


@cache
def probes() -> str:
    """32 bits in hexadecimal: of what torch, its libraries, numpy and the C library compute."""
    with _threads(1):
        return _digest([*host_results().values(), *torch_results().values()])


@cache
def threads_matter(count: int) -> bool:
    """Whether torch's operations give other bits by `count` threads, or by a few, than by one."""
    found = set()
    for each in {1, min(2, count), min(3, count), count}:
        with _threads(each):
            products = (_dense(n, k) for n, k in ((48, 576), (64, 2048), (576, 1536)))
            found.add(_digest([*torch_results().values(), *products]))
    return len(found) > 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def host_probes() -> str:
    """The same without torch, for replies that a GPU computes: RoPE's table and logprobs are the host's."""
    return _digest([*host_results().values()])


def host_results() -> dict[str, NDArray[np.float64]]:
    """What numpy and the C library compute, by operation: in float64, as sampling and the RoPE table call
    them, elementwise over contiguous arrays or as sums over at most 8192 numbers."""
    even = ((_words(0, _ELEMENTS) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # within (0, 1)
    angles = np.arange(0.0, 1 << 17, 32)[:, None] * np.array([1.0, 0.37, 0.011])
    masses = np.exp(-40.0 * even)
    return {
        "exp": np.concatenate([masses, np.exp(-700.0 * even)]),
        "log": np.log(np.concatenate([even, 2.0**18 * even])),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "power": np.array([base ** (-np.arange(64.0) / 64) for base in _BASES]),
        "sum": masses.sum(keepdims=True),
        "running sum": np.cumsum(masses),
        "log of libm": np.array([math.log(value) for value in even[:1024].tolist()]),
    }


def torch_results() -> dict[str, torch.Tensor]:
    """What torch and its libraries compute, by operation."""
    found = {}
    # MKL has another kernel for up to 8 columns that are left over, oneDNN for few columns and many.
    for n, k in ((8, 64), (43, 172), (72, K_CHUNK + 192), (480, 64)):
        found[f"fp32 product {n} x {k}"] = _dense(n, k)
    for n, k in ((16, BF16_K_CHUNK + 512), (43, 64), (480, 64)):
        x, w = _cancelling(TILE, n, k, BF16_K_CHUNK, bits=8)
        found[f"bf16 product {n} x {k}"] = linear(x.bfloat16(), pack_bf16(w))
    found["int4 product"] = _int4_product()
    for dim in (64, 8):
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{dtype} attention, {dim} channels"] = _attention(dim, dtype)
    rows = _tensor(_floats(7, (4, 488), bits=24))  # no multiple of 16: torch's in any case
    found["norm"] = rms_norm(rows, torch.ones(488), 1e-5, torch.float32)
    found["row sum"] = rows.sum(dim=-1)
    found["silu"] = silu_mul(rows, torch.ones(4, 488), torch.empty(4, 488))
    return found


def _dense(n: int, k: int) -> torch.Tensor:
    x, w = _cancelling(TILE, n, k, K_CHUNK, bits=24)
    return linear(x, pack_fp32(w))


def _int4_product() -> torch.Tensor:
    n, k, group = 32, 256, 32
    x, _ = _cancelling(TILE, 1, k, k, bits=8)
    first, second = _pairs(k)
    codes = np.empty((n, k), np.int32)
    codes[:, first] = 1 + (_words(3, n * k // 2) % np.uint64(15)).reshape(n, k // 2)  # -7 to 7, and 8 more
    codes[:, second] = 16 - codes[:, first]
    scales = torch.full((n, k // group), 0.125)
    weight = pack_int4_for_torch(torch.from_numpy(codes), scales, torch.zeros_like(scales), group)
    return linear(x.bfloat16(), weight)


def _attention(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A token's 16 query heads on one KV head, over 512 positions that weigh about the same."""
    q = _tensor(_floats(4, (1, 1, TILE, dim), 8) * np.float32(2**-14)).to(dtype)
    one, other = _pairs(_POSITIONS)
    kv = np.empty((1, _POSITIONS, 2, 1, dim), np.float32)  # one block
    kv[0, one, 0, 0] = kv[0, other, 0, 0] = _floats(5, (len(one), dim), 8)
    kv[0, one, 1, 0] = _floats(6, (len(one), dim), 8)
    kv[0, other, 1, 0] = -kv[0, one, 1, 0]
    call = decode_call(
        None, torch.tensor([_POSITIONS - 1]), slice(0, 1),
        tile=TILE, block_size=_POSITIONS, window=None, dtype=dtype,
    )  # fmt: skip
    buffers = tile_buffers([call], q.shape, dtype)
    out = torch.empty(1, TILE * dim, dtype=dtype)
    return paged_attention(q, _tensor(kv).to(dtype), [call], buffers, dim**-0.5, out)


def _cancelling(m: int, n: int, k: int, block: int, *, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, k] and w [n, k], fp32 of `bits` significant bits, with a product of 0 in every `block` columns.
    k and block are even."""
    x, w = np.empty((m, k), np.float32), np.empty((n, k), np.float32)
    some, others = _floats(1, (m, k // 2), bits), _floats(2, (n, k // 2), bits)
    for at in range(0, k, block):
        first, second = (places + at for places in _pairs(min(block, k - at)))
        part = slice(at // 2, at // 2 + len(first))
        x[:, first] = x[:, second] = some[:, part]
        w[:, first] = others[:, part]
        w[:, second] = -others[:, part]
    return _tensor(x), _tensor(w)


def _pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """0 .. count - 1 in two halves, shuffled: place i of one is the partner of place i of the other."""
    order = np.argsort(_words(0, count), kind="stable")
    return order[: count // 2], order[count // 2 :]


def _tensor(values: NDArray[np.float32]) -> torch.Tensor:
    """In memory of torch's, aligned as the runtime's own tensors are."""
    tensor = torch.empty(values.shape)
    tensor.numpy()[...] = values
    return tensor


def _floats(seed: int, shape: tuple[int, ...], bits: int) -> NDArray[np.float32]:
    """Numbers of `bits` significant bits, of either sign, magnitudes from 2^-8 to 2^8."""
    words = _words(seed, math.prod(shape))
    whole = (words >> np.uint64(65 - bits)).astype(np.int64) + (1 << (bits - 1))  # of `bits` bits
    whole *= 1 - 2 * (words & np.uint64(1)).astype(np.int64)
    power = (words >> np.uint64(1) & np.uint64(15)).astype(np.int32) - (7 + bits)
    return np.ldexp(whole.astype(np.float32), power).reshape(shape)


def _words(seed: int, count: int) -> NDArray[np.uint64]:
    """Mixed bits, uint64 [count], by whole numbers alone (SplitMix64 of Steele, Lea and Flood 2014)."""
    words = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _digest(results: list[NDArray[np.float64]] | list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for result in results:
        raw = result if isinstance(result, np.ndarray) else result.contiguous().view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(raw).tobytes())
    return digest.hexdigest()[:8]
