"""Which replica gets a request: even work, kept beginnings, nothing for the lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.prefix import next_key, root_key
from runtime.engine.routing import KEYED_BLOCKS, MOST_SAVED, Asked, Router, prefix_keys

BLOCK = 16


def ask(prompt, salt="", reply=100):
    return Asked(prefix_keys(prompt, salt, BLOCK), len(prompt), reply)


def test_keys_are_those_of_the_engines_cache():
    prompt = tuple(range(40))
    first = next_key(root_key("s"), prompt[:16])
    assert prefix_keys(prompt, "s", 16) == (first, next_key(first, prompt[16:32]))
    assert prefix_keys(prompt[:32], "s", 16) == (first,), "the last token is always computed"
    assert prefix_keys(prompt[:16], "s", 16) == ()
    assert prefix_keys(prompt, "t", 16)[0] != first
    long = prefix_keys(tuple(range(100 * 16)), "", 16)
    assert len(long) == KEYED_BLOCKS


def test_requests_without_a_common_beginning_go_round():
    router = Router(3, BLOCK)
    chosen = [router.place(ask([i])).replica for i in range(6)]
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_what_waits_counts_until_it_is_computed_or_ended():
    router = Router(2, BLOCK)
    long = router.place(ask(range(1000)))
    assert (long.replica, router.work(0)) == (0, 1100)
    short = [router.place(ask([i])).replica for i in range(5)]
    assert short == [1] * 5
    router.began(long)
    assert router.work(0) == 100
    router.ended(long)
    router.ended(long)
    assert router.work(0) == 0


def test_a_beginning_stays_where_it_was_computed():
    router = Router(3, BLOCK)
    talk, other = tuple(range(300)), tuple(range(1000, 1300))
    first, second = router.place(ask(talk)), router.place(ask(other))
    assert first.replica != second.replica
    router.began(first)  # its reply goes on, and still is less work than the prompt anew
    router.ended(second)
    for turn in range(1, 3):
        for held, prompt in ((first, talk), (second, other)):
            placed = router.place(ask(prompt + tuple(range(40 * turn))))
            assert placed.replica == held.replica
            router.ended(placed)
    # Under another salt nothing of it may be used.
    assert router.place(ask(talk, salt="mine")).replica != first.replica


def test_only_what_is_left_of_a_prompt_counts():
    router = Router(1, BLOCK)
    router.ended(router.place(ask(range(160))))
    placed = router.place(ask(range(160)))
    assert placed.prompt == 16


def test_a_lost_replica_forgets():
    router = Router(2, BLOCK)
    prompt = tuple(range(200))
    held = router.place(ask(prompt))
    assert held.replica == 0
    router.lost(0)
    assert not router.alive(0) and router.work(0) == 0
    assert router.place(ask([1])).replica == 1
    router.found(0)
    router.ended(held)  # of a life before this one
    assert router.work(0) == 0
    router.ended(router.place(ask([2])))
    assert router.place(ask(prompt)).prompt == 200, "its cache is gone"


def test_nobody_left():
    router = Router(2, BLOCK)
    router.lost(1)
    assert router.place(ask([1]), without={0}) is None
    router.lost(0)
    assert router.place(ask([1])) is None


def test_what_was_used_last_is_remembered():
    router = Router(2, BLOCK, remembered=4)
    system, users = tuple(range(32)), [tuple(range(100 * n, 100 * n + 40)) for n in range(1, 9)]
    for user in users:
        router.ended(router.place(ask(system + user)))
    assert len(router._holders) == 4
    placed = router.place(ask(system + users[-1]))
    assert placed.prompt == 72 - 64, "the last one wholly"
    router.ended(placed)
    assert router.place(ask(system + users[0])).prompt == 72 - 32, "of the first the shared beginning"


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("place"), st.integers(0, 3), st.integers(1, 400), st.integers(1, 256)),
        st.tuples(st.sampled_from(["began", "ended"]), st.integers(0, 50)),
        st.tuples(st.sampled_from(["lost", "found"]), st.integers(0, 3)),
    ),
    max_size=80,
)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 4), EVENTS)
def test_whatever_happens(replicas, events):
    """Work is as even as promised, lost replicas get nothing, the books agree, and so again."""

    def play():
        router = Router(replicas, BLOCK, remembered=64)
        lost: set[int] = set()
        placed: list = []
        chosen: list[int | None] = []
        live: list = []
        for kind, number, *more in events:
            if kind == "place":
                length, reply = more
                work = {i: router.work(i) for i in range(replicas) if i not in lost}
                prompt = tuple(range(1000 * number, 1000 * number + length))  # four families
                one = router.place(ask(prompt, reply=reply))
                chosen.append(one and one.replica)
                assert (one is None) == (not work)
                if one is not None:
                    assert one.replica not in lost
                    assert work[one.replica] <= min(work.values()) + min(MOST_SAVED, length)
                    placed.append(one)
                    live.append(one)
            elif kind in ("began", "ended") and placed:
                one = placed[number % len(placed)]
                getattr(router, kind)(one)
                if kind == "ended":
                    live = [other for other in live if other is not one]
            elif kind == "lost" and number < replicas:
                router.lost(number)
                lost.add(number)
                live = [other for other in live if other.replica != number]
            elif kind == "found" and number < replicas:
                router.found(number)
                lost.discard(number)
            assert len(router._holders) <= 64
            for i in range(replicas):
                assert router.work(i) == sum(p.prompt + p.replies for p in live if p.replica == i) >= 0
        return chosen

    assert play() == play()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(1, 200), st.integers(17, 4000), st.integers(1, 256))
def test_a_beginning_that_all_share_starves_nobody(replicas, count, length, reply):
    """A flood of one prompt: no replica is left more than the bound behind another."""
    router = Router(replicas, BLOCK)
    prompt = tuple(range(length))
    for _ in range(count):
        router.place(ask(prompt, reply=reply))
    work = [router.work(i) for i in range(replicas)]
    assert max(work) - min(work) <= MOST_SAVED + length + reply
