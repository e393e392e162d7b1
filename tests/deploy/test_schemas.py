"""Every kustomization renders, every document in it fits its schema, and a misspelt field does not."""

from __future__ import annotations

import copy
import random

import pytest
import yaml

from tests.deploy.manifests import KUBERNETES, RENDERED, documents, rendered_text
from tests.deploy.schemas import VERSIONS, errors, typos
from tests.support import REPOSITORY

TYPOS_A_DOCUMENT = 12


def name_of(document: dict) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def test_all_are_rendered():
    """Nothing beside the list: a kustomization that is no component and that none of the list uses."""
    used = set()

    def visit(folder):
        used.add(folder)
        file = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
        for name in [*file.get("resources", []), *file.get("components", [])]:
            if (folder / name).is_dir():
                visit((folder / name).resolve())

    for folder in RENDERED:
        visit((KUBERNETES / folder).resolve())
    assert used >= {file.parent.resolve() for file in KUBERNETES.rglob("kustomization.yaml")}


@pytest.mark.parametrize("folder", RENDERED)
def test_renders_in_one_namespace(folder):
    found = documents(folder)
    assert len(found) > 5
    assert len({name_of(document) for document in found}) == len(found)
    assert {document["metadata"]["namespace"] for document in found} == {"tramontane"}
    assert str(REPOSITORY) not in rendered_text(folder)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", RENDERED)
def test_fits_its_schemas(folder, version):
    for document in documents(folder):
        assert errors(document, version) == [], name_of(document)


@pytest.mark.parametrize("folder", RENDERED)
def test_a_misspelt_field_is_caught(folder):
    """In every document, at fields drawn by chance, and always at its first."""
    for document in documents(folder):
        planted = list(typos(document))
        drawn = random.Random(name_of(document)).sample(planted, min(TYPOS_A_DOCUMENT, len(planted)))
        for place, misspelt in [planted[0], *drawn]:
            assert errors(misspelt), f"{name_of(document)}: nobody saw a typo in {place}"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "replicas"), "one"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "replicas"), "one"),
        ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("RayCluster", ("spec", "authOptions", "mode"), "Token"),
    ],
)
def test_a_wrong_value_is_caught(kind, path, value):
    """Among them what KubeRay's users stumble on: parameters of `ray start` are strings."""
    document = copy.deepcopy(next(each for each in documents("overlays/dev-cpu") if each["kind"] == kind))
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    assert errors(document)
