"""The files as they lie there: linters find nothing, and find what is planted; images are pinned; what the
walk-through tells people to type exists."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.deploy.commands import parse
from tests.deploy.manifests import DEPLOY, RENDERED, tool
from tests.support import REPOSITORY

SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
YAML = sorted(DEPLOY.rglob("*.yaml"))
DOCKERFILE = DEPLOY / "docker/Dockerfile"
WALK = REPOSITORY / "docs/deploy.md"


def lint(*command: str | Path) -> subprocess.CompletedProcess:
    name, *rest = map(str, command)
    return subprocess.run([tool(name), *rest], capture_output=True, text=True, check=False)


def yamllint(*paths: Path) -> subprocess.CompletedProcess:
    return lint("yamllint", "--strict", "-c", DEPLOY / "yamllint.yaml", *paths)


def test_linters_find_nothing():
    assert len(SCRIPTS) >= 3 and len(YAML) >= 20
    for done in (lint("shellcheck", *SCRIPTS), lint("hadolint", DOCKERFILE), yamllint(*YAML)):
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "file", "old", "new"),
    [
        (lambda path: lint("shellcheck", path), SCRIPTS[0], 'ray start "$@"', "ray start $@"),
        (lambda path: lint("hadolint", path), DOCKERFILE, "FROM ${PYTHON} AS build", "FROM python AS build"),
        (lambda path: lint("hadolint", path), DOCKERFILE, " --no-install-recommends", ""),
        (yamllint, DEPLOY / "kubernetes/base/kustomization.yaml", "  - common", "   - common"),
        (yamllint, DEPLOY / "ray/checkout.yaml", '"60"', "yes"),
    ],
)
def test_linters_find_what_is_planted(tmp_path, command, file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    planted = tmp_path / file.name
    planted.write_text(text.replace(old, new), encoding="utf-8")
    assert command(planted).returncode != 0


def test_scripts_can_be_run():
    for script in SCRIPTS:
        assert script.stat().st_mode & 0o111, f"{script} is not executable"
        assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


def test_the_base_is_pinned_and_the_image_runs_as_nobody_special():
    text = DOCKERFILE.read_text(encoding="utf-8")
    (base,) = re.findall(r"^ARG PYTHON=(\S+)$", text, re.M)
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${PYTHON}", "build", "base"}
    for target in ("cpu", "cuda"):
        stage = text.split(f"FROM base AS {target}\n")[1].split("\nFROM ")[0]
        assert stage.rstrip().splitlines()[-1] == "USER 10001:10001"


def test_the_build_context_holds_what_is_copied():
    """And no more: the ignore file lets single names in."""
    rules = (DEPLOY / "docker/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[1] == "*"
    copied = set()
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(encoding="utf-8"), re.M):
        words = [word for word in shlex.split(line) if not word.startswith("--chmod")]
        if not words[0].startswith("--from"):
            copied |= set(words[:-1])
    assert copied == allowed
    for name in copied:
        assert (REPOSITORY / name).exists()
    assert not any(fnmatch.fnmatch("deploy/docker/node.sh", rule) for rule in rules[1:] if rule[0] == "!*")


def commands_of_the_walk() -> list[str]:
    """Lines that people type: indented or fenced blocks, a line each, continuations joined."""
    text = WALK.read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        lines += block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_the_walk_through_names_what_exists():
    lines = commands_of_the_walk()
    assert len(lines) > 15
    for line in lines:
        for words in re.findall(r"(?:^(?:\w+=\S+ )*|-- )(tramontane .+)", line):
            parse(shlex.split(words.replace("$MODEL", "model.gguf"), comments=True))
        for path in re.findall(r"\bdeploy/[\w./-]+", line):
            assert (REPOSITORY / path).exists(), path
    text = "\n".join(lines)
    for folder in RENDERED:
        assert f"deploy/kubernetes/{folder}" in text, f"the walk-through leaves {folder} out"
