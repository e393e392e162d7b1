"""Strict schemas of what the Prometheus operator and KEDA read, as far as the manifests use it.

Written out after their API references (monitoring.coreos.com/v1, keda.sh/v1alpha1 with its prometheus
trigger): a field that exists but is not used here is refused too. Not the CRDs themselves."""

from __future__ import annotations

from collections.abc import Iterator

import jsonschema

_STRING = {"type": "string", "minLength": 1}
_DURATION = {"type": "string", "pattern": r"^[1-9][0-9]*(s|m|h)$"}
_COUNT = {"type": "integer", "minimum": 0}
_NAMES = {"type": "object", "additionalProperties": _STRING}


def _closed(required: dict, **optional: dict) -> dict:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | optional,
        "additionalProperties": False,
    }


def _some(item: dict) -> dict:
    return {"type": "array", "minItems": 1, "items": item}


_POLICIES = _some(
    _closed({"type": {"enum": ["Pods", "Percent"]}, "value": _COUNT, "periodSeconds": {"maximum": 1800}})
)
_SCALING = _closed(
    {}, stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600}, policies=_POLICIES
)
_PROMETHEUS_TRIGGER = _closed(
    {
        "type": {"const": "prometheus"},
        "metadata": _closed(
            {
                "serverAddress": {"type": "string", "pattern": "^https?://[^/]+:[0-9]+$"},
                "query": _STRING,
                "threshold": {"type": "string", "pattern": r"^[0-9.]+$"},
            },
            activationThreshold={"type": "string", "pattern": r"^[0-9.]+$"},
            ignoreNullValues={"enum": ["true", "false"]},
        ),
    },
    metricType={"const": "AverageValue"},  # the only one that a fallback is for in every KEDA 2
)

SPECS = {
    "ServiceMonitor": _closed(
        {
            "selector": _closed({"matchLabels": _NAMES}),
            "endpoints": _some(
                _closed({"port": _STRING}, path=_STRING, interval=_DURATION, scrapeTimeout=_DURATION)
            ),
        }
    ),
    "PrometheusRule": _closed(
        {
            "groups": _some(
                _closed(
                    {
                        "name": _STRING,
                        "rules": _some(
                            _closed(
                                {
                                    "alert": {"type": "string", "pattern": "^[A-Z][A-Za-z]+$"},
                                    "expr": _STRING,
                                    "labels": _NAMES,
                                    "annotations": _NAMES,
                                },
                                **{"for": _DURATION},
                            )
                        ),
                    },
                    interval=_DURATION,
                )
            )
        }
    ),
    "ScaledObject": _closed(
        {"scaleTargetRef": _closed({"name": _STRING}, kind=_STRING), "triggers": _some(_PROMETHEUS_TRIGGER)},
        minReplicaCount=_COUNT,
        maxReplicaCount=_COUNT,
        pollingInterval=_COUNT,
        cooldownPeriod=_COUNT,
        fallback=_closed({"failureThreshold": _COUNT, "replicas": _COUNT}),
        advanced=_closed(
            {
                "horizontalPodAutoscalerConfig": _closed(
                    {"behavior": _closed({}, scaleDown=_SCALING, scaleUp=_SCALING)}
                )
            }
        ),
    ),
}
_VERSIONS = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}


def iter_errors(document: dict, metadata: dict) -> Iterator[jsonschema.ValidationError]:
    """What is wrong with a document of one of these kinds. `metadata`: the schema of its metadata."""
    kind = document["kind"]
    whole = _closed(
        {
            "apiVersion": {"const": _VERSIONS[kind]},
            "kind": {"const": kind},
            "metadata": metadata,
            "spec": SPECS[kind],
        }
    )
    return jsonschema.Draft202012Validator(whole).iter_errors(document)
