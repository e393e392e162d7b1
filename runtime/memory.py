"""How much memory this process may still take: what its host has free, or less, as its container has it.

A container's limit is a control group's, of version 2 (`memory.max`) or 1 (`memory.limit_in_bytes`), and so
is every limit of the groups around it; Linux kernel documentation, admin-guide/cgroup-v2 and
cgroup-v1/memory. Pages of files count as free: the kernel drops them before it refuses memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available(root: Path = ROOT, groups: Path = GROUPS) -> int:
    """Bytes; never negative."""
    return max(0, min([psutil.virtual_memory().available, *_left(root, groups)]))


def _left(root: Path, groups: Path) -> Iterator[int]:
    """What each limit leaves of this process's groups, from its own outwards."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, files = root, _V2
        elif "memory" in controllers.split(","):
            mount, files = root / "memory", _V1
        else:
            continue
        # Inside a container the path is often as the host sees it, and its own group is the mount's root.
        folder = mount / path.lstrip("/")
        while True:
            left = _left_of(folder, *files)
            if left is not None:
                yield left
            if folder == mount or mount not in folder.parents:
                break
            folder = folder.parent


def _left_of(folder: Path, limit: str, used: str, reclaimable: tuple[str, ...]) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = sum(int(stat.get(name, 0)) for name in reclaimable)
        return int(most) - int((folder / used).read_text()) + files
    except (OSError, ValueError):  # no such group, or files that are not what they should be
        return None
