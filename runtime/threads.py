"""How many threads torch's operations use in this process, where the environment lets them have as many.

oneDNN divides a product among the threads that it asked for, and some of it is left unwritten where OpenMP
gives it fewer (measured with torch 2.13 on AMX): NaN at best. So what would keep threads back is refused.
Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from runtime.errors import NotEnough


def use_threads(count: int, ranks: int = 1) -> None:
    """`count` threads for each of `ranks` that compute in this process, from this thread on. Raises NotEnough
    where OpenMP may give them fewer."""
    check_openmp(os.environ, count * ranks)
    torch.set_num_threads(count)


def check_openmp(environment: Mapping[str, str], threads: int) -> None:
    """Raises NotEnough, naming the variable. OpenMP 5.2, chapter 21: OMP_DYNAMIC and OMP_THREAD_LIMIT, which
    are read once, when a process starts."""
    if environment.get("OMP_DYNAMIC", "").strip().lower() == "true" and threads > 1:
        raise NotEnough("OMP_DYNAMIC lets OpenMP give products fewer threads than they count on: unset it")
    limit = environment.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isdigit() and int(limit) < threads:
        raise NotEnough(f"OMP_THREAD_LIMIT is {limit}, and {threads} threads are to compute: unset it")
