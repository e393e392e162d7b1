"""Encoding and decoding on tiny vocabularies: properties, and the rules a reader of the API relies on."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BadModelFile, InvalidArgument
from runtime.tokenizer import Tokenizer, load_tokenizer
from runtime.tokenizer.bpe import PRE_TOKENIZERS, pre_tokenizer
from runtime.tokenizer.stream import MAX_PADDING
from runtime.tokenizer.vocabulary import byte_alphabet
from tests.support import REPOSITORY
from tests.tokenizer.vocabularies import bpe_metadata, spm_metadata, tiny_bpe, tiny_spm

TINY = pytest.mark.parametrize("tokenizer", [tiny_spm(), tiny_bpe()], ids=["spm", "bpe"])
PIECES = [
    "the",
    " the",
    "  ",
    " ",
    "\n",
    "é",
    "日",
    "🦙",
    "[INST]",
    "<s>",
    "<|im_end|>",
    "<tool>",
    "<0x41>",
    "\0",
]
# "▁" is how sentencepiece writes a space, so a text's own comes back as one.
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4)).map("".join).filter(lambda t: "▁" not in t)


@TINY
@given(text=texts, add_special=st.booleans())
def test_decode_undoes_encode(tokenizer: Tokenizer, text, add_special):
    ids = tokenizer.encode(text, add_special=add_special)
    assert tokenizer.decode(ids) == text
    assert not any(map(tokenizer.is_special, ids[tokenizer.add_bos and add_special :]))


@TINY
@given(data=st.data(), skip_special=st.booleans())
def test_stream_is_decode_is_the_bytes(tokenizer: Tokenizer, data, skip_special):
    token = st.integers(0, tokenizer.vocab_size + 3)
    ids, prompt = data.draw(st.lists(token)), data.draw(st.lists(token, max_size=3))
    stream = tokenizer.stream(skip_special, prompt)
    parts = [stream.push(i) for i in ids]
    whole = tokenizer.decode(ids, skip_special=skip_special, prompt_ids=prompt)
    assert "".join(parts) + stream.finish() == whole
    # An independent account of the same: bytes in a row, one decoding at the end.
    shown = [i for i in ids if not (skip_special and tokenizer.is_special(i))]
    chunks = [tokenizer.token_bytes(i) for i in shown]
    first = next((n for n, i in enumerate(shown) if not tokenizer.is_special(i)), None)
    starts = tokenizer.bos_token == "<s>" and all(map(tokenizer.is_special, prompt))
    if starts and first is not None and not 3 <= shown[first] < 259:  # a byte token's space is a real one
        chunks[first] = chunks[first].removeprefix(b" ")
    assert whole == b"".join(chunks).decode("utf-8", "replace")


@TINY
@given(data=st.binary() | st.text().map(str.encode))
def test_bytes_one_by_one(tokenizer: Tokenizer, data):
    """Every byte is a token of its own in both tiny vocabularies."""
    if tokenizer.bos_token == "<s>":
        ids = [3 + byte for byte in data]
    else:
        ids = list(data)  # the tiny vocabulary lists the alphabet in byte order
    stream = tokenizer.stream()
    out, consumed = "", b""
    for token, byte in zip(ids, data, strict=True):
        text, consumed = stream.push(token), consumed + bytes([byte])
        out += text
        assert "\ufffd" in consumed.decode("utf-8", "replace") or out == consumed.decode()
    assert out + stream.finish() == data.decode("utf-8", "replace")


def test_no_half_characters():
    tokenizer = tiny_bpe()
    stream = tokenizer.stream()
    assert [stream.push(byte) for byte in "🦙é".encode()] == ["", "", "", "🦙", "", "é"]
    assert stream.finish() == ""
    stream = tokenizer.stream()
    assert [stream.push(0xF0), stream.push(0x9F), stream.finish()] == ["", "", "\ufffd"]


def test_a_reply_keeps_its_leading_space():
    tokenizer = tiny_spm()
    prompt, reply = tokenizer.encode("in"), tokenizer.encode("the", add_special=False)
    assert tokenizer.decode(reply) == "the"
    assert tokenizer.decode(prompt + reply) == "in the"
    assert tokenizer.stream(prompt_ids=prompt).push(reply[0]) == " the"
    assert tokenizer.stream(prompt_ids=[tokenizer.bos_id]).push(reply[0]) == "the"
    assert tokenizer.decode([1, *reply, 2], skip_special=False) == "<s>the</s>"


def test_space_prefix_can_be_off():
    tokenizer = load_tokenizer(spm_metadata(add_space_prefix=False))
    pieces = spm_metadata()["tokenizer.ggml.tokens"]
    assert tokenizer.encode("he", add_special=False) == [pieces.index("he")]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_bos():
    tokenizer = tiny_spm()
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.encode("<s>the", parse_special=True) == tokenizer.encode("the")  # not doubled
    assert tokenizer.encode("<s>the")[1] != 1  # a user's text is text
    assert not tiny_bpe().add_bos
    llama3 = load_tokenizer(bpe_metadata(pre="llama-bpe"))
    assert llama3.add_bos and llama3.encode("a")[0] == llama3.bos_id
    assert not load_tokenizer(bpe_metadata(pre="llama-bpe", add_bos_token=False)).add_bos


def test_parse_special_takes_the_longest_name():
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.tokens"] += ["<|a", "<|a|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    tokenizer = load_tokenizer(metadata)
    size = tokenizer.vocab_size
    assert tokenizer.encode("<|a|><|a", parse_special=True) == [size - 1, size - 2]
    assert tokenizer.split("x<|im_end|>y<tool>z") == ["x", tokenizer.eos_ids[0], "y<tool>z"]


def test_user_defined_pieces_are_found_in_any_text():
    for tokenizer in (tiny_spm(), tiny_bpe()):
        for parse_special in (False, True):
            ids = tokenizer.encode("in<tool>in", parse_special=parse_special)
            assert sum(tokenizer.token_bytes(i) == b"<tool>" for i in ids) == 1


def test_space_after_a_control_token():
    """ "<s> [" and "<s>[" are written for the same tokens; a second space is a real one."""
    tokenizer = tiny_spm()
    assert tokenizer.encode("</s> [", parse_special=True) == tokenizer.encode("</s>[", parse_special=True)
    assert tokenizer.decode(tokenizer.encode("</s>  [", parse_special=True, add_special=False)) == " ["


def test_eos_ids():
    assert tiny_spm().eos_ids == (2,)
    pieces = bpe_metadata()["tokenizer.ggml.tokens"]
    end, text_end = pieces.index("<|im_end|>"), pieces.index("<|endoftext|>")
    assert tiny_bpe().eos_ids == (end, text_end)
    assert load_tokenizer(bpe_metadata(eos_token_id=5, eot_token_id=7)).eos_ids == (5, 7, text_end, end)
    assert load_tokenizer(spm_metadata(eos_token_id=None, bos_token_id=None)).eos_ids == (2,)


def test_ids_out_of_range():
    tokenizer = tiny_bpe()
    for token in (-1, tokenizer.vocab_size + MAX_PADDING, 1 << 70):
        with pytest.raises(InvalidArgument, match="token_ids"):
            tokenizer.decode([token])
    assert tokenizer.decode([tokenizer.vocab_size]) == ""  # a padding row of the embedding


def test_lone_surrogates_are_refused():
    for tokenizer in (tiny_spm(), tiny_bpe()):
        with pytest.raises(InvalidArgument, match="text: not valid Unicode at character 2"):
            tokenizer.encode("ab\ud800")


def test_check_fits():
    tokenizer = tiny_bpe()
    tokenizer.check_fits(tokenizer.vocab_size, "m.gguf")
    tokenizer.check_fits(tokenizer.vocab_size + 64, "m.gguf")
    for rows in (0, tokenizer.vocab_size - 1, tokenizer.vocab_size + MAX_PADDING + 1):
        with pytest.raises(BadModelFile, match=rf"m\.gguf: tokenizer: .* {rows} rows"):
            tokenizer.check_fits(rows, "m.gguf")


WORDS = {
    "gpt2": ("I'm  12345 años!?\n\n x", ["I", "'m", " ", " 12345", " años", "!?", "\n\n", " x"]),
    "default": ("I'm 12345!", ["I", "'", "m", " ", "123", "45", "!"]),
    "smollm": ("a 123 b", ["a", " ", "1", "2", "3", " b"]),
    "llama-bpe": ("I'M 12345!!\n\n  x", ["I", "'M", " ", "123", "45", "!!\n\n", " ", " x"]),
    "qwen2": ("I'M 123!!\n\n  x", ["I", "'M", " ", "1", "2", "3", "!!\n\n", " ", " x"]),
    "tekken": (
        "HelloWorld's ABCdef 12 a/b\n",
        ["Hello", "World", "'s", " ABCdef", " ", "1", "2", " a", "/b", "\n"],
    ),
}


@pytest.mark.parametrize("pre", sorted(WORDS))
def test_words(pre):
    text, expected = WORDS[pre]
    alphabet = byte_alphabet()
    words = [word for word, _ in pre_tokenizer(pre).pre_tokenize_str(text)]
    assert [bytes(alphabet[c] for c in word).decode() for word in words] == expected


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@given(text=st.text())
def test_words_keep_every_byte(pre, text):
    alphabet = byte_alphabet()
    spelled = "".join(word for word, _ in pre_tokenizer(pre).pre_tokenize_str(text))
    assert bytes(alphabet[c] for c in spelled) == text.encode()


def test_the_package_needs_no_torch():
    """A gateway starts in the time it takes to read a vocabulary."""
    heavy = "{'torch', 'ray', 'grpc', 'jinja2'}"
    code = f"import sys, runtime.tokenizer; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
