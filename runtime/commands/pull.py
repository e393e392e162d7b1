"""`tramontane pull`: download a model into the cache and say where it lies."""

from __future__ import annotations

from runtime.commands.output import watched, write_json, write_line
from runtime.hub import resolve


def pull(source: str, *, as_json: bool) -> None:
    """Print the path of `source`, fetched if it has to be. What is cached already is checked again."""
    path = resolve(source, verify=True, quiet=not watched()).absolute()
    if as_json:
        write_json({"source": source, "path": str(path)})
    else:
        write_line(str(path))
