"""What watches the servers asks for what they say: scraping, alerts, scaling, the dashboard."""

from __future__ import annotations

import json
import re

import grpc
import pytest

from runtime.types import FinishReason
from tests.deploy.manifests import RENDERED, command_line, documents, of_kind, pods
from tests.deploy.promql import TARGET_LABELS, known, mistakes
from tests.deploy.schemas import errors
from tests.support import REPOSITORY

WATCHED = "overlays/two-node-monitored"
DOCUMENT = (REPOSITORY / "docs/metrics.md").read_text(encoding="utf-8")
METRICS_PORT = 9464
# Alone on top of the smallest and the largest thing they are for.
COMPONENTS = {
    "servicemonitor": ("overlays/one-pod", "lws"),
    "alerts": ("overlays/one-pod", "lws"),
    "grafana": ("overlays/one-pod", "lws"),
    "keda": ("overlays/single-node-8gpu",),
}


def rules() -> list[dict]:
    (document,) = of_kind(WATCHED, "PrometheusRule")
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def dashboard() -> dict:
    maps = {document["metadata"]["name"]: document for document in of_kind(WATCHED, "ConfigMap")}
    (text,) = maps["tramontane-dashboard"]["data"].values()
    return json.loads(text)


def panels() -> list[dict]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def plain(query: str) -> str:
    """A dashboard's query with its variables filled in as Grafana would."""
    return query.replace("$__rate_interval", "1m").replace("$namespace", "tramontane|other")


