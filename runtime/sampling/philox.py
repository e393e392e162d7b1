"""Philox4x32-10, a counter-based random generator, over numpy arrays.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure
function of its counter and key. Knows nothing of what the words are used for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # 32-bit words, held in 64 so that the product of two of them fits

_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: Words, key: Words) -> Words:
    """Four random words [4, ...] for each counter [4, ...] under its key [2, ...]; the rest broadcasts."""
    pair = (2,) + (1,) * (counter.ndim - 1)
    multipliers, weyl = _MULTIPLIERS.reshape(pair), _WEYL.reshape(pair)
    factors, others = counter[0::2], counter[1::2]  # words 0 and 2 are multiplied, 1 and 3 mixed in
    for _ in range(_ROUNDS):
        product = factors * multipliers
        factors = (product >> _HALF)[::-1] ^ others ^ key
        others = (product & _LOW)[::-1]
        key = (key + weyl) & _LOW
    return np.stack([factors[0], others[0], factors[1], others[1]])
