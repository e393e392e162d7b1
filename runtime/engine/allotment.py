"""Who guesses in a step, and how many tokens. Rows are cheap, not free; and whoever guesses must know its
last token, so that the step cannot be planned while the one before it runs.

Nothing is timed here: what a step costs is a formula, so that plans follow from tokens alone. Knows how far
sequences are and how likely their guesses are right; nothing of blocks and plans.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.engine.sequence import Sequence

# What a step costs, in steps of nothing: the weights are read once, whatever for. Measured on two cores of
# a Xeon with AMX: SmolLM2-135M-Instruct Q4_1, 1 to 64 rows at positions 100 to 450, where a step of nothing
# takes 12.5 ms.
SEQUENCE_COST = 0.065  # a sequence: its row, and reading its KV; 0.045 at position 100, 0.095 at 450
ROW_COST = 0.03  # a guess: one more row of a sequence
TILE, TILE_COST = 16, 0.3  # rows that products take at once; each time but the first
WAIT_COST = 0.03  # the ranks wait for the plan
# Of tokens for the cost, or there are no guesses. More than for one sequence alone: the more chances are
# compared, the more the best are overrated, and who ends sooner leaves the others' steps nearly as dear.
LEAST_GAIN = 1.1
WAITERS = 10  # where one in so many must wait for the plan in flight, all do


def step_cost(rows: int, guesses: int = 0) -> float:
    """Of a step with a row for each of `rows` sequences, and so many guesses."""
    return 1 + SEQUENCE_COST * rows + ROW_COST * guesses + TILE_COST * ((rows + guesses - 1) // TILE)


def allot(chances: Items[float], most: Items[int], rows: int, spare: int) -> list[int]:
    """How many guesses each candidate gets in a step that has `rows` rows anyway, each for a token, and
    has `spare` more: those that make the most tokens for the cost, or none where that gains too little.

    Candidate i's j-th guess, of at most `most[i]`, is right with a chance of `chances[i] ** j`. So the
    likeliest guesses are the best of any number, and none comes without those before it."""
    guesses = [(-(chance**j), i) for i, chance in enumerate(chances) for j in range(1, most[i] + 1)]
    guesses.sort()
    tokens, taken, rate = float(rows), 0, LEAST_GAIN * rows / step_cost(rows)
    for count, (less, _) in enumerate(guesses[:spare], start=1):
        tokens -= less
        if (found := tokens / (WAIT_COST + step_cost(rows, count))) > rate:
            taken, rate = count, found
    counts = [0] * len(chances)
    for _, i in guesses[:taken]:
        counts[i] += 1
    return counts


def decodes(sequence: Sequence) -> bool:
    """It lacks one token alone, and may have another."""
    return sequence.total - sequence.computed == 1 and sequence.total != sequence.limit


def allotted(sequences: Items[Sequence], spare: int) -> dict[int, int]:
    """By slot, how many guesses those of `sequences` get that guess because it pays, if all of them are in
    the next plan and `spare` more rows are to be had."""
    rows = len(sequences)
    slots, chances, most = [], [], []
    for sequence in sequences:
        if (guesser := sequence.guesser) is None:
            continue
        rows += guesser.steady
        if chance := guesser.chance:
            slots.append(sequence.slot)
            chances.append(chance)
            # The token at `limit - 1` is sampled, never run.
            most.append(min(guesser.most, sequence.limit - sequence.total - 1))
    spare -= rows - len(sequences)
    if not slots or spare <= 0:
        return {}
    counts = allot(chances, most, rows, spare)
    return {slot: count for slot, count in zip(slots, counts, strict=True) if count}


def pays_to_wait(running: Items[Sequence], spare: int) -> bool:
    """Whether the next plan had better wait for those in flight: because guesses would pay in it, or because
    many of these sequences must wait in any case, and all go on together."""
    waiting = 0
    for sequence in running:
        if sequence.known != sequence.total and (guesser := sequence.guesser) is not None:
            waiting += sequence.guessing or guesser.steady > 0
    if waiting and waiting * WAITERS >= len(running):
        return True
    return bool(allotted([s for s in running if decodes(s)], spare))
