"""The table of `compare`: whole at any width, and within 80 columns."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from runtime.commands.compare_table import show
from tests.cli.command import run

PROMPTS = [  # prompt, tokens, share, KL mean and max, perplexities, where replies part
    ("Once upon a time", 3, 1.0, 0.0, 0.0, 1.0, 1.0, None),
    ("a longer one [b]of[/b] more columns", 131071, 0.5, 1.234e-9, 12.5, 999.9996, 56029.31, 131070),
    ("日本語の長い文章はここで終わります", 12, 0.25, 0.001, 2e-30, 9999999.7, 1.5e123, 0),
    (":smile: [red]x", 9, 0.0, 1e-3, 1.0, 99999.96, 12345678.9, 7),
]


def compared(replies: bool = True) -> dict:
    """A report with the most digits that there are."""
    names = ("prompt", "tokens", "top1_agreement", "kl_mean", "kl_max", "perplexity_a", "perplexity_b")
    each = [
        dict(zip(names, values, strict=False)) | {"reply_tokens": [9, 9], "first_divergence": values[-1]}
        for values in PROMPTS
    ]
    kl = {
        f"kl_{name}": value for name, value in zip(("mean", "median", "p99", "max"), [1e-12] * 4, strict=True)
    }
    return {
        "a": {"model": "one", "path": f"/{'deep/' * 30}[a].gguf", "numerics": "cpu/one"},
        "b": {"model": "two", "path": "/b.gguf", "numerics": "cpu/two"},
        "tokens": 393216,
        "top1_agreement": 0.98765,
        **kl,
        "perplexity_a": 56029.3125,
        "perplexity_b": 1.25e123,
        "replies": {
            "max_tokens": 131072 if replies else 0,
            "identical": 1 if replies else None,
            "of": 4 if replies else 0,
            "first_divergence_min": 0 if replies else None,
            "first_divergence_median": 65536 if replies else None,
        },
        "prompts": each,
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(value: dict, out: io.StringIO) -> list[str]:
    with contextlib.redirect_stdout(out):
        show(value)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()


def columns(line: str) -> int:
    from rich.cells import cell_len

    return cell_len(line)


@pytest.mark.parametrize("out", [io.StringIO, Terminal])
@pytest.mark.parametrize("width", ["80", "30"])
def test_nothing_is_cut(out, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    lines = shown(compared(), out())
    assert lines[0] == f"A: one, /{'deep/' * 30}[a].gguf, cpu/one"
    assert [line for line in lines[2:] if columns(line) > 80] == []
    facts, table = lines[2:-5], lines[-5:]
    assert [line.rstrip() for line in facts] == [
        "tokens compared    393216 of 4 prompts",
        "same top token     98.77%",
        "KL(A || B), nats   mean 1.00e-12  median 1.00e-12  p99 1.00e-12  max 1.00e-12",
        "perplexity         A 56029.31  B 1.25e+123",
        "greedy replies     1 of 4 the same over 131072 tokens",
        "others part after  0 tokens at the least, 65536 in the middle",
    ]
    assert [re.split("  +", line.strip()) for line in table] == [
        ["prompt", "tokens", "same", "KL mean", "KL max", "ppl A", "ppl B", "part at"],
        ["Once upon a time", "3", "100.0%", "0.0e+00", "0.0e+00", "1.000", "1.000", "-"],
        ["a longer one [b…", "131071", "50.0%", "1.2e-09", "1.2e+01", "1000.000", "56029.3", "131070"],
        ["日本語の長い文…", "12", "25.0%", "1.0e-03", "2.0e-30", "10000000", "1.5e+123", "0"],
        [":smile: [red]x", "9", "0.0%", "1.0e-03", "1.0e+00", "100000.0", "1.2e+07", "7"],
    ]  # fmt: skip


def test_no_replies_have_no_column():
    lines = shown(compared(replies=False), io.StringIO())
    assert "greedy replies    none: --max-tokens 0" in [line.rstrip() for line in lines]
    assert not any("part" in line for line in lines)


def test_the_command_prints_it_whole_into_a_pipe(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nIn an age of iron, é\n", encoding="utf-8")
    result = run("compare", str(tiny), str(tiny), "--prompts", str(prompts), "--max-tokens", "4")
    assert result.status == 0
    for words in ("same top token", "KL(A || B), nats", "perplexity", "2 of 2 the same over 4 tokens"):
        assert words in result.out
    *_, heading, first, second = result.out.splitlines()
    assert heading.endswith("part at") and first.endswith(" -") and second.startswith("In an age of ir…")
    # Perplexities of a random model are in the hundreds.
    assert re.search(r" 0\.0e\+00  0\.0e\+00 +\d+\.\d{1,3} +\d+\.\d{1,3} +-$", first)
