"""A failure is an exit status and one line that says what was wrong."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from runtime.commands import inspect as inspect_command
from runtime.commands.failures import Terminated
from tests.cli.command import finish, refused, run, spawn

OPENERS = [["inspect"], ["generate", "--prompt", "x", "--local"], ["serve", "--port", "0", "--local"]]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["nonsense"], ["nonsense", "--help"]),
        (["generate", "m.gguf"], ["--prompt"]),
        (["generate"], ["MODEL"]),
        (["generate", "m.gguf", "--prompt", "x", "--tp", "two"], ["--tp"]),
        (["serve", "m.gguf", "--kv-memory", "2 floz"], ["--kv-memory", "2 floz", "GiB"]),
        (["serve", "m.gguf", "--port"], ["--port"]),
        (["serve", "m.gguf", "--no-such-option"], ["--no-such-option"]),
    ],
)
def test_a_wrong_command_line(arguments, fragments):
    refused(run(*arguments), *fragments, status=2)


@pytest.mark.parametrize(
    "command", [["inspect"], ["generate", "--prompt", "x", "--local"], ["serve", "--local"]]
)
def test_a_model_that_is_not_there(command, tmp_path):
    refused(run(command[0], str(tmp_path / "none.gguf"), *command[1:]), "none.gguf", "not found")


@pytest.mark.parametrize(
    "command", [["inspect"], ["generate", "--prompt", "x", "--local"], ["serve", "--local"]]
)
def test_a_model_that_is_none(command, tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("once upon a time, a file that was no model")
    refused(run(command[0], str(path), *command[1:]), "text.gguf")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--tp", "4"], ["tp", "3 units"]),
        (["--tp", "0"], ["tp"]),
        (["--pp", "3"], ["pp", "2 layers"]),
        (["--device", "cuda"], ["device", "cuda", "cpu"]),
        (["--device", "abacus"], ["device", "abacus"]),
        (["--dtype", "fp8"], ["dtype", "fp8"]),
        (["--kv-dtype", "fp4"], ["kv-dtype", "fp4"]),
        (["--kv-dtype", "fp8", "--device", "cpu"], ["kv-dtype", "fp8", "CPU"]),
        (["--quantize", "int4"], ["quantize", "GGUF"]),
        (["--max-model-len", "0"], ["max-model-len"]),
        (["--max-model-len", "100000"], ["max-model-len", "256"]),
        (["--kv-memory", "1"], ["kv-memory"]),
        (["--chat-template", "/no/such/template"], ["chat template", "/no/such/template"]),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["serve", "--port", "0"]])
def test_settings_that_cannot_be(command, options, fragments, tiny):
    refused(run(command[0], str(tiny), *command[1:], "--local", *options), *fragments)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "-2"], "top_k"),
        (["--min-p", "1.5"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--presence-penalty", "3"], "presence_penalty"),
        (["--frequency-penalty", "-3"], "frequency_penalty"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**64)], "seed"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "256"], "max_tokens"),
        (["--logprobs", "1000", "--json"], "logprobs"),
        (["--stop", ""], "stop"),
        (["--prompt", "\udcff"], "prompt"),
        (["--prompt", "word " * 1000], "prompt"),
    ],
)
def test_parameters_that_cannot_be_are_found_before_weights_are_read(options, field, tiny, monkeypatch):
    def start_engine(*_, **__):
        raise AssertionError("the engine was started")

    monkeypatch.setattr("runtime.commands.generate.start_engine", start_engine)
    refused(run("generate", str(tiny), "--prompt", "x", "--local", *options), f"error: {field}: ")


def test_a_busy_port_is_found_before_the_model_is_opened(tiny, monkeypatch):
    def open_front(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("runtime.commands.serve.open_front", open_front)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        refused(run("serve", str(tiny), "--local", "--port", str(port)), str(port), "busy", "another")


@pytest.mark.parametrize(("option", "value"), [("--port", "70000"), ("--host", "no.such.host.invalid")])
def test_an_address_that_cannot_be(option, value, tiny):
    refused(run("serve", str(tiny), "--local", option, value), option.strip("-"), value)


def test_bench_wants_one_thing_to_measure(tiny):
    refused(run("bench"), "MODEL", "--target")
    refused(run("bench", str(tiny), "--target", "127.0.0.1:1"), "MODEL", "--target")


@pytest.mark.parametrize("target", ["", "here", "host:", ":1", "host:port", "host:0", "host:65536"])
def test_a_target_that_is_none(target):
    refused(run("chat", "--target", target, "--message", "x"), "target", "HOST:PORT")


@pytest.mark.parametrize("command", [["chat", "--message", "x"], ["bench"]])
def test_a_target_where_nobody_answers(command):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(run(*command, "--target", target), target, "tramontane serve")


def test_a_defect_is_one_line_too_and_debug_shows_where(tiny, monkeypatch):
    def broken(opened):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(inspect_command, "describe", broken)
    refused(run("inspect", str(tiny)), "internal error", "RuntimeError", "two lines", "--debug")
    shown = run("inspect", str(tiny), "--debug")
    assert shown.status == 1
    assert "Traceback" in shown.err and "in broken" in shown.err


@pytest.mark.parametrize(("cause", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_command(cause, status, tiny, monkeypatch):
    def stopped(opened):
        raise cause

    monkeypatch.setattr(inspect_command, "describe", stopped)
    refused(run("inspect", str(tiny)), status=status)


def test_a_reader_that_went_away(tiny):
    reading, writing = os.pipe()
    os.close(reading)
    process = spawn("inspect", str(tiny), "--json", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    result = finish(process)
    assert result.status == 1
    assert result.err == ""
