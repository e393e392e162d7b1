"""Prints the numerics of this process and what operations compute in it, as JSON: for tests of how the two go
together where an environment variable has libraries choose other code.

The operations are called through the runtime's own functions, on other inputs and in other shapes than the
probes'. Inputs come from integers alone, so that they are the same whatever is chosen."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

from kernels.linear import linear, pack_bf16, pack_fp32
from runtime.model.numerics import numerics_name
from runtime.model.probes import host_probes, host_results, torch_results

SHAPES = (
    (64, 64),
    (172, 64),
    (64, 172),
    (32, 64),
    (104, 256),
    (1000, 320),
)  # N, K: stories260K's, and others


def digest(*results: torch.Tensor | np.ndarray) -> str:
    found = hashlib.sha256()
    for result in results:
        whole = result.contiguous().view(torch.uint8).numpy() if isinstance(result, torch.Tensor) else result
        found.update(np.ascontiguousarray(whole).tobytes())
    return found.hexdigest()


def inputs(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [16, k] and w [n, k] whose product is 0 but for rounding."""
    draw = np.random.default_rng(n * k)
    order = draw.permutation(k // 2)
    x, w = (draw.integers(-(2**20), 2**20, (rows, k // 2)) * 2.0**-20 for rows in (16, n))
    x, w = (torch.from_numpy(t.astype(np.float32)).to(dtype) for t in (x, w))
    return torch.cat((x, x[:, order]), dim=1), torch.cat((w, -w[:, order]), dim=1)


def product(dtype: torch.dtype) -> str:
    pack = pack_fp32 if dtype == torch.float32 else pack_bf16
    made = [inputs(n, k, dtype) for n, k in SHAPES]
    return digest(*(linear(x, pack(w)) for x, w in made))


def computed() -> dict[str, str]:
    """Operation -> its bits."""
    even = np.random.default_rng(1).random(300_000)
    angles = np.arange(4096.0)[:, None] * 10000 ** (-np.arange(0, 32) / 32).astype(np.float32)
    return {
        "fp32 product": product(torch.float32),
        "bf16 product": product(torch.bfloat16),
        "exp": digest(np.exp(-30 * even)),
        "log": digest(np.log(even)),
        "cos and sin": digest(np.cos(angles), np.sin(angles)),
    }


def main() -> None:
    name = numerics_name(dtype=torch.float32, dense=frozenset(), units=8, quantize=None)
    probed = {key: digest(value) for key, value in {**host_results(), **torch_results()}.items()}
    print(json.dumps({"name": name, "host": host_probes(), "computed": computed(), "probed": probed}))


if __name__ == "__main__":
    main()
