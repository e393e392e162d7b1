"""Exchanges between ranks that are real processes: every size whole, and a lost peer noticed at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import REPOSITORY

# Seconds within which a loss is noticed: where it is not, torch.distributed gives up after 60, sockets never.
NOTICED = 45


def run(ranks: int, script: str, limit: float = 240) -> list[list[str]]:
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
def test_every_size_arrives_whole(ranks):
    assert run(ranks, "exchange") == [["done"]] * ranks


def test_every_size_arrives_whole_by_torch():
    assert run(3, "exchange by torch") == [["done"]] * 3


def test_ranks_of_a_stage_exchange_by_torch():
    assert run(4, "exchange in stages by torch") == [["done"]] * 4


@pytest.mark.parametrize("size", ["small", "middle", "large", "large by torch"])
def test_a_lost_peer_is_noticed(size):
    *others, lost = run(3, f"lose {size}")
    assert lost == []
    for lines in others:
        assert json.loads(lines[0])["noticed"] < NOTICED
        assert lines[1].startswith("Unavailable: rank ")


def test_a_pipe_carries_every_size_in_order():
    """Two stages of two ranks."""
    assert run(4, "pipe") == [["done"]] * 4


def test_a_lost_stage_is_noticed_at_both_ends():
    first, lost, last = run(3, "lose stage")
    assert lost == []
    for lines in (first, last):
        assert json.loads(lines[0])["noticed"] < NOTICED
        assert lines[1].startswith("Unavailable: rank ")
