"""PromQL against the metrics that a server really has: names, kinds and labels, from what it writes out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

from runtime.server.engine_metrics import Seen
from runtime.server.metrics import Metrics
from runtime.types import EngineInfo, Load

TARGET_LABELS = {"namespace", "pod", "service", "job", "instance"}  # Prometheus adds them as it scrapes
_RATES = {"rate", "irate", "increase"}


@dataclass(frozen=True)
class Known:
    """One time series' name: the type of its family, and its labels."""

    kind: str
    labels: frozenset[str]


@functools.cache
def known() -> dict[str, Known]:
    info = EngineInfo("model", "numerics", 2048, 32000, 1, 8, 64, 100, 8)
    seen = Seen(Load(*range(12)))
    _, text = Metrics(info).render(seen, ready=True, open_streams=0)
    found: dict[str, Known] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = found[sample.name].labels if sample.name in found else frozenset()
            found[sample.name] = Known(family.type, labels | sample.labels.keys())
    return found


def mistakes(query: str) -> list[str]:
    """What is wrong with a query, a line each."""
    try:
        tree = promql_parser.parse(query)
    except ValueError as error:
        return [f"does not parse: {error}"]
    found: list[str] = []
    in_rate: set[str] = set()
    used: set[str] = set()
    given: set[str] = set()

    def visit(node) -> None:
        if isinstance(node, promql_parser.Call):
            for argument in node.args:
                if isinstance(argument, promql_parser.MatrixSelector) and node.func.name in _RATES:
                    in_rate.add(argument.vector_selector.name)
        elif isinstance(node, promql_parser.MatrixSelector):
            visit(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            used.add(node.name)
            given.update(matcher.name for matcher in node.matchers.matchers)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            given.update(node.modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and node.modifier and node.modifier.matching:
            given.update(node.modifier.matching.labels)

    promql_parser.walk(tree, visit)
    labels = set(TARGET_LABELS)
    for name in sorted(used):
        if name not in known():
            found.append(f"no metric {name}")
            continue
        labels |= known()[name].labels
        grows = known()[name].kind in ("counter", "histogram")
        if grows and name not in in_rate:
            found.append(f"{name} only grows: take its rate or increase")
        if not grows and name in in_rate:
            found.append(f"{name} is a {known()[name].kind}, not a counter: it has no rate")
    found += [f"no label {label}" for label in sorted(given - labels)]
    if "histogram_quantile" in query and "le" not in given:
        found.append("a quantile needs the label le")
    return found
