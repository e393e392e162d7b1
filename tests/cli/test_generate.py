"""`generate --local`: replies, all that is said of them, and that ranks cannot change them."""

from __future__ import annotations

import pytest

from runtime.commands.generate import _Screen
from runtime.server.reply import Final, Piece
from runtime.types import FinishReason
from tests.cli.command import refused, run
from tests.support import fixture_path
from tests.weights.tiny import write_tiny_llama


def generate(model, *options: str) -> dict:
    return run("generate", str(model), "--local", "--json", *options).json


def test_json_says_all_of_a_reply(tiny):
    reply = generate(tiny, "--prompt", "The", "--max-tokens", "5", "--ignore-eos", "--seed", "9")
    always = {"text", "token_ids", "finish_reason", "seed", "usage"}
    assert set(reply) == always | {"stop_string", "stop_token_id", "model", "numerics"}
    assert len(reply["token_ids"]) == 5
    assert reply["finish_reason"] == "length"
    assert reply["seed"] == 9
    assert reply["model"] == "tiny"
    assert reply["usage"]["completion_tokens"] == 5
    assert reply["usage"]["prompt_tokens"] >= 2  # a BOS and the word
    assert "fp32" in reply["numerics"]


def test_the_text_is_the_same_without_json(tiny):
    options = ["--prompt", "Once", "--max-tokens", "12", "--ignore-eos"]
    plain = run("generate", str(tiny), "--local", *options)
    assert plain.status == 0
    assert plain.out == generate(tiny, *options)["text"] + "\n"
    assert plain.err == ""  # no progress where nobody watches


def test_greedy_unless_a_temperature_is_given(tiny):
    options = ["--prompt", "x", "--max-tokens", "10", "--ignore-eos"]
    first, second = generate(tiny, *options), generate(tiny, *options)
    assert first["seed"] != second["seed"]
    assert first["token_ids"] == second["token_ids"]
    explicit = generate(tiny, *options, "--temperature", "0", "--seed", "1")
    assert explicit["token_ids"] == first["token_ids"]


