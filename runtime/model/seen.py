"""What a draft model has seen of the sequences in the blocks of a KV cache, and what it would have to run.

The model that it guesses for writes the blocks; the draft model keeps its own keys and values by the same
ones, and may lag behind. Knows positions and block tables; nothing of models, devices or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.model.batch import Run

PIECE = 512  # most rows of one forward pass when it catches up


class Seen:
    """Of each block, how many positions from its first were seen with the contents that they have now."""

    def __init__(self, blocks: int, block_size: int):
        self._size = block_size
        self._seen = [0] * blocks

    def written(self, blocks: Sequence[int], start: int, stop: int) -> None:
        """The positions start .. stop - 1 of a sequence get other contents."""
        for index in range(start // self._size, -(-stop // self._size)):
            offset = max(0, start - index * self._size)
            self._seen[blocks[index]] = min(self._seen[blocks[index]], offset)

    def run(self, runs: Sequence[Run]) -> None:
        """These tokens are seen now. Each run begins where what was seen ends, or before."""
        for run in runs:
            stop = run.start + len(run.tokens)
            for index in range(run.start // self._size, -(-stop // self._size)):
                block, end = run.blocks[index], min(self._size, stop - index * self._size)
                self._seen[block] = max(self._seen[block], end)

    def unseen(self, blocks: Sequence[int], stop: int) -> int:
        """The first position of a sequence that was not seen, `stop` if all before it were."""
        for index in range(-(-stop // self._size)):
            if self._seen[blocks[index]] < self._size:
                return min(stop, index * self._size + self._seen[blocks[index]])
        return stop

    def next_to(self, runs: Sequence[Run]) -> list[Run]:
        """Those of `runs` that begin just where what was seen of their sequence ends."""
        return [run for run in runs if self.unseen(run.blocks, run.start + 1) == run.start]

    def missing(self, tokens: list[int], blocks: list[int]) -> list[Run]:
        """What is to run, in order, until all of a sequence is seen. The last run ends with the last token,
        which is run even where it was seen, for its logits."""
        start = min(self.unseen(blocks, len(tokens)), len(tokens) - 1)
        cuts = [*range(start, len(tokens) - PIECE, PIECE)]
        pieces = [Run(tokens[at : at + PIECE], at, blocks, 0) for at in cuts]
        start += PIECE * len(cuts)
        return [*pieces, Run(tokens[start:], start, blocks, 1)]
