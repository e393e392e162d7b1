"""The Llama architecture in plain torch, as an oracle: read by the gguf package, dequantised by gguf.quants,
computed densely in one floating type, one whole sequence at a time. Shares no code with the runtime.

The architecture (Touvron et al. 2023): x += Wo attention(norm(x)); x += Wdown(silu(Wgate h) * Wup h) with
h = norm(x); RMSNorm; rotary embedding over interleaved pairs, as GGUF orders the rows of q and k.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import torch


class Reference:
    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float64,
        *,
        inverse_frequencies: torch.Tensor | None = None,
        window: int | None = None,
    ):
        """`inverse_frequencies` [head_dim / 2] and `window` replace what the file says of them."""
        reader = gguf.GGUFReader(path)
        self.dtype = dtype
        self.weights = {}
        for tensor in reader.tensors:
            dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            self.weights[tensor.name] = torch.from_numpy(dense.copy()).to(dtype)

        def value(key: str, default=None):
            field = reader.fields.get(f"llama.{key}")
            return default if field is None else field.contents()

        self.layers = value("block_count")
        self.hidden = value("embedding_length")
        self.heads = value("attention.head_count")
        self.kv_heads = value("attention.head_count_kv", self.heads)
        self.head_dim = value("attention.key_length", self.hidden // self.heads)
        self.eps = value("attention.layer_norm_rms_epsilon")
        self.window = window or value("attention.sliding_window") or None
        half = self.head_dim // 2
        theta = value("rope.freq_base", 10000.0)
        inverse = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
        if "rope_freqs.weight" in self.weights:
            inverse = inverse / self.weights["rope_freqs.weight"].double()
        if value("rope.scaling.type") == "linear":
            inverse = inverse / value("rope.scaling.factor")
        self.inverse = inverse if inverse_frequencies is None else inverse_frequencies.double()

    def weight(self, name: str) -> torch.Tensor:
        return self.weights[f"{name}.weight"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight(name)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, heads, D], row n at position n."""
        angles = (torch.arange(x.shape[0], dtype=torch.float64)[:, None] * self.inverse)[:, None]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def attention(self, h: torch.Tensor, layer: str) -> torch.Tensor:
        n, d = h.shape[0], self.head_dim
        q = self.rotate((h @ self.weight(f"{layer}.attn_q").T).view(n, self.heads, d))
        k = self.rotate((h @ self.weight(f"{layer}.attn_k").T).view(n, self.kv_heads, d))
        v = (h @ self.weight(f"{layer}.attn_v").T).view(n, self.kv_heads, d)
        group = self.heads // self.kv_heads
        i = torch.arange(n)
        seen = i[None, :] <= i[:, None]
        if self.window:
            seen &= i[None, :] > i[:, None] - self.window
        heads = []
        for head in range(self.heads):
            scores = q[:, head] @ k[:, head // group].T / math.sqrt(d)
            probabilities = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
            heads.append(probabilities @ v[:, head // group])
        return torch.cat(heads, dim=1) @ self.weight(f"{layer}.attn_output").T

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[n, vocab] after each token of one sequence that starts at position 0."""
        x = self.weight("token_embd")[tokens]
        for i in range(self.layers):
            layer = f"blk.{i}"
            x = x + self.attention(self.norm(x, f"{layer}.attn_norm"), layer)
            h = self.norm(x, f"{layer}.ffn_norm")
            gate, up = h @ self.weight(f"{layer}.ffn_gate").T, h @ self.weight(f"{layer}.ffn_up").T
            x = x + (gate / (1 + torch.exp(-gate)) * up) @ self.weight(f"{layer}.ffn_down").T
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return self.norm(x, "output_norm") @ head.T


def divergence(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(want || got) in nats of each row of logits, in float64."""
    p, q = torch.log_softmax(want.double(), -1), torch.log_softmax(got.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


def llama3_frequencies(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> torch.Tensor:
    """Inverse frequencies of Llama 3.1, by wavelength, as its model card's code states them."""
    result = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > original / low:
            frequency /= factor
        elif wavelength >= original / high:
            share = (original / wavelength - low) / (high - low)
            frequency = (1 - share) * frequency / factor + share * frequency
        result.append(frequency)
    return torch.tensor(result, dtype=torch.float64)
