"""Files of tokens and certificates, whatever is in them; that a changed file is seen, however it changes."""

import logging
import os
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.errors import InvalidArgument
from runtime.server import current as currents
from runtime.server.current import Current
from tramontane.secret_files import BadFile, is_token, read_authorities, read_tokens

OLD = 1_700_000_000  # seconds: long settled


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "file"


WORDS = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=8)


@example(b"one\x1ctwo\x1f\n")
@given(st.one_of(st.binary(), st.lists(WORDS | st.just(""), max_size=4).map(lambda x: "\n".join(x).encode())))
def test_any_file_gives_tokens_or_one_line_without_its_content(file, content):
    file.write_bytes(content)
    try:
        # A short name: words of our sources, such as the option's, are among those that are drawn.
        tokens = read_tokens("field", file)
    except BadFile as error:
        assert str(file) in str(error) and "\n" not in str(error)
        shown = str(error).replace(str(file), "")
        assert not any(len(word) >= 8 and word.decode("latin-1") in shown for word in content.split())
    else:
        assert tokens and all(is_token(token) for token in tokens)
        assert tokens == content.decode().split()  # by all that is space in a text, such as \x1c


@given(st.binary() | st.binary().map(lambda body: b"-----BEGIN CERTIFICATE-----\n" + body))
def test_no_junk_passes_for_a_certificate(file, content):
    file.write_bytes(content)
    with pytest.raises(BadFile):
        read_authorities("tls-ca", file)


def reader(path) -> Current[str]:
    def read() -> str:
        text = path.read_text()
        if text == "bad":
            raise InvalidArgument("file", f"{path}: bad")
        return text

    return Current([str(path)], read)


def test_a_link_that_is_turned_is_seen(tmp_path):
    """As Kubernetes renews a Secret: the same name, length and time."""
    for name, text in (("one", "aaaa"), ("two", "bbbb")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens").write_text(text)
        os.utime(tmp_path / name / "tokens", (OLD, OLD))
    data = tmp_path / "..data"
    data.symlink_to("one")
    (tmp_path / "tokens").symlink_to("..data/tokens")
    current = reader(tmp_path / "tokens")
    assert current() == "aaaa"
    (tmp_path / "..data_new").symlink_to("two")
    os.replace(tmp_path / "..data_new", data)
    assert current() == "bbbb"


def test_a_change_within_a_tick_of_the_clock_is_seen(tmp_path):
    """The same file, length and time, the time being no past one."""
    path = tmp_path / "tokens"
    stamp = time.time() + 100
    path.write_text("0000")
    os.utime(path, (stamp, stamp))
    current = reader(path)
    for text in ("1111", "2222"):
        path.write_text(text)
        os.utime(path, (stamp, stamp))
        assert current() == text


def test_a_file_at_rest_is_read_once(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("aaaa")
    os.utime(path, (OLD, OLD))
    reads = []
    current = Current([str(path)], lambda: reads.append(path.read_text()) or len(reads))
    assert [current() for _ in range(5)] == [1] * 5
    os.utime(path, (OLD + 1, OLD + 1))
    assert [current() for _ in range(5)] == [2] * 5


def test_what_is_wrong_is_said_once_and_again_if_it_returns(tmp_path, caplog):
    path = tmp_path / "tokens"
    path.write_text("good")
    current = reader(path)
    with caplog.at_level(logging.WARNING):
        for text, want in (("bad", "good"), ("bad", "good"), ("new", "new"), ("bad", "new")):
            path.write_text(text)
            assert (current(), current()) == (want, want)
    said = [record for record in caplog.records if record.name == currents.__name__]
    assert len(said) == 2 and "stays in force" in caplog.text
