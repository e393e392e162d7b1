"""Fixtures that several folders of tests use: tiny models, made once a session, and one Ray a session."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import smollm2_path

# Random draws go on finding things, and on a slow machine that is all they do: neither how long one example
# takes (200 ms by default) nor how long the first ten take to draw says anything of the code. What fails says
# how to draw it again. Tests that set more of this themselves start from here.
with contextlib.suppress(ImportError):  # a machine with a GPU may lack it
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
    settings.load_profile("any-speed")

# Tiny models run fastest on one thread, and OpenMP's teams wait for each other by spinning, which is slow
# where cores are shared. Tests that are about threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
# GPU kernels run on CPU tensors where there is no GPU. Triton looks at this when a kernel is defined.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Folders whose tests start processes that talk to each other, and wait for them.
ALONE = {"bench", "cli", "cluster", "deploy", "server", "wire"}

TinyModel = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` runs all others on as many processes as there are cores, and then these."""
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in ALONE or item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.alone)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: the cores that this process may use. Workers take up to 1.5 GB each."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or min(8, len(allowed)))


@pytest.fixture(autouse=True)
def torch_stays() -> Iterator[None]:
    """An engine in this process sets torch's threads for all of it: undone after each test. And what is drawn
    from torch's own generator must not depend on which tests this process happened to run before."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 1
    if torch:
        torch.manual_seed(0)
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """tiny(**arguments of write_tiny_llama) -> the path of that model, written at its first use."""
    from tests.weights.tiny import write_tiny_llama

    made: dict[str, Path] = {}

    def make(**arguments) -> Path:
        key = repr(sorted(arguments.items(), key=lambda item: item[0]))
        if key not in made:
            made[key] = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", **arguments)
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return smollm2_path()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this session alone; a Cluster that finds one running uses it and lets it live."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(2, os.cpu_count() or 1),
        object_store_memory=80 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="tramontane-tests",
    )
    yield
    ray.shutdown()
