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
SEQUENCE_COST = 0.07  # a sequence: its row, and reading its KV; 0.06 at position 100, 0.17 at 450
ROW_COST = 0.045  # a guess: one more row of a sequence
GUESSER_COST = 0.12  # a sequence that guesses: its attention has calls of its own
TILE, TILE_COST = 16, 0.28  # rows that products take at once; each time but the first
WAIT_COST = 0.03  # the ranks wait for the plan
# Of tokens for the cost, or there are no guesses. More than for one sequence alone: the more chances are
# compared, the more the best are overrated, and who ends sooner leaves the others' steps nearly as dear.
LEAST_GAIN = 1.1
WAITERS = 10  # where one in so many must wait for the plan in flight, all do


def step_cost(rows: int, guesses: int = 0, guessers: int = 0) -> float:
    """Of a step with a row for each of `rows` sequences, and `guesses` for `guessers` of them."""
    tiles = (rows + guesses - 1) // TILE
    return 1 + SEQUENCE_COST * rows + ROW_COST * guesses + GUESSER_COST * guessers + TILE_COST * tiles


def allot(chances: Items[float], most: Items[int], rows: int, spare: int) -> list[int]:
    """How many guesses each candidate gets in a step that has `rows` rows anyway, each for a token, and
    has `spare` more: those that make the most tokens for the cost, or none where that gains too little.

    Candidate i's j-th guess, of at most `most[i]`, is right with a chance of `chances[i] ** j`. The ratio is
    raised as in Dinkelbach (1967): what brings more than its cost does at one rate has a better rate, and
    so on until nothing has."""
    best = [0] * len(chances)
    rate = LEAST_GAIN * rows / step_cost(rows)
    rooms = [*range(-rows % TILE or TILE, spare, TILE), spare]  # full tiles, or whatever there is
    while True:
        found = max((_fill(chances, most, rows, room, rate) for room in rooms), key=lambda f: f[0])
        if found[0] <= rate:
            return best
        rate, best = found


def _fill(
    chances: Items[float], most: Items[int], rows: int, room: int, rate: float
) -> tuple[float, list[int]]:
    """Tokens for the cost, and guesses a candidate, if up to `room` guesses are tried that are worth more
    than they cost at `rate`, from the best on."""
    wanted = []
    for i, chance in enumerate(chances):
        count, worth, right = 0, -rate * GUESSER_COST, chance
        while count < most[i] and right > rate * ROW_COST:
            count += 1
            worth += right - rate * ROW_COST
            right *= chance
        if worth > 0:
            wanted.append((worth / count, i, count))
    wanted.sort(reverse=True)
    counts = [0] * len(chances)
    tokens, left, guessers = float(rows), room, 0
    for _, i, count in wanted:
        if not left:
            break
        counts[i] = count = min(count, left)
        tokens += sum(chances[i] ** j for j in range(1, count + 1))
        left -= count
        guessers += 1
    return tokens / (WAIT_COST + step_cost(rows, room - left, guessers)), counts


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
