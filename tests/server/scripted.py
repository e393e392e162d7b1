"""What the gateway's tests put in the place of a model: a byte tokenizer and an engine with a script."""

import asyncio
import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from runtime.types import (
    Branch,
    EngineInfo,
    Finished,
    FinishReason,
    Load,
    Request,
    ScoreOutput,
    TokenLogprob,
    TokenOutput,
    TokenScore,
)

BOS, EOS = 256, 257


class PieceTokenizer:
    """Tokens 0..255 are bytes, then BOS and EOS, then whatever pieces of bytes the test gives."""

    def __init__(self, pieces: Sequence[bytes] = ()):
        self._pieces = [bytes([byte]) for byte in range(256)] + [b"", b""] + list(pieces)
        self.vocab_size = len(self._pieces)
        self.bos_id = BOS
        self.eos_ids = (EOS,)
        self.add_bos = True

    def encode(self, text, *, add_special=True, parse_special=False):
        ids = list(text.encode())
        if parse_special and text.endswith("</s>"):
            ids = [*ids[:-4], EOS]
        return [BOS, *ids] if add_special else ids

    def fewest_tokens(self, text):
        return len(text.encode()) // 2

    def decode(self, ids, *, skip_special=True):
        special = {BOS: b"" if skip_special else b"<s>", EOS: b"" if skip_special else b"</s>"}
        return b"".join(special.get(token, self._pieces[token]) for token in ids).decode(errors="replace")

    def stream(self, skip_special=True, prompt_ids=()):
        return _Stream(self._pieces)


class _Stream:
    def __init__(self, pieces):
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token):
        return self._decoder.decode(self._pieces[token])

    def finish(self):
        return self._decoder.decode(b"", final=True)


@dataclass
class ScriptedEngine:
    """Replies to every request with `reply`, choice c beginning c tokens later in it, round about. Goes on
    after tokens that a request brings. Behaves as the protocol of EngineClient says, and like an engine with
    steps in flight it sends `overrun` more tokens after it was told to stop."""

    reply: Sequence[int] = ()
    pace: float = 0.0  # seconds a token
    overrun: int = 1
    refuse: Exception | None = None  # raised in place of a reply
    ending: FinishReason | None = None  # in place of LENGTH
    hang: bool = False  # after the reply's tokens, wait until the deadline or an abort
    gate: asyncio.Event | None = None  # while it is not set, a choice gets no more than `held` tokens
    held: int = 1
    cached: int = 0
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    stopped: dict[str, int] = field(default_factory=dict)  # choice c of request r as "r", "r/1", ...
    dies: int | None = None  # the tokens after which it fails, each time it is asked; of scores, how often
    running: int = 0
    sent: int = 0

    async def info(self):
        return info_for(PieceTokenizer())

    async def load(self):
        return Load(self.running, 3, 40, 64, 8, 100, 1000, 50, 200, 2)

    async def stop_at(self, request_id, keep, choice=0):
        self.stopped[_name(request_id, choice)] = keep

    async def generate(self, request):
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        self.running += 1
        done = False
        try:
            async for output in self._outputs(request):
                yield output
            done = True
        finally:
            self.running -= 1
            if not done:
                self.aborted.append(request.request_id)

    async def _outputs(self, request: Request):
        """All branches, a token each in turn; or the scores of the prompt, two at a time."""
        if request.scores:
            if self.dies is not None:
                self.dies -= 1
                if self.dies >= 0:
                    yield Finished(request.request_id, FinishReason.ERROR, 3, 0, 0, detail="rank 1 is gone")
                    return
            for first in range(1, len(request.prompt), 2):
                await asyncio.sleep(self.pace)
                run = request.prompt[first : first + 2]
                scores = (TokenScore(*self._logprobs(request, token)) for token in run)
                yield ScoreOutput(request.request_id, first, tuple(scores))
            yield Finished(request.request_id, FinishReason.LENGTH, len(request.prompt), 0, 0)
            return
        running = [self._branch(request, branch) for branch in request.branches]
        while running:
            for branch in list(running):
                output = await anext(branch)
                if isinstance(output, Finished):
                    running.remove(branch)
                    output = replace(output, last=not running)
                yield output

    async def _branch(self, request: Request, branch: Branch):
        def finished(reason, tokens, stop_token=None):
            detail = "rank 1 is gone" if reason is FinishReason.ERROR else ""
            return Finished(
                request.request_id,
                reason,
                len(request.prompt),
                self.cached,
                tokens,
                stop_token,
                detail,
                branch.choice,
            )

        name = _name(request.request_id, branch.choice)
        ends_at = asyncio.get_running_loop().time() + (request.deadline or 1e9)
        overrun = self.overrun
        tokens = [*self.reply[branch.choice :], *self.reply[: branch.choice]][: request.params.max_tokens]
        assert tuple(tokens[: len(branch.reply)]) == branch.reply, "goes on with another reply"
        for index, token in enumerate(tokens):
            if index < len(branch.reply):
                continue
            if self.gate is not None and index >= self.held:
                await self.gate.wait()
            if self.dies is not None and index - len(branch.reply) >= self.dies:
                yield finished(FinishReason.ERROR, index)
                return
            await asyncio.sleep(self.pace)
            if asyncio.get_running_loop().time() > ends_at:
                yield finished(FinishReason.DEADLINE, index)
                return
            if name in self.stopped:
                if overrun == 0:
                    yield finished(FinishReason.STOP, self.stopped[name])
                    return
                overrun -= 1
            self.sent += 1
            yield TokenOutput(
                request.request_id, index, token, *self._logprobs(request, token), branch.choice
            )
            if token in request.stop_ids and index >= request.params.min_tokens:
                yield finished(FinishReason.STOP, index + 1, token)
                return
        while self.hang:
            await asyncio.sleep(0.01)
            if asyncio.get_running_loop().time() > ends_at:
                yield finished(FinishReason.DEADLINE, len(tokens))
                return
        yield finished(self.ending or FinishReason.LENGTH, len(tokens))

    def _logprobs(self, request: Request, token: int):
        wanted = request.params.logprobs
        if wanted is None:
            return None, ()
        return -0.5 - token, tuple(TokenLogprob(token + rank, -0.5 - token - rank) for rank in range(wanted))


def _name(request_id: str, choice: int) -> str:
    return f"{request_id}/{choice}" if choice else request_id


def info_for(tokenizer, context_length: int = 4096) -> EngineInfo:
    return EngineInfo(
        model="scripted",
        numerics="test-numerics",
        context_length=context_length,
        vocab_size=tokenizer.vocab_size,
        tp=2,
        units=3,
        block_size=64,
        total_blocks=64,
        max_num_seqs=8,
        rank_nodes=("here", "there"),
    )
