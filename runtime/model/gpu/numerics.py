"""The short name for whatever may change a bit of a reply that a GPU computes. Equal names promise equal
bits.

Covered: the GPU's architecture, the versions of torch and Triton, the sources of the kernels, of the model,
of sampling and of what finds the end tokens, what the host computes of a reply (RoPE's table, logprobs: see
runtime/model/probes.py), the types of activations and KV, chunk, segment and U. Not covered, because nothing
of it may matter: ranks, batches, chunks of prompts, caches, tilings, and how many multiprocessors a GPU has.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
import triton

import kernels
from kernels.gpu.attention import SEGMENT
from kernels.gpu.chunks import CHUNK
from kernels.gpu.launch import INTERPRETED
from runtime.model.numerics import ENDS
from runtime.model.probes import host_probes

_FOLDERS = ("model", "model/gpu", "sampling", "weights")


def gpu_numerics_name(*, units: int, quantize: str | None, kv_dtype: str = "auto") -> str:
    """For example `sm90/torch2.13.0/triton3.9.0/5f0c9a1d/p0d3389cf/fp16.kv-fp16/chunk2048.segment512/u8`."""
    versions = f"torch{torch.__version__.split('+')[0]}/triton{triton.__version__}"
    types = f"fp16.kv-{'fp8' if kv_dtype == 'fp8' else 'fp16'}" + (f".{quantize}" if quantize else "")
    computes = f"{_architecture()}/{versions}/{_sources()}/p{host_probes()}"
    return f"{computes}/{types}/chunk{CHUNK}.segment{int(SEGMENT)}/u{units}"


def _architecture() -> str:
    if INTERPRETED:
        return "interpreted"
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    runtime = Path(__file__).parents[2]
    folders = [Path(kernels.__file__).parent / "gpu", *(runtime / name for name in _FOLDERS)]
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    for path in (*paths, *(runtime / name for name in ENDS)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]
