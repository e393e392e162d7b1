"""Certificates and tokens on the command line: what is refused, and that it is refused before any weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from tests.cli.command import finish, refused, run, serving

TOKEN = "0123456789abcdef"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "junk").write_text("junk of all kinds\n")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--tls-cert", "junk"], ["tls-key: is missing", "junk"]),
        (["--tls-cert", "junk", "--tls-key", "junk"], ["tls-cert: ", "junk: holds no certificate"]),
        (["--tls-client-ca", "junk"], ["tls-client-ca: ", "junk: needs --tls-cert"]),
        (["--auth-token-file", "none"], ["auth-token-file: ", "none: No such file"]),
        (["--auth-token-file", "junk"], ["auth-token-file: ", "junk: line 1 is no token"]),
    ],
)
def test_serve_refuses_files_before_it_looks_at_the_model(tiny, files, monkeypatch, arguments, fragments):
    monkeypatch.chdir(files)
    monkeypatch.setattr("runtime.commands.serve.open_front", None)  # whoever came as far would call it
    refused(run("serve", str(tiny), "--local", *arguments), *fragments)


@pytest.mark.parametrize("command", [["chat", "--message", "x"], ["bench"], ["batch", "in", "out"]])
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--tls-ca", "junk"], ["tls-ca: junk: holds no certificate"]),
        (["--tls-cert", "junk"], ["tls-key: is missing"]),
        (["--tls-cert", "junk", "--tls-key", "junk"], ["tls-ca: is missing"]),
        (["--token-file", "none"], ["token-file: none: No such file"]),
    ],
)
def test_clients_refuse_files(files, monkeypatch, command, arguments, fragments):
    monkeypatch.chdir(files)
    refused(run(*command, "--target", "127.0.0.1:1", *arguments), *fragments)


def test_certificates_are_for_a_server_that_runs(files, tiny):
    refused(run("bench", str(tiny), "--tls-ca", "junk"), "tls-ca: ", "--target")
    refused(run("batch", "in", "out", "--model", str(tiny), "--tls-key", "junk"), "tls-key: ", "--target")


def test_the_token_file_has_a_variable(files, monkeypatch):
    monkeypatch.setenv("TRAMONTANE_TOKEN_FILE", str(files / "none"))
    refused(run("chat", "--message", "x", "--target", "127.0.0.1:1"), "token-file: ", "none: No such file")


def test_a_server_with_tls_and_tokens(tiny, tmp_path):
    """One for all: its commands, what they say without a token or TLS, and what none of them may say."""
    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    names = ("ca", "another", "cert", "key", "tokens", "in.jsonl", "out.jsonl")
    ca, another, cert, key, tokens, requests, results = (str(tmp_path / name) for name in names)
    authority.cert_pem.write_to_path(ca)
    trustme.CA().cert_pem.write_to_path(another)
    pair.cert_chain_pems[0].write_to_path(cert)
    pair.private_key_pem.write_to_path(key)
    Path(tokens).write_text(f"{TOKEN}\n")
    Path(requests).write_text('{"custom_id": "1", "prompt": "x"}\n')
    access = ["--tls-cert", cert, "--tls-key", key, "--auth-token-file", tokens]
    with serving(tiny, "--local", *access) as (process, ready):
        assert (ready["tls"], ready["tokens"]) == ("server", True)
        target = ["--target", ready["address"]]
        secure = [*target, "--tls-ca", ca]
        both = [*secure, "--token-file", tokens]
        assert run("chat", *both, "--message", "hi", "--max-tokens", "2").status == 0
        size = ["--streams", "1", "--prompt-tokens", "2", "--max-tokens", "2", "--repeat", "1"]
        assert run("bench", *both, *size).status == 0
        refused(run("chat", *secure, "--message", "hi"), "wants a token", "--token-file")
        refused(run("bench", *secure, *size), "wants a token", "--token-file")
        refused(run("chat", *target, "--message", "hi"), "no connection", "--tls-ca")
        refused(run("chat", *target, "--tls-ca", another, "--message", "hi"), "no connection", "certificate")
        refused_batch = run("batch", requests, results, *secure)
        assert refused_batch.status == 1 and "--token-file" in refused_batch.err
        assert not Path(results).read_text()  # the request has not failed, it was never made
        assert run("batch", requests, results, *both, "--max-tokens", "2").status == 0
        command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert TOKEN.encode() not in command_line
        process.terminate()
        ended = finish(process)
    assert (ended.status, ended.err) == (0, "")
