"""Other projects' int4 and K-quant products, timed beside ours by linear.py where they are installed.

torch's tinygemm, GemLite, Humming, and the operators of vLLM's GGUF plugin (loaded without vLLM). A peer that
cannot be imported, refuses a shape or gives wrong results says so in one line on standard error and leaves
its column out. Every figure is of a result compared with the peer's own weights, dequantised, on the shape
that is timed (the last 256 rows of the weight).

On a machine without a network they travel as a folder (what else they import is tqdm, numpy, safetensors, and
jinja2 and cuda-bindings, which torch for CUDA brings; vLLM and gguf are not needed):

    pip install --no-deps --target peers gemlite
    pip install --no-deps --target peers --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 humming-kernels vllm-gguf-plugin
    PYTHONPATH=peers python bench/gpu/linear.py > linear.json

GemLite 0.6.0 tunes itself at the first call of each shape and number of rows, before any capture, in its
default mode "fast"; a shape found in the file of settings that it ships for this GPU's name keeps those.
What it finds lives as long as the process; what it compiles (some hundred variants a shape) stays in Triton's
cache, so that only the first run is slow. Humming compiles at the first call too, with NVRTC or nvcc. Not
known here: Marlin, which needs all of vLLM or GPTQModel; how quick a peer is with other settings than its own
choice.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.gpu.timing import captured, median_ms
from runtime.weights.formats import TensorType
from runtime.weights.planar import from_gguf_bytes

GROUP = 128
CHECKED = 256  # rows of a weight whose results are compared
TOLERANCE = 0.02  # of the results' norm: activations in 8 bits cost 0.5%, a wrong layout more than 100%
HALVES = {"Q4_K": (0, 2), "Q6_K": (208,)}  # where a block keeps its fp16 (ggml/src/ggml-common.h)

# x [tokens, k] -> y [tokens, n], and the last CHECKED rows of the dense weight [n, k] behind it, fp32.
Product = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Peer:
    """`load` raises where the peer cannot be used; `make` gives (format, n, k) random weights of its own."""

    name: str  # its column is name_us
    distribution: str  # what its version is looked up by
    formats: tuple[str, ...]
    load: Callable[[], object]
    make: Callable[[str, int, int], Product]
    dtype: torch.dtype = torch.float16
    most_rows: int = 1 << 30  # beyond these it is no candidate


def int4(
    n: int, k: int, dtype: torch.dtype, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]:
    """Codes [n, k] uint8, scales and zeros [n, k / 128], and the dense weights: (code - zero) * scale."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scales = (0.01 * (0.5 + torch.rand(n, k // GROUP, device=device))).to(dtype)
    zeros = torch.randint(0, 16, scales.shape, device=device).to(dtype)
    last = [part[-CHECKED:].clone() for part in (codes, scales, zeros)]

    def dense() -> torch.Tensor:
        code, scale, zero = (part.float() for part in last)
        return ((code.unflatten(1, (-1, GROUP)) - zero[..., None]) * scale[..., None]).flatten(1)

    return codes, scales, zeros, dense


def tinygemm(kind: str, n: int, k: int) -> Product:
    """Column pairs with the even one in the high nibble; (code - 8) * scale + shift, both in bf16."""
    codes, scales, zeros, dense = int4(n, k, torch.bfloat16)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    pairs = torch.stack((scales, (8 - zeros) * scales), -1).transpose(0, 1).contiguous()
    return (lambda x: torch._weight_int4pack_mm(x, packed, GROUP, pairs)), dense


def gemlite(kind: str, n: int, k: int) -> Product:
    library = importlib.import_module("gemlite")
    codes, scales, zeros, dense = int4(n, k, torch.float16)
    half = library.DType.FP16
    layer = library.GemLiteLinear(
        4, group_size=GROUP, in_features=k, out_features=n, input_dtype=half, output_dtype=half
    )
    layer.pack(codes, scales, zeros)
    return layer, dense


