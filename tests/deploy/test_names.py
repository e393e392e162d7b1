"""What the manifests name exists: commands, flags, ports, probes, variables, secrets, images, versions."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib.resources import files

import pytest
import yaml
from ray.scripts.scripts import start as ray_start

from runtime.commands import serve
from runtime.hub.resolve import cache_folder
from runtime.server import lifecycle
from tests.deploy.commands import default, parse
from tests.deploy.manifests import (
    DEPLOY,
    RENDERED,
    command_line,
    environment,
    of_kind,
    pods,
    ray_clusters,
    rendered_text,
)
from tests.support import REPOSITORY

NODE = (DEPLOY / "docker/node.sh").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SECRETS = {  # with their keys
    "tramontane-ray-token": {"auth_token"},
    "tramontane-hub": {"token"},
    "tramontane-tls": {"tls.crt", "tls.key", "ca.crt"},
    "tramontane-tokens": {"tokens"},
}
RAY_OPTIONS = {name.removeprefix("--") for option in ray_start.params for name in option.opts}


def served(folder: str, container: dict) -> list[str] | None:
    """The `tramontane` command line that a container comes down to, if it is not a Ray node alone."""
    words = command_line(folder, container)
    if words[0] == "tramontane":
        return words
    if words[0] == "tramontane-node":
        role, place, *rest = words[1:]
        assert f"  {role})" in NODE, f"node.sh knows no {role}"
        assert re.fullmatch(r"\d+" if role == "leader" else r"[\w.$()-]+:\d+", place), place
        return ["tramontane", "serve", *rest, "--ray-address", place] if role != "worker" else None
    if words[:2] == ["sh", "-c"]:
        (found,) = re.findall(r"tramontane [^;&]+", words[2])
        model = environment(folder, container)["MODEL"]
        return shlex.split(found.replace("$MODEL", model))
    raise AssertionError(f"{words[0]} is no command of the image")


@pytest.mark.parametrize("folder", RENDERED)
def test_command_lines_are_understood(folder):
    found = []
    for pod in pods(folder):
        for container in pod.containers:
            if "command" in container or not pod.command_by_kuberay:
                words = served(folder, container)
                found.append(words and (words[1], parse(words)))
    for job in of_kind(folder, "RayJob"):
        words = shlex.split(job["spec"]["entrypoint"])
        found.append((words[1], parse(words)))
        # The driver shares a host with its ranks only where it takes of what the head does not have.
        assert job["spec"]["entrypointNumCpus"] >= 1
        assert parse(words)["ray_address"] == "auto"
    models = {options.get("model", options.get("source")) for _, options in filter(None, found)}
    assert len(models) == 1, "pods of one deployment name different models"
    assert {name for name, _ in filter(None, found)} >= {"pull"}
    for name, options in filter(None, found):
        if name == "serve":
            assert options["host"] == "0.0.0.0", "from outside the pod, nothing else is reached"
            assert options["port"] == 50051 == default("serve", "port")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["tramontane", "serve", "m", "--pipeline", "2"], "--pipeline"),
        (["tramontane", "serve", "m", "--tp", "two"], "two"),
        (["tramontane", "serve", "m", "--kv-memory", "1 parsec"], "parsec"),
        (["tramontane", "serves", "m"], "serves"),
        (["tramontane", "serve"], "MODEL"),
    ],
)
def test_a_wrong_command_line_would_be_seen(words, fragment):
    with pytest.raises(AssertionError, match=re.escape(fragment)):
        parse(words)


@pytest.mark.parametrize("folder", RENDERED)
def test_probes_ask_for_what_the_server_reports(folder):
    """ "" is liveness, the service is readiness; tests/server/test_lifecycle.py holds what they stand on."""
    gateways = [pod for pod in pods(folder) if pod.labels["app.kubernetes.io/component"] == "gateway"]
    assert len(gateways) == (0 if folder == "rayjob" else 1)
    for pod in gateways:
        (container,) = pod.spec["containers"]
        ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
        assert ports == {"grpc": 50051, "metrics": 9464}
        if parse(served(folder, container))["tls_cert"] is None:
            assert container["readinessProbe"]["grpc"] == {"port": 50051, "service": lifecycle.SERVICE}
            assert container["startupProbe"]["grpc"] == {"port": 50051, "service": lifecycle.SERVICE}
            assert container["livenessProbe"]["grpc"] == {"port": 50051}
        else:  # older kubelets speak no TLS: test_tls.py
            assert not any(
                "grpc" in container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
            )
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800


@pytest.mark.parametrize("folder", RENDERED)
def test_the_grace_covers_the_drain(folder):
    closing = 20  # seconds for actors, a raylet and Python's own end
    for pod in pods(folder):
        if pod.labels["app.kubernetes.io/component"] == "gateway":
            (container,) = pod.spec["containers"]
            before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            needed = before + serve.DRAIN_SECONDS + lifecycle._LAST_CALLS + closing
            assert pod.spec["terminationGracePeriodSeconds"] >= needed


def source(module: str, file: str) -> str:
    """Text of a file of an installed package."""
    return (files(module) / file).read_text(encoding="utf-8")


READ_BY = {  # variable: where it is looked up
    "RAY_USAGE_STATS_ENABLED": ("ray", "_common/usage/usage_constants.py"),
    "RAY_JOB_STOP_WAIT_TIME_S": ("ray", "dashboard/modules/job/job_supervisor.py"),
    "HF_HUB_OFFLINE": ("huggingface_hub", "constants.py"),
    "HF_TOKEN": ("huggingface_hub", "utils/_auth.py"),
}
CONVENTIONS = {"HOME", "PYTHONPATH"}


def test_variables_are_read_by_someone():
    job = yaml.safe_load((DEPLOY / "ray/checkout.yaml").read_text(encoding="utf-8"))
    named = set(job["env_vars"])
    for folder in RENDERED:
        for pod in pods(folder):
            for container in pod.containers:
                named |= {entry["name"] for entry in container.get("env", [])}
                line = command_line(folder, container)
                used = re.findall(r"\$\(?(\w+)\)?", " ".join(line))
                assert set(used) <= {"MODEL"} and not any("$(" in word for word in line)
    for name, (module, file) in READ_BY.items():
        assert name in named and name in source(module, file)
    assert str(cache_folder({"TRAMONTANE_CACHE": "/models"})) == "/models"
    ray_library = (files("ray") / "_raylet.so").read_bytes()
    assert b"RAY_AUTH_TOKEN" in ray_library and b"RAY_AUTH_MODE" in ray_library
    settings = {name for name in named if re.match("RAY_[a-z]", name)}  # of Ray's own, by name
    assert settings
    for name in settings:
        assert name.removeprefix("RAY_").encode() in ray_library, name
    assert named - settings == {*READ_BY, *CONVENTIONS, "TRAMONTANE_CACHE", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"}


@pytest.mark.parametrize("folder", RENDERED)
def test_ray_start_has_the_parameters(folder):
    for cluster in ray_clusters(folder):
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            assert set(group["rayStartParams"]) <= RAY_OPTIONS
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert groups[0]["rayStartParams"]["num-cpus"] == "0", "the head would run ranks"


def test_the_container_script_starts_ray_as_ray_knows():
    lines = [line for line in NODE.splitlines() if "ray start" in line or "beside_raylet" in line]
    named = {name for line in lines for name in re.findall(r"(?<=\s)--([a-z-]+)", line)}
    assert named <= RAY_OPTIONS
    assert {"address", "head", "num-cpus", "object-store-memory"} <= named


@pytest.mark.parametrize("folder", RENDERED)
def test_one_ray_version(folder):
    """That of constraints.txt, which the image installs."""
    (pinned,) = re.findall(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.M)
    for cluster in ray_clusters(folder):
        assert cluster["rayVersion"] == pinned
        assert cluster["authOptions"] == {"mode": "token", "secretName": "tramontane-ray-token"}


@pytest.mark.parametrize("folder", RENDERED)
def test_secrets_are_those_that_the_walk_through_makes(folder):
    text = rendered_text(folder)
    for name in re.findall(r"secretName: (\S+)", text):
        assert name in SECRETS
    for pod in pods(folder):
        for container in pod.containers:
            for entry in container.get("env", []):
                if source := entry.get("valueFrom", {}).get("secretKeyRef"):
                    assert SECRETS[source["name"]] == {source["key"]}
    walk = (REPOSITORY / "docs/deploy.md").read_text(encoding="utf-8")
    for name, keys in SECRETS.items():
        lines = re.findall(rf"create secret generic {name} (.+)", walk)
        assert lines, name
        for line in lines:
            assert set(re.findall(r"--from-(?:literal|file)=([\w.]+)", line)) == keys


@pytest.mark.parametrize("folder", RENDERED)
def test_images_are_targets_of_the_dockerfile(folder):
    kinds = set()
    for pod in pods(folder):
        for container in pod.containers:
            name, _, tag = container["image"].partition(":")
            version, _, target = tag.rpartition("-")
            assert (name, version) == ("tramontane", PROJECT["version"])
            assert re.search(rf"^FROM base AS {target}$", DOCKERFILE, re.M)
            kinds.add(target)
    gpu = "nvidia.com/gpu" in rendered_text(folder)
    assert kinds == {"cuda" if gpu else "cpu"}


def test_the_image_has_what_pods_start():
    assert PROJECT["scripts"]["tramontane"] == "runtime.cli:main"
    assert re.search(r"^COPY .*deploy/docker/node.sh /usr/local/bin/tramontane-node$", DOCKERFILE, re.M)
    assert "cluster" in PROJECT["optional-dependencies"] and ".[cluster]" in DOCKERFILE
