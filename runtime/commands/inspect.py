"""`tramontane inspect`: what a model file holds and what each rank of it would read. Reads headers only."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from runtime.commands.output import write_json
from runtime.config import ModelConfig
from runtime.model.header import OpenModel, open_model
from runtime.model.layout import shard_slices
from runtime.model.units import rank_units
from runtime.sizes import show_size
from runtime.weights.plan import plan_reads


def inspect(model: ModelConfig, *, as_json: bool) -> None:
    """Print a description. Raises TramontaneError for a file that would not be served."""
    opened = open_model(model)
    value = describe(opened)
    if as_json:
        write_json(value)
    else:
        _show(value)


def describe(opened: OpenModel) -> dict:
    """A model in plain values; all sizes in bytes."""
    from runtime.model.load import numerics  # asks torch what this machine computes in: the slow part

    checkpoint, spec = opened.checkpoint, opened.spec
    return {
        "name": spec.name,
        "path": checkpoint.path,
        "format": checkpoint.kind,
        "file_bytes": sum(os.path.getsize(file) for file in checkpoint.files),
        "files": len(checkpoint.files),
        "architecture": _architecture(opened),
        "tokenizer": _tokenizer(opened),
        "quantization": str(checkpoint.packed) if checkpoint.packed else None,
        "tensors": _tensor_types(opened),
        "units": len(opened.units),
        "numerics": numerics(opened),
        "kv_bytes_per_token": opened.kv_bytes_per_position,
        "tensor_parallel": [_split(opened, tp) for tp in range(1, len(opened.units) + 1)],
    }


def _architecture(opened: OpenModel) -> dict:
    spec = dataclasses.asdict(opened.spec)
    metadata, config = opened.checkpoint.metadata, opened.checkpoint.config
    kind = metadata.get("general.architecture") or config.get("architectures", ["?"])[0]
    hidden = {"name", "half_split_rope"}
    return {"kind": kind} | {key: value for key, value in spec.items() if key not in hidden}


def _tokenizer(opened: OpenModel) -> dict:
    metadata = opened.checkpoint.metadata
    if opened.checkpoint.kind == "safetensors":
        folder = Path(opened.checkpoint.path)
        names = ("tokenizer.json", "tokenizer.model")
        return {"file": next((name for name in names if (folder / name).exists()), None)}
    return {
        "model": metadata.get("tokenizer.ggml.model"),
        "pre": metadata.get("tokenizer.ggml.pre"),
        "chat_template": "tokenizer.chat_template" in metadata,
    }


def _tensor_types(opened: OpenModel) -> list[dict]:
    """Largest share first."""
    found: dict[str, list[int]] = {}
    for tensor in opened.checkpoint.tensors.values():
        found.setdefault(str(tensor.type), []).append(tensor.nbytes)
    entries = [{"type": type, "count": len(sizes), "bytes": sum(sizes)} for type, sizes in found.items()]
    return sorted(entries, key=lambda entry: -entry["bytes"])


def _split(opened: OpenModel, tp: int) -> dict:
    ranks = []
    for start, stop in rank_units(len(opened.units), tp):
        slices = shard_slices(opened.spec, opened.units, (start, stop))
        reads = plan_reads(opened.checkpoint, slices, opened.quantize)
        ranks.append({"units": [start, stop], "weight_bytes": sum(read.total for read in reads)})
    return {"tp": tp, "ranks": ranks}


def _show(value: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    architecture = value["architecture"]
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("name", escape(value["name"]))  # names are the file's: they may look like markup
    facts.add_row("file", f"{escape(value['path'])} ({value['format']}, {show_size(value['file_bytes'])})")
    facts.add_row(
        "architecture",
        f"{architecture['kind']}: {architecture['layers']} layers, hidden {architecture['hidden']}, "
        f"ffn {architecture['ffn']}, {architecture['heads']} heads on {architecture['kv_heads']} KV heads "
        f"of {architecture['head_dim']}, vocabulary {architecture['vocab']}",
    )
    facts.add_row("context", f"{architecture['context_length']} tokens")
    tokenizer = ", ".join(f"{key} {found}" for key, found in value["tokenizer"].items() if found is not None)
    facts.add_row("tokenizer", escape(tokenizer))
    facts.add_row("KV", f"{show_size(value['kv_bytes_per_token'])} a token, over all ranks")
    if value["quantization"]:
        facts.add_row("quantised", value["quantization"])
    facts.add_row("numerics", value["numerics"])
    console.print(facts)
    types = Table("tensor type", "tensors", "bytes", title="Tensors", title_justify="left", box=None)
    for entry in value["tensors"]:
        types.add_row(entry["type"], str(entry["count"]), show_size(entry["bytes"]))
    console.print()
    console.print(types)
    ranks = Table("--tp", "units a rank", "weights a rank reads", box=None, title_justify="left")
    ranks.title = f"Ranks ({value['units']} units, so --tp 1 to {value['units']})"
    for split in value["tensor_parallel"]:
        units = " + ".join(str(rank["units"][1] - rank["units"][0]) for rank in split["ranks"])
        sizes = " + ".join(show_size(rank["weight_bytes"]) for rank in split["ranks"])
        ranks.add_row(str(split["tp"]), units, sizes)
    console.print()
    console.print(ranks)
