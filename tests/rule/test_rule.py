"""A reply is a pure function: the same bits alone or in company, for any chunks, caches, blocks and ranks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from runtime.types import FinishReason
from tests.replies import Reply, ask_all, ask_in_turn
from tests.rule.engines import assert_same, at_once, check_idle, engine, plain_replies
from tests.rule.requests import named, others, requests
from tests.support import fixture_path

# Each cuts quant blocks inside units or leaves a unit without FFN channels, and each takes another road
# through the operators: fp32 throughout; int4 throughout; int4, bf16 and K-quants mixed, over eight units.
MODELS = {
    "fp32-u3": {"types": "F32", "heads": 6, "kv_heads": 3, "head_dim": 16, "hidden": 96, "ffn": 172},
    "q4-u3": {
        "types": {"*": "Q4_1", "token_embd": "Q8_0", "output": "Q8_0"},
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 32,
        "hidden": 288,
        "ffn": 480,
    },
    "mixed-u8": {
        "types": {"*": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q3_K", "ffn_gate": "Q5_K", "output": "Q2_K"},
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 16,
        "hidden": 256,
        "ffn": 1280,
        "layers": 2,
        "vocab": 389,
    },
    "window-u4": {
        "types": {"*": "Q8_0", "attn_output": "Q5_1", "ffn_up": "BF16"},
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "hidden": 256,
        "ffn": 96,
        "metadata": {"llama.attention.sliding_window": 33},
    },
}
UNITS = {"fp32-u3": 3, "q4-u3": 3, "mixed-u8": 8, "window-u4": 4}
CONTEXT = 256


class Case:
    """A model, its requests, and their plain replies."""

    def __init__(self, path: Path, vocab: int, context: int, **sizes):
        self.path, self.vocab, self.context = path, vocab, context
        self.requests = requests(vocab, context, **sizes)
        self.replies = plain_replies(path, self.requests)

    def compare(self, *, company: int = 0, rounds: int = 1, in_turn: bool = False, **settings) -> list:
        """Serve the requests in some setting, `rounds` times, and compare. Returns the last round's load."""
        loads = []
        with engine(self.path, **settings) as made:
            for n in range(rounds):
                asked = named(self.requests, f".{n}")

                async def serve(asked=asked) -> list[Reply]:
                    if in_turn:
                        return await ask_in_turn(made.client, asked)
                    crowd = others(self.vocab, self.context, company)
                    everyone = [*asked[::2], *crowd, *asked[1::2]]
                    replies = await at_once(made, ask_all(made.client, everyone), len(everyone))
                    evens = replies[: len(asked[::2])]
                    odds = replies[len(asked[::2]) + company :]
                    mixed = [None] * len(asked)
                    mixed[::2], mixed[1::2] = evens, odds
                    return mixed

                assert_same(asyncio.run(serve()), self.replies)
                loads.append(asyncio.run(made.client.load()))
            check_idle(made)
        return loads


@pytest.fixture(scope="module", params=MODELS)
def case(request, tiny) -> Case:
    shape = MODELS[request.param]
    made = Case(tiny(context=CONTEXT, **shape), shape.get("vocab", 384), CONTEXT)
    made.units = UNITS[request.param]
    return made


def test_the_requests_are_worth_asking(case):
    """They stop and run out, repeat and vary, and their logprobs are numbers."""
    reasons = {reply.reason for reply in case.replies}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    assert len({reply.tokens for reply in case.replies}) == len(case.replies)
    chosen = [lp for reply in case.replies for lp in reply.logprobs if lp is not None]
    assert len(chosen) > 60 and all(-60 < lp <= 0 for lp in chosen)
    assert len(set(chosen)) > 50


def test_together(case):
    case.compare()


def test_among_16_others(case):
    case.compare(company=16, max_num_seqs=40)


@pytest.mark.parametrize("chunk", [7, 64])
def test_prompts_in_chunks(case, chunk):
    case.compare(max_chunk=chunk, company=4)


def test_a_small_step_budget(case):
    case.compare(max_step_tokens=13, max_num_seqs=5, prefix_cache=False)


@pytest.mark.parametrize("block", [16, 64])
def test_cold_and_warm_prefix_cache(case, block):
    loads = case.compare(rounds=2, block_size=block, in_turn=block == 64)
    gained = loads[1].prefix_hit_tokens - loads[0].prefix_hit_tokens
    assert gained > 100  # the second round found the first one's blocks


@pytest.mark.parametrize("block", [1, 8, 128])
def test_other_block_sizes(case, block):
    case.compare(block_size=block)


def test_preemption(case):
    """KV for little more than one full context: sequences are thrown out and computed again."""
    loads = case.compare(company=8, block_size=8, total_blocks=36, max_num_seqs=24)
    assert loads[0].preemptions >= 2


@pytest.mark.parametrize("threads", [2, 4])
def test_threads(case, threads):
    case.compare(threads=threads)


def test_ranks(case):
    """Any number of them, even or not, up to one a unit."""
    for tp in {2, 3, 5, 7, 8}:
        if tp <= case.units:
            case.compare(tp=tp, company=3, max_chunk=50)


def test_ranks_alone(case):
    case.compare(tp=2, in_turn=True)


def test_ranks_and_everything_at_once(case):
    settings = {"max_chunk": 13, "block_size": 16, "total_blocks": 24, "max_num_seqs": 24}
    loads = case.compare(tp=3, company=12, **settings)
    assert loads[0].preemptions


@pytest.fixture(scope="module", params=["f32", "pad256.Q4_K_M", "pad256.Q8_0"])
def stories(request) -> Case:
    path = fixture_path(
        f"stories260K/stories260K{'-' if 'pad' in request.param else '.'}{request.param}.gguf"
    )
    return Case(path, 512, 256, count=7, longest=24)


@pytest.mark.parametrize(
    "setting",
    [
        {"company": 16, "max_num_seqs": 32},
        {"max_chunk": 7},
        {"max_chunk": 64, "block_size": 16, "rounds": 2},
        {"tp": 2, "company": 4, "max_chunk": 64},
        {"tp": 3, "block_size": 16, "total_blocks": 18, "max_chunk": 7},
        {"tp": 4},
    ],
    ids=str,
)
def test_a_trained_model(stories, setting):
    stories.compare(max_model_len=256, **setting)


@pytest.fixture(scope="module")
def chat(smollm2) -> Case:
    return Case(smollm2, 49152, 160, count=4, longest=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {"company": 8, "max_num_seqs": 12},
        {"max_chunk": 7, "tp": 2},
        {"max_chunk": 64, "block_size": 16, "rounds": 2},
        {"tp": 3, "company": 3},
    ],
    ids=str,
)
def test_smollm2(chat, setting):
    chat.compare(max_model_len=160, total_blocks=160, **{"block_size": 16, **setting})
