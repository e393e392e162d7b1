"""What the manifests say: every kustomization rendered by kubectl's own kustomize, once a session, and views
of the pods in them. Knows nothing of what is right."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.support import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
RENDERED = (
    "overlays/one-pod",
    "overlays/dev-cpu",
    "overlays/dev-cpu-tls",
    "overlays/single-node-8gpu",
    "overlays/two-node",
    "overlays/two-node-monitored",
    "overlays/two-node-stages",
    "rayjob",
    "lws",
)
LWS_VARIABLES = {"LWS_LEADER_ADDRESS": "tramontane-0.tramontane.tramontane"}  # set by LeaderWorkerSet


def tool(name: str) -> str:
    """A program that the test extra installs, beside this Python or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: it comes with the test extra (make test installs it)"
    return found


@functools.cache
def rendered_text(folder: str) -> str:
    """What kustomize makes of a folder. "A + B + C" is the components B and C on top of A, as a user's own
    folder would have it."""
    with tempfile.TemporaryDirectory() as made:
        path = KUBERNETES / folder
        if " + " in folder:
            path = Path(made).resolve()
            below, *components = (os.path.relpath(KUBERNETES / name, path) for name in folder.split(" + "))
            (path / "kustomization.yaml").write_text(
                "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: tramontane\n"
                f"resources:\n  - {below}\ncomponents: [{', '.join(components)}]\n"
            )
        done = subprocess.run([tool("kubectl"), "kustomize", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return done.stdout


@functools.cache
def documents(folder: str) -> list[dict]:
    """What a kustomization renders to. Shared: to be read, not changed."""
    return list(yaml.load_all(rendered_text(folder), Loader=yaml.CSafeLoader))


def of_kind(folder: str, *kinds: str) -> list[dict]:
    return [document for document in documents(folder) if document["kind"] in kinds]


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever it stands, and who starts it."""

    owner: str  # kind/name/place
    template: dict
    command_by_kuberay: bool = False  # KubeRay writes the command of its Ray container

    @property
    def spec(self) -> dict:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def containers(self) -> list[dict]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(folder: str) -> list[Pod]:
    return [pod for document in documents(folder) for pod in _pods(document)]


def _pods(document: dict) -> Iterator[Pod]:
    kind, spec = document["kind"], document.get("spec", {})
    owner = f"{kind}/{document['metadata']['name']}"
    if kind in ("Deployment", "Job"):
        yield Pod(owner, spec["template"])
    elif kind == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        yield Pod(f"{owner}/leader", group["leaderTemplate"])
        yield Pod(f"{owner}/worker", group["workerTemplate"])
    elif kind == "RayCluster":
        yield from _ray_pods(owner, spec)
    elif kind == "RayJob":
        yield Pod(f"{owner}/submitter", spec["submitterPodTemplate"], command_by_kuberay=True)
        yield from _ray_pods(owner, spec["rayClusterSpec"])


def _ray_pods(owner: str, spec: dict) -> Iterator[Pod]:
    yield Pod(f"{owner}/head", spec["headGroupSpec"]["template"], command_by_kuberay=True)
    for group in spec["workerGroupSpecs"]:
        yield Pod(f"{owner}/{group['groupName']}", group["template"], command_by_kuberay=True)


def ray_clusters(folder: str) -> list[dict]:
    """The spec of every Ray cluster, a RayJob's own too."""
    return [
        document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]
        for document in of_kind(folder, "RayCluster", "RayJob")
    ]


def environment(folder: str, container: dict) -> dict[str, str]:
    """A container's variables as far as the manifests know them; secrets as an empty string."""
    maps = {document["metadata"]["name"]: document["data"] for document in of_kind(folder, "ConfigMap")}
    values = dict(LWS_VARIABLES)
    for source in container.get("envFrom", []):
        values |= maps[source["configMapRef"]["name"]]
    return values | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def command_line(folder: str, container: dict) -> list[str]:
    """Command and arguments as Kubernetes would start them; the image's entry point where none is named."""
    words = [*container.get("command", ["tramontane"]), *container.get("args", [])]
    for name, value in environment(folder, container).items():
        words = [word.replace(f"$({name})", value) for word in words]
    return words
