"""Finds stop strings in text that arrives piece by piece.

Text only: knows nothing of tokens. Where a text is cut into pieces does not change what is found.
"""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on as soon as it cannot be part of a stop string any more.

    The match is the one that ends first; of several that end together, the longest. Each stop string is
    followed by the Knuth-Morris-Pratt automaton, so the work is linear in the text whatever it holds.
    """

    def __init__(self, stops: Sequence[str]):
        """`stops`: strings of at least one character each."""
        # Longest first, so that the first automaton found complete is the longest match.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that end the text so far
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Take more text; return the text that is now certain, and the stop string if one was found.

        With `armed` false, stop strings that end within `text` are ignored. Once a match was returned
        the matcher is spent: the text before the match is out, and what follows it is dropped.
        """
        if not self._stops:
            return text, None
        text_before = len(self._held)
        self._held += text
        for offset, character in enumerate(text, start=text_before + 1):
            found = self._advance(character)
            if found is not None and armed:
                certain = self._held[: offset - len(found)]
                self._held = ""
                return certain, found
        certain = len(self._held) - max(self._matched)
        text, self._held = self._held[:certain], self._held[certain:]
        return text, None

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        text, self._held = self._held, ""
        return text

    def _advance(self, character: str) -> str | None:
        """Feed every automaton; the longest stop string that ends at this character, or None."""
        found = None
        for number, stop in enumerate(self._stops):
            fallbacks, matched = self._fallbacks[number], self._matched[number]
            while matched and stop[matched] != character:
                matched = fallbacks[matched]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                found = found or stop
                matched = fallbacks[matched]
            self._matched[number] = matched
        return found


def _fallbacks(stop: str) -> list[int]:
    """fallbacks[n]: length of the longest proper prefix of stop[:n] that is also its suffix."""
    fallbacks = [0, 0]
    length = 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = fallbacks[length]
        if stop[length] == character:
            length += 1
        fallbacks.append(length)
    return fallbacks
