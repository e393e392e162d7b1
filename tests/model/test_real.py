"""Real models: stories260K to the letter, SmolLM2 against the reference, and known answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.local import LocalEngine
from runtime.tokenizer import Tokenizer, load_tokenizer
from runtime.weights.gguf import read_gguf
from tests.model.driver import forward_of, logits, opened, run
from tests.model.reference import Reference, divergence
from tests.replies import ask_all, greedy
from tests.support import fixture_path

# Prose, a conversation, code, and another language: written for this test.
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening before the sun went down. He carried a can of "
    "oil in one hand and a book in the other, because the nights were long and the sea had little to say. "
    "On the third of November a storm came up from the south, and for the first time in twenty years the "
    "lamp did not burn.",
    "<|im_start|>user\nHow many days are there in a leap year, and why?<|im_end|>\n<|im_start|>assistant\n"
    "A leap year has 366 days, one more than other years. The Earth takes about 365.25 days to go around the "
    "Sun, so an extra day every four years keeps the calendar in step with the seasons.<|im_end|>\n",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    "
    "return total / len(values) if values else float('nan')\n",
    "Le chat dort sur la table de la cuisine pendant que la pluie tombe sur le toit.",
)
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def tokenizer_of(path: Path) -> Tokenizer:
    return load_tokenizer(read_gguf(str(path)).metadata)


def greedy_text(path: Path, prompt: list[int], count: int, tokenizer: Tokenizer, stop_ids=()) -> str:
    engine = LocalEngine(ModelConfig(str(path)), EngineConfig(max_num_seqs=2), ParallelConfig(threads=1))
    try:
        [reply] = asyncio.run(ask_all(engine.client, [greedy("r", prompt, count, stop_ids)]))
    finally:
        engine.close()
    kept = [token for token in reply.tokens if token not in stop_ids]
    return tokenizer.decode(kept)


@pytest.fixture(scope="module")
def stories() -> tuple[Path, str, Tokenizer]:
    path = fixture_path("stories260K/stories260K.f32.gguf")
    text = fixture_path("stories260K/expected_greedy.txt").read_text()
    return path, text, tokenizer_of(path)


def test_stories_to_the_letter(stories):
    path, text, tokenizer = stories
    got = greedy_text(path, [1], 256, tokenizer)
    assert len(text) > 450
    assert got.strip().startswith(text.strip())


def test_stories_from_a_folder_to_the_letter(stories):
    _, text, tokenizer = stories
    folder = fixture_path("stories260K/hf")
    assert greedy_text(folder, [1], 256, tokenizer).strip().startswith(text.strip())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q2_K"])
def test_quantised_stories_agree_with_the_reference(stories, name):
    """Files that llama.cpp quantised. Q8_0 keeps the text for 60 tokens."""
    path = fixture_path(f"stories260K/stories260K-pad256.{name}.gguf")
    _, text, tokenizer = stories
    tokens = [1, *tokenizer.encode(text)][:200]
    assert len(tokens) == 200
    reference = Reference(path).logits(tokens)
    exact = logits(opened(path, dtype="fp32"), tokens)
    assert divergence(reference, exact).max() < 1e-6
    kl = divergence(reference, logits(opened(path), tokens))
    # Q2_K's text is garbled, so what it predicts is near ties.
    assert kl.mean() < (2e-3 if name == "Q2_K" else 1e-3) and kl.max() < 2e-2
    if name == "Q8_0":
        got = greedy_text(path, [1], 60, tokenizer)
        assert len(got) > 100 and text.strip().startswith(got.strip())


def measure(path: Path, report) -> None:
    """KL of the served numerics to an fp32 reference over real text, teacher-forced; prints the agreement."""
    tokenizer, forward = tokenizer_of(path), forward_of(opened(path), 256)
    reference = Reference(path, torch.float32)
    kls, agreed = [], []
    for text in TEXTS:
        tokens = tokenizer.encode(text, parse_special=True)
        want, got = reference.logits(tokens), run(forward, tokens)
        kls.append(divergence(want, got))
        agreed.append(want.argmax(1) == got.argmax(1))
    kl, top1 = torch.cat(kls), torch.cat(agreed).double().mean().item()
    report(
        f"\n{path.name}: {kl.numel()} tokens, KL mean {kl.mean():.2e}, max {kl.max():.2e}, "
        f"top-1 agreement {top1:.1%}"
    )
    assert kl.numel() >= 150
    assert kl.min() > -1e-6
    assert kl.mean() <= 1e-3 and kl.max() <= 2e-2
    assert top1 >= 0.95


@pytest.mark.slow
def test_smollm2_agrees_with_the_reference(smollm2, capsys):
    with capsys.disabled():
        measure(smollm2, print)


@pytest.mark.slow
def test_padded_smollm2_agrees_with_the_reference(capsys):
    with capsys.disabled():
        measure(fixture_path("smollm2/smollm2-135m-pad768.Q4_K_M.gguf"), print)


def answer(path: Path) -> str:
    tokenizer = tokenizer_of(path)
    prompt = tokenizer.encode(QUESTION, parse_special=True)
    [end] = tokenizer.encode("<|im_end|>", parse_special=True)
    return greedy_text(path, prompt, 30, tokenizer, (end,))


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    assert answer(smollm2).startswith("The capital of France is Paris.")


@pytest.mark.slow
def test_padded_smollm2_knows_the_capital_of_france():
    path = fixture_path("smollm2/smollm2-135m-pad768.Q4_K_M.gguf")
    assert answer(path).startswith("The capital of France is Paris.")
