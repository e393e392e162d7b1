"""The gateway over a real vocabulary and chat template (Llama's SPM vocabulary, Mistral's form)."""

import asyncio

import pytest

from runtime.server.lifecycle import serve
from runtime.server.pipeline import Pipeline
from runtime.tokenizer import template as templates
from runtime.tokenizer.chat import render_chat
from runtime.tokenizer.load import load_tokenizer
from runtime.tokenizer.template import ChatTemplate
from runtime.weights.gguf import read_gguf
from tests.server.scripted import ScriptedEngine, info_for
from tests.support import fixture_path
from tramontane import AsyncClient, FinishReason, InvalidRequest

ANSWER = "Paris, naturally \u2014 la Ville Lumi\u00e8re \U0001f5fc. Anything else?"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(read_gguf(fixture_path("tokenizers/ggml-vocab-llama-spm.gguf")).metadata)


@pytest.fixture(scope="module")
def template(tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "WALL_SECONDS", 120.0)  # a machine may stall for some of the usual ten
        made = ChatTemplate(tokenizer.chat_template, bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    yield made
    made.close()


def chat(tokenizer, template, reply, messages, **options):
    """The reply to a conversation, and the engine that was asked."""

    async def go():
        engine = ScriptedEngine(reply)
        server = await serve(Pipeline(tokenizer, template, engine, info_for(tokenizer)), port=0)
        await server.ready()
        try:
            async with AsyncClient(f"127.0.0.1:{server.port}") as client:
                tokens = await client.tokenize(messages)
                return await client.chat(messages, **options), engine, tokens
        finally:
            await server.stop()

    return asyncio.run(go())


def test_a_conversation_becomes_the_templates_prompt(tokenizer, template):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    reply = tokenizer.encode(" " + ANSWER, add_special=False)
    got, engine, tokens = chat(tokenizer, template, [*reply, *tokenizer.eos_ids], messages)
    assert got.text.strip() == ANSWER
    assert (got.finish_reason, got.stop_token_id) == (FinishReason.STOP, tokenizer.eos_ids[0])
    prompt = engine.requests[0].prompt
    assert list(prompt) == tokens == render_chat(tokenizer, template, messages)
    assert tokenizer.decode(prompt).strip() == "[INST] What is the capital of France? [/INST]"
    assert got.usage.prompt_tokens == len(prompt)


def test_stop_strings_work_on_real_tokens(tokenizer, template):
    reply = tokenizer.encode(ANSWER, add_special=False)
    messages = [{"role": "user", "content": "Where?"}]
    got, _, _ = chat(tokenizer, template, reply, messages, stop=["\U0001f5fc", "zzz"])
    assert got.text.strip() == ANSWER[: ANSWER.index("\U0001f5fc")].strip()
    assert got.stop_string == "\U0001f5fc"
    assert got.token_ids == tuple(reply[: got.usage.completion_tokens])
    assert tokenizer.decode(got.token_ids).endswith("\U0001f5fc")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages: "),
        ([{"role": "", "content": "x"}], "messages[0].role: "),
        ([{"role": "assistant", "content": "x"}], "messages: "),
    ],
)
def test_conversations_that_the_template_refuses(tokenizer, template, messages, field):
    with pytest.raises(InvalidRequest) as caught:
        chat(tokenizer, template, [1], messages)
    assert str(caught.value).startswith(field)
