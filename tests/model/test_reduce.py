"""The sum over units: bit-equal however many ranks hold them, over both ways of exchanging partials."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.errors import Unavailable
from runtime.model.communicator import Alone, Threads
from runtime.model.reduce import LARGE, UnitSum
from runtime.model.units import rank_units
from tests.bits import random, same_bits


def partials(empty: list[bool], m: int, width: int, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """Numbers of very different sizes, so that another order of adding shows."""
    scale = 10 ** (3 * random(99, len(empty), m, width))
    return {u: (random(u, m, width) * scale[u]).to(dtype) for u, nothing in enumerate(empty) if not nothing}


def by_ranks(empty: list[bool], tp: int, m: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    given_ = partials(empty, m, width, dtype)
    results: list = [None] * tp
    comms = Threads.group(tp)

    def work(rank: int) -> None:
        try:
            total = UnitSum(empty, comms[rank], dtype)
            start, stop = rank_units(len(empty), tp)[rank]
            for _ in range(2):  # the second call finds nothing left over from the first
                mine = [given_[u].clone() for u in range(start, stop) if u in given_]
                results[rank] = total(mine, m, width).clone()
        except Exception as error:  # shown below
            results[rank] = error
            comms[rank].close()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(isinstance(result, torch.Tensor) for result in results), results
    return results


@st.composite
def groups(draw):
    units = draw(st.integers(1, 8))
    empty = draw(st.lists(st.booleans(), min_size=units, max_size=units).filter(lambda e: not all(e)))
    return empty, draw(st.integers(1, units))


@settings(max_examples=60, deadline=None)
@given(
    groups(), st.sampled_from([(1, 5), (3, 64), (16, 576)]), st.sampled_from([torch.bfloat16, torch.float32])
)
@example(([True, True, False, True, True], 3), (16, 576), torch.bfloat16)
@example(([False] * 8, 3), (16, 576), torch.bfloat16)
@example(([False] * 7, 5), (16, 576), torch.float32)
def test_whole_partials_are_exchanged(group, size, dtype):
    empty, tp = group
    assert size[0] * size[1] * 4 < LARGE
    check(empty, tp, *size, dtype)


@settings(max_examples=25, deadline=None)
@given(
    groups(),
    st.sampled_from([(64, 1024), (131, 501), (9001, 8)]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
@example(([True, True, False, True, True], 5), (131, 501), torch.bfloat16)
@example(([False] * 8, 3), (131, 2048), torch.bfloat16)
@example(([False] * 3, 3), (9001, 8), torch.float32)
def test_slices_are_exchanged(group, size, dtype):
    empty, tp = group
    assert size[0] * size[1] * 4 >= LARGE
    check(empty, tp, *size, dtype)


def check(empty: list[bool], tp: int, m: int, width: int, dtype: torch.dtype) -> None:
    given_ = partials(empty, m, width, dtype)
    want = UnitSum(empty, Alone(), dtype)([p.clone() for p in given_.values()], m, width)
    assert want.dtype == torch.float32 and want.shape == (m, width)
    exact = sum(p.double() for p in given_.values())
    size = sum(p.double().abs() for p in given_.values())
    assert ((want.double() - exact).abs() <= size * 2**-21).all()
    for result in by_ranks(empty, tp, m, width, dtype):
        assert same_bits(result, want)


def test_the_order_of_adding_is_the_trees():
    """What the string algebra shows for `fold` holds for the numbers too: (0+1)+2, not 0+(1+2)."""
    given_ = [torch.tensor([[value]]) for value in (1.0, 2.0**-24, 2.0**-24)]
    total = UnitSum([False] * 3, Alone(), torch.float32)(given_, 1, 1)
    assert total.item() == 1.0  # 0+(1+2) would be 1 + 2**-23


def test_a_rank_that_stops_wakes_the_others():
    comms = Threads.group(3)
    failed = []

    def wait(rank: int) -> None:
        try:
            comms[rank].all_gather(torch.zeros(4, dtype=torch.uint8), [4, 4, 4])
        except Unavailable as error:
            failed.append(error)

    threads = [threading.Thread(target=wait, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    comms[2].close()
    for thread in threads:
        thread.join(120)
    assert len(failed) == 2
    with pytest.raises(Unavailable):
        comms[2].gather(torch.zeros(4, dtype=torch.uint8), [4, 4, 4])


class _Sends:
    """The second of two ranks, which notes what it is asked to send and gets back what it wants."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def all_gather(self, mine, sizes):
        self.sent.append(mine)
        return [torch.empty(size, dtype=torch.uint8, device=mine.device) for size in sizes]

    def all_to_all(self, outgoing, sizes):
        self.sent += outgoing
        return [torch.empty(size, dtype=torch.uint8, device=outgoing[0].device) for size in sizes]


@pytest.mark.parametrize("width", [8, LARGE // 4])
def test_a_rank_without_partials_sends_from_its_own_device(width: int) -> None:
    """A GPU's communicator takes nothing from the host, be it empty."""
    comm = _Sends()
    total = UnitSum([False, True], comm, torch.float32, "meta")([], 1, width)
    assert total.shape == (1, width)
    assert comm.sent and {payload.device.type for payload in comm.sent} == {"meta"}
