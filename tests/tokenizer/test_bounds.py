"""Long texts: others have their turns while one is encoded, and how few tokens it can have is soon known."""

import sys
import threading
import time

import pytest

from runtime.tokenizer import load_tokenizer
from tests.tokenizer.test_huggingface import byte_level, folder
from tests.tokenizer.vocabularies import tiny_bpe, tiny_spm


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
        before = turns
        for _ in range(50):  # on a busy machine another thread may come too late for its turn
            tokenizer._encode_text("the in" * 2000, False)
            if turns > before:
                break
        after = turns
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
    assert after > before
