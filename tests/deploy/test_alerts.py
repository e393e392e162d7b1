"""Alerts fire when they should and not else, as Prometheus' own promtool sees it; skipped where it is not.

promtool is not on PyPI: it comes with Prometheus (Debian: prometheus)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from runtime.server.engine_metrics import Seen
from runtime.server.metrics import Metrics
from runtime.types import EngineInfo, Load
from tests.deploy.manifests import KUBERNETES

ALERTS = KUBERNETES / "components/alerts/prometheusrule.yaml"
CASES = Path(__file__).with_name("alerts.yaml")


def promtool(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    return subprocess.run(
        [found, *map(str, arguments)], input=text, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """What the Prometheus operator makes of the PrometheusRule: its spec, as a file of rules."""
    spec = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["spec"]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return file


def test_every_alert_has_a_case():
    named = set(re.findall(r"alertname=\"(\w+)\"", CASES.read_text(encoding="utf-8")))
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["spec"]["groups"]
    assert named == {rule["alert"] for rule in group["rules"]}


def test_alerts_fire_when_they_should(tmp_path, rules):
    cases = tmp_path / "cases.yaml"
    cases.write_text(f"rule_files:\n  - {rules}\n{CASES.read_text(encoding='utf-8')}", encoding="utf-8")
    done = promtool("test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_in_the_rules(rules):
    done = promtool("check", "rules", rules)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_in_the_metrics():
    info = EngineInfo("model", "numerics", 2048, 32000, 1, 8, 64, 100, 8)
    _, text = Metrics(info).render(Seen(Load(*range(12))), ready=True, open_streams=0)
    done = promtool("check", "metrics", text=text.decode())
    assert done.returncode == 0, done.stdout + done.stderr
