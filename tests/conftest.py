"""Fixtures that several folders of tests use: tiny models, made once a session, and one Ray a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import smollm2_path

TinyModel = Callable[..., Path]


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
