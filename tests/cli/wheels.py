"""Makes wheels that hold files, as a package index would serve them."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path


def write_wheel(
    folder: Path,
    name: str,
    version: str,
    files: dict[str, bytes],
    *,
    recorded: dict[str, bytes] | None = None,
    requires: str = "",
) -> Path:
    """`recorded` replaces what RECORD says a file holds."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    members = dict(files) | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{info}/RECORD,,"]
    for member, data in members.items():
        stated = (recorded or {}).get(member, data)
        code = base64.urlsafe_b64encode(hashlib.sha256(stated).digest()).decode().rstrip("=")
        lines.append(f"{member},sha256={code},{len(stated)}")
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/RECORD", "\n".join(lines) + "\n")
    return path
