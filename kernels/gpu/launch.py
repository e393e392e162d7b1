"""How kernels are started, and what every operation checks first."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on CPU tensors
_ONE_AT_A_TIME = threading.Lock()  # the interpreter patches Triton's own functions while it runs a kernel
OLDEST = (8, 0)  # compute capability: fp16 matrix instructions and asynchronous copies


def launch(kernel, grid: Sequence[int], *args, warps: int = 4, stages: int = 1, **constants) -> None:
    """Run `kernel` over `grid`. An empty grid does nothing. A kernel that is told OVERLAP waits for the one
    before it by itself, and is started before that one has ended.

    No product is fused with a sum behind the source's back: where a fused one is wanted, `tl.fma` says so.
    """
    if not all(grid):
        return
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if constants.get("OVERLAP"):
        options["launch_pdl"] = True
    if INTERPRETED:
        with _ONE_AT_A_TIME:
            kernel[tuple(grid)](*args, **options, **constants)
    else:
        kernel[tuple(grid)](*args, **options, **constants)


def check(
    operation: str, name: str, tensor: torch.Tensor, dtypes: torch.dtype | Sequence[torch.dtype], *shape: int
) -> None:
    """Refuse a tensor that a kernel does not take. -1 in `shape` stands for any size.

    Raises ValueError that names the operation, the tensor, and what was wanted.
    """
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in wanted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise ValueError(f"{operation}: {name} is {tensor.dtype}, not {names}")
    if tensor.dim() != len(shape) or any(
        n not in (-1, have) for n, have in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{operation}: {name} is {list(tensor.shape)}, not {list(shape)} (-1: any)")
    if not tensor.is_contiguous():
        raise ValueError(f"{operation}: {name} has strides {tensor.stride()}, and must be contiguous")
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(f"{operation}: {name} is on {tensor.device}, not on a CUDA device")


def same_device(operation: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that are not all on one device. Raises ValueError naming the odd one."""
    present = [(name, t.device) for name, t in tensors.items() if t is not None]
    for name, device in present:
        if device != present[0][1]:
            raise ValueError(f"{operation}: {name} is on {device}, {present[0][0]} on {present[0][1]}")


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def require_gpu(device: torch.device | str = "cuda") -> None:
    """Refuse, in one line, a machine on which the kernels cannot run. Raises RuntimeError."""
    if INTERPRETED:
        return
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible to torch: use --device cpu, or a CUDA build of torch")
    have = torch.cuda.get_device_capability(device)
    if have < OLDEST:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(f"{name} has compute capability {have[0]}.{have[1]}; 8.0 (A100) is the least")
