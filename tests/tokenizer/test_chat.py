"""Conversations to tokens: the template's control tokens are control tokens, a message's are text."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidArgument
from runtime.tokenizer import ChatTemplate, Tokenizer, default_template, render_chat
from runtime.tokenizer.chat import MISTRAL_TEMPLATE, guards
from tests.tokenizer.vocabularies import CHATML, bpe_metadata, spm_metadata, tiny_bpe, tiny_spm


@cache
def setup(kind: str) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = tiny_spm() if kind == "spm" else tiny_bpe()
    return tokenizer, ChatTemplate(tokenizer.chat_template, bos=tokenizer.bos_token, eos=tokenizer.eos_token)


def specials(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if tokenizer.is_special(token)]


PARTS = ["<|im_end|>", "<|im_start|>", "<|", "im_end", "|>", "<", "/s>", "s>", "</s>", "<s>", "<unk>",
         "[INST]", "<tool>", "|", " ", "\n", "the", "é", "\U0010fffd", "\U0010fffc"]  # fmt: skip
contents = st.lists(st.sampled_from(PARTS) | st.text(max_size=2)).map("".join).filter(lambda t: "▁" not in t)


@pytest.mark.parametrize("kind", ["spm", "bpe"])
@settings(max_examples=200, deadline=None)
@given(turns=st.lists(contents, min_size=1, max_size=4).filter(lambda turns: len(turns) % 2))
def test_messages_cannot_forge_control_tokens(kind, turns):
    tokenizer, template = setup(kind)
    messages = [
        {"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(turns)
    ]
    ids = render_chat(tokenizer, template, messages)
    harmless = render_chat(tokenizer, template, [message | {"content": "in"} for message in messages])
    assert specials(tokenizer, ids) == specials(tokenizer, harmless)
    # And each message's text is all there, as the template wrote it.
    text = template.render(messages)
    shown = tokenizer.decode(ids, skip_special=False)
    assert shown.replace(" ", "") == text.replace(" ", "")
    if kind == "bpe":
        assert shown == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_characters="<|▁", exclude_categories=["Cs"])))
def test_ordinary_messages_are_encoded_as_rendered(text):
    for kind in ("spm", "bpe"):
        tokenizer, template = setup(kind)
        messages = [{"role": "user", "content": text}]
        expected = tokenizer.encode(template.render(messages), parse_special=True)
        assert render_chat(tokenizer, template, messages) == expected


def test_no_doubled_bos():
    tokenizer, template = setup("spm")
    ids = render_chat(tokenizer, template, [{"role": "user", "content": "<s>the"}])
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    bare = ChatTemplate("[INST]{{ messages[0].content }}", bos="<s>", eos="</s>")
    assert render_chat(tokenizer, bare, [{"role": "user", "content": "a"}])[0] == tokenizer.bos_id


def test_a_role_can_be_part_of_a_control_token():
    """'<|' + role + '|>' as Zephyr writes it: composed by the template, so it counts."""
    tokenizer, _ = setup("bpe")
    template = ChatTemplate("{{ '<|im_' + ('end' if messages[0].role == 'user') + '|>' }}", bos="", eos="")
    assert render_chat(tokenizer, template, [{"role": "user", "content": ""}]) == [tokenizer.eos_ids[0]]


def test_templates_see_contents():
    """Trimming, testing and cutting a message's text work as they would on the text itself."""
    tokenizer, _ = setup("bpe")
    cut = "c.split('</think>')[-1] if '</think>' in c else c | length"
    source = "{% set c = messages[0].content | trim %}{{ " + cut + " }}"
    template = ChatTemplate(source, bos="", eos="")

    def answer(content):
        return tokenizer.decode(render_chat(tokenizer, template, [{"role": "user", "content": content}]))

    assert answer("  <think>a|b</think> <|im_end|> yes ") == " <|im_end|> yes"
    assert answer("  <|im_end|>  ") == str(len("<|im_end|>"))


def test_generation_prompt():
    tokenizer, template = setup("bpe")
    messages = [{"role": "user", "content": "hi"}]
    with_prompt = render_chat(tokenizer, template, messages)
    without = render_chat(tokenizer, template, messages, add_generation_prompt=False)
    assert with_prompt[: len(without)] == without
    assert tokenizer.decode(with_prompt[len(without) :], skip_special=False) == "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages: "),
        ([{"role": "end", "content": "x"}], "messages[0].role: "),
        ([{"content": "x"}], "messages[0].role: "),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1].content: not a text"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content: not a text"),
        ([{"role": "user", "content": "a\udfff"}], "messages[0].content: not valid Unicode at character 1"),
    ],
)
def test_malformed_messages(messages, reason):
    with pytest.raises(InvalidArgument) as caught:
        render_chat(*setup("bpe"), messages)
    assert str(caught.value).startswith(reason)


def test_default_template():
    assert default_template(bpe_metadata()) == CHATML
    assert default_template(spm_metadata()) == MISTRAL_TEMPLATE
    assert default_template(spm_metadata() | {"tokenizer.chat_template": "x"}) == "x"
    assert default_template(bpe_metadata() | {"tokenizer.chat_template": ""}) is None


@given(names=st.lists(st.text(min_size=1)))
def test_each_name_holds_a_guard(names):
    found = guards(names)
    assert all(set(name) & set(found) for name in names)
    assert len(set(found)) == len(found) <= len(names)
