"""Strict validators for the kinds that the manifests use.

Kubernetes' own kinds: the schemas inside kubernetes-validate. KubeRay's kinds: its CRDs, from the fixtures.
LeaderWorkerSet: its few fields written out here after the API reference of LWS 0.9, its pods as Kubernetes'
own. What watches: monitoring_schemas.py. An API server would drop or refuse a field that it does not know;
all of these refuse it. What a CRD says in CEL (x-kubernetes-validations) is not evaluated.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from importlib import resources

import jsonschema
import yaml
from referencing import Registry, Resource

from tests.deploy import monitoring_schemas
from tests.support import fixture_path

VERSIONS = ("1.30", "1.37")  # the oldest with a preStop sleep by default, and the newest known here
_CRDS = {
    "RayCluster": "kuberay/ray.io_rayclusters.v1.7.0.yaml",
    "RayJob": "kuberay/ray.io_rayjobs.v1.7.0.yaml",
}
_META = {
    "type": "object",
    "required": ["name"],
    "properties": {key: {"type": "string"} for key in ("name", "namespace")}
    | {
        key: {"type": "object", "additionalProperties": {"type": "string"}}
        for key in ("labels", "annotations")
    },
    "additionalProperties": False,
}


def errors(document: dict, version: str = VERSIONS[-1]) -> list[str]:
    """What is wrong with a manifest, a line each. Skips the test where the CRD of a kind is not at hand."""
    if document["kind"] in _CRDS:
        found = _crd(document["kind"]).iter_errors(document)
    elif document["kind"] == "LeaderWorkerSet":
        found = _leader_worker_set(document, version)
    elif document["kind"] in monitoring_schemas.SPECS:
        found = monitoring_schemas.iter_errors(document, _META)
    else:
        found = _core(document["apiVersion"], document["kind"], version).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


@functools.cache
def _core(api_version: str, kind: str, version: str) -> jsonschema.protocols.Validator:
    group, _, short = api_version.rpartition("/")
    name = f"{kind}-{group.split('.')[0]}-{short}" if group else f"{kind}-{short}"
    folder = f"v{_release(version)}-local-strict"
    registry = Resource.from_contents(_schema(f"{folder}/_definitions.json")) @ Registry()
    return jsonschema.Draft202012Validator(_schema(f"{folder}/{name.lower()}.json"), registry=registry)


@functools.cache
def _release(version: str) -> str:
    folder = resources.files("kubernetes_validate").joinpath("kubernetes-json-schema")
    names = sorted(entry.name for entry in folder.iterdir())
    return next(
        name.removeprefix("v").removesuffix("-local-strict")
        for name in names
        if name.startswith(f"v{version}.") and name.endswith("-local-strict")
    )


@functools.cache
def _schema(path: str) -> dict:
    file = resources.files("kubernetes_validate").joinpath("kubernetes-json-schema", path)
    return json.loads(file.read_text(encoding="utf-8"))


@functools.cache
def _crd(kind: str) -> jsonschema.protocols.Validator:
    definition = yaml.load(fixture_path(_CRDS[kind]).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = copy.deepcopy(_META)
    schema["properties"]["apiVersion"]["const"] = "ray.io/v1"
    schema.get("required", []).append("spec")
    _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(schema: dict) -> None:
    """Refuse unknown fields: an API server prunes them in silence."""
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    children = [
        *schema.get("properties", {}).values(),
        schema.get("items"),
        schema.get("additionalProperties"),
    ]
    for child in children:
        if isinstance(child, dict):
            _close(child)


def _leader_worker_set(document: dict, version: str) -> Iterator[jsonschema.ValidationError]:
    template = {"type": "object"}
    group = {
        "type": "object",
        "required": ["workerTemplate"],
        "properties": {
            "leaderTemplate": template,
            "workerTemplate": template,
            "size": {"type": "integer", "minimum": 1},
            "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        },
        "additionalProperties": False,
    }
    whole = {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
            "kind": {"const": "LeaderWorkerSet"},
            "metadata": _META,
            "spec": {
                "type": "object",
                "required": ["leaderWorkerTemplate"],
                "properties": {
                    "replicas": {"type": "integer", "minimum": 0},
                    "leaderWorkerTemplate": group,
                },
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    }
    yield from jsonschema.Draft202012Validator(whole).iter_errors(document)
    templates = document.get("spec", {}).get("leaderWorkerTemplate", {})
    for name in ("leaderTemplate", "workerTemplate"):
        if name in templates:
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": templates[name]}
            yield from _core("v1", "PodTemplate", version).iter_errors(pod)


def typos(document: dict) -> Iterator[tuple[str, dict]]:
    """Copies of a document with one misspelt field each, and where; names free to choose are left."""
    for path in _field_paths(document):
        copied = copy.deepcopy(document)
        holder = copied
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1] + "x"] = holder.pop(path[-1])
        yield ".".join(map(str, path)), copied


_FREE = {
    "labels", "annotations", "matchLabels", "data", "nodeSelector", "rayStartParams",
    "requests", "limits", "selector",
}  # fmt: skip


def _field_paths(node: object, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(node, dict):
        free = bool(path) and path[-1] in _FREE and not {"matchLabels", "matchExpressions"} & set(node)
        for key, value in node.items():
            if not free and (*path, key) not in (("apiVersion",), ("kind",)):
                yield (*path, key)
            yield from _field_paths(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _field_paths(value, (*path, index))
