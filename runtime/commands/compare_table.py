"""A comparison for people: a table that 80 columns hold."""

from __future__ import annotations

_WIDE = 10_000  # columns: more than any table takes, so that none is ever cut to a width
_PROMPT = 16  # columns of a prompt


def show(value: dict) -> None:
    """Print what `report` found. Lines that are too long for a terminal after all go on in its next line."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=_WIDE)
    for name in ("a", "b"):
        model = value[name]
        line = f"{name.upper()}: {model['model']}, {model['path']}, {model['numerics']}"
        console.print(line, markup=False, emoji=False)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    facts.add_row("tokens compared", f"{value['tokens']} of {len(value['prompts'])} prompts")
    facts.add_row("same top token", f"{100 * value['top1_agreement']:.2f}%")
    facts.add_row("KL(A || B), nats", _nats(value))
    facts.add_row("perplexity", f"A {value['perplexity_a']:.7g}  B {value['perplexity_b']:.7g}")
    for fact in _replies(value):
        facts.add_row(*fact)
    console.print(facts)
    console.print(_prompts(value))


def _replies(value: dict) -> list[tuple[str, str]]:
    replies = value["replies"]
    if not replies["of"]:
        why = "no prompt leaves room for one" if replies["max_tokens"] else "--max-tokens 0"
        return [("greedy replies", f"none: {why}")]
    words = f"{replies['identical']} of {replies['of']} the same over {replies['max_tokens']} tokens"
    full = len(value["prompts"]) - replies["of"]
    facts = [("greedy replies", words + (f"; no room for {full} more" if full else ""))]
    if replies["identical"] < replies["of"]:
        least, middle = replies["first_divergence_min"], replies["first_divergence_median"]
        facts.append(("others part after", f"{least} tokens at the least, {middle} in the middle"))
    return facts


def _prompts(value: dict):
    """A row a prompt, as a rich Table."""
    from rich.table import Table
    from rich.text import Text

    replies = value["replies"]["of"] > 0
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("prompt", no_wrap=True)
    names = ["tokens", "same", "KL mean", "KL max", "ppl A", "ppl B"] + ["part at"] * replies
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in value["prompts"]:
        cells = [
            str(entry["tokens"]),
            f"{100 * entry['top1_agreement']:.1f}%",
            f"{entry['kl_mean']:.1e}",
            f"{entry['kl_max']:.1e}",
            _perplexity(entry["perplexity_a"]),
            _perplexity(entry["perplexity_b"]),
        ]
        after = entry["first_divergence"]
        if replies and not any(entry["reply_tokens"]):
            cells.append("")
        elif replies:
            cells.append("-" if after is None else str(after))
        table.add_row(Text(_short(entry["prompt"])), *cells)
    return table


def _nats(value: dict) -> str:
    return "  ".join(f"{name} {value['kl_' + name]:.2e}" for name in ("mean", "median", "p99", "max"))


def _perplexity(value: float) -> str:
    """In 8 characters."""
    if value >= 1e7:
        return f"{value:.1e}"
    return f"{value:.{3 if value < 1000 else 1 if value < 1e5 else 0}f}"


def _short(text: str) -> str:
    from rich.cells import cell_len, set_cell_size

    line = " ".join(text.split())
    return line if cell_len(line) <= _PROMPT else set_cell_size(line, _PROMPT - 1).rstrip() + "…"
