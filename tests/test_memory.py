"""The limits of containers, as Linux shows them in files."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from runtime.memory import available

GIB = 1 << 30
FREE = 64 * GIB


@pytest.fixture(autouse=True)
def host(monkeypatch) -> None:
    memory = psutil.virtual_memory()._replace(available=FREE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def group(folder: Path, limit: str, used: int = 0, cache: int = 0, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        )
    )
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    total = "" if version == 2 else "total_"
    lately = cache // 3
    lines = [f"anon {used - cache}", f"{total}active_file {lately}", f"{total}inactive_file {cache - lately}"]
    (folder / "memory.stat").write_text("\n".join(lines) + "\n")


def found(tmp_path: Path, lines: str) -> int:
    (tmp_path / "groups").write_text(lines)
    return available(tmp_path / "root", tmp_path / "groups")


def test_without_limits_it_is_what_the_host_has(tmp_path):
    assert found(tmp_path, "0::/\n") == FREE
    assert available(tmp_path / "root", tmp_path / "no such file") == FREE
    group(tmp_path / "root" / "a", "max", 5)
    assert found(tmp_path, "0::/a\n") == FREE


def test_a_container_leaves_its_limit_less_what_it_uses(tmp_path):
    group(tmp_path / "root", str(8 * GIB), used=3 * GIB, cache=GIB)
    assert found(tmp_path, "0::/\n") == 6 * GIB
    # The path as the host sees it, which is not there inside.
    assert found(tmp_path, "0::/kubepods/pod1/c1\n") == 6 * GIB


def test_the_narrowest_of_the_groups_around_counts(tmp_path):
    group(tmp_path / "root" / "pod" / "c", "max", GIB)
    group(tmp_path / "root" / "pod", str(4 * GIB), used=3 * GIB)
    group(tmp_path / "root", str(40 * GIB), used=3 * GIB)
    assert found(tmp_path, "0::/pod/c\n") == GIB
    group(tmp_path / "root" / "pod" / "c", str(GIB), used=2 * GIB)  # over its limit, for a moment
    assert found(tmp_path, "0::/pod/c\n") == 0


def test_version_1(tmp_path):
    lines = "9:name=systemd:/\n4:cpu,memory:/docker/c\n0::/\n"
    memory = tmp_path / "root" / "memory"
    group(memory, str((1 << 63) - 4096), used=GIB, version=1)  # its word for no limit
    assert found(tmp_path, lines) == FREE
    group(memory / "docker" / "c", str(2 * GIB), used=GIB, cache=GIB // 2, version=1)
    assert found(tmp_path, lines) == GIB + GIB // 2


def test_files_that_make_no_sense_limit_nothing(tmp_path):
    group(tmp_path / "root", "a lot", used=GIB)
    assert found(tmp_path, "0::/\n") == FREE
