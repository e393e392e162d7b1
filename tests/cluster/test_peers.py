"""Exchanges between ranks that are real processes: every size whole, and a lost peer noticed at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY


def run(ranks: int, script: str, folder: Path, limit: float = 90) -> list[list[str]]:
    """Lines that each rank printed after its address."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.cluster.peer",
                str(rank),
                str(ranks),
                "t",
                str(folder / "store"),
                script,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in range(ranks)
    ]
    try:
        addresses = json.dumps([json.loads(p.stdout.readline()) for p in processes])
        for p in processes:
            p.stdin.write(addresses + "\n")
            p.stdin.flush()
        found = []
        for p in processes:
            out, err = p.communicate(timeout=limit)
            assert p.returncode in (0, 9), err
            found.append(out.splitlines())
        return found
    finally:
        for p in processes:
            p.kill()
            p.wait()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_size_arrives_whole(ranks, tmp_path):
    assert run(ranks, "exchange", tmp_path) == [["done"]] * ranks


def test_every_size_arrives_whole_by_torch(tmp_path):
    assert run(3, "exchange by torch", tmp_path) == [["done"]] * 3


@pytest.mark.parametrize("size", ["small", "middle", "large", "large by torch"])
def test_a_lost_peer_is_noticed(size, tmp_path):
    *others, lost = run(3, f"lose {size}", tmp_path)
    assert lost == []
    for lines in others:
        assert json.loads(lines[0])["noticed"] < 10
        assert lines[1].startswith("Unavailable: rank ")
