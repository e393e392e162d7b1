"""The short name for whatever may change a bit of a reply. Equal names promise equal bits.

Covered: the processor's instruction set, the torch version, the sources of the operations, of the model and
sampling code and of what finds the end tokens, which code libraries pick here (probes.py), the types of
activations and KV, the operator of each weight, attention's segment and U. Not covered, because nothing of it
may matter: ranks, threads, batches, chunks, caches.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

import kernels
from kernels.native import machine
from runtime.model.probes import probes

_HASHED = ("model", "sampling", "weights")
# They say which tokens end a reply, by the model's files, which the name of the weights covers.
ENDS = ("tokenizer/huggingface.py", "tokenizer/vocabulary.py")


def numerics_name(*, dtype: torch.dtype, dense: frozenset[str], units: int, quantize: str | None) -> str:
    """For example `cpu.avx512-amx.native/torch2.13.0/5f0c9a1d/p83097207/bf16.kv-bf16.int4+down/u3`:
    `kernels.native` serves; weights in int4 where it takes them, but for the roles named after the `+`, which
    are bf16. The first call runs the probes, which takes milliseconds."""
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    weights = "fp32" if kind == "fp32" else "+".join(["int4", *sorted(dense)])
    if quantize:
        weights += f".{quantize}"
    version = torch.__version__.split("+")[0]
    computes = f"cpu.{_instruction_set()}/torch{version}/{_sources()}/p{probes()}"
    return f"{computes}/{kind}.kv-{kind}.{weights}/u{units}"


def _instruction_set() -> str:
    level = torch.backends.cpu.get_cpu_capability().lower()
    amx = "-amx" if torch.cpu._is_amx_tile_supported() else ""
    return level + amx + (".native" if machine.supported() else "")


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    root, runtime = Path(kernels.__file__).parent, Path(__file__).parents[1]
    folders = [root, root / "native", *(runtime / name for name in _HASHED)]
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    for path in (*paths, *(runtime / name for name in ENDS)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]
