"""When the phases of a start-up began: the ready line tells whoever waits for it where the time went."""

from __future__ import annotations

import time

import psutil


class Phases:
    """Seconds since 1970, by what began then. The first is this process's start; of a replica that is built
    again, the first time counts."""

    def __init__(self) -> None:
        self._began = {"process": process_start(), "command": time.time()}

    def begin(self, name: str) -> None:
        """May be called by several threads."""
        self._began.setdefault(name, time.time())

    def begun(self) -> list[dict[str, str | float]]:
        """In order, as the ready line has them."""
        return [{"phase": name, "at": round(at, 3)} for name, at in tuple(self._began.items())]


def process_start() -> float:
    """Seconds since 1970. Linux tells a process's start in seconds since it booted, to 10 ms, and the time of
    that boot in whole seconds, by which psutil's own sum may be a second off."""
    process = psutil.Process()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return process.create_time()
    since_boot = process.create_time() - psutil.boot_time()
    # Read in this order, a pause between the two makes a start later and not earlier than its process.
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - uptime + since_boot
