"""What the engine keeps of one reply: its tokens, how far it is planned, and where its KV lives.

Positions are counted by plans issued, not by results received: `computed` and `total` run ahead of
`known` by the tokens that are still in flight: one for each plan, though more come of it where guesses are
right.
"""

from __future__ import annotations

from runtime.engine.prefix import next_key, root_key
from runtime.engine.speculation import Guesser
from runtime.types import Branch, Request


class Sequence:
    """One live reply. Held back while it has a `leader`, else running if it has a slot, else waiting."""

    __slots__ = (
        "arrived",
        "block_keys",
        "cached_tokens",
        "capacity",
        "choice",
        "computed",
        "finished",
        "followers",
        "fresh",
        "guesser",
        "guessing",
        "known",
        "last_step",
        "leader",
        "limit",
        "min_tokens",
        "next_named",
        "order",
        "prompt",
        "reply",
        "request",
        "root",
        "scored",
        "scores",
        "shared",
        "slot",
        "stop_ids",
        "table",
        "total",
    )

    def __init__(self, request: Request, branch: Branch, arrival: int, arrived: float, limit: int):
        self.request = request
        self.choice = branch.choice
        self.scores = request.scores
        self.scored = 0  # scores sent: those of the tokens at positions 1 .. scored
        # What is run through the model: nothing follows the last token that is scored.
        self.prompt = request.prompt[:-1] if request.scores else request.prompt
        self.reply = list(branch.reply)  # what came with the request, then what was sampled and came back
        self.stop_ids = frozenset(request.stop_ids)
        self.min_tokens = request.params.min_tokens
        self.order = (-request.priority, arrival)  # smaller runs first
        self.arrived = arrived  # seconds
        self.limit = limit  # most tokens of prompt and reply together
        self.known = len(self.prompt) + len(self.reply)  # tokens the engine knows
        self.total = self.known  # known, and those that plans in flight will sample
        self.computed = 0  # positions whose KV was computed, found cached, or is planned
        self.slot: int | None = None
        self.table: list[int] = []  # block ids, in position order
        self.capacity = 0  # positions the table has room for
        self.shared = 0  # blocks that were found cached at its last start
        self.fresh = False  # computes all by itself, guesses nothing, and lets nobody find it
        self.last_step = 0  # the last plan that names this sequence's blocks
        self.root = b""  # made when first needed
        self.block_keys: list[bytes] = []  # of full blocks of known tokens, as far as they were needed
        self.next_named = 0  # when so many positions are known and computed, one more block has a key
        # Of the prompt; set at first admission. Whoever is scored needs every row, and looks nothing up.
        self.cached_tokens: int | None = 0 if request.scores else None
        self.leader: Sequence | None = None  # whose prefill this one waits for, to share its blocks
        self.followers: list[Sequence] = []
        self.guesser: Guesser | None = None  # made with the first token, where guessing is on
        self.guessing = False  # its plan in flight has guesses
        self.finished = False

    def tokens(self) -> tuple[int, ...]:
        """Prompt and reply, as far as known."""
        return (*self.request.prompt, *self.reply)

    def key_of_block(self, index: int, block_size: int) -> bytes:
        """The key of the full, known block `index`; keys up to it are made on the way and kept."""
        keys = self.block_keys
        prompt_length = len(self.prompt)
        if not keys and not self.root:
            self.root = root_key(self.request.cache_salt)
        while len(keys) <= index:
            start = len(keys) * block_size
            end = start + block_size
            tokens = (
                *self.prompt[start:end],
                *self.reply[max(0, start - prompt_length) : max(0, end - prompt_length)],
            )
            keys.append(next_key(keys[-1] if keys else self.root, tokens))
        return keys[index]
