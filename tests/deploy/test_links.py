"""What the manifests refer to is there: pods behind selectors, ports, volumes, claims, settings, accounts.
What is meant to be closed is closed."""

from __future__ import annotations

import pytest

from tests.deploy.manifests import (
    RENDERED,
    Pod,
    command_line,
    environment,
    of_kind,
    pods,
    ray_clusters,
)

STRANGER: dict[str, str] = {"app": "another"}
CLIENT = {"tramontane/client": "true"}
RAY_PORTS = (6379, 8265, 10001, 8080, 52365, 10002, 19999)


def selects(selector: dict, labels: dict[str, str]) -> bool:
    """A Kubernetes label selector, with the operator that the manifests use."""
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def behind(folder: str, selector: dict) -> list[Pod]:
    return [pod for pod in pods(folder) if selects(selector, pod.labels)]


# ---- what refers to what --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", RENDERED)
def test_services_lead_to_the_gateway(folder):
    services = of_kind(folder, "Service")
    watched = folder.endswith("-monitored")  # with a Service for metrics: test_monitoring.py
    assert len(services) == (0 if folder == "rayjob" else 2 + watched)
    for service in services:
        (pod,) = behind(folder, {"matchLabels": service["spec"]["selector"]})
        (port,) = service["spec"]["ports"]
        ports = {
            entry["name"]: entry["containerPort"]
            for container in pod.containers
            for entry in container.get("ports", [])
        }
        assert port["port"] == ports[port["targetPort"]]
        assert port["port"] == (50051 if port["name"] == "grpc" else 9464)


@pytest.mark.parametrize("folder", RENDERED)
def test_workloads_select_their_own_pods(folder):
    for document in of_kind(folder, "Deployment"):
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert selects(document["spec"]["selector"], labels)


@pytest.mark.parametrize("folder", RENDERED)
def test_what_serves_is_not_evicted_for_convenience(folder):
    (budget,) = of_kind(folder, "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 0
    covered = {pod.owner for pod in behind(folder, budget["spec"]["selector"])}
    assert covered == {pod.owner for pod in pods(folder)} - {"Job/tramontane-pull"} - {
        "RayJob/tramontane-generate/submitter"
    }


@pytest.mark.parametrize("folder", RENDERED)
def test_pods_find_what_they_mount_and_read(folder):
    claims = {document["metadata"]["name"] for document in of_kind(folder, "PersistentVolumeClaim")}
    maps = {document["metadata"]["name"] for document in of_kind(folder, "ConfigMap")}
    accounts = {document["metadata"]["name"] for document in of_kind(folder, "ServiceAccount")}
    for pod in pods(folder):
        assert pod.spec["serviceAccountName"] in accounts
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounted = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
        assert set(volumes) == mounted
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in pod.containers:
            for entry in container.get("envFrom", []):
                assert entry["configMapRef"]["name"] in maps


@pytest.mark.parametrize("folder", RENDERED)
def test_ranks_and_gateway_see_the_same_files(folder):
    """The gateway names a model's path; the ranks open it."""
    for pod in pods(folder):
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            values = environment(folder, container)
            if "TRAMONTANE_CACHE" in values:
                assert mounts[values["TRAMONTANE_CACHE"]] == "models"
            if command_line(folder, container)[0] == "tramontane-node":
                assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= set(values)
            if pod.labels["app.kubernetes.io/component"] == "ray-worker":
                assert mounts["/models"] == "models"


@pytest.mark.parametrize(
    "folder",
    [
        "overlays/dev-cpu",
        "overlays/dev-cpu-tls",
        "overlays/single-node-8gpu",
        "overlays/two-node",
        "overlays/two-node-stages",
    ],
)
def test_the_gateway_names_the_head(folder):
    """KubeRay names the Service of a cluster's head."""
    (cluster,) = of_kind(folder, "RayCluster")
    (gateway,) = [pod for pod in pods(folder) if pod.owner == "Deployment/tramontane-gateway"]
    (container,) = gateway.spec["containers"]
    line = command_line(folder, container)
    assert line[:3] == ["tramontane-node", "gateway", f"{cluster['metadata']['name']}-head-svc:6379"]


@pytest.mark.parametrize(
    ("folder", "nodes", "gpus"),
    [
        ("overlays/dev-cpu", 1, 0),
        ("overlays/dev-cpu-tls", 1, 0),
        ("overlays/single-node-8gpu", 1, 8),
        ("overlays/two-node", 2, 8),
        ("overlays/two-node-stages", 2, 8),
        ("rayjob", 1, 0),
    ],
)
def test_a_replica_fits_into_a_node(folder, nodes, gpus):
    (cluster,) = ray_clusters(folder)
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == nodes
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) == gpus
    (settings,) = of_kind(folder, "ConfigMap")
    if gpus:
        assert int(settings["data"]["TP"]) == gpus
    apart = "affinity" in group["template"]["spec"]
    assert apart == (nodes > 1)
    for gateway in of_kind(folder, "Deployment"):
        (container,) = gateway["spec"]["template"]["spec"]["containers"]
        line = command_line(folder, container)
        stages = int(line[line.index("--pp") + 1]) if "--pp" in line else 1
        assert gateway["spec"]["replicas"] * stages == nodes
        assert gateway["spec"]["strategy"] == {"type": "Recreate"}


