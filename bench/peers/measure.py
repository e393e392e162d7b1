"""What both peer benchmarks share: prompts, medians, the age of the process, facts about the machine.

Knows no engine. Standard library alone, since each peer lives in an environment of its own.
"""

import os
import platform
import random
import statistics
import time


def prompt_ids(n_vocab: int, length: int, seed: int) -> list[int]:
    """`length` token ids drawn evenly from the vocabulary, the same for every engine and run.

    The first 256 ids are left out: control tokens live there, and an engine may treat them apart.
    Raises ValueError where the vocabulary is too small for that.
    """
    if n_vocab <= 512:
        raise ValueError(f"a vocabulary of {n_vocab} is too small for random prompts (needs more than 512)")
    draw = random.Random(seed)
    return [draw.randrange(256, n_vocab) for _ in range(length)]


def summary(rates: list[float]) -> dict[str, object]:
    """Median, extremes and all runs of a list of rates, in tokens a second."""
    return {
        "median": round(statistics.median(rates), 2),
        "min": round(min(rates), 2),
        "max": round(max(rates), 2),
        "runs": [round(rate, 2) for rate in rates],
    }


def process_age() -> float:
    """Seconds since this process was started (Linux), the interpreter's own start included.

    Field 22 of /proc/self/stat is the start in clock ticks since boot (proc(5)); its grain is 10 ms.
    """
    with open("/proc/self/stat") as stat:
        # The second field is a name in parentheses that may hold spaces; count from behind it.
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, object]:
    """CPU model, cores this process may use, load average: enough to tell a quiet run from a busy one."""
    model = platform.processor()
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
