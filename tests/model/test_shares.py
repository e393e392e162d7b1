"""A rank reads its units' share of a file and keeps no more of it; together the ranks hold the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from runtime.model.header import OpenModel
from runtime.model.layout import shard_slices
from runtime.model.load import load_shard
from runtime.model.shard import Shard
from runtime.model.stages import model_bytes, stage_layers
from runtime.model.units import rank_units
from tests.model.driver import opened
from tests.support import fixture_path

SLACK = 1.15


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Every tensor inside nested dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)


def storage_bytes(*values: object) -> int:
    """Bytes of memory behind all tensors inside, each storage once, views counted whole."""
    seen: dict[int, int] = {}
    for tensor in tensors_of(values):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        else:  # oneDNN's own order: the shape says what it takes
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def kept_by(shard: Shard) -> dict[str, int]:
    """Bytes that a shard keeps of each kind of tensor that ranks share out."""
    return {
        "vocab": storage_bytes(shard.embedding, shard.heads),
        "heads": storage_bytes([(layer.qkv, layer.attention_output) for layer in shard.layers]),
        "ffn": storage_bytes([layer.ffn for layer in shard.layers]),
    }


def stored_by(model: OpenModel) -> dict[str, int]:
    """Bytes of the file of each such kind; "" is what every rank reads: norms."""
    found = {"vocab": 0, "heads": 0, "ffn": 0, "": 0}
    for name, info in model.checkpoint.tensors.items():
        if info.rows == 1:
            kind = ""
        elif name.startswith("blk."):
            kind = "ffn" if "ffn_" in name else "heads"
        else:
            kind = "vocab"
        found[kind] += info.nbytes
    return found


def fraction(model: OpenModel, run: tuple[int, int], kind: str) -> float:
    """How much of a kind the units of `run` own."""
    spans = [getattr(unit, kind) for unit in model.units]
    return (spans[run[1] - 1][1] - spans[run[0]][0]) / spans[-1][1]


def check(model: OpenModel, slack: float = SLACK) -> None:
    units, stored = len(model.units), stored_by(model)
    whole, report = load_shard(model, 0, 1)
    assert sum(stored.values()) <= report.bytes_read <= slack * sum(stored.values())
    kept = kept_by(whole)
    said = whole.nbytes
    assert said <= storage_bytes(whole) <= said * 1.02 + 2 * stored[""]
    del whole
    for tp in range(2, units + 1):
        read_together = 0
        for rank, run in enumerate(rank_units(units, tp)):
            mine = {kind: fraction(model, run, kind) for kind in kept}
            shard, report = load_shard(model, rank, tp)
            share = sum(stored[kind] * part for kind, part in mine.items()) + stored[""]
            assert report.bytes_read <= slack * share, (tp, rank)
            for kind, size in kept_by(shard).items():
                assert size <= 1.02 * mine[kind] * kept[kind] + 4096, (tp, rank, kind)
                assert size >= 0.98 * mine[kind] * kept[kind] - 4096, (tp, rank, kind)
            read_together += report.bytes_read
        assert read_together >= sum(stored.values())


@pytest.mark.parametrize("types", ["F32", "BF16", "Q4_0", "Q8_0"], ids=str)
def test_tiny_shares(tiny, types):
    check(opened(tiny(types=types, hidden=256, heads=16, kv_heads=8, ffn=1024, vocab=4096, layers=2)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_of_a_stage_reads_and_keeps_its_layers(tiny, tied):
    """And what stands before and behind them: the embedding in the first stage, norm and head in the last."""
    model = opened(
        tiny(types="Q8_0", hidden=256, heads=8, kv_heads=4, ffn=1024, layers=5, vocab=512, tied=tied)
    )
    spans, tensors = stage_layers(model, 3), model.checkpoint.tensors
    layers, before, after = model_bytes(model)
    wholes = [load_shard(model, rank, 2)[0] for rank in range(2)]
    names: list[str] = []
    for rank in range(6):
        stage, (start, stop) = rank // 2, spans[rank // 2]
        shard, report = load_shard(model, rank, 2, pp=3)
        own = sum(layers[start:stop]) + (before if stage == 0 else 0) + (after if stage == 2 else 0)
        assert 0.5 * own <= report.bytes_read <= 0.5 * SLACK * own
        held = [shard.embedding is not None, shard.output_norm is not None, bool(shard.heads)]
        assert held == [stage == 0, stage == 2, stage == 2] == [shard.first, shard.last, shard.last]
        assert len(shard.layers) == stop - start
        for mine, theirs in zip(shard.layers, wholes[rank % 2].layers[start:stop], strict=True):
            for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
                assert a.layout != torch.strided or torch.equal(a, b)  # oneDNN's own order is not compared
        if rank % 2 == 0:
            run = rank_units(len(model.units), 2)[0]
            names += {wanted.name for wanted in shard_slices(model.spec, model.units, run, (start, stop))}
    assert sorted(names) == sorted([*tensors, *(["token_embd.weight"] if tied else [])])


def test_a_unit_without_ffn_channels_reads_none(tiny):
    """Two quant blocks of channels among eight units: six own none, and their ranks read no FFN matrix."""
    model = opened(tiny(types="Q4_K", hidden=256, heads=8, kv_heads=8, head_dim=32, ffn=512))
    owning = [u.ffn[0] < u.ffn[1] for u in model.units]
    assert sum(owning) == 2
    for rank, owns in enumerate(owning):
        names = {wanted.name for wanted in shard_slices(model.spec, model.units, (rank, rank + 1))}
        assert owns == any(f"ffn_{part}.weight" in name for name in names for part in ("gate", "up", "down"))
        shard, _ = load_shard(model, rank, 8)
        assert all(bool(layer.ffn) == owns for layer in shard.layers)


@pytest.mark.slow
def test_smollm2_shares(smollm2):
    check(opened(smollm2))


@pytest.mark.slow
def test_padded_smollm2_shares():
    """Units of 192 columns cut K-quant blocks of 256, and a block is read whole: up to 2.7 times the columns
    of the attention output, which is 16.3% of all that the worst rank reads."""
    check(opened(fixture_path("smollm2/smollm2-135m-pad768.Q4_K_M.gguf")), slack=1.17)


def test_ranks_hold_the_rows_of_the_embedding_that_are_theirs(tiny):
    """Put side by side in rank order, they are the whole table, in the file's exact values."""
    model = opened(tiny(types={"*": "Q6_K", "output": "Q4_0"}, hidden=256, heads=16, kv_heads=8, ffn=512))
    whole, _ = load_shard(model, 0, 1)
    for tp in (3, 8):
        shards = [load_shard(model, rank, tp)[0] for rank in range(tp)]
        codes = torch.cat([shard.embedding.codes for shard in shards])
        assert torch.equal(codes, whole.embedding.codes)
        assert [shard.vocab[0] for shard in shards[1:]] == [shard.vocab[1] for shard in shards[:-1]]
