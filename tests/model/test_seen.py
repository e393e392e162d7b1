"""What a draft model has seen, against sets of positions; and which chunks it is asked for."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.model.batch import Run
from runtime.model.guessing import with_guesses
from runtime.model.seen import PIECE, Seen
from runtime.types import Chunk

SIZE = 4
BLOCKS = 12


class Sets:
    """The same by the positions of each block: what is written takes away what comes after it there too."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = [set() for _ in range(BLOCKS)]

    def written(self, blocks: list[int], start: int, stop: int) -> None:
        for position in range(start, stop):
            block = self.seen[blocks[position // SIZE]]
            block -= set(range(position % SIZE, SIZE))

    def run(self, blocks: list[int], start: int, stop: int) -> None:
        for position in range(start, stop):
            self.seen[blocks[position // SIZE]].add(position % SIZE)

    def unseen(self, blocks: list[int], stop: int) -> int:
        gaps = (p for p in range(stop) if p % SIZE not in self.seen[blocks[p // SIZE]])
        return next(gaps, stop)


@st.composite
def tables(draw) -> list[list[int]]:
    """Block tables of three sequences, the second of which shares its first blocks with the first."""
    order = draw(st.permutations(range(BLOCKS)))
    shared = draw(st.integers(0, 4))
    return [list(order[:4]), [*order[:shared], *order[4 : 8 - shared]], list(order[8:12])]


@settings(deadline=None)
@given(tables(), st.data())
def test_like_sets_of_positions(blocks, data) -> None:
    seen, sets = Seen(BLOCKS, SIZE), Sets()
    for _ in range(data.draw(st.integers(1, 25))):
        table = data.draw(st.sampled_from(blocks))
        start = data.draw(st.integers(0, 4 * SIZE - 1))
        stop = data.draw(st.integers(start + 1, 4 * SIZE))
        if data.draw(st.booleans()):
            seen.written(table, start, stop)
            sets.written(table, start, stop)
        else:
            start = min(start, sets.unseen(table, 4 * SIZE - 1))
            seen.run([Run([0] * (stop - start), start, table, 0)])
            sets.run(table, start, stop)
        for table in blocks:
            for stop in range(1, 4 * SIZE + 1):
                first = seen.unseen(table, stop)
                assert first == sets.unseen(table, stop)
                run = Run([0], stop - 1, table, 0)
                assert seen.next_to([run]) == ([run] if first == stop - 1 else [])


@settings(deadline=None)
@given(st.integers(1, 3 * PIECE), st.integers(0, 3 * PIECE), st.integers(0, 9))
def test_what_is_missing_comes_in_pieces(length, stale, extra) -> None:
    """Any sequence, seen up to some position or beyond all that is known."""
    tokens = list(range(length))
    blocks = list(range(-(-(length + extra) // 64)))[::-1]
    seen = Seen(len(blocks), 64)
    seen.run([Run([0] * (length + extra), 0, blocks, 0)])
    if stale < length:
        seen.written(blocks, stale, length + extra)
    pieces = seen.missing(tokens, blocks)
    start = min(stale, length - 1)
    assert [token for piece in pieces for token in piece.tokens] == tokens[start:]
    assert [piece.start for piece in pieces] == list(range(start, start + PIECE * len(pieces), PIECE))
    assert all(len(piece.tokens) == PIECE for piece in pieces[:-1])
    assert 1 <= len(pieces[-1].tokens) <= PIECE
    assert [piece.samples for piece in pieces] == [0] * (len(pieces) - 1) + [1]
    seen.run(pieces)
    assert seen.unseen(blocks, length) == length


class Recorder:
    """A drafter that says what it was asked."""

    def __init__(self) -> None:
        self.calls: list = []

    def written(self, blocks, start, stop) -> None:
        self.calls.append((tuple(blocks), start, stop))

    def follow(self, runs) -> None:
        self.calls.append([(run.start, run.tokens) for run in runs])

    def guess(self, asks) -> list[list[int]]:
        self.calls.append(asks)
        return [[90 + ask] * 2 for ask in asks]


def test_which_chunks_it_follows_and_guesses() -> None:
    """Prompts are followed unless they are scored or end in a token that is not known yet."""
    sequences = [SimpleNamespace(tokens=list(range(10 * i, 10 * i + 6)), blocks=[i, 9 - i]) for i in range(5)]
    sequences[2].tokens[5] = None
    chunks = [
        Chunk(0, 2, 4, (), True),
        Chunk(1, 0, 6, (), False, scores=True),
        Chunk(2, 4, 2, (), True),
        Chunk(3, 5, 1, (), True, guesses=2),
        Chunk(4, 5, 1, (), True, drafts=(7, 8)),
    ]
    drafter = Recorder()
    found = with_guesses(chunks, sequences, drafter, lambda chunk: chunk.slot)
    writes = [((0, 9), 2, 6), ((1, 8), 0, 6), ((2, 7), 4, 6), ((3, 6), 5, 8), ((4, 5), 5, 8)]
    assert drafter.calls == [*writes, [(2, [2, 3, 4, 5])], [3]]
    assert found == [*chunks[:3], Chunk(3, 5, 1, (), True, drafts=(93, 93)), chunks[4]]
