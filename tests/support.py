"""What several tests share: where the real data lies."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def fixture_path(name: str) -> Path:
    """Path of a file of the real-data fixtures, or a skip that says what is missing.

    They lie beside the checkout in ../shared/fixtures unless TRAMONTANE_FIXTURES names another folder.
    """
    folder = Path(os.environ.get("TRAMONTANE_FIXTURES", REPOSITORY.parent / "shared" / "fixtures"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"fixture {name} is not there; set TRAMONTANE_FIXTURES to the folder that holds it")
    return path
