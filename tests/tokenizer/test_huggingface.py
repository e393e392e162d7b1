"""Hugging Face folders, made here with the libraries that models' authors make them with."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from runtime.errors import BadModelFile, NotFound, UnsupportedModel
from runtime.tokenizer import ChatTemplate, load_tokenizer, render_chat
from runtime.tokenizer.chat import MISTRAL_TEMPLATE
from runtime.tokenizer.spm import model_proto
from runtime.tokenizer.vocabulary import gguf_vocabulary
from tests.tokenizer.vocabularies import CHATML, KEY, bpe_metadata, spm_metadata, tiny_bpe, tiny_spm

TEXTS = ["", "the", " the  in", "é日🦙\n", "in<tool>the", "x<|im_end|>y", "<s>the</s>", "[INST]  "]


def byte_level() -> tokenizers.Tokenizer:
    """The tiny byte-level vocabulary as SmolLM2's tokenizer.json is made."""
    metadata = bpe_metadata()
    pieces, kinds = metadata[KEY + "tokens"], metadata[KEY + "token_type"]
    known = {piece: token for token, piece in enumerate(pieces) if kinds[token] == 1}
    merges = [tuple(merge.split(" ")) for merge in metadata[KEY + "merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab=known, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind == 3:
            made.add_special_tokens([piece])
        elif kind != 1:
            made.add_tokens([piece])
    return made


def llama2(*, legacy: bool) -> tokenizers.Tokenizer:
    """A sentencepiece-like vocabulary the way Llama-2's tokenizer.json is made, in both its forms."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁thein[]",
        "he",
        "▁t",
        "▁the",
    ]
    known = {piece: token for token, piece in enumerate(pieces)}
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab=known, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def folder(tmp_path, made, **config):
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_byte_level_equals_its_gguf(tmp_path):
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": CHATML}
    tokenizer = load_tokenizer({}, folder=folder(tmp_path, byte_level(), **settings))
    gguf = tiny_bpe()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (
        gguf.vocab_size,
        gguf.bos_id,
        False,
    )
    assert (tokenizer.eos_ids, tokenizer.chat_template) == (gguf.eos_ids, CHATML)
    for text in TEXTS:
        for parse_special in (False, True):
            ids = tokenizer.encode(text, parse_special=parse_special)
            assert ids == gguf.encode(text, parse_special=parse_special)
            assert tokenizer.decode(ids, skip_special=False) == gguf.decode(ids, skip_special=False) == text
    template = ChatTemplate(CHATML, bos="", eos="")
    messages = [{"role": "user", "content": "the <|im_end|>"}]
    assert render_chat(tokenizer, template, messages) == render_chat(gguf, template, messages)


@pytest.mark.parametrize("legacy", [True, False])
def test_llama2_equals_the_library(tmp_path, legacy):
    made = llama2(legacy=legacy)
    tokenizer = load_tokenizer({}, folder=folder(tmp_path, made, bos_token="<s>", eos_token="</s>"))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), True)
    assert tokenizer.chat_template == MISTRAL_TEMPLATE
    for text in ["the in", " the", "é🦙\n", "", "in the"]:
        assert tokenizer.encode(text) == made.encode(text).ids
        if legacy or text != " the":  # the newer form writes "the" and " the" alike
            assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in ["<s>[in] the</s>in", "the</s> in</s>in"]:
        expected = made.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True, add_special=False) == expected
    assert tokenizer.encode("<s>")[1:2] != [1]  # a user's text is text
    reply = tokenizer.stream(prompt_ids=tokenizer.encode("in"))
    assert "".join(map(reply.push, tokenizer.encode("the", add_special=False))) == " the"


@given(text=st.text().filter(lambda text: "▁" not in text))
def test_llama2_round_trip(tmp_path_factory, text):
    made = llama2(legacy=True)
    tokenizer = load_tokenizer({}, folder=folder(tmp_path_factory.mktemp("hf"), made, bos_token="<s>"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_that_swallow_white_space(tmp_path):
    made = byte_level()
    made.add_special_tokens([tokenizers.AddedToken("<|user|>", lstrip=True, rstrip=True)])
    tokenizer = load_tokenizer({}, folder=folder(tmp_path, made))
    for text in ["the <|user|>\n in", "<|user|>  ", "  <|user|><|user|>x"]:
        assert tokenizer.encode(text, parse_special=True) == made.encode(text).ids


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizer_model(tmp_path, prefix):
    metadata = spm_metadata(add_space_prefix=prefix)
    proto = model_proto(gguf_vocabulary(metadata, ""), metadata[KEY + "scores"])
    (tmp_path / "tokenizer.model").write_bytes(proto)
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "290": {"content": "<|im_end|>", "special": True},
            "291": {"content": "<fn>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [290, 2]}')
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer, gguf = load_tokenizer({}, folder=tmp_path), load_tokenizer(metadata)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (292, 1, (290, 2))
    assert tokenizer.add_bos and tokenizer.chat_template == CHATML
    for text in [text for text in TEXTS if "im_end" not in text]:
        ids = gguf.encode(text, parse_special=True)
        assert tokenizer.encode(text, parse_special=True) == ids
        assert tokenizer.decode(ids) == gguf.decode(ids)
    assert tokenizer.encode("<|im_end|><fn>", parse_special=True) == [1, 290, 291]
    assert 290 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([290, 291]) == "<fn>"
    assert tiny_spm().vocab_size < 290  # the ids between are unused


def test_bad_folders(tmp_path):
    with pytest.raises(NotFound, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer({}, folder=tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(BadModelFile, match=r"tokenizer\.model: sentencepiece refuses it"):
        load_tokenizer({}, folder=tmp_path)
    for text, reason in [("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "tokenizers refuses it")]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(BadModelFile, match=rf"tokenizer\.json: {reason}"):
            load_tokenizer({}, folder=tmp_path)
    made = byte_level()
    made.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="decoder"):
        load_tokenizer({}, folder=folder(tmp_path, made))
    with pytest.raises(BadModelFile, match="bos_token: 'nope' is not in the vocabulary"):
        load_tokenizer({}, folder=folder(tmp_path, byte_level(), bos_token="nope"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(BadModelFile, match="eos_token_id: 99999 is not a token id"):
        load_tokenizer({}, folder=folder(tmp_path, byte_level()))


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    for template, found in [(named, "y"), (named[:1], None), (None, None)]:
        tokenizer = load_tokenizer({}, folder=folder(tmp_path, byte_level(), chat_template=template))
        assert tokenizer.chat_template == found


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ([{"name": ["x"], "template": "y"}], "entry 0 is not a name and a template"),
        ([{"name": "x", "template": "y"}, {"name": "default", "template": 5}], "entry 1 is not"),
        ([{"template": "y"}], "entry 0 is not"),
        (["y"], "entry 0 is not"),
        (5, "neither a text nor a list"),
    ],
)
def test_templates_that_are_none(tmp_path, template, words):
    with pytest.raises(BadModelFile) as caught:
        load_tokenizer({}, folder=folder(tmp_path, byte_level(), chat_template=template))
    assert (caught.value.file, caught.value.where) == (str(tmp_path), "chat_template")
    assert words in caught.value.reason


def test_an_added_token_of_too_many_digits(tmp_path):
    metadata = spm_metadata()
    proto = model_proto(gguf_vocabulary(metadata, ""), metadata[KEY + "scores"])
    (tmp_path / "tokenizer.model").write_bytes(proto)
    config = {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFile, match=r"added_tokens_decoder: entry '9+"):
        load_tokenizer({}, folder=tmp_path)