def test_a_drawn_seed_gives_the_reply_again(tiny):
    options = ["--prompt", "x", "--max-tokens", "16", "--ignore-eos", "--temperature", "1"]
    drawn = generate(tiny, *options)
    again = generate(tiny, *options, "--seed", str(drawn["seed"]))
    other = generate(tiny, *options, "--seed", str(drawn["seed"] ^ 1))
    assert again == drawn
    assert other["token_ids"] != drawn["token_ids"]


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.2", "--top-k", "50", "--top-p", "0.95"]])
def test_replies_are_bit_equal_for_any_number_of_ranks(tiny, sampling):
    options = ["--prompt", "In an age", "--max-tokens", "20", "--seed", "7", "--logprobs", "3", *sampling]
    replies = [generate(tiny, *options, "--tp", str(tp)) for tp in (1, 2, 3)]
    assert replies[0] == replies[1] == replies[2]
    assert len(replies[0]["logprobs"]) == len(replies[0]["token_ids"])
    for entry in replies[0]["logprobs"]:
        top = [each["logprob"] for each in entry["top"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert entry["logprob"] <= top[0] <= 0


def test_a_stop_string_ends_the_reply_before_it(tiny):
    whole = generate(tiny, "--prompt", "x", "--max-tokens", "30", "--ignore-eos")["text"]
    stop = whole[len(whole) // 2 :][:2]
    reply = generate(
        tiny, "--prompt", "x", "--max-tokens", "30", "--ignore-eos", "--stop", stop, "--stop", "\x00"
    )
    assert reply["finish_reason"] == "stop"
    assert reply["stop_string"] == stop
    assert reply["text"] == whole[: whole.index(stop)]


def test_without_max_tokens_a_reply_takes_what_the_context_leaves(tiny):
    options = ["--prompt", "x", "--ignore-eos"]
    reply = generate(tiny, *options, "--max-model-len", "64")
    assert reply["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"] == 64


def test_chat_puts_the_prompt_into_the_template(tiny, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}:")
    options = ["--prompt", "hello", "--max-tokens", "8", "--ignore-eos"]
    templated = generate(tiny, *options, "--chat", "--chat-template", str(template))
    spelled = generate(tiny, "--prompt", "[user] hello:", *options[2:])
    plain = generate(tiny, *options)
    assert templated["token_ids"] == spelled["token_ids"] != plain["token_ids"]


def test_a_template_that_is_not_text(tiny, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_bytes(b"\xff\xfe\x00")
    options = ["--prompt", "hello", "--chat", "--local", "--chat-template", str(template)]
    refused(run("generate", str(tiny), *options), "chat-template", str(template))


def test_several_replies_to_a_prompt(tiny):
    options = [
        "--prompt",
        "Once",
        "--max-tokens",
        "12",
        "--temperature",
        "1",
        "--seed",
        "5",
        "--logprobs",
        "1",
    ]
    alone = generate(tiny, *options)
    several = generate(tiny, *options, "--n", "3")
    choices = several.pop("choices")
    assert len({choice["text"] for choice in choices}) == 3
    for name, value in choices[0].items():
        assert alone.pop(name) == value
    tokens = sum(len(choice["token_ids"]) for choice in choices)
    assert several["usage"]["completion_tokens"] == tokens > alone["usage"]["completion_tokens"]
    drafts = ("completion_tokens", "drafted_tokens", "accepted_tokens")
    for value in (alone, several):
        assert all(value["usage"].pop(name) >= 0 for name in drafts)
    assert alone == several  # seed, model, numerics and the prompt's tokens
    assert choices[:2] == generate(tiny, *options, "--n", "2")["choices"]


def test_texts_of_several_replies_come_one_after_another(tiny):
    options = ["--prompt", "Once", "--max-tokens", "12", "--temperature", "1", "--seed", "5"]
    choices = generate(tiny, *options, "--n", "3")["choices"]
    plain = run("generate", str(tiny), "--local", *options, "--n", "3")
    texts = [f"choice {number}:\n{choice['text']}\n" for number, choice in enumerate(choices, start=1)]
    assert plain.out == "".join(texts)


def test_a_choice_waits_on_the_screen_for_those_before_it(capsys):
    end = Final(FinishReason.LENGTH, None, None, 1, 0, 1, 0, "")
    screen = _Screen(3)
    for choice, text, final in [(2, "c", None), (1, "b", end), (0, "a", None), (2, "C", end), (0, "A", end)]:
        screen.add(Piece(text, final=final, choice=choice))
        if choice == 0 and final is None:
            assert capsys.readouterr().out == "choice 1:\na"  # as it grows
    assert capsys.readouterr().out == "A\nchoice 2:\nb\nchoice 3:\ncC\n"


@pytest.mark.parametrize("n", ["0", "-1", "65"])
def test_as_many_replies_as_the_api_has(n, tiny, monkeypatch):
    monkeypatch.setattr("runtime.commands.generate.start_engine", None)
    refused(run("generate", str(tiny), "--prompt", "x", "--local", "--n", n), "error: n: ", "from 1 to 64")


def test_logprobs_are_not_left_out_in_silence(tiny):
    asked = ["generate", str(tiny), "--prompt", "x", "--local", "--logprobs"]
    refused(run(*asked, "2"), "error: logprobs: ", "--json")
    refused(run(*asked, "1000", "--json"), "error: logprobs: ", "1000")


def test_a_draft_with_other_tokens_is_refused(tiny, tmp_path):
    """A vocabulary of the same size in which one id is another token."""
    data = tiny.read_bytes()
    space, other = (len(piece).to_bytes(8, "little") + piece for piece in ("▁".encode(), "月".encode()))
    assert data.count(space) == 1
    draft = tmp_path / "draft.gguf"
    draft.write_bytes(data.replace(space, other))
    asked = ["generate", str(tiny), "--prompt", "x", "--local", "--max-tokens", "2", "--draft"]
    assert run(*asked, str(tiny)).status == 0
    token = "token 259 is b'\\xe6\\x9c\\x88' in tiny and b' ' in tiny"
    refused(run(*asked, str(draft)), "draft: ", token, "the vocabulary must be the same")


def test_an_empty_prompt_is_the_bos_where_there_is_one(tiny, tmp_path):
    reply = generate(tiny, "--prompt", "", "--max-tokens", "3", "--ignore-eos")
    assert reply["usage"]["prompt_tokens"] == 1
    bare = tmp_path / "bare.gguf"
    write_tiny_llama(bare, metadata={"tokenizer.ggml.add_bos_token": False})
    refused(run("generate", str(bare), "--local", "--prompt", ""), "prompt", "no tokens")


def test_stories_tell_their_published_text():
    model = fixture_path("stories260K/stories260K.f32.gguf")
    expected = fixture_path("stories260K/expected_greedy.txt").read_text()
    options = ["--prompt", "", "--temperature", "0", "--max-tokens", "256", "--ignore-eos"]
    told = [generate(model, *options, "--tp", tp)["text"] for tp in ("1", "2")]
    assert told[0] == told[1]
    assert told[0].startswith(expected)
