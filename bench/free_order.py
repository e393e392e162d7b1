"""The engine without what only the rule wants: a patch of this process, for bench/rule.py alone.

The rule (docs/numerics.md) pads, cuts and orders so that a reply's bits hang on nothing but the request.
Each item here replaces one such thing by what an engine would do that makes no such promise, with the same
operators; `switched_off` does so for a while and puts everything back. What is the same either way is left
alone: products of codes on AMX take any number of rows, sum groups of K in the one order that scales need,
and share columns, not sums, among threads; attention there reads what each row sees, nothing padded;
normalising, rotating and gating handle rows apart.

Some items change how weights are packed, so that an engine has to be built, and run, under the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import kernels.activation
import kernels.head
import kernels.linear
import runtime.model.batch
import runtime.model.forward
import runtime.model.packing
import runtime.model.units
import runtime.sampling.sampler
from bench import free_attention
from kernels.linear import Bf16Weight, Fp32Weight, Weight
from kernels.native import head as native_head
from runtime.sampling.sampler import Choice
from runtime.sampling.state import SamplerState
from runtime.types import SamplingParams

Patch = tuple[Any, str, Any]  # (owner, attribute, what stands there meanwhile)

_ruled_linear = kernels.linear.linear
_ruled_silu_mul = kernels.activation.silu_mul
_ruled_sample = runtime.sampling.sampler.sample


@dataclass(frozen=True, slots=True)
class Item:
    """Something the rule makes the engine do. `kept`: it is not the rule's, and is shown beside it only."""

    about: str
    patches: Callable[[], Sequence[Patch]]
    kept: bool = False


@contextmanager
def switched_off(names: Iterable[str]) -> Iterator[None]:
    """Without the items of these names, as long as it lasts. Raises KeyError for a name that is none, and
    AttributeError where the engine has changed and an item no longer fits."""
    patches = [patch for name in names for patch in ITEMS[name].patches()]
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches]
    try:
        for owner, attribute, value in patches:
            setattr(owner, attribute, value)
        yield
    finally:
        for owner, attribute, value in reversed(before):
            setattr(owner, attribute, value)


# ---- units: one product over all of K ----------------------------------------------------------------


def _units() -> Sequence[Patch]:
    forward = runtime.model.forward

    def linear_parts(x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        (weight,) = weights
        return forward.linear(x, weight)[None]

    return (
        (runtime.model.units, "unit_count", lambda kv_heads: 1),
        (forward, "linear_parts", linear_parts),
    )


# ---- attention ---------------------------------------------------------------------------------------


def _attention() -> Sequence[Patch]:
    forward = runtime.model.forward
    return (
        (forward, "paged_attention", free_attention.paged_attention),
        (forward, "tile_buffers", free_attention.tile_buffers),
    )


def _single_tokens() -> Sequence[Patch]:
    batch = runtime.model.batch
    return (
        *_attention(),
        (batch, "decode_call", free_attention.decode_call),
        (batch, "padded_blocks", free_attention.blocks_of),
    )


def _runs() -> Sequence[Patch]:
    return (*_attention(), (runtime.model.batch, "chunk_calls", free_attention.chunk_calls))


# ---- dense products: any number of rows, all of K ----------------------------------------------------


def _free_linear(x: torch.Tensor, weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(weight, Bf16Weight):
        (chunk,) = weight.chunks
        y = kernels.linear._bf16_product(x.contiguous(), chunk, weight.blocked)
    elif isinstance(weight, Fp32Weight):
        (chunk,) = weight.chunks
        y = torch.nn.functional.linear(x, chunk)
    else:
        return _ruled_linear(x, weight, out)
    return y if out is None else out.copy_(y)


def _dense() -> Sequence[Patch]:
    endless = 1 << 40
    packing = runtime.model.packing

    def fuse(packer: object, pieces: list[torch.Tensor]) -> list[Weight]:
        return [packing.pack_bf16(torch.cat(pieces))] if pieces else []

    return (
        (kernels.linear, "BF16_K_CHUNK", endless),
        (kernels.linear, "K_CHUNK", endless),
        (kernels.linear, "linear", _free_linear),
        (kernels.head, "linear", _free_linear),
        (runtime.model.forward, "linear", _free_linear),
        (runtime.model.forward, "TILE", 1),  # rows of the FFN are padded to it
        (packing.Packer, "_fuse", fuse),
    )


def _activation() -> Sequence[Patch]:
    def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mul(torch.nn.functional.silu(gate), up, out=out)

    return ((kernels.activation, "silu_mul", silu_mul),)


# ---- the sampler -------------------------------------------------------------------------------------


def _plain(params: SamplingParams) -> bool:
    """Whether nothing but a temperature is asked for."""
    bare = SamplingParams(max_tokens=params.max_tokens, temperature=params.temperature, seed=params.seed)
    known = {"stop", "stop_token_ids", "ignore_eos"}  # not the sampler's
    return all(
        getattr(params, name) == getattr(bare, name) for name in SamplingParams.__slots__ if name not in known
    )


def _free_sample(
    logits: torch.Tensor, states: Sequence[SamplerState], positions: Sequence[int]
) -> list[Choice]:
    """As `sampler.sample`, drawing from torch's own generator by the cumulated distribution."""
    if not all(_plain(state.params) for state in states):
        return _ruled_sample(logits, states, positions)
    if all(state.params.temperature == 0 for state in states):
        return [Choice(token) for token in logits.argmax(dim=1).tolist()]
    heat = torch.tensor([[state.params.temperature or 1e-6] for state in states])
    steps = torch.softmax(logits / heat, dim=1).cumsum(dim=1)
    drawn = torch.rand(len(states), 1) * steps[:, -1:]
    tokens = torch.searchsorted(steps, drawn).view(-1).clamp_(max=logits.shape[1] - 1)
    return [Choice(token) for token in tokens.tolist()]


def _noise() -> Sequence[Patch]:
    return ((runtime.sampling.sampler, "sample", _free_sample),)


# ---- beside the rule ---------------------------------------------------------------------------------


@cache
def _coarse_head() -> Sequence[Patch]:
    return (
        (native_head, "_PARTS", 1),
        (native_head, "_code", cache(native_head._code.__wrapped__)),
        (native_head, "_constants", cache(native_head._constants.__wrapped__)),
    )


ITEMS = {
    "units": Item("K of attention output and down is cut by unit, partial sums folded in a tree", _units),
    "single tokens": Item("torch: their KV is padded to 64 (fp32: 512) positions, masked", _single_tokens),
    "runs": Item("torch: a prompt's attention goes in masked tiles of at most 32 rows", _runs),
    "dense": Item("dense products take 16 rows, padded, and K in chunks", _dense),
    "activation": Item("fp32 SiLU in pieces without a tail, on one thread", _activation),
    "noise": Item("noise is keyed by position and token, not drawn in turn", _noise),
    "head": Item("logits are exact to fp32: x goes in as three bf16 numbers", _coarse_head, kept=True),
}
RULE = tuple(name for name, item in ITEMS.items() if not item.kept)
