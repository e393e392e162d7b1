"""Whole models by GPU kernels: near an independent fp32 reference, and equal to themselves bit for bit."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from kernels.gpu.rope import rope_store
from runtime.config import ModelConfig
from runtime.model.communicator import Alone
from runtime.model.gpu.shard import FP8
from runtime.model.header import open_model
from runtime.model.load import load_shard, numerics
from runtime.model.runner import Runner
from runtime.sampling.sampler import NO_TOKEN, SamplerState, sample
from runtime.types import Chunk, SamplingParams, SequenceStart, StepPlan
from tests.gpu.device import ON_GPU
from tests.gpu.folder import write_folder
from tests.gpu.play import guessed_replies, opened, replies, replies_of_ranks, runner, simulate_graphs

PROMPTS = ((5, 9, 33, 7, 1), (2, 60, 11), tuple(range(3, 20)))
TYPES = {"*": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q5_0", "token_embd": "Q4_1", "output": "Q8_0"}
SHAPE = {"hidden": 128, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 160, "vocab": 260}


@pytest.fixture(scope="module")
def model(request, tmp_path_factory) -> Path:
    """Mixed types where the gguf package is there to write them, else a folder quantised on load."""
    try:
        importlib.import_module("gguf")
    except ImportError:
        return write_folder(tmp_path_factory.mktemp("folder"), **SHAPE)
    return request.getfixturevalue("tiny")(types=TYPES, **SHAPE)


@pytest.fixture(scope="module")
def alone(model) -> list:
    return [replies(runner(opened(model), 64, 1), [prompt], 3)[0] for prompt in PROMPTS]


def test_like_the_cpu(model, alone) -> None:
    """Greedy tokens and logprobs against this project's fp32 CPU path, which has its own reference."""
    if model.is_dir():
        pytest.skip("without gguf the model is a folder, quantised on load, which fp32 does not see")
    shard, _ = load_shard(open_model(ModelConfig(str(model), dtype="fp32")), 0, 1)
    cpu = Runner(shard, Alone(), total_blocks=12, block_size=16, max_positions=64)
    for mine, theirs in zip(alone, replies(cpu, PROMPTS, 3), strict=True):
        assert [token for token, _, _ in mine] == [token for token, _, _ in theirs]
        assert [p for _, p, _ in mine] == pytest.approx([p for _, p, _ in theirs], abs=0.02)


def test_company_and_chunks(model, alone) -> None:
    run = opened(model)
    assert replies(runner(run, 64, 3), PROMPTS, 3) == alone
    assert replies(runner(run, 64, 3), PROMPTS, 3, chunk=2) == alone


@pytest.mark.filterwarnings("ignore:invalid value")
def test_numbers_that_are_none_end_their_own_reply(model, alone, monkeypatch) -> None:
    """A row of the token table overflows: a prompt with that token gets no token; its neighbours, and who has
    its blocks after it, get theirs. The penalty has the device remember what was sampled, and the next step
    is launched from that before anyone has seen it."""
    run = runner(opened(model), 64, 3)
    simulate_graphs(monkeypatch, run.steps)
    table = run.forward.shard.embedding
    (table.d if hasattr(table, "d") else table)[40] = torch.inf
    params = SamplingParams(temperature=0.0, logprobs=2, presence_penalty=1e-3)
    prompts = [PROMPTS[0], (3, 40, 7, 40, 11), PROMPTS[2]]
    first, bad, last = replies(run, prompts, 3, params=params, ahead=1)
    assert [first, last] == [alone[0], alone[2]]
    assert bad[0] == (NO_TOKEN, None, ())
    blocks = tuple(range(4))
    for slot in range(3):
        run.execute(StepPlan(90 + slot, (slot,), (), ()))
    again = SequenceStart(1, PROMPTS[1], len(PROMPTS[1]), SamplingParams(temperature=0.0, logprobs=2), ())
    chunk = Chunk(1, 0, len(PROMPTS[1]), tuple(reversed(blocks)), True)
    (token,) = run.execute(StepPlan(99, (), (again,), (chunk,))).tokens
    assert (token.token, token.logprob) == alone[1][0][:2]


def test_fp8_keys_and_values(model, alone, monkeypatch) -> None:
    """Half the memory; replies as of a cache whose numbers were rounded to fp8; and the same in any company,
    in chunks and on ranks."""
    fp8 = opened(model, "fp8")
    assert numerics(fp8) == numerics(opened(model)).replace("kv-fp16", "kv-fp8")
    run = runner(fp8, 64, 2)
    found = replies(run, PROMPTS[:2], 2, chunk=3)
    assert run.cache_bytes == fp8.kv_bytes_per_position * 2 * 64
    assert run.cache_bytes < 0.55 * runner(opened(model), 64, 2).cache_bytes
    assert replies(runner(fp8, 64, 1), PROMPTS[:1], 2) == found[:1]
    assert replies_of_ranks(fp8, 2, PROMPTS[:1], 2) == found[:1]

    def store_rounded(partials, positions, slots, cos, sin, q, cache, *, scales, **shape) -> None:
        rope_store(partials, positions, slots, cos, sin, q, cache, **shape)
        scale = cache.float().abs().amax(-1, keepdim=True) / 448  # rounding again changes next to nothing
        cache.copy_((cache.float() / scale.clamp(min=1e-30)).to(FP8).float() * scale)

    monkeypatch.setattr("runtime.model.gpu.forward.rope_store", store_rounded)
    (rounded,) = replies(runner(opened(model), 64, 1), PROMPTS[:1], 2)
    assert [token for token, _, _ in found[0]] == [token for token, _, _ in rounded]
    assert [p for _, p, _ in found[0]] == pytest.approx([p for _, p, _ in rounded], abs=0.015)
    assert [p for _, p, _ in found[0]] != pytest.approx([p for _, p, _ in alone[0][:2]], abs=0.015)


