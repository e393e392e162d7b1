"""Reads command lines as the program would, without running them."""

from __future__ import annotations

import functools
import inspect

import typer

from runtime import cli


@functools.cache
def _commands() -> dict:
    return dict(typer.main.get_command(cli.app).commands)


def parse(words: list[str]) -> dict[str, object]:
    """The options of a `tramontane` command line, by parameter name.

    Raises AssertionError for a command or an option that does not exist, or a value that does not fit.
    """
    assert words and words[0] == "tramontane", words
    name = words[1]
    assert name in _commands(), f"tramontane has no command {name}"
    try:
        return _commands()[name].make_context(name, list(words[2:])).params
    except Exception as error:
        if not hasattr(error, "format_message"):  # what click raises for a wrong command line
            raise
        raise AssertionError(f"{' '.join(words)}: {error.format_message()}") from None


def default(command: str, option: str) -> object:
    return inspect.signature(getattr(cli, command)).parameters[option].default
