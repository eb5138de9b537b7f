"""What takes minutes: a run killed at any moment, the wheel in an empty environment."""
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, kill_cli, run_cli

pytestmark = pytest.mark.slow


def report_of(folder: Path) -> str:
    """The report without what names a single run or its speed."""
    text = (folder / "results" / "main" / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"Run [0-9a-f]{32}", "Run", text)
    return re.sub(r"(\| \d+ )\| \d+ \|$", r"\1|", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_cli("run", "--num-epochs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return report_of(folder)


@pytest.mark.parametrize("moment", ["▶ validate", "epoch 1/", "▶ evaluate", "▶ register"])
def test_killed_run_ends_in_the_same_report(moment: str, undisturbed: str, tmp_path: Path) -> None:
    """kill -9 shortly after `moment` shows on the terminal; the same command then ends in the same report."""
    kill_cli("run", "--num-epochs", "2", cwd=tmp_path, at=moment, linger=random.Random(moment).uniform(0.5, 4))  # noqa: S311
    done = run_cli("run", "--num-epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report_of(tmp_path) == undisturbed
    runs = json.loads((tmp_path / "results" / "main" / "train.json").read_text())
    assert len(runs["metrics"]) == 2


def test_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    """The wheel in an empty environment (with the packages of this one) trains and predicts with what it carries."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)], check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    torch = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([str(python), "-m", "pip", "install", "-q", torch], check=True, capture_output=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "requirements.lock"), str(wheel)], check=True, capture_output=True)
    subprocess.run([str(python), "-m", "pip", "check"], check=True)
    work = tmp_path / "elsewhere"
    work.mkdir()
    done = subprocess.run([str(python.with_name("madewithml")), "run", "--num-epochs", "1", "--num-samples", "200"], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "results" / "main" / "report.md").is_file()
