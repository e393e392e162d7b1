"""The loop between an engine and its ranks: whatever fails, every stream ends and nobody waits for ever."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from runtime.config import EngineConfig
from runtime.errors import InvalidArgument, TramontaneError, Unavailable
from runtime.local import LocalClient
from runtime.loop import EngineLoop
from runtime.types import (
    FinishReason,
    Load,
    Output,
    SampledToken,
    StepPlan,
    StepResult,
    TokenOutput,
)
from tests.replies import greedy

AT_ONCE = 60.0  # seconds for what is to happen at once: a loaded machine may stand still for several
CONFIG = EngineConfig(block_size=4, total_blocks=64, max_num_seqs=4, max_model_len=128, max_waiting=8)


class Ranks:
    """Ranks that sample token 7, or do what a test tells them."""

    def __init__(self, answer: Callable[[StepPlan], StepResult] | None = None):
        self.answer = answer or honest
        self.plans: list[StepPlan] = []
        self.closed = threading.Event()

    def start(self, on_result: Callable[[StepResult], None], on_lost: Callable[[str], None]) -> None:
        self.on_result, self.on_lost = on_result, on_lost

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.on_result(self.answer(plan))

    def close(self) -> None:
        self.closed.set()


def honest(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, tuple(SampledToken(chunk.slot, 7) for chunk in plan.chunks if chunk.samples))


def fails(plan: StepPlan) -> StepResult:
    raise RuntimeError("a defect")


class Stream:
    """Takes what a request gets."""

    def __init__(self):
        self.inbox: queue.SimpleQueue[Output | TramontaneError] = queue.SimpleQueue()

    def __call__(self, output: Output | TramontaneError) -> None:
        self.inbox.put(output)

    def rest(self) -> list[Output | TramontaneError]:
        """All until the end, which has to come."""
        seen = [self.inbox.get(timeout=AT_ONCE)]
        while isinstance(seen[-1], TokenOutput):
            seen.append(self.inbox.get(timeout=AT_ONCE))
        return seen


@pytest.fixture
def running() -> Iterator[Callable[[Ranks], EngineLoop]]:
    loops: list[EngineLoop] = []

    def start(ranks: Ranks) -> EngineLoop:
        loop = EngineLoop(CONFIG, ranks, 100)
        loops.append(loop)
        loop.start()
        return loop

    yield start
    for loop in loops:
        loop.close()


def ask(loop: EngineLoop, *args, **more) -> Stream:
    stream = Stream()
    loop.add(greedy(*args, **more), stream)
    return stream


def on_its_thread(loop: EngineLoop, call: Callable[[], object]) -> object:
    """What `call` returns on the thread that owns the engine."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    loop._post(lambda: answers.put(call()))
    return answers.get(timeout=AT_ONCE)


def rests(loop: EngineLoop) -> None:
    """Wait until there is nothing left to do, what follows a reply's end included."""
    while on_its_thread(loop, lambda: loop._engine.has_work):
        pass


@pytest.mark.parametrize("sound", [True, False])
def test_the_engine_s_state_is_checked_when_nothing_runs(running, monkeypatch, sound):
    """A block with an owner too many would be given away or lost: the engine must not go on."""
    monkeypatch.setattr("runtime.loop.IDLE", 3600.0)
    loop = running(Ranks())
    checked = queue.SimpleQueue()
    check = loop._engine.check
    monkeypatch.setattr(loop._engine, "check", lambda: (checked.put(None), check()))
    lost = queue.SimpleQueue()
    loop.on_lost = lost.put
    ask(loop, "r", (1, 2, 3), 5).rest()
    rests(loop)
    assert checked.empty(), "it was not idle for long enough yet"
    if not sound:
        references = loop._engine._scheduler.pool.references
        on_its_thread(loop, lambda: references.__setitem__(0, references[0] + 1))
    monkeypatch.setattr("runtime.loop.IDLE", 0.1)
    rests(loop)  # from now on it waits for the shorter time
    checked.get(timeout=AT_ONCE)
    if sound:
        ask(loop, "again", (1, 2, 3), 5).rest()
        checked.get(timeout=AT_ONCE)
        assert lost.empty()
    else:
        assert "IntegrityError" in lost.get(timeout=AT_ONCE)


def test_a_reply(running):
    ranks = Ranks()
    loop = running(ranks)
    *tokens, end = ask(loop, "r", (1, 2, 3), 5).rest()
    assert [t.token for t in tokens] == [7] * 5
    assert (end.reason, end.prompt_tokens, end.completion_tokens) == (FinishReason.LENGTH, 3, 5)
    loop.close()
    assert ranks.closed.wait(AT_ONCE)


def wrong_step(plan: StepPlan) -> StepResult:
    return StepResult(plan.step + 1, honest(plan).tokens)


def too_many_tokens(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, (*honest(plan).tokens, SampledToken(0, 7)))


def another_slot(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, tuple(SampledToken(t.slot + 1, t.token) for t in honest(plan).tokens))


@pytest.mark.parametrize("answer", [fails, wrong_step, too_many_tokens, another_slot])
def test_ranks_that_fail_or_lie_end_every_stream(running, answer):
    loop = running(Ranks(answer))
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    loop.on_lost = lost.put
    streams = [ask(loop, f"r{i}", (1, i), 50) for i in range(6)]
    for stream in streams:
        end = stream.rest()[-1]
        failed = isinstance(end, Unavailable)  # it came after the others had ended
        assert failed or (end.reason is FinishReason.ERROR and end.detail)
    assert lost.get(timeout=AT_ONCE)
    later = ask(loop, "later", (1,), 5).rest()
    assert isinstance(later[-1], Unavailable)


