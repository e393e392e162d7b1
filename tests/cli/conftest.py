"""Models and a server that the command line's tests share."""

from __future__ import annotations

import pytest

from tests.cli.command import serving
from tests.weights.tiny import write_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of three units: 6 heads on 3 KV heads."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_tiny_llama(path, hidden=96, heads=6, kv_heads=3, ffn=160, context=256)


@pytest.fixture(scope="session")
def server(tiny):
    """The ready line of a server of `tiny` in one process, without Ray."""
    with serving(tiny, "--local", "--tp", "2", "--name", "small", "--metrics-port", "0") as (_, ready):
        yield ready
