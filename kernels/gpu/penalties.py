"""Bias, penalties and the ban of early stops, on the device: the next step need not wait for the host.

What sampling remembers of sequences is a table with a row each: the tokens that bias or penalties touch, and
how often the reply holds them. `adjust` applies it to logits, `remember` takes in the tokens just sampled.
Adjusted logit, in float64 from the fp32 logit, rounded once to fp32, as on the host (bit for bit):

    l + bias, then l / repetition if l > 0 else l * repetition (tokens of prompt or reply), then
    l - presence (tokens of the reply) - frequency * occurrences in the reply

While a reply is shorter than its least length its stop tokens are -inf. Knows no temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import check, launch, same_device

_BLOCK = 1024  # entries of one turn
_WARPS = 4
_FP32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """The table, n rows of E entries. An entry whose id is -1 is free; no id stands twice in a row. A row
    with a penalty needs a free entry for every token that its reply may still bring.

    ids, counts (occurrences in the reply): int32 [n, E]. bias: float64 [n, E]. in_text (in prompt or reply,
    for repetition): int8 [n, E]. repetition, presence, frequency: float64 [n]; 1, 0, 0 mean none. stop_ids:
    int32 [n, s], -1 where there are fewer. missing: int32 [n], tokens still short of the least length."""

    ids: torch.Tensor
    bias: torch.Tensor
    in_text: torch.Tensor
    counts: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    stop_ids: torch.Tensor
    missing: torch.Tensor

    @staticmethod
    def empty(rows: int, entries: int, stops: int, device: torch.device | str) -> Penalties:
        """A table of rows that touch nothing."""
        return Penalties(
            ids=torch.full((rows, entries), -1, dtype=torch.int32, device=device),
            bias=torch.zeros((rows, entries), dtype=torch.float64, device=device),
            in_text=torch.zeros((rows, entries), dtype=torch.int8, device=device),
            counts=torch.zeros((rows, entries), dtype=torch.int32, device=device),
            repetition=torch.ones(rows, dtype=torch.float64, device=device),
            presence=torch.zeros(rows, dtype=torch.float64, device=device),
            frequency=torch.zeros(rows, dtype=torch.float64, device=device),
            stop_ids=torch.full((rows, stops), -1, dtype=torch.int32, device=device),
            missing=torch.zeros(rows, dtype=torch.int32, device=device),
        )


@triton.jit
def adjust_kernel(
    logits_ptr,
    states_ptr,
    ids_ptr,
    bias_ptr,
    in_text_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    stop_ids_ptr,
    missing_ptr,
    states,
    V: tl.constexpr,
    ENTRIES: tl.constexpr,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = logits_ptr + tl.program_id(0).to(tl.int64) * V
    state = tl.load(states_ptr + tl.program_id(0)).to(tl.int64)
    if (state >= 0) & (state < states):
        repetition = tl.load(repetition_ptr + state)
        presence = tl.load(presence_ptr + state)
        frequency = tl.load(frequency_ptr + state)
        most = tl.full((), _FP32_MAX, tl.float64)
        for start in range(0, ENTRIES, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            at = state * ENTRIES + entry
            token = tl.load(ids_ptr + at, mask=entry < ENTRIES, other=-1)
            mask = (token >= 0) & (token < V)
            x = tl.load(row + token, mask=mask, other=0.0).to(tl.float64)
            x += tl.load(bias_ptr + at, mask=mask, other=0.0)
            in_text = tl.load(in_text_ptr + at, mask=mask, other=0)
            count = tl.load(counts_ptr + at, mask=mask, other=0)
            x = tl.where(in_text != 0, tl.where(x > 0.0, x / repetition, x * repetition), x)
            x -= tl.where(count > 0, presence, 0.0)
            x -= frequency * count.to(tl.float64)
            # -inf stays what it is: a token that the model excludes.
            x = tl.where(x == float("-inf"), x, tl.minimum(tl.maximum(x, -most), most))
            tl.store(row + token, x.to(tl.float32), mask=mask)
        if (STOPS > 0) & (tl.load(missing_ptr + state) > 0):
            tl.debug_barrier()  # the ban comes after what other threads wrote
            for start in range(0, STOPS, BLOCK):
                entry = start + tl.arange(0, BLOCK)
                token = tl.load(stop_ids_ptr + state * STOPS + entry, mask=entry < STOPS, other=-1)
                tl.store(row + token, float("-inf"), mask=(token >= 0) & (token < V))


@triton.jit
def remember_kernel(
    tokens_ptr,
    states_ptr,
    ids_ptr,
    in_text_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    missing_ptr,
    states,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    state = tl.load(states_ptr + tl.program_id(0)).to(tl.int64)
    token = tl.load(tokens_ptr + tl.program_id(0)).to(tl.int32)
    if (state >= 0) & (state < states) & (token >= 0):
        missing = tl.load(missing_ptr + state)
        tl.store(missing_ptr + state, tl.maximum(missing - 1, 0))
        neutral = tl.load(repetition_ptr + state) == 1.0
        neutral &= tl.load(presence_ptr + state) == 0.0
        neutral &= tl.load(frequency_ptr + state) == 0.0
        if neutral == 0:
            own = tl.full((), ENTRIES, tl.int32)
            free = tl.full((), ENTRIES, tl.int32)
            for start in range(0, ENTRIES, BLOCK):
                entry = start + tl.arange(0, BLOCK)
                found = tl.load(ids_ptr + state * ENTRIES + entry, mask=entry < ENTRIES, other=-2)
                own = tl.minimum(own, tl.min(tl.where(found == token, entry, ENTRIES), axis=0))
                free = tl.minimum(free, tl.min(tl.where(found == -1, entry, ENTRIES), axis=0))
            entry = tl.where(own < ENTRIES, own, free)
            if entry < ENTRIES:
                at = state * ENTRIES + entry
                tl.store(counts_ptr + at, tl.load(counts_ptr + at) + 1)
                tl.store(ids_ptr + at, token)
                tl.store(in_text_ptr + at, tl.full((), 1, tl.int8))


def adjust(logits: torch.Tensor, penalties: Penalties, states: torch.Tensor) -> None:
    """Adjust rows of logits in place. logits: fp32 [M, V]. states: int32 or int64 [M], the table's row of
    each row of logits; a row whose state is not in the table (-1, say) stays as it is. Raises ValueError
    naming what does not fit; ids outside the vocabulary are passed over."""
    check("adjust", "logits", logits, torch.float32, -1, -1)
    rows, vocabulary = logits.shape
    p = penalties
    _check("adjust", p, states, rows)
    same_device("adjust", logits=logits, states=states, ids=p.ids)
    launch(
        adjust_kernel,
        (rows,),
        logits,
        states,
        p.ids,
        p.bias,
        p.in_text,
        p.counts,
        p.repetition,
        p.presence,
        p.frequency,
        p.stop_ids,
        p.missing,
        len(p.ids),
        warps=_WARPS,
        V=vocabulary,
        ENTRIES=p.ids.shape[1],
        STOPS=p.stop_ids.shape[1],
        BLOCK=_BLOCK,
    )


def remember(tokens: torch.Tensor, penalties: Penalties, states: torch.Tensor) -> None:
    """Take each row's sampled token into its reply. tokens, states: int32 or int64 [M]; no state stands
    twice. A token of -1 (none was chosen) changes nothing. Raises ValueError naming what does not fit."""
    check("remember", "tokens", tokens, _INTEGERS, -1)
    p = penalties
    _check("remember", p, states, len(tokens))
    same_device("remember", tokens=tokens, states=states, ids=p.ids)
    launch(
        remember_kernel,
        (len(tokens),),
        tokens,
        states,
        p.ids,
        p.in_text,
        p.counts,
        p.repetition,
        p.presence,
        p.frequency,
        p.missing,
        len(p.ids),
        warps=_WARPS,
        ENTRIES=p.ids.shape[1],
        BLOCK=_BLOCK,
    )


def _check(operation: str, p: Penalties, states: torch.Tensor, rows: int) -> None:
    check(operation, "states", states, _INTEGERS, rows)
    check(operation, "ids", p.ids, torch.int32, -1, -1)
    n, entries = p.ids.shape
    check(operation, "bias", p.bias, torch.float64, n, entries)
    check(operation, "in_text", p.in_text, torch.int8, n, entries)
    check(operation, "counts", p.counts, torch.int32, n, entries)
    for name in ("repetition", "presence", "frequency"):
        check(operation, name, getattr(p, name), torch.float64, n)
    check(operation, "stop_ids", p.stop_ids, torch.int32, n, -1)
    check(operation, "missing", p.missing, torch.int32, n)
    tensors = {name: getattr(p, name) for name in Penalties.__slots__}
    same_device(operation, **tensors)
