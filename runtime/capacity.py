"""How much KV fits: from memory and settings to a number of blocks, or one line that says what to do."""

from __future__ import annotations

from dataclasses import replace

from runtime.config import EngineConfig, ParallelConfig
from runtime.errors import InvalidArgument, NotEnough
from runtime.memory import available
from runtime.model.draft import draft_cost
from runtime.model.gpu.limits import check_block_size
from runtime.model.header import OpenModel
from runtime.model.stages import stage_layers
from runtime.weights.formats import TensorType

DEFAULT_SHARE = 0.25  # of the memory that is free, for all ranks of a host together
GPU_SPARE = 2 << 30  # bytes of a GPU left to activations, graphs and the libraries
DEFAULT_CAP = 512 << 20  # bytes a rank that a CPU server takes unasked


def kv_blocks(
    opened: OpenModel,
    engine: EngineConfig,
    parallel: ParallelConfig,
    max_model_len: int | None,
    *,
    sharers: int | None = None,
    draft: OpenModel | None = None,
    unloaded: bool = False,
) -> EngineConfig:
    """Fill in `max_model_len`, `total_blocks`, `draft_cost` with a draft model, and `microbatches`, of which
    there are as many as stages.

    The whole of a position's KV is spread over the ranks, by units and by layers; the largest share decides.
    A draft model keeps its KV by the same blocks. Without --kv-memory a rank takes a quarter of what is free,
    shared by the ranks of the host, 512 MiB at most, yet room for one full context. A rank on a GPU, which
    has loaded its weights by then, takes what is left but for GPU_SPARE and `step_room`. `sharers`: ranks
    that live off one memory; None: all on a host, one on a GPU. `unloaded`: this host's memory is still to
    take the weights of all ranks.
    """
    context = opened.spec.context_length
    if max_model_len is not None:
        if not 1 <= max_model_len <= context:
            raise InvalidArgument(
                "max-model-len", f"{max_model_len} is not within 1 to {context}, the model's"
            )
        context = max_model_len
    block = engine.block_size
    if block < 1 or (512 % block and block % 512):  # attention pads KV to 64 or 512 positions
        raise InvalidArgument("block-size", f"{block} neither divides 512 nor is a multiple of it")
    if opened.device == "cuda":
        check_block_size(block)
    units, layers = len(opened.units), opened.spec.layers
    largest_run = -(-units // parallel.tp)
    most_layers = max(stop - start for start, stop in stage_layers(opened, parallel.pp))
    block_bytes = opened.kv_bytes_per_position * largest_run * most_layers * block // (units * layers)
    if draft is not None:
        run = -(-len(draft.units) // parallel.tp)
        block_bytes += draft.kv_bytes_per_position * run * block // len(draft.units)
    for_one = -(-context // block)
    sharers = sharers or (1 if opened.device == "cuda" else parallel.tp * parallel.pp)
    free = _free(opened.device)
    if opened.device == "cuda":
        each = [one for one in (opened, draft) if one is not None]
        free = max(0, free - sharers * sum(step_room(one, parallel, context) for one in each))
    weights = _weights(opened) + (_weights(draft) if draft else 0) if unloaded else 0
    if parallel.kv_memory is not None:
        blocks = parallel.kv_memory // block_bytes
        if blocks < 1:
            raise NotEnough(f"--kv-memory: one block of {block} positions takes {block_bytes:,} bytes a rank")
    else:
        spare = free // sharers
        if opened.device == "cpu":
            spare = min(DEFAULT_CAP, int(max(0, free - weights) * DEFAULT_SHARE) // sharers)
        blocks = max(spare // block_bytes, for_one)
    if engine.total_blocks:
        blocks = engine.total_blocks
    blocks = min(blocks, for_one * engine.max_num_seqs)  # more can never be used at once
    if weights + blocks * block_bytes * sharers > free:
        kv = f"{blocks * block_bytes * sharers / 2**30:.1f} GiB"
        beside = f", the weights at least {weights / 2**30:.1f} GiB," if weights else ""
        raise NotEnough(
            f"{blocks} KV blocks of {block} tokens take {kv}{beside} "
            f"and {free / 2**30:.1f} GiB are free: give a smaller --max-model-len or --kv-memory"
        )
    return replace(
        engine,
        total_blocks=blocks,
        max_model_len=min(context, blocks * block),
        microbatches=max(engine.microbatches, parallel.pp),
        draft_cost=draft_cost(draft, opened) if engine.draft_cost is None else engine.draft_cost,
    )


def step_room(opened: OpenModel, parallel: ParallelConfig, context: int) -> int:
    """Bytes of a GPU that the steps of a rank with the most units take once, for the largest of them, where a
    sequence has up to `context` positions."""
    from runtime.model.gpu.steps import logits_room, workspace_room  # brings Triton along

    spec, units = opened.spec, len(opened.units)
    floats = workspace_room(spec.heads * -(-units // parallel.tp) // units, spec.head_dim, context)
    if parallel.tp * parallel.pp == 1:  # which alone captures its steps
        floats += logits_room(spec.vocab)
    return 4 * floats


def _free(device: str) -> int:
    """Bytes that KV may take at most."""
    if device == "cpu":
        return available()
    import torch

    free, _ = torch.cuda.mem_get_info()
    return max(0, free - GPU_SPARE)


def _weights(opened: OpenModel) -> int:
    """Bytes that all ranks keep of a model on CPUs, at the least: operators want some types larger than the
    file has them."""
    tensors = opened.checkpoint.tensors.values()
    if opened.quantize:
        return sum(info.rows * info.cols for info in tensors) * 5 // 8  # 4 bits, and their share of scales
    halves = opened.dtype == "bf16"  # in which fp32 is kept too
    return sum(
        info.nbytes // 2 if halves and info.type is TensorType.F32 else info.nbytes for info in tensors
    )
