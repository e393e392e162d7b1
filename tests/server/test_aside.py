"""Calls that are no replies: they take turns, are refused where too many wait, and hold up no reply."""

import asyncio
import threading

import grpc
import pytest

from runtime.errors import QueueFull, Unavailable
from runtime.server.aside import Aside
from runtime.server.lifecycle import Limits
from tests.server.harness import ask, details, refusal, serving
from tests.server.scripted import ScriptedEngine
from tests.server.test_streams import until
from tramontane.v1 import inference_service_pb2 as pb


def hold_up(running, gate) -> list[str]:
    """Texts that are "slow" are encoded when `gate` opens, tokens decoded too. What has a thread is added to
    the list."""
    tokenizer = running.server._service._pipeline.tokenizer
    encode, decode = tokenizer.encode, tokenizer.decode
    begun = []

    def slow(text, **options):
        if "slow" in text:
            begun.append(text)
            assert gate.wait(200)
        return encode(text, **options)

    def slow_too(ids, **options):
        begun.append("ids")
        assert gate.wait(200)
        return decode(ids, **options)

    tokenizer.encode, tokenizer.decode = slow, slow_too
    return begun


TEXTS = [f"slow {number}" for number in range(39)]


def test_texts_that_take_long_hold_up_no_reply_and_are_bounded():
    gate = threading.Event()

    async def go():
        async with serving(ScriptedEngine(b"abc"), limits=Limits(max_aside=40)) as running:
            begun = hold_up(running, gate)
            calls = {text: running.stub.Tokenize(pb.TokenizeRequest(text=text)) for text in TEXTS}
            calls["ids"] = running.stub.Detokenize(pb.DetokenizeRequest(token_ids=[97]))
            await until(lambda: running.server._service._aside.waiting == 40 and len(begun) == 2)
            text = "".join([message.text async for message in running.stub.Generate(ask())])
            error = await refusal(running.stub.Tokenize(pb.TokenizeRequest(text="x")))
            refused = await refusal(running.stub.Detokenize(pb.DetokenizeRequest(token_ids=[97])))
            # Calls come in any order. This one waits for a thread, and needs none any more.
            left = next(text for text in TEXTS if text not in begun)
            calls.pop(left).cancel()
            await until(lambda: running.server._service._aside.waiting == 39)
            gate.set()
            answers = dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))
            assert left not in begun
            await until(lambda: running.server._service._aside.waiting == 0)
            return text, error, refused, answers

    try:
        text, error, refused, answers = asyncio.run(go())
    finally:
        gate.set()
    assert text == "abc"
    assert error.code() is refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["ErrorInfo"].reason == "QUEUE_FULL" and "40" in error.details()
    assert answers.pop("ids").text == "a" and len(answers) == 38
    assert all(bytes(answer.token_ids[1:]).decode() == text for text, answer in answers.items())


def test_nothing_is_left_at_the_end():
    gate = threading.Event()

    async def go():
        async with serving(ScriptedEngine()) as running:
            begun = hold_up(running, gate)
            calls = [running.stub.Tokenize(pb.TokenizeRequest(text="slow")) for _ in range(9)]
            await until(lambda: running.server._service._aside.waiting == 9 and len(begun) == 2)
            for call in calls:
                call.cancel()
            return running.server._service._aside

    try:
        aside = asyncio.run(go())
        assert aside.waiting == 2, "what has a thread keeps it"
    finally:
        gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("aside"):
            thread.join(120)
    assert aside.waiting == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("aside")]


def test_errors_come_through():
    async def go():
        aside, gate = Aside(1), threading.Event()
        try:
            with pytest.raises(ZeroDivisionError):
                await aside.run(lambda: 1 // 0)
            assert await aside.run(divmod, 7, 2) == (3, 1)
            waiting = asyncio.create_task(aside.run(gate.wait, 200))
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await aside.run(divmod, 7, 2)
            gate.set()
            assert await waiting
        finally:
            gate.set()
            aside.close()

    asyncio.run(go())


def test_an_engine_is_asked_once_how_busy_it_is():
    asked, answer = [], None

    class Slow(ScriptedEngine):
        async def load(self):
            asked.append(1)
            await answer.wait()
            if len(asked) > 1:
                raise Unavailable("the engine is gone")
            return await super().load()

    async def go():
        nonlocal answer
        answer = asyncio.Event()
        async with serving(Slow()) as running:
            reader, waiting = running.server._service._loads, []
            plain = reader.ask

            async def counted():
                waiting.append(1)
                try:
                    return await plain()
                finally:
                    waiting.pop()

            reader.ask = counted
            calls = [running.stub.GetLoad(pb.GetLoadRequest()) for _ in range(20)]
            await until(lambda: asked and len(waiting) == 20)
            calls[0].cancel()  # the others want to know all the same
            await until(lambda: len(waiting) == 19)
            answer.set()
            loads = await asyncio.gather(*calls[1:])
            assert len(asked) == 1 and {load.free_blocks for load in loads} == {40}
            error = await refusal(running.stub.GetLoad(pb.GetLoadRequest()))
            assert len(asked) == 2 and error.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(go())
