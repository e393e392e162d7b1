import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("7B", 7),
        ("1K", 1024),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1.5 M", 3 << 19),
        ("0.1KB", 100),
        (" 3TiB ", 3 << 40),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "1XB", "1 2", "1.", "nan", "9" * 400, "1G1", "٣", "１K"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@given(st.integers(0, 999 * 10**12))
def test_shown_sizes_are_within_half_their_last_digit(size):
    shown = parse_size(show_size(size))
    assert abs(shown - size) * 20 <= size  # at worst 1.0 of something stands for 1.05 of it
