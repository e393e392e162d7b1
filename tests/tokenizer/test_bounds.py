"""Long texts: others have their turns while one is encoded, and how few tokens it can have is soon known."""

import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.tokenizer import load_tokenizer
from runtime.tokenizer.tokenizer import _STRETCH
from tests.tokenizer.test_coding import PIECES
from tests.tokenizer.test_huggingface import byte_level, folder
from tests.tokenizer.vocabularies import KEY, bpe_metadata, spm_metadata, tiny_bpe, tiny_spm


def hugging_face(tmp_path):
    return load_tokenizer({}, folder=folder(tmp_path, byte_level()))


@pytest.mark.parametrize(
    "make", [lambda _: tiny_spm(), lambda _: tiny_bpe(), hugging_face], ids=["spm", "bpe", "hugging-face"]
)
def test_other_threads_go_on_while_a_text_is_encoded(tmp_path, make):
    tokenizer = make(tmp_path)
    turns, done = 0, threading.Event()

    def others():
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0)

    other = threading.Thread(target=others)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # a thread has its turn when another gives it up, and never else
    try:
        other.start()
        before, ends = turns, time.monotonic() + 60
        while turns == before and time.monotonic() < ends:
            # On a busy machine the other thread may come too late for its turn, again and again.
            tokenizer._encode_text("the in" * 2000, False)
        after = turns
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
    assert after > before


def lacking_bytes():
    """The tiny byte-level vocabulary without pieces for LF and the first byte of "é": both are dropped."""
    metadata = bpe_metadata()
    kinds = list(metadata[KEY + "token_type"])
    for piece in ("Ċ", "Ã"):
        kinds[metadata[KEY + "tokens"].index(piece)] = 5
    merges = [merge for merge in metadata[KEY + "merges"] if "Ã" not in merge]
    return load_tokenizer(bpe_metadata(token_type=kinds, merges=merges))


def long_names():
    """A vocabulary whose longest piece is user-defined, with spaces and characters of several bytes."""
    metadata = spm_metadata()
    pieces, kinds = list(metadata[KEY + "tokens"]), metadata[KEY + "token_type"]
    pieces[kinds.index(4)] = "<日 日 日>"
    return load_tokenizer(spm_metadata(tokens=pieces))


KNOWN = [tiny_spm(), tiny_bpe(), lacking_bytes(), long_names()]
texts = st.lists(
    st.sampled_from([*PIECES, "▁", "<日 日 日>", "\n" * 50, "ll" * 30]) | st.text(max_size=4)
).map("".join)


@pytest.mark.parametrize("tokenizer", KNOWN, ids=["spm", "bpe", "bpe-lacking-bytes", "spm-long-names"])
@given(text=texts, add_special=st.booleans())
def test_no_text_has_fewer_tokens_than_the_fewest(tokenizer, text, add_special):
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special=add_special))


NEAR = [
    (tiny_bpe(), "<tool>"),
    (tiny_spm(), "<tool>"),
    (long_names(), "<日 日 日>"),
    (lacking_bytes(), "\n<tool>"),
]


@pytest.mark.parametrize(("tokenizer", "text"), NEAR)
def test_the_bound_is_near(tokenizer, text):
    tokens = len(tokenizer.encode(text * 1000))
    assert 0.7 * tokens <= tokenizer.fewest_tokens(text * 1000) <= tokens
    assert tokenizer.fewest_tokens("") == 0


def test_where_a_run_of_any_length_can_be_one_token_nothing_is_said(tmp_path):
    kinds = [5 if kind == 6 else kind for kind in spm_metadata()[KEY + "token_type"]]
    unknown = load_tokenizer(spm_metadata(token_type=kinds))
    assert len(unknown.encode("🦙" * 1000)) < 5 and unknown.fewest_tokens("🦙" * 1000) == 0
    assert hugging_face(tmp_path).fewest_tokens("a" * 1000) == 0


@given(
    place=st.integers(-30, 30), names=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "|>"]))
)
def test_names_are_found_wherever_they_lie(place, names):
    """Long texts are searched a stretch at a time."""
    text = "".join(names)
    before, after = (
        "<|" * (_STRETCH // 2) + "x" * place if place > 0 else "-" * (_STRETCH + place),
        "-" * _STRETCH,
    )
    around = tiny_bpe().split(text)
    parts = tiny_bpe().split(before + text + after)
    whole = [before, *around, after]
    expected = []
    for part in whole:
        if isinstance(part, str) and expected and isinstance(expected[-1], str):
            expected[-1] += part
        else:
            expected.append(part)
    assert parts == expected
