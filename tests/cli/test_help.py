"""Help is complete, comes at once and needs none of the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.command import environment, run

COMMANDS = {
    "pull": ["SOURCE", "--json"],
    "inspect": ["MODEL", "--json"],
    "serve": [
        "MODEL",
        "--tp",
        "--host",
        "--port",
        "--device",
        "--max-model-len",
        "--max-num-seqs",
        "--kv-memory",
        "--tls-cert",
        "--auth-token-file",
    ],
    "generate": [
        "MODEL",
        "--prompt",
        "--max-tokens",
        "--temperature",
        "--seed",
        "--tp",
        "--local",
        "--n",
        "--json",
    ],
    "chat": ["--target", "--tls-ca", "--token-file", "--message", "--json"],
    "bench": ["MODEL", "--target", "--streams", "--json"],
    "compare": ["A", "B", "--prompts", "--max-tokens", "--plot", "--quantize-b", "--json"],
    "batch": ["IN.jsonl", "OUT.jsonl", "--model", "--target", "--concurrency", "--json"],
    "plan": ["MODEL", "--gpus", "--nodes", "--context", "--users", "--json"],
    "demo": ["--tp"],
}


def test_the_overview_lists_every_command():
    result = run("--help")
    assert result.status == 0
    assert all(name in result.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_its_options(name):
    result = run(name, "--help")
    assert result.status == 0
    assert all(option in result.out for option in [*COMMANDS[name], "--debug"])


def test_no_command_at_all_shows_the_overview():
    result = run()
    assert result.status == 2
    assert "generate" in result.out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from runtime.cli import main; main(['serve', '--help']);"
        "heavy = {'torch', 'ray', 'grpc', 'numpy', 'huggingface_hub', 'tokenizers', 'jinja2'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