def test_who_asks_later_hears_of_a_loss_too(running):
    loop = running(Ranks(fails))
    assert ask(loop, "r", (1,), 5).rest()
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    loop.when_lost(heard.put)
    assert heard.get(timeout=AT_ONCE)
    loop.close()
    loop.when_lost(heard.put)
    assert heard.get(timeout=AT_ONCE) == "the engine was stopped"


def test_lost_ranks_end_every_stream_once(running):
    on_the_way, told = threading.Event(), threading.Event()

    def answer(plan: StepPlan) -> StepResult:
        if plan.step == 5:  # amid the reply, which goes no further until the loss is known
            on_the_way.set()
            assert told.wait(AT_ONCE)
        return honest(plan)

    loop = running(Ranks(answer))
    stream = ask(loop, "r", (1, 2), 120)
    assert on_the_way.wait(AT_ONCE)
    loop.ranks_lost("rank 1 is lost: it hung up")
    loop.ranks_lost("rank 0 is lost: it hung up too")
    told.set()
    *tokens, end = stream.rest()
    assert 0 < len(tokens) < 120
    assert (end.reason, end.detail) == (FinishReason.ERROR, "rank 1 is lost: it hung up")
    on_its_thread(loop, lambda: None)  # the second loss has been heard
    assert stream.inbox.empty()


def test_a_receiver_that_is_gone_harms_nobody_else(running):
    loop = running(Ranks())

    def gone(output: Output) -> None:
        raise RuntimeError("Event loop is closed")

    for i in range(3):
        loop.add(greedy(f"gone{i}", (1, i), 100), gone)
    *tokens, end = ask(loop, "r", (1, 2), 60).rest()
    assert len(tokens) == 60 and end.reason is FinishReason.LENGTH
    loads: queue.SimpleQueue = queue.SimpleQueue()
    loop.load(loads.put)
    assert loads.get(timeout=AT_ONCE).running == 0


def test_closing_ends_what_runs_and_refuses_what_comes(running):
    ranks = Ranks()
    loop = running(ranks)
    answers: queue.SimpleQueue = queue.SimpleQueue()
    streams = [ask(loop, f"r{i}", (1, i), 100) for i in range(8)]
    loop.close()
    assert ranks.closed.wait(AT_ONCE)
    for stream in streams:
        end = stream.rest()[-1]
        assert isinstance(end, Unavailable) or end.reason in (FinishReason.ERROR, FinishReason.LENGTH)
    assert isinstance(ask(loop, "later", (1,), 5).rest()[-1], Unavailable)
    loop.load(answers.put)
    assert isinstance(answers.get(timeout=AT_ONCE), Unavailable)
    loop.check(answers.put)
    assert isinstance(answers.get(timeout=AT_ONCE), Unavailable)
    loop.abort("r0")
    loop.close()
    assert ranks.closed.is_set()


@pytest.mark.parametrize("keep", [-1, 101, 10**9])
def test_an_abort_that_makes_no_sense_is_ignored(running, keep):
    loop = running(Ranks())
    stream = ask(loop, "r", (1, 2), 100)
    loop.abort("r", FinishReason.STOP, keep)
    loop.abort("unknown", FinishReason.STOP, keep)
    assert stream.rest()[-1].reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "request_",
    [
        greedy("r", (1, 100), 5),
        greedy("r", (1, -1), 5),
        greedy("r", (1,), 5, (100,)),
        greedy("r", (1,), 5, logit_bias=((100, 1.0),)),
        greedy("r", (), 5),
        greedy("r", (1,), 0),
    ],
    ids=lambda request: "",
)
def test_what_cannot_be_served_is_refused_alone(running, request_):
    loop = running(Ranks())
    other, stream = ask(loop, "other", (1, 2), 100), Stream()
    loop.add(request_, stream)
    assert isinstance(stream.inbox.get(timeout=AT_ONCE), InvalidArgument)
    assert other.rest()[-1].reason is FinishReason.LENGTH


def test_an_idle_loop_makes_no_steps(running):
    ranks = Ranks()
    loop = running(ranks)
    ask(loop, "r", (1, 2), 5).rest()
    rests(loop)
    loads: queue.SimpleQueue = queue.SimpleQueue()
    steps = len(ranks.plans)
    for _ in range(20):
        loop.load(loads.put)
        loads.get(timeout=AT_ONCE)
    assert len(ranks.plans) == steps <= 8


def test_a_reply_that_could_hold_no_token_is_refused() -> None:
    loop = EngineLoop(CONFIG, Ranks(), 8)
    loop.start()
    try:
        bad, good = Stream(), Stream()
        loop.add(greedy("bad", (1,), 2, range(8), min_tokens=1), bad)
        assert (
            isinstance(error := bad.inbox.get(timeout=AT_ONCE), InvalidArgument)
            and error.field == "min_tokens"
        )
        loop.add(greedy("good", (1,), 2, range(7), min_tokens=1), good)
        assert isinstance(good.inbox.get(timeout=AT_ONCE), TokenOutput)
    finally:
        loop.close()


def test_an_answer_that_comes_late_harms_nobody() -> None:
    """Whoever asked for the load has gone, or their event loop has closed."""

    class Slow:
        def load(self, answer: Callable) -> None:
            self.answer = answer

    slow, problems = Slow(), []

    async def go() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, problem: problems.append(problem))
        asked = asyncio.create_task(LocalClient(slow, None).load())
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait([asked])
        slow.answer(Load(*[0] * 10))
        await asyncio.sleep(0)

    asyncio.run(go())
    slow.answer(Load(*[0] * 10))
    assert problems == []