def humming(kind: str, n: int, k: int) -> Product:
    """Quantised and dequantised by itself: how it packs is its own affair."""
    library = importlib.import_module("humming.layer")
    config = {"dtype": "uint4", "group_size": GROUP, "has_zero_point": True}
    layer = library.HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16).cuda()
    schema = layer.weight_schema
    weight = torch.randn(n, k, device="cuda", dtype=torch.float16) * 0.02
    tensors = schema.quant_tensor(weight, schema, torch.float16)
    # Zero points alone are packed along n: eight rows a word.
    count = {name: CHECKED // 8 if name == "zero_point" else CHECKED for name in tensors}
    last = {name: tensor[-count[name] :].clone() for name, tensor in tensors.items()}
    layer.load_from_tensors(tensors)
    layer.transform()
    return layer, lambda: schema.dequant_tensors(last).float()


def random_blocks(kind: str, n: int, k: int, device: str = "cuda") -> torch.Tensor:
    """GGUF blocks [n, bytes a row] of random bytes, with super-scales that keep weights below one."""
    type = TensorType(kind)
    blocks = torch.randint(0, 256, (n, k // type.block, type.block_bytes), dtype=torch.uint8, device=device)
    for at in HALVES[kind]:
        d = (1 + torch.rand(n, k // type.block, 1, device=device)) * 2**-14
        blocks[..., at : at + 2] = d.half().view(torch.uint8)
    return blocks.flatten(1)


def gguf_operators() -> object:
    """The plugin's compiled operators alone: importing the package would import vLLM."""
    spec = importlib.util.find_spec("vllm_gguf_plugin")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'vllm_gguf_plugin'")
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob("_C_gguf*.so"))
    if not libraries:
        raise ImportError("this version of vllm_gguf_plugin comes without compiled operators")
    torch.ops.load_library(str(libraries[0]))
    return torch.ops._C_gguf


def gguf(operator: str, kind: str, n: int, k: int) -> Product:
    """Held against our own reader of these blocks. Activations are quantised to 8 bits within the call."""
    run, type = getattr(gguf_operators(), operator), TensorType(kind)
    blocks = random_blocks(kind, n, k)
    last = blocks[-CHECKED:].clone()

    def dense() -> torch.Tensor:
        return from_gguf_bytes(last.cpu(), type, len(last), k).dequantize().to(last.device)

    return (lambda x: run(blocks, x, type.id, n)), dense


INT4, BLOCKS = ("int4 g128",), tuple(HALVES)
PEERS = (
    Peer("tinygemm", "torch", INT4, lambda: torch.ops.aten._weight_int4pack_mm, tinygemm, torch.bfloat16),
    Peer("gemlite", "gemlite", INT4, partial(importlib.import_module, "gemlite"), gemlite),
    Peer("humming", "humming-kernels", INT4, partial(importlib.import_module, "humming.layer"), humming),
    # Reads all weights once for every row: the plugin itself takes it for a few rows only.
    Peer(
        "gguf_vec",
        "vllm-gguf-plugin",
        BLOCKS,
        gguf_operators,
        partial(gguf, "ggml_mul_mat_vec_a8"),
        most_rows=16,
    ),
    Peer("gguf", "vllm-gguf-plugin", BLOCKS, gguf_operators, partial(gguf, "ggml_mul_mat_a8")),
)
DISTRIBUTIONS = {f"{peer.name}_us": peer.distribution for peer in PEERS}


def complain(name: str, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    absent = "not installed: " if isinstance(error, ModuleNotFoundError) else ""
    print(f"{name}: {absent}{lines[0] if lines else repr(error)}", file=sys.stderr, flush=True)


def available(kinds: Collection[str], peers: Iterable[Peer] = PEERS) -> list[Peer]:
    """Those with a format of `kinds` that load; one line on standard error for each other one."""
    found = []
    for peer in peers:
        if not set(kinds) & set(peer.formats):
            continue
        try:
            peer.load()
        except Exception as error:  # whatever an import may raise: it is a peer's, not ours
            complain(peer.name, error)
        else:
            found.append(peer)
    return found


def figure(column: str, measure: Callable[[], float]) -> dict[str, float]:
    """{column: us} of a measurement in ms; nothing, and one line on standard error, where it raises."""
    try:
        return {column: round(measure() * 1e3, 1)}
    except Exception as error:  # a peer's own refusal, of whatever kind
        complain(column.removesuffix("_us"), error)
        return {}


def check(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """ValueError unless the last rows' results y are those of x and `dense`, within TOLERANCE."""
    wanted = x.float() @ dense.t()
    error = float((y[:, -CHECKED:].float() - wanted).norm() / wanted.norm())
    if not error < TOLERANCE:
        raise ValueError(f"wrong results for {tuple(x.shape)} x {y.shape[1]}, relative error {error:.2g}")


def timed(peer: Peer, kind: str, n: int, k: int, tokens: int, copies: int, repeats: int) -> float:
    """Median ms a call, over `copies` weights in turn."""
    x = torch.randn(tokens, k, device="cuda", dtype=peer.dtype)
    product, dense = peer.make(kind, n, k)
    check(product(x), x, dense())
    products = [product, *(peer.make(kind, n, k)[0] for _ in range(copies - 1))]
    return median_ms(captured([partial(product, x) for product in products]), repeats) / copies


def beside(
    peers: Iterable[Peer], kind: str, n: int, k: int, tokens: int, copies: int, repeats: int
) -> dict[str, float]:
    """us of every peer that takes this format and number of rows, by column."""
    found: dict[str, float] = {}
    for peer in peers:
        if kind in peer.formats and tokens <= peer.most_rows:
            measure = partial(timed, peer, kind, n, k, tokens, copies, repeats)
            found |= figure(f"{peer.name}_us", measure)
            torch.cuda.empty_cache()
    return found


def against(name: str, row: dict, columns: Iterable[str]) -> dict[str, float]:
    """{name: how many times our "us" the quickest of `columns` takes}; nothing where none has a figure."""
    times = [row[column] for column in columns if column in row]
    return {name: round(min(times) / row["us"], 2)} if times else {}


def versions(rows: list[dict], distributions: dict[str, str]) -> dict[str, str]:
    """Versions of the distributions behind those columns that have a figure in some row."""
    found = {}
    for column, name in distributions.items():
        if any(column in row for row in rows):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown"
    return found
