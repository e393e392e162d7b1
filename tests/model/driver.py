"""Runs the model without an engine: logits after every token of a sequence, from any number of ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import torch

from runtime.config import ModelConfig
from runtime.model.batch import BatchMaker, Run
from runtime.model.communicator import Alone, Communicator, Threads
from runtime.model.forward import Forward
from runtime.model.header import OpenModel, open_model
from runtime.model.load import DTYPES, load_shard

BLOCK = 64


def opened(path: str | os.PathLike, **settings) -> OpenModel:
    return open_model(ModelConfig(str(path), **settings))


def forward_of(model: OpenModel, positions: int, comm: Communicator | None = None) -> Forward:
    comm = comm or Alone()
    shard, _ = load_shard(model, comm.rank, comm.size)
    units = shard.units[shard.run[0] : shard.run[1]]
    heads = units[-1].kv_heads[1] - units[0].kv_heads[0]
    blocks = -(-positions // BLOCK)
    shape = (model.spec.layers, blocks, BLOCK, 2, heads, model.spec.head_dim)
    return Forward(shard, torch.zeros(shape, dtype=DTYPES[model.dtype]), comm, blocks * BLOCK)


@torch.inference_mode()
def run(forward: Forward, tokens: Sequence[int], chunks: Sequence[int] | None = None) -> torch.Tensor | None:
    """Logits [n, V] at rank 0, the tokens run in chunks of the given lengths (all at once without)."""
    at, parts, blocks = 0, [], list(range(forward.cache.shape[1]))
    batches = BatchMaker(forward.shard.spec, forward.shard.dtype, BLOCK, len(blocks))
    for length in chunks or [len(tokens)]:
        batch = batches.make([Run(list(tokens[at : at + length]), at, blocks, length)])
        parts.append(forward.logits(forward.hidden(batch)))
        at += length
    return torch.cat(parts) if forward.comm.rank == 0 else None


def logits(
    model: OpenModel, tokens: Sequence[int], *, tp: int = 1, chunks: Sequence[int] | None = None
) -> torch.Tensor:
    """Logits [n, V] of a sequence, by `tp` ranks that are threads of this process."""
    if tp == 1:
        return run(forward_of(model, len(tokens)), tokens, chunks)
    found: list[torch.Tensor | None] = [None] * tp
    failed: list[BaseException] = []
    comms = Threads.group(tp)

    def work(rank: int) -> None:
        try:
            found[rank] = run(forward_of(model, len(tokens), comms[rank]), tokens, chunks)
        except BaseException as error:  # told to the caller below
            failed.append(error)
            comms[rank].close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    if failed:
        raise failed[0]
    assert found[0] is not None
    return found[0]
