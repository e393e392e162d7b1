"""GPTQ's tensors, as AutoGPTQ and GPTQModel write them: codes in words, zero points, the order of groups.

Field i of a word, from its lowest bits up, is code (or zero point) per_word * word + i: codes run along the
inputs, zero points along the outputs. checkpoint_format "gptq" stores zero points less one, "gptq_v2" as
they are. g_idx[k] is the group of input k: k // group size, unless the model was quantised in the order of
its activations ("act-order", desc_act).
"""

from __future__ import annotations

import os

import numpy as np

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.weights.packed import PackedInfo


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [..., 4 words] of little-endian words -> codes [..., words * 32 / bits], uint8, in order."""
    if bits == 8:
        return words
    codes = np.empty((*words.shape, 2), np.uint8)
    np.bitwise_and(words, np.uint8(15), out=codes[..., 0])
    np.right_shift(words, np.uint8(4), out=codes[..., 1])
    return codes.reshape(*words.shape[:-1], -1)


def codes_of_outputs(words: np.ndarray, start: int, stop: int, bits: int) -> np.ndarray:
    """qweight's bytes [words along K, 4 N] -> codes [stop - start, K] of some of the outputs."""
    turned = np.ascontiguousarray(words.view("<u4")[:, start:stop].T)
    return fields(turned.view(np.uint8), bits)


def check_order(info: PackedInfo, order: np.ndarray, first: int) -> None:
    """`order`: g_idx of the inputs from `first` on, int32. Groups must come in the order of the inputs.

    Otherwise raises UnsupportedModel (act-order), or BadModelFile for a group that is not there."""
    assert info.g_idx is not None
    group = info.type.columns_a_scale(info.cols)
    expected = np.arange(first, first + len(order)) // group
    if np.array_equal(order, expected):
        return
    groups = -(-info.cols // group)
    wrong = order[(order < 0) | (order >= groups)]
    if len(wrong):
        raise BadModelFile(
            info.g_idx.file, info.g_idx.name, f"names group {wrong[0]} where there are {groups} groups"
        )
    raise UnsupportedModel(
        f"{info.g_idx.file}: {info.g_idx.name}: inputs are not in the order of their groups (act-order), "
        "which is not served; quantise with desc_act false, or use a GGUF of the model"
    )


def check_whole_order(info: PackedInfo) -> None:
    """Reads a layer's g_idx, 4 bytes an input, and checks it as `check_order` does."""
    held = info.g_idx
    if held is None:
        raise BadModelFile(
            info.file, info.qweight.name.replace("qweight", "g_idx"), "missing, though desc_act is true"
        )
    try:
        with open(held.file, "rb") as file:
            raw = os.pread(file.fileno(), held.nbytes, held.offset)
    except OSError as error:
        raise BadModelFile(held.file, "", f"cannot be read: {error.strerror or error}") from None
    if len(raw) != held.nbytes:
        raise BadModelFile(held.file, held.name, "ends early: the file shrank after opening")
    check_order(info, np.frombuffer(raw, "<i4"), 0)