def queries() -> dict[str, str]:
    """Every query of the manifests, by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = plain(target["expr"])
    for document in of_kind(WATCHED, "ScaledObject"):
        for number, trigger in enumerate(document["spec"]["triggers"]):
            found[f"trigger {number}"] = trigger["metadata"]["query"]
    return found


def test_queries_ask_for_what_there_is():
    found = queries()
    assert len(found) > 30
    assert {place: mistakes(query) for place, query in found.items() if mistakes(query)} == {}


def test_a_misspelt_metric_or_label_is_caught():
    """In every query, at every place."""
    for place, query in queries().items():
        for name in set(re.findall(r"tramontane_\w+", query)):
            assert mistakes(query.replace(name, name + "x")), (place, name)
            assert mistakes(query.replace(name, name.replace("tramontane", "tramontana"))), (place, name)
        for label in set(re.findall(r"(\w+)=~?\"", query)) | set(re.findall(r"by \((\w+)", query)):
            assert mistakes(re.sub(rf"\b{label}\b", f"{label}z", query)), (place, label)


@pytest.mark.parametrize(
    ("query", "mistake"),
    [
        ("sum(rate(tramontane_requests_total[5m])", "does not parse"),
        ("sum(tramontane_requests_total)", "only grows"),
        ("rate(tramontane_ready[5m])", "no rate"),
        ("tramontane_engine_running > 0", "no metric tramontane_engine_running"),
        ('tramontane_ready{pot="x"}', "no label pot"),
        ("tramontane_ready * on (modle) tramontane_server_info", "no label modle"),
        ("histogram_quantile(0.9, sum(rate(tramontane_time_to_first_token_seconds_bucket[5m])))", "le"),
        ('rate(tramontane_replies_total{code="OK"}[5m])', "no label code"),
    ],
)
def test_mistakes_are_named(query, mistake):
    assert any(mistake in line for line in mistakes(query)), mistakes(query)


def test_matched_values_are_values():
    """A matcher for a value that no server gives would be silent for ever."""
    allowed = {
        "code": {code.name for code in grpc.StatusCode},
        "reason": {reason.value for reason in FinishReason},
        "namespace": {"tramontane", "other"},
    }
    for place, query in queries().items():
        for label, values in re.findall(r"(\w+)=~?\"([^\"]*)\"", query):
            assert set(values.split("|")) <= allowed[label], place


def test_alerts_say_what_they_know():
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        text = rule["annotations"]["summary"]
        labels = set(re.findall(r"\$labels\.(\w+)", text))
        kept = {label for each in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in each.split(", ")}
        aggregated = " by (" in rule["expr"]
        assert labels <= (kept if aggregated else TARGET_LABELS), rule["alert"]
        assert f"`{rule['alert']}`" in DOCUMENT, f"docs/metrics.md does not explain {rule['alert']}"


def test_the_dashboard_is_one():
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {entry["name"] for entry in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(board))) <= variables | {"__rate_interval"}
    asked = [entry["query"] for entry in board["templating"]["list"] if entry["type"] == "query"]
    for metric, label in (re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups() for query in asked):
        assert metric in known() and label in TARGET_LABELS | known()[metric].labels
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    for panel in panels():
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]


def test_every_metric_is_explained_and_no_other():
    families = {re.sub(r"_(total|bucket|sum|count|created|info)$", "", name) for name in known()}
    written = set(re.findall(r"^\| `(tramontane_\w+?)(?:_total|_info)?`", DOCUMENT, re.M))
    assert written == families
    for block in re.findall(r"^```promql\n(.*?)^```", DOCUMENT, re.M | re.S):
        for query in block.strip().splitlines():
            assert mistakes(query) == [], query
    for query in re.findall(r"^\| `tramontane_\w+` \|.*\| `([^`]+)` \|$", DOCUMENT, re.M):
        assert mistakes(query.replace(r"\|", "|")) == [], query


# ---- scraping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(set(RENDERED) - {"rayjob"}))
def test_the_metrics_are_on_the_port_that_is_named(folder):
    (gateway,) = [pod for pod in pods(folder) if pod.labels["app.kubernetes.io/component"] == "gateway"]
    (container,) = gateway.spec["containers"]
    words = command_line(folder, container)
    assert words[words.index("--metrics-port") + 1] == str(METRICS_PORT)
    assert {"name": "metrics", "containerPort": METRICS_PORT} in container["ports"]


def test_prometheus_finds_each_gateway_once():
    (monitor,) = of_kind(WATCHED, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [
        document
        for document in of_kind(WATCHED, "Service")
        if wanted <= document["metadata"]["labels"].items()
    ]
    (endpoint,) = monitor["spec"]["endpoints"]
    (port,) = service["spec"]["ports"]
    assert endpoint["port"] == port["name"] == port["targetPort"] == "metrics"
    assert endpoint["path"] == "/metrics" and port["port"] == METRICS_PORT
    selector = service["spec"]["selector"].items()
    (pod,) = [pod for pod in pods(WATCHED) if selector <= pod.labels.items()]
    assert pod.owner == "Deployment/tramontane-gateway"


@pytest.mark.parametrize("folder", RENDERED)
def test_metrics_are_open_to_the_monitoring_namespace_alone(folder):
    doors = [
        (document["spec"]["podSelector"]["matchLabels"], rule)
        for document in of_kind(folder, "NetworkPolicy")
        for rule in document["spec"].get("ingress", [])
        if METRICS_PORT in [port["port"] for port in rule.get("ports", [])]
    ]
    if folder == "rayjob":
        assert doors == []
        return
    ((labels, rule),) = doors
    assert labels["app.kubernetes.io/component"] == "gateway"
    assert [port["port"] for port in rule["ports"]] == [METRICS_PORT]
    (peer,) = rule["from"]
    assert peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


# ---- scaling --------------------------------------------------------------------------------------------


def test_scaling_stays_within_the_room_there_is():
    (scaled,) = of_kind(WATCHED, "ScaledObject")
    spec = scaled["spec"]
    (deployment,) = of_kind(WATCHED, "Deployment")
    assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "an apply would undo what KEDA did"
    (cluster,) = of_kind(WATCHED, "RayCluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    room = group["replicas"]  # a node holds one replica of the model
    assert 1 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"] == room
    (trigger,) = spec["triggers"]
    assert ".monitoring." in trigger["metadata"]["serverAddress"]
    assert trigger["metadata"]["ignoreNullValues"] == "false", "no value must not look like an empty queue"
    assert f'namespace="{scaled["metadata"]["namespace"]}"' in trigger["metadata"]["query"]


@pytest.mark.parametrize(
    ("component", "base"), [(name, base) for name, bases in COMPONENTS.items() for base in bases]
)
def test_each_component_stands_alone(component, base):
    """Whoever lacks one operator takes the others."""
    found = documents(f"{base} + components/{component}")
    foreign = {"servicemonitor": "ServiceMonitor", "alerts": "PrometheusRule", "keda": "ScaledObject"}
    present = {document["kind"] for document in found} & set(foreign.values())
    assert present == ({foreign[component]} if component in foreign else set())
    for document in found:
        assert errors(document) == []
        assert document["metadata"]["namespace"] == "tramontane"
