"""Models of the Hugging Face Hub, pulled from a small Hub of our own that runs on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from runtime.errors import InvalidArgument
from runtime.hub import resolve
from tests.cli.command import Result, environment, finish, refused, spawn

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "me/gguf": {
        "small.gguf": b"GGUF small",
        "big/big-00001-of-00002.gguf": b"GGUF one",
        "big/big-00002-of-00002.gguf": b"GGUF two",
    },
    "me/folder": {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "chat_template.json": b"{}",
        "chat_template.jinja": b"",
        "consolidated.safetensors": b"the same again",
        "original/model.safetensors": b"and again",
        "pytorch_model.bin": b"a pickle",
        "modeling.py": b"code",
    },
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as its own library asks for."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self.describe(path.removeprefix("/api/models/"))
            return
        repo, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo not in REPOSITORIES:
            self.refuse("RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse("RevisionNotFound")
        elif name not in REPOSITORIES[repo]:
            self.refuse("EntryNotFound")
        else:
            data = REPOSITORIES[repo][name]
            self.send(data if body else b"", len(data), {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def describe(self, path: str) -> None:
        parts = path.split("/")
        repo = "/".join(parts[:2])
        if repo not in REPOSITORIES:
            self.refuse("RepoNotFound")
            return
        if "tree" in parts:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in REPOSITORIES[repo].items()
            ]
            answer = json.dumps(files).encode()
        else:
            files = [{"rfilename": name} for name in REPOSITORIES[repo]]
            answer = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files}).encode()
        self.send(answer, len(answer), {"Content-Type": "application/json"})

    def send(self, data: bytes, length: int, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def pull(hub, tmp_path):
    """`tramontane pull SOURCE --json` against our Hub, with a cache of its own."""

    def pull(source: str, **extra: str) -> Result:
        settings = {
            "HF_ENDPOINT": hub,
            "HF_HUB_DISABLE_XET": "1",
            "TRAMONTANE_CACHE": str(tmp_path / "cache"),
        }
        settings |= {"HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
        # Its library waits ten seconds for an answer; this process may be held up for longer.
        settings |= {"HF_HUB_ETAG_TIMEOUT": "100", "HF_HUB_DOWNLOAD_TIMEOUT": "100"}
        return finish(spawn("pull", source, "--json", env=environment(**(settings | extra))))

    return pull


def test_a_file(pull, tmp_path):
    path = Path(pull("hf:me/gguf/small.gguf").json["path"])
    assert path.read_bytes() == b"GGUF small"
    assert path.is_relative_to(tmp_path / "cache" / "models")


def test_a_file_of_a_revision(pull):
    path = Path(pull(f"hf:me/gguf/small.gguf@{COMMIT}").json["path"])
    assert path.read_bytes() == b"GGUF small"
    refused(pull("hf:me/gguf/small.gguf@nowhere"), "revision", "nowhere")


def test_all_parts_of_a_split_file(pull):
    path = Path(pull("hf:me/gguf/big/big-00002-of-00002.gguf").json["path"])
    assert path.read_bytes() == b"GGUF one"
    assert path.with_name("big-00002-of-00002.gguf").read_bytes() == b"GGUF two"


def test_a_folder_without_code_pickles_and_copies(pull):
    path = Path(pull("hf:me/folder").json["path"])
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == [
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_what_is_cached_needs_no_hub(pull):
    first = pull("hf:me/gguf/small.gguf").json
    offline = pull("hf:me/gguf/small.gguf", HF_HUB_OFFLINE="1")
    assert offline.json == first


def test_what_is_not_cached_needs_one(pull):
    refused(pull("hf:me/gguf/small.gguf", HF_HUB_OFFLINE="1"), "hf:me/gguf/small.gguf", "cannot be reached")


def test_a_file_that_is_not_there_names_those_that_are(pull):
    refused(pull("hf:me/gguf/large.gguf"), "hf:me/gguf/large.gguf", "no such file", "small.gguf")


def test_a_repository_without_safetensors_names_its_files(pull):
    refused(pull("hf:me/gguf"), "hf:me/gguf", "no safetensors", "small.gguf")


def test_a_repository_that_is_not_there(pull):
    refused(pull("hf:me/nothing/m.gguf"), "hf:me/nothing/m.gguf", "no repository")


@pytest.mark.parametrize("name", ["", "me", "me/", "/repo/file", "me/re po/file", "me//file", "me/repo@"])
def test_what_is_no_name(name):
    with pytest.raises(InvalidArgument, match="owner/repo"):
        resolve(f"hf:{name}")
