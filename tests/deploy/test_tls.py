"""With TLS and tokens: what the server is told to read is mounted there, from Secrets that the walk-through
makes; probes go where they can; clients get in as it says. What is misspelt would be seen."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from pathlib import PurePosixPath

import pytest

from runtime.server import lifecycle
from tests.deploy.commands import parse
from tests.deploy.manifests import KUBERNETES, Pod, documents, of_kind, pods
from tests.deploy.schemas import errors
from tests.deploy.test_names import SECRETS, served
from tests.support import REPOSITORY

FOLDER = "overlays/dev-cpu-tls"
FLAGS = ("tls_cert", "tls_key", "tls_client_ca", "auth_token_file")
PAGES = set(re.findall(r'"(/\w+)":', inspect.getsource(lifecycle._pages)))


def gateway(folder: str) -> Pod:
    (pod,) = [pod for pod in pods(folder) if pod.labels["app.kubernetes.io/component"] == "gateway"]
    return pod


def mistakes(folder: str, pod: Pod) -> list[str]:
    """What keeps a gateway from serving with TLS and tokens, or its probes from finding it."""
    (container,) = pod.spec["containers"]
    try:
        options = parse(served(folder, container))
    except AssertionError as error:
        return [str(error)]
    secrets = {
        volume["name"]: volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume
    }
    files = {}  # path: Secret and key
    for mount in container["volumeMounts"]:
        if (secret := secrets.get(mount["name"])) is not None:
            for key in SECRETS.get(secret, ()):
                files[str(PurePosixPath(mount["mountPath"]) / key)] = (secret, key)
    wanted = {
        "tls_cert": ("tramontane-tls", "tls.crt"),
        "tls_key": ("tramontane-tls", "tls.key"),
        "tls_client_ca": ("tramontane-tls", "ca.crt"),
        "auth_token_file": ("tramontane-tokens", "tokens"),
    }
    found = [
        f"{name} is {options[name]}"
        for name in FLAGS
        if options[name] is not None and files.get(str(options[name])) != wanted[name]
    ]
    found += [f"{name} is missing" for name in FLAGS if options[name] is None and name != "tls_client_ca"]
    found += [f"nobody makes {secret}" for secret in secrets.values() if secret not in SECRETS]
    ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
    for kind, page in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/healthz")):
        asked = container[f"{kind}Probe"].get("httpGet", {})
        if asked.get("path") != page or page not in PAGES:
            found.append(f"the {kind} probe asks for {asked.get('path')}")
        if ports.get(asked.get("port")) != options["metrics_port"]:
            found.append(f"the {kind} probe asks at {asked.get('port')}")
    return found


def test_the_server_finds_its_files_and_probes_the_server():
    assert mistakes(FOLDER, gateway(FOLDER)) == []


def test_the_overlay_has_both():
    (container,) = gateway(FOLDER).spec["containers"]
    assert parse(served(FOLDER, container))["tls_client_ca"] is not None


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("below", ["overlays/one-pod", "overlays/single-node-8gpu", "lws"])
def test_the_components_go_on_top_of_others(below, mutual):
    folder = f"{below} + components/tls" + " + components/mtls" * mutual
    pod = gateway(folder)
    assert mistakes(folder, pod) == []
    (container,) = pod.spec["containers"]
    assert (parse(served(folder, container))["tls_client_ca"] is not None) == mutual
    ports = [port for service in of_kind(folder, "Service") for port in service["spec"]["ports"]]
    assert {port["appProtocol"] for port in ports} == {"https"}
    for document in documents(folder):
        assert errors(document) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tramontane-tls", "tramontane-tsl"),
        ("tramontane-tokens", "tramontane-token"),
        ("tramontane-tokens", "tramontane-tls"),
        ("--tls-cert", "--tls-certificate"),
        ("--auth-token-file", "--token-file"),
        ("/etc/tramontane/tls/tls.key", "/etc/tramontane/tls/key.pem"),
        ("/etc/tramontane/tls/tls.crt", "/etc/tramontane/tls/tls.key"),
        ("/etc/tramontane/tls/ca.crt", "/etc/tramontane/tls/ca.pem"),
        ("/etc/tramontane/tokens", "/etc/tramontane/token"),
        ("/readyz", "/ready"),
        ("/healthz", "/readyz"),
        ("metrics", "http"),
    ],
)
def test_a_wrong_name_would_be_seen(old, new):
    """Each in its first place alone: where it is mounted, say, and not where the flag names it."""
    pod = gateway(FOLDER)
    planted = dataclasses.replace(pod, template=copy.deepcopy(pod.template))
    assert replace_first(planted.template["spec"], old, new)
    assert mistakes(FOLDER, planted)


def replace_first(value, old: str, new: str) -> bool:
    """Put `new` in place of the first text that is `old`, in a tree of lists and maps."""
    places = value.items() if isinstance(value, dict) else enumerate(value)
    for place, each in places:
        if each == old:
            value[place] = new
            return True
        if isinstance(each, dict | list) and replace_first(each, old, new):
            return True
    return False


def test_secrets_are_the_gateways_alone_and_renewed():
    for pod in pods(FOLDER):
        secret = {volume["name"]: volume["secret"] for volume in pod.spec["volumes"] if "secret" in volume}
        assert bool(secret) == (pod.owner == "Deployment/tramontane-gateway")
        for each in secret.values():
            assert each["defaultMode"] == 0o440 and not each.get("optional")
            assert pod.spec["securityContext"]["fsGroup"] == pod.spec["securityContext"]["runAsGroup"]
        for container in pod.containers:
            mounts = [mount for mount in container["volumeMounts"] if mount["name"] in secret]
            assert bool(mounts) == (container["name"] == "gateway")
            # A subPath is a copy that Kubernetes never renews.
            assert all(mount["readOnly"] and "subPath" not in mount for mount in mounts)


def test_no_secret_lies_in_the_tree():
    for file in KUBERNETES.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"^kind: Secret$|BEGIN [A-Z ]*(PRIVATE KEY|CERTIFICATE)", text, re.M), file


def test_the_walk_through_makes_a_certificate_for_the_services():
    walk = (REPOSITORY / "docs/deploy.md").read_text(encoding="utf-8")
    names = set(re.findall(r"DNS:([\w.-]+)", walk))
    for service in of_kind(FOLDER, "Service"):
        assert service["metadata"]["name"] in names
        assert f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc" in names
    assert {"localhost"} <= names and "IP:127.0.0.1" in walk  # for port-forward