def test_a_step_ahead(model, alone) -> None:
    """Plans launched before the tokens they continue have been seen."""
    assert replies(runner(opened(model), 64, 3), PROMPTS, 3, ahead=1) == alone


def test_sampled_like_the_host(model) -> None:
    """Seeded, filtered and penalised choices: the host's sampler on the same logits chooses the same."""
    params = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=50, seed=7, repetition_penalty=1.2, frequency_penalty=0.3,
        logit_bias=((5, 2.0),), logprobs=1, max_tokens=3,
    )  # fmt: skip
    run = runner(opened(model), 64, 2)
    seen = _HostSampler(run._sampler, params, PROMPTS[:2], run.forward.shard.spec.vocab)
    run._sampler = seen
    found = replies(run, PROMPTS[:2], 3, params=params)
    assert [[token for token, _, _ in reply] for reply in found] == seen.tokens
    for reply, logprobs in zip(found, seen.logprobs, strict=True):
        assert [p for _, p, _ in reply] == pytest.approx(logprobs, abs=1e-5)


def test_guesses(model, monkeypatch) -> None:
    """Rows of guesses, right and wrong, yield what single tokens do; padded as for a captured step."""
    params = SamplingParams(
        temperature=0.8, seed=3, repetition_penalty=1.3, presence_penalty=0.2, logprobs=1, max_tokens=4
    )
    run = opened(model)
    want = replies(runner(run, 64, 3), PROMPTS, 4, params=params)
    made = runner(run, 64, 3)
    simulate_graphs(monkeypatch, made.steps)
    assert guessed_replies(made, PROMPTS, want, params) == want


def test_scores(model) -> None:
    """A prompt's tokens get the same scores in chunks."""
    prompt, params = PROMPTS[2], SamplingParams(temperature=0.0, logprobs=1)
    start = SequenceStart(0, prompt, len(prompt), params, ())
    blocks = (0, 1)
    scoring = StepPlan(0, (), (start,), (Chunk(0, 0, len(prompt) - 1, blocks, False, scores=True),))
    whole = runner(opened(model), 32, 1).execute(scoring).scores[0]
    assert len(whole) == len(prompt) - 1
    run = runner(opened(model), 32, 1)
    parts = []
    for at in range(0, len(prompt) - 1, 5):
        length = min(5, len(prompt) - 1 - at)
        chunk = Chunk(0, at, length, blocks if at == 0 else (), False, scores=True)
        parts += run.execute(StepPlan(at, (), (start,) if at == 0 else (), (chunk,))).scores[0]
    assert tuple(parts) == tuple(whole)


class _HostSampler:
    """Chooses by the device, and beside it by the host."""

    def __init__(self, inner, params, prompts, vocab):
        self._inner = inner
        self._states = [SamplerState(params, prompt, (), (), vocab) for prompt in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.start = inner.start

    def sample_ahead(self, logits, slots, positions, drafts):
        assert not any(drafts)
        return self.sample(logits, slots, positions)[:, None]

    def sample(self, logits, slots, positions):
        for choice, slot in zip(
            sample(logits, [self._states[s] for s in slots], positions), slots, strict=True
        ):
            self.tokens[slot].append(choice.token)
            self.logprobs[slot].append(choice.logprob)
            self._states[slot].append(choice.token)
        return self._inner.sample(logits, slots, positions)


@pytest.mark.parametrize("tp", [2])
def test_ranks(model, alone, tp: int) -> None:
    assert replies_of_ranks(opened(model), tp, PROMPTS, 3) == alone


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_graphs_change_nothing(model, alone) -> None:
    run = opened(model)
    assert replies(runner(run, 64, 3, graphs=False), PROMPTS, 3) == alone
    assert replies(runner(run, 64, 3, graphs=True), PROMPTS, 3) == alone


@pytest.mark.skipif(not ON_GPU, reason="too slow interpreted")
@pytest.mark.parametrize("kv_heads, tp", [(8, 1), (8, 2), (8, 3), (8, 4), (8, 5), (8, 8), (3, 2), (3, 3)])
def test_degrees(tmp_path, kv_heads: int, tp: int) -> None:
    shape = {"hidden": 512, "layers": 2, "heads": kv_heads * 2, "kv_heads": kv_heads, "head_dim": 64}
    run = opened(write_folder(tmp_path, ffn=1312, vocab=1000, **shape))
    assert replies_of_ranks(run, tp, PROMPTS, 8) == replies(runner(run, 64, 3), PROMPTS, 8)
