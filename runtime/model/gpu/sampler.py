"""Chooses the next tokens on the device, so that a step can start before the host has seen the last one's.

Computes what `runtime.sampling` defines: bias and penalties from a table with a row a slot, filters, and
Gumbel-max with the same noise. What differs is one sum, top-p's mass, which is fp32 here. Logprobs are read
off the logits by the host, where a request asks, as those of given tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate

import torch

from kernels.gpu.penalties import Penalties, adjust, remember
from kernels.gpu.sampling import Settings, Workspace, sample
from runtime.types import SamplingParams, SequenceStart

CLOSED = -2  # in place of a token: a guess before it was wrong
_ROWS, _ENTRIES, _STOPS = 64, 64, 8  # of the table to begin with; each doubles as needed


class DeviceSampler:
    """State of the running sequences' samplers, by slot."""

    def __init__(self, vocab: int, device: torch.device):
        self._vocab = vocab
        self._device = device
        self._table = Penalties.empty(_ROWS, _ENTRIES, _STOPS, device)
        self._workspace = Workspace.make(_ROWS, vocab, device)
        self._params: dict[int, tuple[SamplingParams, int, bool]] = {}  # with the choice; whether touched
        self.last = torch.zeros(_ROWS, dtype=torch.int32, device=device)  # each slot's newest token

    def start(self, start: SequenceStart) -> None:
        """Give a slot its sequence. Checked already: tokens lie inside the vocabulary."""
        params = start.params
        prompt, reply = start.tokens[: start.prompt_length], start.tokens[start.prompt_length :]
        penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        bias: dict[int, float] = {}
        for token, value in params.logit_bias:
            bias[token] = bias.get(token, 0.0) + value
        in_text = set(prompt) if params.repetition_penalty != 1.0 else set()
        counts: dict[int, int] = {}
        for token in reply if penalised else ():
            counts[token] = counts.get(token, 0) + 1
        ids = sorted(bias.keys() | in_text | counts.keys())
        missing = max(0, params.min_tokens - len(reply)) if start.stop_ids else 0
        left = min(self._vocab, (params.max_tokens or 0) - len(reply)) if penalised else 0
        self._grow(start.slot + 1, len(ids) + max(0, left), len(start.stop_ids))
        self._params[start.slot] = params, start.choice, bool(ids or penalised or missing)
        row: dict[str, list] = {
            "ids": ids,
            "bias": [bias.get(token, 0.0) for token in ids],
            "in_text": [token in in_text or token in counts for token in ids],
            "counts": [counts.get(token, 0) for token in ids],
            "stop_ids": list(start.stop_ids),
        }
        for name, values in row.items():
            whole = getattr(self._table, name)[start.slot]
            whole.fill_(-1 if name in ("ids", "stop_ids") else 0)
            whole[: len(values)] = torch.tensor(values, dtype=whole.dtype).to(self._device)
        self._table.repetition[start.slot] = params.repetition_penalty
        self._table.presence[start.slot] = params.presence_penalty
        self._table.frequency[start.slot] = params.frequency_penalty
        self._table.missing[start.slot] = missing

    def sample_ahead(
        self,
        logits: torch.Tensor,
        slots: list[int],
        positions: list[int],
        drafts: Sequence[tuple[int, ...]],
    ) -> torch.Tensor:
        """Tokens int32 [M, 1 + longest of drafts] for M sequences, whose 1 + len(drafts[i]) rows of logits
        fp32 saw so many more of the guesses: the one at positions[i], and one more for each guess that was
        right before the first wrong one. CLOSED where there is none; -1 as for `sample`."""
        most = max(map(len, drafts), default=0)
        if most == 0:
            return self.sample(logits, slots, positions)[:, None]
        first = list(accumulate((1 + len(guesses) for guesses in drafts), initial=0))
        found = torch.full((len(slots), 1 + most), CLOSED, dtype=torch.int32, device=self._device)
        guessed = torch.tensor(
            [[*guesses, *([CLOSED] * (most - len(guesses)))] for guesses in drafts], dtype=torch.int32
        ).to(self._device, non_blocking=True)
        open_ = None  # which of the sequences still to go have had their guesses right
        going = list(range(len(slots)))
        for ahead in range(1 + most):
            at = torch.tensor(going).to(self._device, non_blocking=True)
            if ahead:
                before = found.index_select(0, at)[:, ahead - 1]
                open_ = before == guessed.index_select(0, at)[:, ahead - 1]
            rows = torch.tensor([first[i] + ahead for i in going]).to(self._device, non_blocking=True)
            places = [positions[i] + ahead for i in going]
            tokens = self.sample(logits.index_select(0, rows), [slots[i] for i in going], places, open_)
            found[:, ahead].index_copy_(0, at, tokens)
            going = [i for i in going if len(drafts[i]) > ahead]
        return found

    def sample(
        self,
        logits: torch.Tensor,
        slots: list[int],
        positions: list[int],
        open_: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens int32 [M] for rows of logits fp32 [M, V] of `slots`, to stand at `positions`; each becomes
        its slot's newest. A token of -1: the row held no number to choose by. Rows outside `open_` (bool [M],
        None for all) choose nothing: CLOSED."""
        states = self._states(slots)
        if states is not None and open_ is not None:
            states = torch.where(open_, states, -1)
        tokens = self._chosen(logits, slots, positions, states)
        if states is not None:
            remember(tokens, self._table, states)
        at = self._column(slots, torch.int64)
        if open_ is None:
            self.last.index_copy_(0, at, tokens)
            return tokens
        self.last.index_copy_(0, at, torch.where(open_, tokens, self.last.index_select(0, at)))
        return torch.where(open_, tokens, CLOSED)

    def choose(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> torch.Tensor:
        """As `sample`, and nothing is remembered: for guesses. Penalties count what was sampled alone, not
        the guesses before; with penalties a guess may be wrong for that, which costs a row."""
        return self._chosen(logits, slots, positions, self._states(slots))

    def _states(self, slots: list[int]) -> torch.Tensor | None:
        """int64 [M]: the rows of the table, -1 where it touches nothing; None if that is so of all."""
        touched = [self._params[slot][2] for slot in slots]
        if not any(touched):
            return None
        return self._column([s if t else -1 for s, t in zip(slots, touched, strict=True)], torch.int64)

    def _chosen(
        self, logits: torch.Tensor, slots: list[int], positions: list[int], states: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens int32 [M] after adjusting a copy of the logits by `states`."""
        chosen = [self._params[slot] for slot in slots]
        if len(slots) > len(self._workspace.peaks):
            self._workspace = Workspace.make(1 << len(slots).bit_length(), self._vocab, self._device)
        settings = Settings(
            self._column([p.temperature for p, _, _ in chosen], torch.float64),
            self._column([p.top_k for p, _, _ in chosen], torch.int32),
            self._column([p.top_p for p, _, _ in chosen], torch.float64),
            self._column([p.min_p for p, _, _ in chosen], torch.float64),
            self._column([_signed(p.seed or 0) for p, _, _ in chosen], torch.int64),
            self._column(positions, torch.int64),
            self._column([choice for _, choice, _ in chosen], torch.int32),
        )
        if states is not None:
            logits = logits.clone()
            adjust(logits, self._table, states)
        tokens = torch.empty(len(slots), dtype=torch.int32, device=self._device)
        sample(logits, settings, self._workspace, tokens)
        return tokens

    def _column(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)

    def _grow(self, rows: int, entries: int, stops: int) -> None:
        """Make the table hold as much, keeping what it holds."""
        have = (len(self._table.ids), self._table.ids.shape[1], self._table.stop_ids.shape[1])
        need = tuple(_doubled(h, n) for h, n in zip(have, (rows, entries, stops), strict=True))
        if need == have:
            return
        wider = Penalties.empty(*need, self._device)
        for field in fields(Penalties):
            old = getattr(self._table, field.name)
            getattr(wider, field.name)[tuple(slice(n) for n in old.shape)] = old
        self._table = wider
        last = torch.zeros(need[0], dtype=torch.int32, device=self._device)
        last[: len(self.last)] = self.last
        self.last = last


def _doubled(have: int, need: int) -> int:
    while have < need:
        have *= 2
    return have


def _signed(seed: int) -> int:
    """The same 64 bits as torch's int64."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
