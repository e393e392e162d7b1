"""Where ranks compute: what `--device` comes to on this host. Imports torch only where a GPU may be used."""

from __future__ import annotations

import ctypes
import importlib.util

from runtime.errors import InvalidArgument

LEAST = (8, 0)  # compute capability the kernels need


def resolve_device(wanted: str) -> str:
    """The device, cpu or cuda, that `wanted` (auto, cpu or cuda) comes to. Auto takes a GPU that the kernels
    can use, if there is one. Raises InvalidArgument that says in one line what is missing."""
    if wanted == "cpu":
        return "cpu"
    if wanted not in ("auto", "cuda"):
        raise InvalidArgument("device", f"{wanted!r} is none of auto, cpu, cuda")
    missing = missing_for_cuda()
    if wanted == "cuda" and missing:
        raise InvalidArgument("device", f"cuda is not possible: {missing}; use cpu or auto")
    return "cpu" if missing else "cuda"


def missing_for_cuda() -> str | None:
    """Why this process cannot compute on a GPU; None if it can."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed"
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "torch sees no CUDA device" if built else "this torch is built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    have = torch.cuda.get_device_capability()
    if have < LEAST:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {have[0]}.{have[1]}, and {LEAST[0]}.{LEAST[1]} is the least"
    return None
