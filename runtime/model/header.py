"""Opens a model by its header: what it is, whether it can be served, in which numbers. No torch.

Everything that can be wrong with a file is found here, before weights are read or memory is taken.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from runtime.config import ModelConfig
from runtime.errors import InvalidArgument, UnsupportedModel
from runtime.model.gpu.limits import check_spec
from runtime.model.layout import expected_shapes
from runtime.model.spec import ModelSpec, spec_from_gguf, spec_from_hf
from runtime.model.units import Unit
from runtime.weights.checkpoint import Checkpoint, check_tensor, open_checkpoint
from runtime.weights.formats import TensorType

# Weights by what they do, and those that are kept in bf16 even where codes would do: none, since products of
# codes on AMX are the cheaper ones at any number of rows (docs/decisions.md).
ROLES = ("qkv", "attention_output", "gate_up", "down")
DENSE_ROLES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model whose header has been read and checked."""

    checkpoint: Checkpoint
    spec: ModelSpec
    units: tuple[Unit, ...]
    dtype: str  # of activations and KV: "bf16" or "fp32" on a CPU, "fp16" on a GPU
    dense: frozenset[str]  # roles kept in bf16 even where codes would do
    quantize: str | None
    device: str = "cpu"  # or "cuda"
    kv_dtype: str = "auto"  # as `dtype`, or "fp8"

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of keys and values of one position over all layers and heads, scales counted."""
        spec = self.spec
        one = spec.head_dim * (4 if self.dtype == "fp32" else 2)
        if self.kv_dtype == "fp8":
            one = spec.head_dim + 4
        return spec.layers * 2 * spec.kv_heads * one


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of an opened checkpoint, with every tensor it needs there and of the right shape."""
    if checkpoint.kind == "gguf":
        embedding = checkpoint.tensors.get("token_embd.weight")
        spec = spec_from_gguf(
            checkpoint.path,
            checkpoint.metadata,
            checkpoint.tensors,
            vocab_rows=embedding.rows if embedding else 0,
        )
    else:
        name = os.path.basename(os.path.normpath(checkpoint.path))
        spec = spec_from_hf(
            os.path.join(checkpoint.path, "config.json"), checkpoint.config, checkpoint.tensors, name
        )
    shapes = expected_shapes(spec)
    for tensor, (rows, cols) in shapes.items():
        check_tensor(checkpoint, tensor, rows, cols)
    for tensor in checkpoint.tensors:
        if tensor.startswith("blk.") and tensor not in shapes:
            raise UnsupportedModel(f"{checkpoint.path}: {tensor}: a tensor that a Llama model does not have")
    return spec


def open_model(config: ModelConfig, device: str = "cpu") -> OpenModel:
    """Read and check a model's header and decide its numerics, for ranks on "cpu" or "cuda". No weights are
    read."""
    checkpoint = open_checkpoint(config.path)
    spec = model_spec(checkpoint)
    if config.quantize not in (None, "int4"):
        raise InvalidArgument("quantize", f"{config.quantize!r} is not int4")
    if config.quantize and checkpoint.kind == "gguf":
        raise InvalidArgument("quantize", "a GGUF file is served as it is quantised; this is for safetensors")
    if config.quantize and checkpoint.packed:
        raise InvalidArgument("quantize", f"the model is quantised already: {checkpoint.packed}")
    if config.kv_dtype not in ("auto", "fp8"):
        raise InvalidArgument("kv-dtype", f"{config.kv_dtype!r} is neither auto nor fp8")
    if config.kv_dtype == "fp8" and device != "cuda":
        raise InvalidArgument("kv-dtype", "fp8 is not possible on a CPU; use auto")
    if device == "cuda":
        check_spec(checkpoint.path, spec)
    dtype = _gpu_dtype(config) if device == "cuda" else _cpu_dtype(config, checkpoint, spec)
    down = [checkpoint.tensors[f"blk.{i}.ffn_down.weight"].type for i in range(spec.layers)]
    block = 32 if config.quantize else max(t.block for t in down)
    dense = DENSE_ROLES if dtype == "bf16" else frozenset()
    units = spec.units(block)
    return OpenModel(checkpoint, spec, units, dtype, dense, config.quantize, device, config.kv_dtype)


def header_device(config: ModelConfig, wanted: str) -> str:
    """What to open a header for before it is known where ranks will be: "cuda" where nothing else will do."""
    if wanted in ("cpu", "cuda"):
        return wanted
    return "cuda" if config.kv_dtype == "fp8" or config.dtype == "fp16" else "cpu"


def _gpu_dtype(config: ModelConfig) -> str:
    if config.dtype not in ("auto", "fp16"):
        raise InvalidArgument("dtype", f"{config.dtype!r} is not possible on a GPU: auto or fp16")
    return "fp16"


def _cpu_dtype(config: ModelConfig, checkpoint: Checkpoint, spec: ModelSpec) -> str:
    matrices = [checkpoint.tensors[name] for name, (rows, _) in expected_shapes(spec).items() if rows > 1]
    if config.dtype == "auto":
        # Full-precision files were made to be exact; quantised and bf16 ones lose nothing to bf16 here. The
        # embedding of a GPTQ or AWQ folder is F16 however few bits its layers have.
        exact = not checkpoint.packed and any(t.type in (TensorType.F32, TensorType.F16) for t in matrices)
        return "fp32" if exact and not config.quantize else "bf16"
    if config.dtype in ("bf16", "fp32"):
        return config.dtype
    if config.dtype == "fp16":
        raise InvalidArgument("dtype", "fp16 is not possible on a CPU; use auto, bf16 or fp32")
    raise InvalidArgument("dtype", f"{config.dtype!r} is none of auto, bf16, fp32, fp16")
