"""deploy/ in step with the program: options, metrics, memory limits, and a unit that systemd accepts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from daemon import serving
from repository import ROOT
from tiny_store import write_model

from flashclient.cli import _parser
from weightd.machine.budget import INTERPRETER_BYTES
from weightd.serving.config import ServeConfig, load_config
from weightd.sizes import parse_size
from weightd.watching.metric_table import HISTOGRAM, METRICS

DEPLOY = ROOT / "deploy"
OPTION = re.compile(r"^(?:# )?([a-z][a-z-]*) = (.+)$", re.MULTILINE)
OF_OTHERS = {"up", "process_cpu_seconds_total"}  # of Prometheus, and of its library
OF_SCRAPE = {"instance", "job"}
EXPOSURE_MAX = 2.0  # of `systemd-analyze security`, on its scale from 0 to 10; it was 1.6


def sample() -> str:
    return (DEPLOY / "weightd.toml").read_text()


def test_the_sample_names_every_option() -> None:
    from weightd.serving.config import _flag_names, _parser

    known = {name.removeprefix("--") for name in _flag_names(_parser())} - {"help", "config"}
    assert {key for key, _ in OPTION.findall(sample())} == known


def test_the_sample_can_be_used_as_it_is_and_with_every_option(tmp_path: Path) -> None:
    config = load_config(["--config", str(DEPLOY / "weightd.toml")])
    assert config.store == Path("/var/lib/weightd")
    every = dict(OPTION.findall(sample()))  # of an option that is there twice, the last
    file = tmp_path / "every.toml"
    file.write_text("\n".join(f"{key} = {value}" for key, value in every.items()))
    full = load_config(["--config", str(file)])
    assert full.tls is not None
    assert len(full.allow) == 2
    assert len(full.listen) == 2


def test_the_sample_shows_the_defaults() -> None:
    defaults = load_config(["--store", "/s"])
    shown: dict[str, Any] = {key: tomllib.loads(f"x = {value}")["x"] for key, value in OPTION.findall(sample())}
    for name in ("io_engine", "io_threads", "log_level", "log_format", "allow_buffered"):
        assert shown[name.replace("_", "-")] == getattr(defaults, name), name
    assert shown["dram-floor"] == f"{defaults.dram_floor.percent:g}%"


def metric_names() -> set[str]:
    names = {metric.name for metric in METRICS}
    histograms = {metric.name for metric in METRICS if metric.kind == HISTOGRAM}
    return names | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")} | OF_OTHERS


def labels_of(name: str) -> set[str]:
    """The labels of the series of this name."""
    if name in OF_OTHERS:
        return OF_SCRAPE
    metric = next(
        each for each in METRICS if name == each.name or (each.kind == HISTOGRAM and name.startswith(each.name))
    )
    return OF_SCRAPE | set(metric.labels) | ({"le"} if name.endswith("_bucket") else set())


def assert_known(expression: str, *shown: str) -> None:
    """Checks the metrics of a query, and the labels that it groups by or selects.

    `shown`: labels that its result must have.
    """
    used = re.findall(r"\b(?:weightd|process)_\w+|\bup\b", expression)
    assert used, expression
    assert set(used) <= metric_names(), expression
    kept = set.intersection(*map(labels_of, used))
    for labels in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
        grouped = {label.strip() for label in labels.split(",")}
        assert grouped <= kept, expression
    for name, selected in re.findall(r"(\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]", selected)) <= labels_of(name), expression
    groups = [{label.strip() for label in labels.split(",")} for labels in re.findall(r"by \(([^)]*)\)", expression)]
    assert set(shown) <= set.intersection(kept, *groups), (expression, shown)


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("weightd_no_such", ()),
        ("sum by (region) (rate(weightd_reads_total[5m]))", ()),
        ("weightd_reads_in_flight{model='m'}", ()),
        ("sum by (instance) (weightd_sessions)", ("model",)),
        ("sum by (le) (weightd_read_latency_seconds_sum)", ()),
        ("weightd_dram_bytes", ("model",)),
    ],
)
def test_labels_that_are_not_there_are_noticed(expression: str, shown: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        assert_known(expression, *shown)


def test_alerts_use_metrics_that_there_are() -> None:
    (group,) = yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) > 0
    for rule in group["rules"]:
        shown = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
        assert_known(rule["expr"], *shown)
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_dashboard_uses_metrics_that_there_are() -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    targets = [target for panel in panels for target in panel.get("targets", [])]
    assert len(targets) > 20
    for target in targets:
        assert_known(target["expr"], *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert "label_values(weightd_info, instance)" in json.dumps(dashboard["templating"])


def test_every_metric_is_in_the_dashboard_or_an_alert() -> None:
    text = (DEPLOY / "grafana-dashboard.json").read_text() + (DEPLOY / "prometheus-alerts.yaml").read_text()
    unused = {metric.name for metric in METRICS if metric.name not in text}
    assert unused <= {"weightd_dram_floor_bytes", "weightd_reads_in_flight_max"}


def test_compose_gives_weightd_the_memory_that_it_asks_for() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    config = load_config(services["weightd"]["command"])
    assert config.dram.bytes is not None
    assert kubernetes_bytes(services["weightd"]["mem_limit"].upper() + "i") >= config.dram.bytes + INTERPRETER_BYTES
    clients = [service for name, service in services.items() if name.startswith("client")]
    assert len(clients) == 2
    for client in clients:
        assert f"unix:{config.listen[0].socket_path}" in client["command"]
        assert "sockets:/run/weightd" in client["volumes"]
        assert client["volumes"][0] in services["weightd"]["volumes"]


def kubernetes_bytes(text: str) -> int:
    """8448Mi as bytes."""
    return parse_size(f"{text}B")


def test_the_daemon_set_gives_weightd_the_memory_that_it_asks_for(tmp_path: Path) -> None:
    documents = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    assert set(documents) == {"Namespace", "ConfigMap", "DaemonSet"}
    file = tmp_path / "weightd.toml"
    file.write_text(documents["ConfigMap"]["data"]["weightd.toml"])
    config: ServeConfig = load_config(["--config", str(file)])
    assert config.dram.bytes is not None
    pod = documents["DaemonSet"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    resources = container["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    assert kubernetes_bytes(resources["limits"]["memory"]) >= config.dram.bytes + INTERPRETER_BYTES
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert documents["DaemonSet"]["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert config.metrics is not None
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(config.metrics.port)


def test_the_server_beside_the_daemon_set_is_started_as_its_command_line_allows() -> None:
    documents = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes-server.yaml").read_text())}
    assert set(documents) == {"Deployment", "Service"}
    template = documents["Deployment"]["spec"]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    options = _parser().parse_args(container["args"])
    assert options.address == "unix:/run/weightd/weightd.sock"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert (mounted["sockets"], mounted["keys"]) == ("/run/weightd", str(options.api_key_file.parent))
    (port,) = container["ports"]
    assert (port["name"], port["containerPort"]) == ("http", options.port)
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(options.port)
    labels = template["metadata"]["labels"]
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["Service"]["spec"]["selector"] == labels
    assert {container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "/health"
    }


def test_the_job_of_slurm_ends_where_weightd_does(tmp_path: Path) -> None:
    ((script,),) = [re.findall(r"```bash\n(#!.*?#SBATCH.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)]
    for name, content in (("weightd", '[ "$1" = import ]'), ("flashclient", "echo made"), ("sleep", "true")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "USER": "user", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_the_images_copy_what_there_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    sources = re.findall(r"^COPY (\S+) ", text, re.MULTILINE) + re.findall(r"source=([\w.]+)", text)
    assert sources
    for source in sources:
        assert (DEPLOY.parent / source).exists(), source


def probes() -> dict[str, list[str]]:
    """The commands with which Docker and Kubernetes check weightd's health."""
    ((image,),) = [re.findall(r"HEALTHCHECK .*\\\n\s+CMD (\[.*\])", (DEPLOY / "Dockerfile").read_text())]
    documents = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    (container,) = documents["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    names = ("startupProbe", "readinessProbe", "livenessProbe")
    return {"HEALTHCHECK": json.loads(image)} | {name: container[name]["exec"]["command"] for name in names}


@pytest.mark.parametrize("name", ["HEALTHCHECK", "startupProbe", "readinessProbe", "livenessProbe"])
def test_health_probes_tell_a_daemon_that_answers_from_one_that_does_not(name: str, tmp_path: Path) -> None:
    command = probes()[name]
    assert command[0] == "weightd"
    assert command[-1] == "unix:/run/weightd/weightd.sock"
    write_model(tmp_path / "store")
    with serving(tmp_path / "store", "--dram", "64MiB") as daemon:
        here = [sys.executable, "-m", *command[:-1], daemon.address]
        healthy = subprocess.run(here, capture_output=True, text=True, timeout=10, check=False)
        assert (healthy.returncode, healthy.stderr) == (0, "")
        daemon.stop()
        assert subprocess.run(here, capture_output=True, timeout=10, check=False).returncode == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_accepts_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "weightd.service"
    text = (DEPLOY / "weightd.service").read_text()
    assert "--config /etc/weightd.toml" in text
    unit.write_text(text.replace("/opt/weightd/bin/weightd", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    security = subprocess.run(command, capture_output=True, text=True, check=False)
    exposure = re.search(r"Overall exposure level for \S+ (\d+\.\d+)", security.stdout)
    assert exposure, security.stdout
    assert float(exposure.group(1)) <= EXPOSURE_MAX
