"""How many threads torch's operations use in this process: as many as there are for them, unless bits would
show how many.

oneDNN divides a product among the threads that it asked for, and some of it is left unwritten where OpenMP
gives it fewer (measured with torch 2.13 on AMX): NaN at best. So what would keep threads back is refused. MKL
adds up otherwise by several threads where it has no AVX-512: there one has to do.
Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from runtime.errors import NotEnough
from runtime.model.probes import threads_matter


def use_threads(asked: int | None, ranks: int, device: str) -> int:
    """Have torch use `asked` threads, or if that is None what `ranks` ranks on this machine leave each other;
    how many that is. Holds for this thread, and those that it starts. Raises NotEnough where OpenMP may give
    a product fewer; on a GPU ("cuda") that decides no bit."""
    cores = os.cpu_count() or 1
    if device != "cpu":
        count = asked or max(1, cores // ranks)
    else:
        count = threads_for(asked, ranks, cores, os.environ)
        count = 1 if count > 1 and threads_matter(count) else count
    torch.set_num_threads(count)
    return count


def threads_for(asked: int | None, ranks: int, cores: int, environment: Mapping[str, str]) -> int:
    """As `use_threads`. Raises NotEnough, naming the variable. OpenMP 5.2, chapter 21: OMP_DYNAMIC,
    OMP_THREAD_LIMIT and OMP_MAX_ACTIVE_LEVELS, which are read once, when a process starts."""
    limit = _number(environment, "OMP_THREAD_LIMIT") or None  # 0 is no limit to libgomp
    count = asked or max(1, cores // ranks)
    if asked is None and limit:
        count = min(count, limit)
    if count == 1:
        return 1
    if environment.get("OMP_DYNAMIC", "").strip().lower() == "true":
        raise NotEnough("OMP_DYNAMIC lets OpenMP give products fewer threads than they count on: unset it")
    if _number(environment, "OMP_MAX_ACTIVE_LEVELS") == 0:
        raise NotEnough("OMP_MAX_ACTIVE_LEVELS is 0, which leaves products one thread: unset it")
    if limit and limit < count:
        raise NotEnough(f"OMP_THREAD_LIMIT is {limit}, and {count} threads are to compute: unset it")
    return count


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """None where OpenMP would not take it for a number either."""
    text = environment.get(name, "").strip()
    return int(text) if text.isascii() and text.isdecimal() else None
