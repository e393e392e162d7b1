"""Guesses at what a reply goes on with, and how likely they are right. Guesses never change a reply: the
ranks keep those that are what they would have sampled.

Two sources. `Lookup` finds the last tokens earlier in the text and guesses that what followed then follows
again: it costs nothing, and is watched on every token whether or not a guess is tried, so that how often it
is right is known before anything is. `Pace` says how many guesses to ask of a draft model, from how many were
right lately and what they cost. Functions of the tokens and counts they are given; whose guesses are worth
their rows is settled among all sequences of a step (allotment.py).
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3  # tokens that must agree for the text after them to be a guess
AT_ONCE = 512  # tokens of a prompt that are indexed with each token of the reply
FEWEST_RIGHT = 2  # tokens in a row that must have been foreseen before guesses are tried
TOKEN_DECAY = 0.95  # weight of what was foreseen, or not, one token ago

TRY_DECAY = 0.8  # weight of what a draft model's guesses were one try ago
ROW_COST = 0.05  # what one more row of one sequence alone costs a step, in steps
LEAST_GAIN = 1.05  # tokens for the cost of one, below which the draft model is left alone
FIRST_REST, LONGEST_REST = 16, 512  # tokens until it is tried again

FIRST_RIGHT, FIRST_WRONG = 2.0, 1.0  # what is taken to have been seen before anything was


class Lookup:
    """A text that grows, and where in it the last few tokens stood before. O(1) a token."""

    __slots__ = ("_at", "_gram", "_index", "_indexed", "_right", "_text", "_wrong", "foreseen")

    def __init__(self, text: Sequence[int]):
        self._text = list(text)
        self._gram: tuple[int, ...] = tuple(text[-GRAM:])  # that ends the text
        self._index: dict[tuple[int, ...], int] = {}  # GRAM tokens -> the position after their last place
        self._indexed = GRAM  # grams that end before this position are in the index
        self._at: int | None = None  # where the next token is guessed to stand already
        self._right, self._wrong = FIRST_RIGHT, FIRST_WRONG
        self.foreseen = 0  # how many tokens in a row stood where they were guessed to

    def push(self, token: int) -> None:
        """The text goes on with `token`."""
        text, at, gram = self._text, self._at, self._gram
        right = at is not None and text[at] == token
        if self.foreseen >= FEWEST_RIGHT:
            self._right = TOKEN_DECAY * self._right + right
            self._wrong = TOKEN_DECAY * self._wrong + (not right)
        if right:
            self.foreseen += 1
            self._at = at + 1
        else:
            self.foreseen = 0
            self._at = None
        # A gram is indexed once it does not end the text any more, else it would be found where it stands.
        end = len(text)
        if self._indexed == end:
            self._index[gram] = end
            self._indexed = end + 1
        elif self._indexed < end:
            stops = range(self._indexed, min(end, self._indexed + AT_ONCE) + 1)
            for stop in stops:
                self._index[tuple(text[stop - GRAM : stop])] = stop
            self._indexed = stops[-1] + 1
        text.append(token)
        self._gram = gram = (*gram[-2:], token)
        if self._at is None and self._indexed > end:
            self._at = self._index.get(gram)

    @property
    def chance(self) -> float:
        """That the next token is foreseen, from how often it was lately where so many before it were; 0 where
        too few were."""
        return self._right / (self._right + self._wrong) if self.foreseen >= FEWEST_RIGHT else 0.0

    def guess(self, most: int) -> tuple[int, ...]:
        """`most` tokens, or none where nothing is foreseen. A text that repeats itself is guessed to do so
        for ever."""
        if self._at is None:
            return ()
        found = self._text[self._at : self._at + most]
        period = len(self._text) - self._at
        while len(found) < most:
            found.append(found[-period])
        return tuple(found)


class Pace:
    """How many guesses to ask of a draft model for one sequence.

    With a chance `a` that a guess is right where those before it were, k guesses yield
    (1 - a**(k + 1)) / (1 - a) tokens on average (Leviathan et al. 2023, equation 1) for the cost of
    1 + k * (cost + ROW_COST) steps; the best k up to `most` is asked for, or none if it gains nothing.
    """

    __slots__ = ("_best", "_rest", "_resting", "_right", "_wrong", "cost", "most")

    def __init__(self, most: int, cost: float):
        """cost: of one guess, in steps of the model itself."""
        self.most = most
        self.cost = cost
        self._right, self._wrong = FIRST_RIGHT, FIRST_WRONG
        self._rest = FIRST_REST
        self._resting = 0  # tokens until the next try, where it did not pay
        self._best = self._find()

    def push(self) -> None:
        """One more token was sampled."""
        if self._resting:
            self._resting -= 1

    @property
    def chance(self) -> float:
        """That a guess is right where those before it were."""
        return self._right / (self._right + self._wrong)

    @property
    def length(self) -> int:
        return 0 if self._resting else self._best

    def settle(self, tried: int, right: int) -> None:
        """Of `tried` guesses `right` were, from the first on."""
        self._right = TRY_DECAY * self._right + right
        self._wrong = TRY_DECAY * self._wrong + (right < tried)
        self._best = self._find()
        if self._best:
            self._rest = FIRST_REST
        else:  # off; a single guess now and then finds out whether the text has changed
            self._resting, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)
            self._best = 1

    def _find(self) -> int:
        chance = self.chance
        best, gain, tokens = 0, LEAST_GAIN, 1.0
        for count in range(1, self.most + 1):
            tokens += chance**count
            if tokens / (1 + count * (self.cost + ROW_COST)) > gain:
                best, gain = count, tokens / (1 + count * (self.cost + ROW_COST))
        return best


class Guesser:
    """The guesses of one sequence, whatever they come from.

    `steady`: how many guesses of the draft model it tries in its next step, whatever the other sequences
    do; 0 where they do not pay, or where the text foresees the next token more likely than the model does."""

    __slots__ = ("_lookup", "_pace", "accepted", "drafted", "most", "steady")

    def __init__(self, text: Sequence[int], most: int, draft_cost: float | None):
        """text: prompt and reply so far; most: guesses a step. draft_cost: None without a draft model."""
        self.most = most
        self._lookup = Lookup(text)
        self._pace = Pace(most, draft_cost) if draft_cost is not None else None
        self.drafted = 0
        self.accepted = 0
        self.steady = self._pace.length if self._pace is not None else 0

    def push(self, token: int) -> None:
        """A token of the reply has become known."""
        self._lookup.push(token)
        if (pace := self._pace) is not None:
            pace.push()
            self.steady = pace.length if pace.chance >= self._lookup.chance else 0

    @property
    def chance(self) -> float:
        """That a guess at the next token is right, and one at each token after it if those before were; 0
        where there is none whose rows are to be weighed."""
        return 0.0 if self.steady else self._lookup.chance

    def propose(self, most: int) -> tuple[tuple[int, ...], int]:
        """Tokens to try next, or how many to ask of the draft model: up to `most`."""
        most = min(most, self.most)
        if most < 1:
            return (), 0
        if self.steady:
            return (), min(most, self.steady)
        return self._lookup.guess(most), 0

    def settle(self, drafts: int, guesses: int, right: int) -> None:
        """A step with these guesses came back, the first `right` of them being so. Called before the tokens
        are pushed."""
        self.drafted += drafts + guesses
        if guesses:
            self._pace.settle(guesses, right)
