"""The block pool, its contiguous runs, and the keys of the prefix cache."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.blocks import BlockPool
from runtime.engine.check import IntegrityError, check_pool
from runtime.engine.prefix import next_key, root_key
from runtime.engine.runs import FreeRuns


@settings(max_examples=100, deadline=None)
@given(total=st.integers(1, 40), data=st.data())
def test_runs_hold_exactly_what_is_free(total: int, data) -> None:
    runs, taken = FreeRuns(total), []
    for _ in range(data.draw(st.integers(1, 40))):
        if runs.count and data.draw(st.booleans()):
            after = data.draw(st.sampled_from(taken) | st.none()) if taken else None
            follows = after is not None and after + 1 < total and after + 1 not in taken
            blocks = runs.take(data.draw(st.integers(1, runs.count)), after)
            assert not set(blocks) & set(taken)
            assert not follows or blocks[0] == after + 1
            taken += blocks
        elif taken:
            runs.give(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        assert runs.ids() == set(range(total)) - set(taken)
        assert runs.count == total - len(taken)
        starts = runs.length_at
        assert not any(start + length in starts for start, length in starts.items()), (
            "runs that should be one"
        )


def test_runs_leave_room_to_grow() -> None:
    runs = FreeRuns(100)
    first = runs.take(4, None)
    second = runs.take(4, None)
    assert first == [0, 1, 2, 3]
    for table in (first, second):
        for _ in range(40):
            table += runs.take(1, table[-1])
        assert table == list(range(table[0], table[0] + 44))


def test_runs_forget_stale_sizes() -> None:
    runs = FreeRuns(1000)
    for _ in range(2000):
        for block in runs.take(3, None):
            runs.give(block)
    assert len(runs._largest) < 200
    assert runs.length_at == {0: 1000}


def test_a_large_take_is_contiguous_where_it_can_be() -> None:
    runs = FreeRuns(64)
    held = runs.take(8, None)
    assert runs.take(56, held[-1]) == list(range(8, 64))


def pool_with_cached(count: int) -> tuple[BlockPool, list[bytes]]:
    pool = BlockPool(8)
    keys = [b"%d" % index for index in range(count)]
    blocks = pool.take(count)
    for block, key in zip(blocks, keys, strict=True):
        pool.name(block, key)
    pool.release(blocks)
    return pool, keys


def test_cached_blocks_are_found_shared_and_kept() -> None:
    pool, keys = pool_with_cached(5)
    assert pool.available == 8 and len(pool.cached) == 5
    found = pool.find([*keys[:3], b"unknown", keys[4]])
    assert found == [pool.block_of[key] for key in keys[:3]]
    assert pool.idle_among(found) == 3
    pool.share(found)
    assert pool.available == 5 and pool.idle_among(found) == 0
    pool.share(found[:1])
    assert pool.available == 5
    check_pool(pool, Counter(found + found[:1]))
    others = pool.take(5)
    assert not set(others) & set(found)
    assert pool.find(keys) == found, "held blocks are never evicted"
    with pytest.raises(ValueError, match="1 blocks wanted, 0 available"):
        pool.take(1)


def test_eviction_is_least_recent_and_leaf_first() -> None:
    pool, keys = pool_with_cached(6)
    pool.share(pool.find(keys[:2]))
    pool.release(pool.find(keys[:2]))  # used again: these two are the most recent now
    for kept in (5, 4, 3, 2, 1, 0):
        pool.release(pool.take(pool.empty.count + 1))
        assert len(pool.find(keys)) == kept
    check_pool(pool, Counter())


def test_the_first_block_keeps_a_key() -> None:
    pool = BlockPool(4)
    first, second = pool.take(2)
    pool.name(first, b"same")
    pool.name(second, b"same")
    assert pool.find([b"same"]) == [first]
    pool.release([second])
    assert second in pool.empty.ids()
    check_pool(pool, Counter([first]))


def test_keys_stand_for_salt_and_every_token() -> None:
    def chain(salt: str, *blocks: tuple[int, ...]) -> bytes:
        key = root_key(salt)
        for tokens in blocks:
            key = next_key(key, tokens)
        return key

    chains = [
        chain("", (1, 2), (3, 4)),
        chain("", (3, 4), (1, 2)),
        chain("", (3, 4)),
        chain("", (1, 2, 3, 4)),
        chain("", (1, 2), (3, 5)),
        chain("a", (1, 2), (3, 4)),
        chain("ä", (1, 2), (3, 4)),
        chain("", (1,), (2, 3, 4)),
        chain("", (1 + 256, 2), (3, 4)),
    ]
    assert len(set(chains)) == len(chains)
    assert all(len(key) == 32 for key in chains)
    assert chain("", (1, 2), (3, 4)) == chains[0]


@pytest.mark.parametrize("damage", ["lost", "double", "count", "key", "reference"])
def test_the_check_finds_damage(damage: str) -> None:
    pool, keys = pool_with_cached(3)
    held = pool.take(2)
    check_pool(pool, Counter(held))
    if damage == "lost":
        del pool.cached[pool.block_of[keys[0]]]
    elif damage == "double":
        pool.empty.give(held[0])
    elif damage == "count":
        pool.empty.count += 1
    elif damage == "key":
        del pool.block_of[keys[1]]
    else:
        pool.references[held[1]] += 1
    with pytest.raises(IntegrityError):
        check_pool(pool, Counter(held))
