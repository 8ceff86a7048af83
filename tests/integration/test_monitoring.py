"""Metrics, alert rules and dashboard with the real Prometheus and its promtool."""

import asyncio
import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserve.control import address
from nbdserve.control.client import Client, path
from tests.nbdserve.server.nbd_client import READ
from tests.nbdserve.server.nbd_client import Client as Nbd

from .parts import (
    DIE_WITH_PARENT,
    MIB,
    PROJECT,
    SCRIPTS,
    Daemon,
    find_free_port,
    require,
    run,
    unpacked,
)

MONITORING = SCRIPTS / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PATIENCE = 60.0


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def test_rules_and_their_tests() -> None:
    promtool = unpacked("prometheus", "promtool")
    run(promtool, "check", "rules", MONITORING / "alerts.yml")
    said = run(promtool, "test", "rules", MONITORING / "alerts-test.yml").stdout
    assert "SUCCESS" in said
    rules = (MONITORING / "alerts.yml").read_text()
    tests = (MONITORING / "alerts-test.yml").read_text()
    for alert in re.findall(r"alert: (\w+)", rules):
        assert re.search(rf"alertname: {alert}\n +eval_time: .*\n +exp_alerts:\n", tests), alert
        assert f"`{alert}`" in (PROJECT / "docs" / "monitoring.md").read_text(), alert


class Watched:
    """A daemon that does everything that the dashboard shows."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon = daemon
        self.port = port

    @property
    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            return str(answer.read().decode())


@pytest.fixture
def watched(data_directory: Path, tmp_path: Path) -> Iterator[Watched]:
    require("fio")
    port = find_free_port()
    data_directory.mkdir()
    daemon = Daemon(data_directory, "--http", f"127.0.0.1:{port}", "--workers", "2")
    daemon.start()
    load = None
    try:
        repository = f"file://{tmp_path / 'repository'}"
        daemon.create("disk", 16 * MIB)
        fill = ["fio", "--name=fill", "--ioengine=nbd", "--size=4M", "--rw=write", "--bs=64k"]
        run(*fill, f"--uri={daemon.uri('disk')}")
        daemon.command("repo", "init", repository)
        daemon.command("backup", "disk", "--repo", repository)
        (snapshot,) = daemon.json("snapshot", "list", "disk")["snapshots"]
        daemon.command(
            "repo", "restore", repository, f"disk@{snapshot['name']}", "lazy", "--lazy",
            "--rate", "0",
        )  # fmt: skip
        daemon.command("volume", "limit", "disk", "--iops", "500", "--iops-burst", "10")
        load = subprocess.Popen(
            [*DIE_WITH_PARENT, "fio", "--name=load", "--ioengine=nbd", "--size=8M", "--rw=randrw",
             "--iodepth=8", "--time_based", "--runtime=300", f"--uri={daemon.uri('disk')}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        control = Client(lambda: address.connect(data_directory))
        job = {
            "kind": "push", "volume": "disk", "snapshot": "later", "repository": repository,
        }  # fmt: skip
        with control.stream("POST", path("jobs"), job) as answer:
            control.post(path("jobs", answer.first()["job"]), {"done": 5, "total": 10})
            yield Watched(daemon, port)
    finally:
        if load is not None:
            load.kill()
            load.wait()
        if daemon.process is not None:
            daemon.kill()


async def fail_once(daemon: Daemon) -> None:
    """Let one request have an error."""
    client = await Nbd.connect(str(daemon.socket), "disk")
    assert (await client.call(READ, 16 * MIB, 1)).error
    client.close()


def test_the_dashboard_against_a_real_prometheus(watched: Watched, tmp_path: Path) -> None:
    checked = subprocess.run(
        [unpacked("prometheus", "promtool"), "check", "metrics"],
        input=watched.metrics, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    asyncio.run(fail_once(watched.daemon))
    port = find_free_port()
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(
        f"""
global: {{scrape_interval: 1s}}
rule_files: ["{MONITORING / "alerts.yml"}"]
scrape_configs:
  - job_name: nbdserve
    static_configs: [{{targets: ["127.0.0.1:{watched.port}"]}}]
"""
    )
    with (tmp_path / "prometheus.log").open("wb") as log:
        prometheus = subprocess.Popen(
            [*DIE_WITH_PARENT, unpacked("prometheus", "prometheus"),
             f"--config.file={configuration}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        missing = [
            (panel["title"], substitute(target["expr"]))
            for panel in DASHBOARD["panels"]
            for target in panel["targets"]
        ]
        assert len(missing) >= 18
        deadline = time.monotonic() + PATIENCE
        while missing:
            assert time.monotonic() < deadline, (missing, (tmp_path / "prometheus.log").read_text())
            time.sleep(1)
            missing = [one for one in missing if not finds_data(port, one[1])]
        for variable in DASHBOARD["templating"]["list"][1:]:
            (selector, label) = re.fullmatch(
                r"label_values\((.*), (\w+)\)", variable["definition"]
            ).groups()  # type: ignore[union-attr]
            query = urllib.parse.urlencode({"match[]": selector})
            values = fetch(f"http://127.0.0.1:{port}/api/v1/label/{label}/values?{query}")["data"]
            assert values and ("disk" in values or label != "volume")
    finally:
        prometheus.kill()
        prometheus.wait()


def substitute(expression: str) -> str:
    """What Grafana makes of it with everything chosen."""
    chosen = {"$volume": ".*", "$instance": ".*", "$__rate_interval": "10s"}
    for variable, value in chosen.items():
        expression = expression.replace(variable, value)
    return expression


def finds_data(port: int, expression: str) -> bool:
    query = urllib.parse.urlencode({"query": expression})
    try:
        found = fetch(f"http://127.0.0.1:{port}/api/v1/query?{query}")
    except OSError:
        return False  # it is starting
    assert found["status"] == "success", (expression, found)
    return any(one["value"][1] != "NaN" for one in found["data"]["result"])
