"""Loads one rank's share of an opened model, and says what a gateway must know of it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from runtime.config import EngineConfig, ModelConfig
from runtime.errors import BadModelFile
from runtime.model.header import OpenModel
from runtime.model.layout import shard_slices
from runtime.model.numerics import numerics_name
from runtime.model.shard import Shard, build_shard
from runtime.model.stages import stage_layers
from runtime.model.units import rank_units
from runtime.types import EngineInfo
from runtime.weights.fingerprint import fingerprint
from runtime.weights.loader import LoadReport, load

if TYPE_CHECKING:
    from runtime.model.gpu.shard import GpuShard

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_shard(
    model: OpenModel,
    rank: int,
    tp: int,
    *,
    pp: int = 1,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Shard | GpuShard, LoadReport]:
    """Read the ranges of one rank and build its weights, on the device the model was opened for. Ranks count
    stage by stage: 0 to tp - 1 are the first one's. Raises BadModelFile for weights that cannot be computed
    with."""
    stage, within = divmod(rank, tp)
    run, layers = rank_units(len(model.units), tp)[within], stage_layers(model, pp)[stage]
    slices = shard_slices(model.spec, model.units, run, layers)
    loader = load(model.checkpoint, slices, threads=threads, quantize=model.quantize, progress=progress)
    if model.device == "cuda":
        from runtime.model.gpu.shard import DTYPE, FP8, Refused, build_gpu_shard  # brings Triton along

        try:
            shard = build_gpu_shard(
                model.spec, model.units, run, loader,
                device="cuda", layers=layers, kv_dtype=FP8 if model.kv_dtype == "fp8" else DTYPE,
            )  # fmt: skip
        except Refused as error:
            raise BadModelFile(model.checkpoint.path, error.tensor, error.reason) from error
    else:
        dtype = DTYPES[model.dtype]
        shard = build_shard(
            model.spec, model.units, run, loader, dtype=dtype, dense=model.dense, layers=layers
        )
    assert loader.report is not None
    _return_memory()
    return shard, loader.report


def _return_memory() -> None:
    """Give freed heap pages back: repacking leaves as much behind, in glibc's hands, as the weights take."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def engine_info(
    opened: OpenModel,
    model: ModelConfig,
    config: EngineConfig,
    tp: int,
    nodes: tuple[str, ...] = (),
    *,
    pp: int = 1,
) -> EngineInfo:
    return EngineInfo(
        model=model.name or opened.spec.name,
        numerics=numerics(opened),
        context_length=config.max_model_len,
        vocab_size=opened.spec.vocab,
        tp=tp,
        units=len(opened.units),
        block_size=config.block_size,
        total_blocks=config.total_blocks,
        max_num_seqs=config.max_num_seqs,
        rank_nodes=nodes,
        pp=pp,
    )


def numerics(opened: OpenModel) -> str:
    """The name of all that may change a bit of a reply: how things are computed, with which weights, and
    what the model's files say of its vocabulary and end tokens. Raises BadModelFile for files that cannot be
    read."""
    weights = fingerprint(opened.checkpoint, also=repr(replace(opened.spec, name="")))
    units, quantize = len(opened.units), opened.quantize
    if opened.device == "cuda":
        from runtime.model.gpu.numerics import gpu_numerics_name

        name = gpu_numerics_name(units=units, quantize=quantize, kv_dtype=opened.kv_dtype)
    else:
        dtype = DTYPES[opened.dtype]
        name = numerics_name(dtype=dtype, dense=opened.dense, units=units, quantize=quantize)
    return f"{name}/w{weights}"
