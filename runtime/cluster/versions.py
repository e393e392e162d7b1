"""What is installed where a rank lives, and whether that is the same everywhere: else bits would differ."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from runtime.errors import Unavailable

PACKAGES = ("tramontane", "torch", "triton", "ray")


def installed() -> dict[str, str]:
    """Versions by package. One that runs from its sources, or is not there, has none."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def check_alike(nodes: Sequence[str], versions: Sequence[dict[str, str]]) -> None:
    """Raises Unavailable, naming two nodes, unless the rank on each of `nodes` has the first's versions."""
    for node, found in zip(nodes, versions, strict=True):
        for package, have in found.items():
            if have != versions[0].get(package):
                raise Unavailable(
                    f"{package} is {versions[0].get(package)} on {nodes[0]} and {have} on {node}: "
                    "install the same versions on all nodes"
                )
