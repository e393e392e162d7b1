"""What a gateway is told of the model behind an engine."""

from __future__ import annotations

from runtime.config import EngineConfig, ModelConfig
from runtime.model.load import OpenModel
from runtime.types import EngineInfo


def engine_info(
    opened: OpenModel,
    model: ModelConfig,
    config: EngineConfig,
    tp: int,
    nodes: tuple[str, ...] = (),
) -> EngineInfo:
    return EngineInfo(
        model=model.name or opened.spec.name,
        numerics=opened.numerics,
        context_length=config.max_model_len,
        vocab_size=opened.spec.vocab,
        tp=tp,
        units=len(opened.units),
        block_size=config.block_size,
        total_blocks=config.total_blocks,
        max_num_seqs=config.max_num_seqs,
        rank_nodes=nodes,
    )
