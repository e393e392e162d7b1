"""The small operations inside one CUDA graph: captured once, replayed on other numbers. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu.activation import silu_mul_fold
from kernels.gpu.embedding import embed
from kernels.gpu.norm import add_norm
from kernels.gpu.penalties import Penalties, adjust, remember
from kernels.gpu.rope import rope_store
from kernels.gpu.sampling import Settings, Workspace, sample
from tests.gpu.device import ON_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]

ROWS, H, V, HEADS, KV, D, S = 5, 576, 2500, 9, 3, 64, 3


class Step:
    """Inputs, and one call of each operation; the token chosen last is the next one embedded."""

    def __init__(self) -> None:
        def full(*shape: int, dtype: torch.dtype = torch.float32, value: float = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device="cuda")

        self.table = torch.randn(V, H, device="cuda")
        self.tokens = full(ROWS, dtype=torch.int64)
        self.residual = full(ROWS, H)
        self.partials, self.gates = full(S, ROWS, H), full(S, ROWS, 2 * H)
        self.qkv = full(S, ROWS, (HEADS + 2 * KV) * D)
        self.weight, self.normed = torch.randn(H, device="cuda"), full(ROWS, H, dtype=torch.float16)
        self.gated = full(ROWS, H, dtype=torch.float16)
        self.cos, self.sin = torch.randn(64, D // 2, device="cuda"), torch.randn(64, D // 2, device="cuda")
        self.positions, self.slots = full(ROWS, dtype=torch.int64), torch.arange(ROWS, device="cuda")
        self.q = full(ROWS, HEADS, D, dtype=torch.float16)
        self.cache = full(2, 2, KV, 16, D, dtype=torch.float16)
        self.logits, self.adjusted = full(ROWS, V), full(ROWS, V)
        self.settings = Settings(
            full(ROWS, dtype=torch.float64, value=0.9), full(ROWS, dtype=torch.int32, value=200),
            full(ROWS, dtype=torch.float64, value=0.95), full(ROWS, dtype=torch.float64, value=0.01),
            torch.arange(ROWS, device="cuda"), self.positions, full(ROWS, dtype=torch.int32),
        )  # fmt: skip
        self.work, self.logprobs = Workspace.make(ROWS, V, "cuda"), full(ROWS)
        self.penalties = Penalties.empty(ROWS, 32, 2, "cuda")
        self.penalties.presence.fill_(1.5)
        self.states = torch.arange(ROWS, device="cuda")

    def renew(self, seed: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        for tensor in (self.partials, self.gates, self.qkv, self.logits):
            tensor.normal_(generator=generator)
        self.logits.mul_(4)
        self.tokens.random_(0, V, generator=generator)
        self.positions.fill_(seed)
        self.penalties.ids.fill_(-1)
        self.penalties.counts.zero_()

    def run(self) -> None:
        embed(self.table, self.tokens, self.residual)
        add_norm(self.residual, self.partials, self.weight, 1e-5, self.normed)
        rope_store(
            self.qkv, self.positions, self.slots, self.cos, self.sin, self.q, self.cache,
            heads=HEADS, kv_heads=KV, head_dim=D,
        )  # fmt: skip
        silu_mul_fold(self.gates, self.gated)
        for _ in range(2):
            self.adjusted.copy_(self.logits)
            adjust(self.adjusted, self.penalties, self.states)
            sample(self.adjusted, self.settings, self.work, self.tokens, self.logprobs, self.logits)
            remember(self.tokens, self.penalties, self.states)

    def results(self) -> list[torch.Tensor]:
        held = (self.residual, self.normed, self.q, self.cache, self.gated, self.tokens, self.logprobs)
        return [tensor.clone() for tensor in held]


def test_replay() -> None:
    step = Step()
    step.renew(0)
    step.run()  # compiles what the capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for seed in (1, 2):
        step.renew(seed)
        step.run()
        want = step.results()
        step.renew(seed)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(step.results(), want, strict=True))
