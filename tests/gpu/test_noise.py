"""Random words equal the host's bit for bit; the noise made of them, to float64's rounding."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.gpu.launch import launch
from kernels.gpu.noise import BLOCK, gumbel
from kernels.gpu.philox import philox4x32
from runtime.sampling import noise as host
from runtime.sampling.philox import philox4x32 as host_philox
from tests.gpu.device import DEVICE

N = 512


@triton.jit
def _words(counter_ptr, key, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    c0 = tl.load(counter_ptr + at).to(tl.uint32)
    c1 = tl.load(counter_ptr + N + at).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * N + at).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * N + at).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, tl.load(key))
    tl.store(out_ptr + at, w0.to(tl.int64))
    tl.store(out_ptr + N + at, w1.to(tl.int64))
    tl.store(out_ptr + 2 * N + at, w2.to(tl.int64))
    tl.store(out_ptr + 3 * N + at, w3.to(tl.int64))


@triton.jit
def _noise(first, keys, out_ptr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    block = first + tl.arange(0, BLOCKS)
    inside = tl.arange(0, BLOCK)
    noise = gumbel(block, inside, tl.load(keys), tl.load(keys + 1), tl.load(keys + 2))
    at = tl.arange(0, BLOCKS)[:, None] * BLOCK + inside[None, :]
    tl.store(out_ptr + at, noise)


def signed(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int64).copy()).to(DEVICE)


def test_words() -> None:
    """Against the host, and the known answers of Random123 for counters and keys of zeros and of ones."""
    rng = np.random.default_rng(5)
    for seed in (0, 2**64 - 1, 0x0123456789ABCDEF, 2**63, 7):
        counter = rng.integers(0, 2**32, (4, N), dtype=np.uint64)
        counter[:, 0], counter[:, 1] = 0, 2**32 - 1
        out = torch.full((4, N), -1, dtype=torch.int64, device=DEVICE)
        launch(_words, (1,), signed(counter), signed(np.array([seed], np.uint64)), out, N=N)
        key = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], np.uint64)
        np.testing.assert_array_equal(out.cpu().numpy().view(np.uint64), host_philox(counter, key))
        if seed == 0:
            assert [hex(w) for w in out[:, 0].tolist()] == [
                "0x6627e8d5",
                "0xe169c58d",
                "0xbc57ac4c",
                "0x9b00dbd8",
            ]
        if seed == 2**64 - 1:
            assert [hex(w) for w in out[:, 1].tolist()] == [
                "0x408f276d",
                "0x41c83b0e",
                "0xa20bc7c6",
                "0x6d5451fd",
            ]


def test_noise() -> None:
    """Each id's, against the host's definition: least of the block, holder, fresh draw."""
    assert BLOCK == host.BLOCK
    blocks = 4
    for seed, position, choice, first in ((3, 0, 0, 0), (2**64 - 5, 2**32 - 1, 5, 124), (2**40, 70000, 1, 8)):
        keys = signed(np.array([position, choice, seed], np.uint64))
        out = torch.full((blocks, BLOCK), float("nan"), dtype=torch.float64, device=DEVICE)
        launch(_noise, (1,), first, keys, out, BLOCKS=blocks, BLOCK=BLOCK)
        ids = np.arange(first * BLOCK, (first + blocks) * BLOCK)
        draws = host.draw_blocks([seed], [position], [0], (first + blocks) * BLOCK, [choice])
        counters = ids.astype(np.uint64), np.uint64(position), np.uint64(choice), np.uint64(0)
        words = host._words(*counters, draws.keys)
        block = np.zeros(len(ids), np.int64), ids >> 8
        want = host._gumbel(ids, draws.least[block], draws.holder[block], host._exponential(words))
        got = out.cpu().numpy().reshape(-1)
        np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-14)
        # Which id holds a block's least shows in the bits that are not rounded away.
        assert (got.reshape(blocks, -1).argmax(1) == want.reshape(blocks, -1).argmax(1)).all()
