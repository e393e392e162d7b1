"""AWQ's tensors in the layout that AutoAWQ calls "gemm": eight 4-bit codes a word, interleaved.

Codes and zero points both run along the outputs. Field i of a word, from its lowest bits up, is output
8 * word + ORDER[i]; zero points are stored as they are.
"""

from __future__ import annotations

import numpy as np

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def fields(words: np.ndarray) -> np.ndarray:
    """Bytes [..., 4 words] of little-endian words -> codes [..., 8 words], uint8, by output."""
    codes = np.empty((*words.shape[:-1], words.shape[-1] // 4, 8), np.uint8)
    for field, output in enumerate(ORDER):
        byte = words[..., field // 2 :: 4]
        codes[..., output] = byte >> np.uint8(4) if field % 2 else byte & np.uint8(15)
    return codes.reshape(*words.shape[:-1], -1)


def codes_of_outputs(words: np.ndarray, start: int, stop: int) -> np.ndarray:
    """qweight's bytes [K, 4 words] -> codes [stop - start, K] of some of the outputs."""
    first, last = start // 8, -(-stop // 8)
    turned = np.ascontiguousarray(words.view("<u4")[:, first:last].T)  # [words, K]
    by_word = fields(turned.view(np.uint8)).reshape(last - first, -1, 8)
    by_output = by_word.transpose(0, 2, 1).reshape(8 * (last - first), -1)
    return by_output[start - 8 * first : stop - 8 * first]