def test_only_gateways_of_gpu_overlays_name_the_device():
    for folder in RENDERED:
        gpu = any("nvidia.com/gpu" in str(pod.template) for pod in pods(folder))
        lines = [command_line(folder, container) for pod in pods(folder) for container in pod.containers]
        named = [line[line.index("--device") + 1] for line in lines if "--device" in line]
        assert named == (["cuda"] if gpu else [])


# ---- what is closed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", RENDERED)
def test_containers_have_no_rights(folder):
    for pod in pods(folder):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == context["runAsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        for volume in pod.spec["volumes"]:
            # Secrets are the gateway's alone: test_tls.py.
            assert set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim", "secret"}
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                assert volume["emptyDir"]["sizeLimit"]
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def open_to(folder: str, source: dict[str, str], target: dict[str, str], port: int, way: str) -> bool:
    """Whether the policies let traffic in the namespace through at one end: "ingress" judges at the target,
    "egress" at the source."""
    subject, other = (target, source) if way == "ingress" else (source, target)
    policies = [
        document["spec"]
        for document in of_kind(folder, "NetworkPolicy")
        if selects(document["spec"]["podSelector"], subject)
        and way.capitalize() in document["spec"]["policyTypes"]
    ]
    if not policies:
        return True
    for rule in (rule for policy in policies for rule in policy.get(way, [])):
        peers = rule.get("from" if way == "ingress" else "to")
        ports = rule.get("ports")
        here = peers is None or any(
            set(peer) == {"podSelector"} and selects(peer["podSelector"], other) for peer in peers
        )
        if here and (ports is None or port in [each["port"] for each in ports]):
            return True
    return False


def passes(folder: str, source: dict[str, str], target: dict[str, str], port: int) -> bool:
    return all(open_to(folder, source, target, port, way) for way in ("ingress", "egress"))


@pytest.mark.parametrize("folder", RENDERED)
def test_the_doors(folder):
    """Nothing of Ray's is open to anyone but Ray's nodes; gRPC is, to clients."""
    for target in pods(folder):
        gateway = target.labels["app.kubernetes.io/component"] == "gateway"
        for source in (STRANGER, CLIENT):
            for port in (*RAY_PORTS, 9464):
                assert not passes(folder, source, target.labels, port), (target.owner, port)
        assert passes(folder, CLIENT, target.labels, 50051) == gateway
        assert not passes(folder, STRANGER, target.labels, 50051)
        for source in pods(folder):
            both = [pod.labels.get("tramontane/ray") == "node" for pod in (source, target)]
            for port in RAY_PORTS:
                assert passes(folder, source.labels, target.labels, port) == all(both)
        # Out of the cluster goes the download alone, over HTTPS.
        anywhere = {"elsewhere": "yes"}
        pull = target.labels["app.kubernetes.io/component"] == "pull"
        assert open_to(folder, target.labels, anywhere, 443, "egress") == pull
        assert not open_to(folder, target.labels, anywhere, 80, "egress")


def test_a_job_server_is_open_to_the_operator_alone():
    rules = [
        rule
        for document in of_kind("rayjob", "NetworkPolicy")
        for rule in document["spec"].get("ingress", [])
        if any(port["port"] == 8265 for port in rule.get("ports", []))
    ]
    (rule,) = rules
    (peer,) = rule["from"]
    assert peer["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    for folder in set(RENDERED) - {"rayjob"}:
        assert "8265" not in str(of_kind(folder, "NetworkPolicy"))
