"""Bytes as people write them. Standard library only."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power
_FORM = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1.5G" (powers of 1024), "2GB" (powers of 1000) or a plain number. ValueError."""
    match = _FORM.fullmatch(text.strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text[:40]!r} is not a size; write it as 512MiB or 2GiB")
    return int(Decimal(match[1]) * factor)


def show_size(size: int) -> str:
    """For example "98.4 MB": powers of 1000, as files are listed."""
    if size < 1000:
        return f"{size} B"
    value, letters = float(size), iter("kMGTPE")
    while value >= 999.95:
        value, letter = value / 1000, next(letters)
    return f"{value:.1f} {letter}B"
