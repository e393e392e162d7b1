"""The models of the suite: tiny ones written on the spot, real ones where they lie, each read once a cut.

What differs between two ways to run is settings, never weights: the shards of each cut are kept,
and a way makes only runners (KV cache, state) over them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import pytest
import torch

from runtime.capacity import kv_blocks
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.local import LocalClient, LocalRanks, local_runners
from runtime.loop import EngineLoop
from runtime.model.drafter import Ask, Drafter
from runtime.model.header import open_model
from runtime.model.load import engine_info, load_shard
from runtime.model.runners import StepRunner
from runtime.threads import use_threads
from runtime.tokenizer.load import load_tokenizer
from runtime.types import Request
from tests.conformance.plain import Plain
from tests.conformance.requests import growing, request_list
from tests.conformance.watch import Watch
from tests.support import fixture_path, smollm2_path
from tests.weights.tiny import write_tiny_llama

CONTEXT = 560  # most tokens of prompt and reply: past two segments of attention in fp32, four elsewhere
LARGE_CONTEXT = 300  # the same of models that take their time: past two segments

# Shapes whose cuts are uneven, each on another road through the operators: int4 throughout, over eight units;
# int4, bf16 and K-quants mixed, over three of which one has fewer FFN channels; fp32 throughout, over five.
TINY = {
    "int4-u8": {
        "types": {"*": "Q4_0", "token_embd": "Q8_0", "output": "Q8_0"},
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 32,
        "hidden": 128,
        "ffn": 352,
    },
    "mixed-u3": {
        "types": {"*": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q4_1", "ffn_up": "Q5_0", "ffn_down": "Q8_0"},
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 32,
        "hidden": 256,
        "ffn": 224,
    },
    "fp32-u5": {"types": "F32", "heads": 10, "kv_heads": 5, "head_dim": 16, "hidden": 160, "ffn": 172},
}
REAL = (
    "stories260K/stories260K.f32.gguf",
    "stories260K/stories260K-pad256.Q4_K_M.gguf",
    "smollm2/smollm2-135m-pad768.Q4_K_M.gguf",
)


def write_tiny(name: str, folder: Path) -> Path:
    """One of TINY as a file in `folder`."""
    return write_tiny_llama(folder / f"{name}.gguf", context=CONTEXT, **TINY[name])


def real_paths() -> Iterator[Path | str]:
    """The real models that are there; for each that is not, the line that says so."""
    for find, name in [*((fixture_path, name) for name in REAL), (smollm2_path, None)]:
        try:
            yield find(name) if name else find()
        except pytest.skip.Exception as missing:
            yield str(missing)


class Model:
    """A model that is read once for each number of ranks, its requests, and their plain replies."""

    def __init__(self, path: Path, *, longest: int = 8, every: int = 1, context: int = CONTEXT):
        """`longest`: tokens of a reply. `every`: only every so many-th of the requests. `context`: most
        tokens of prompt and reply, if the model has so many."""
        self.path = path
        self.config = ModelConfig(str(path))
        self.opened = open_model(self.config)
        self.units = len(self.opened.units)
        self.layers = self.opened.spec.layers
        self.context = min(context, self.opened.spec.context_length)
        self.tokenizer = load_tokenizer(self.opened.checkpoint.metadata, file=str(path))
        self.requests: list[Request] = request_list(
            self.tokenizer.encode, self.opened.spec.vocab, self.context, longest=longest
        )[::every]
        self.growing = growing(self.requests, 5 * longest)
        self._shards: dict[tuple[int, int], list] = {}
        self._reading = threading.Lock()

    @cached_property
    def plain(self) -> Plain:
        return Plain(self.shards(1)[0], self.context)

    def room(self, requests: Sequence[Request], block_size: int) -> int:
        """Blocks for the largest of the requests alone, and two more: all of them together have to fight."""
        return 2 + max(-(-(len(r.prompt) + r.params.max_tokens) // block_size) for r in requests)

    def shards(self, tp: int, pp: int = 1) -> list:
        with self._reading:
            if (tp, pp) not in self._shards:
                self._shards[tp, pp] = [
                    load_shard(self.opened, rank, tp, pp=pp)[0] for rank in range(tp * pp)
                ]
            return self._shards[tp, pp]

    def settle(self, config: EngineConfig, tp: int, pp: int = 1) -> EngineConfig:
        """The settings as an engine would take them: block size checked, context filled in."""
        return kv_blocks(self.opened, config, ParallelConfig(tp=tp, pp=pp, device="cpu"), self.context)

    def runners(self, config: EngineConfig, tp: int, pp: int = 1, draft: str = "") -> list[StepRunner]:
        """draft: "" for none; "right", the model itself, whose guesses all stand; "doubtful", the same with
        every third or so guess replaced."""
        shards = self.shards(tp, pp)
        made = local_runners(shards, tp, config, self.context, shards if draft else None)
        if draft == "doubtful":
            for runner in made:
                runner._drafter = Doubtful(runner._drafter, self.opened.spec.vocab)
        return made

    @contextmanager
    def serving(
        self, *, tp: int = 1, pp: int = 1, threads: int = 1, draft: str = "", **settings
    ) -> Iterator[Serving]:
        """An engine at work in this process, as `LocalEngine` puts it together."""
        if draft:
            settings["draft_cost"] = 0.0  # guesses are tried as long as a third of them is right
        config = EngineConfig(**settings)
        if not config.total_blocks:  # room for 16 full contexts, not the machine's memory
            blocks = -(-self.context // config.block_size) * 16
            config = EngineConfig(**{**settings, "total_blocks": blocks})
        config = self.settle(config, tp, pp)
        before = torch.get_num_threads()
        use_threads(threads, 1, "cpu")
        loop = EngineLoop(config, LocalRanks(self.runners(config, tp, pp, draft)), self.opened.spec.vocab)
        watch = Watch(loop._engine)
        loop.start()
        try:
            info = engine_info(self.opened, self.config, config, tp, pp=pp)
            yield Serving(loop, LocalClient(loop, info), config, watch)
        finally:
            loop.close()
            torch.set_num_threads(before)


class Doubtful:
    """A drafter whose guesses are at times replaced, on every rank by the same."""

    def __init__(self, drafter: Drafter, vocab: int):
        self._drafter = drafter
        self._vocab = vocab
        self.written, self.follow = drafter.written, drafter.follow

    def guess(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [
            [
                token if (token + len(ask.tokens) + ahead) % 3 else (token + 1) % self._vocab
                for ahead, token in enumerate(tokens)
            ]
            for ask, tokens in zip(asks, self._drafter.guess(asks), strict=True)
        ]


class Serving:
    """A running loop and the client that talks to it."""

    def __init__(self, loop: EngineLoop, client: LocalClient, config: EngineConfig, watch: Watch):
        self.loop = loop
        self.client = client
        self.config = config
        self.watch = watch
