"""Opens the draft model that is to guess for another, and says what its guesses cost. Headers only."""

from __future__ import annotations

from runtime.config import ModelConfig, ParallelConfig
from runtime.errors import InvalidArgument
from runtime.model.header import OpenModel, open_model
from runtime.model.stages import model_bytes


def open_draft(config: ModelConfig, opened: OpenModel, parallel: ParallelConfig) -> OpenModel | None:
    """The draft model of `config`, if it names one, for the ranks of `opened`. Raises InvalidArgument if it
    cannot guess for that model there, and as `open_model`."""
    if config.draft is None:
        return None
    if parallel.pp > 1:
        raise InvalidArgument("draft", f"is not possible with --pp {parallel.pp}: give one or the other")
    draft = open_model(ModelConfig(config.draft, kv_dtype=opened.kv_dtype), opened.device)
    if draft.spec.vocab != opened.spec.vocab:
        raise InvalidArgument(
            "draft",
            f"{draft.spec.name} has a vocabulary of {draft.spec.vocab} tokens and {opened.spec.name} one of "
            f"{opened.spec.vocab}: it must be the same",
        )
    if parallel.tp > len(draft.units):
        raise InvalidArgument(
            "draft",
            f"{draft.spec.name} has {len(draft.units)} units, too few for --tp {parallel.tp}",
        )
    return draft


def draft_cost(draft: OpenModel | None, opened: OpenModel) -> float | None:
    """What a guess costs, in steps of the model: both are bound by reading their weights once."""
    if draft is None:
        return None
    return _bytes_a_step(draft) / _bytes_a_step(opened)


def _bytes_a_step(opened: OpenModel) -> int:
    layers, _, head = model_bytes(opened)
    return sum(layers) + head
