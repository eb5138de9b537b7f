"""Prometheus scrapes the service: a rest raises no alert, an overload and a dead replica do.

Minutes; `make test-load`, where Debian's `prometheus` is installed."""
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from madewithml.ray_session import find_free_ports

from ..conftest import ROOT, Run
from .test_serve import Served, serving
from .test_serve_load import find_processes, run_h2load

pytestmark = [pytest.mark.load,
              pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus")]
SPEED = 5  # times faster than in production


def shorten(config: str) -> str:
    """The same configuration with intervals a fifth as long."""
    def divide(match: re.Match) -> str:
        seconds = int(match[1]) * {"s": 1, "m": 60}[match[2]]
        return f"{seconds // SPEED}s"
    return re.sub(r"\b(\d+)([sm])\b", divide, config)


@contextmanager
def prometheus(served: Served, folder: Path) -> Iterator[Callable[[], set[str]]]:
    """Prometheus with the rules of `deploy/monitoring`; returns what asks for its firing alerts."""
    for name in ("prometheus.yaml", "alerts.yaml"):
        text = (ROOT / "deploy" / "monitoring" / name).read_text(encoding="utf-8")
        text = shorten(text).replace("localhost:8000", f"127.0.0.1:{served.port}")
        (folder / name).write_text(text, encoding="utf-8")
    port = find_free_ports(1)[0]
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}",
               f"--storage.tsdb.path={folder / 'series'}", f"--web.listen-address=127.0.0.1:{port}"]

    def firing() -> set[str]:
        answer = requests.get(f"http://127.0.0.1:{port}/api/v1/alerts", timeout=10).json()
        alerts = answer["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            time.sleep(5)
            yield firing
        finally:
            process.terminate()


def wait_for(firing: Callable[[], set[str]], alert: str, timeout: float) -> set[str]:
    """What is firing as soon as the alert is; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while alert not in (names := firing()):
        assert time.monotonic() < end, names
        time.sleep(1)
    return names


def test_alerts(promoted: Run, tmp_path: Path) -> None:
    with serving(promoted) as served, prometheus(served, tmp_path) as firing:
        run_h2load(served, 8, 60, 20, tmp_path)
        assert firing() == set()
        run_h2load(served, 600, 60, 3000, tmp_path)
        assert "Overloaded" in wait_for(firing, "Overloaded", 5)
        for replica in find_processes(served, "ServeReplica"):
            replica.kill()
        wait_for(firing, "ReplicaRestarted", 90)
        time.sleep(130)  # the restart is longer ago than the rule looks back
        assert firing() == set()
