"""Tests that take minutes: a run killed at any moment, the wheel in an empty environment."""
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, kill_cli, run_cli

pytestmark = pytest.mark.slow


def read_report(folder: Path) -> str:
    """The report without the run's id, speed and times."""
    text = (folder / "results" / "main" / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"## Time\n.*?(?=\n## )", "", text, flags=re.DOTALL)
    text = re.sub(r"Run [0-9a-f]{32}", "Run", text)
    return re.sub(r"(\| \d+ )\| \d+ \|$", r"\1|", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_cli("run", "--num-epochs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return read_report(folder)


@pytest.mark.parametrize("moment", ["▶ validate", "epoch 1/", "▶ evaluate", "▶ register"])
def test_killed_run_ends_in_the_same_report(moment: str, undisturbed: str, tmp_path: Path) -> None:
    """After kill -9 shortly after `moment` is printed, the same command gives the same report."""
    delay = random.Random(moment).uniform(0.5, 4)  # noqa: S311
    kill_cli("run", "--num-epochs", "2", cwd=tmp_path, at=moment, linger=delay)
    done = run_cli("run", "--num-epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_report(tmp_path) == undisturbed
    results = json.loads((tmp_path / "results" / "main" / "train.json").read_text())
    assert len(results["metrics"]) == 2


def test_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    """The wheel, installed into an empty environment, trains and predicts with its own tables."""
    lock = ROOT / "requirements.lock"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run([*build, "--outdir", str(tmp_path / "dist"), str(ROOT)], check=True,
                   capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip"]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    torch = next(line for line in lock.read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, "install", "-q", torch], check=True, capture_output=True)
    subprocess.run([*pip, "install", "-q", "-c", str(lock), str(wheel)], check=True,
                   capture_output=True)
    subprocess.run([*pip, "check"], check=True)
    work = tmp_path / "elsewhere"
    work.mkdir()
    command = [str(python.with_name("madewithml")), "run", "--num-epochs", "1"]
    done = subprocess.run([*command, "--num-samples", "200"], cwd=work, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "results" / "main" / "report.md").is_file()
