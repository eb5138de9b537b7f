"""The walk of the course, as its page has it: every command and call ends well."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from madewithml.schemas import EvaluateResults, TrainResults, TuneResults, read_results
from tests.conftest import ROOT, Run, get_clean_env
from tests.system.test_serve import serving

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "course.md"


def read_block(language: str) -> str:
    """The page's block of code in that language."""
    return re.search(f"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_walk(tmp_path: Path) -> None:
    """Train, tune, best run, evaluate, predict, data and model tests, serve, the client."""
    env = get_clean_env(MADEWITHML_STORAGE_DIR=str(tmp_path / "storage"),
                        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    *walk, serve = re.split(r"\n(?=python|pytest|export)", read_block("bash").strip())
    script = "\n".join(["set -ex", *walk, 'echo "RUN_ID $RUN_ID"'])
    script = script.replace("results/", f"{tmp_path}/")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    training = read_results(TrainResults, tmp_path / "training_results.json")
    tuning = read_results(TuneResults, tmp_path / "tuning_results.json")
    evaluation = read_results(EvaluateResults, tmp_path / "evaluation_results.json")
    assert training.params["lr_factor"] == tuning.params["lr_factor"] == 0.8
    assert all(epoch.val_loss > 0 for epoch in [*training.metrics, *tuning.metrics])
    run_id = re.search(r"^RUN_ID (\w+)$", done.stdout, re.MULTILINE)[1]
    assert run_id == evaluation.run_id
    assert evaluation.overall.f1 > 0.85
    assert '"prediction": "natural-language-processing"' in done.stdout

    _, *command = shlex.split(serve.replace("$RUN_ID", run_id))
    with serving(Run(tmp_path), command=(sys.executable, *command)) as served:
        client = read_block("python").replace("http://127.0.0.1:8000", served.url)
        code = re.sub(r"^requests\.post", "answer = requests.post", client, flags=re.MULTILINE)
        names: dict = {}
        exec(code, names)  # noqa: S102  the page's own lines
        assert names["answer"]["run_id"] == run_id
        result = names["answer"]["results"][0]
        assert set(result) == {"prediction", "probabilities"}
        is_sure = max(result["probabilities"].values()) >= 0.9
        assert is_sure or result["prediction"] == "other"
        assert served.get("/").json() == {"message": "OK", "status-code": 200, "data": {}}
        assert served.get("/run_id/").json() == {"run_id": run_id}
        answer = served.post("/evaluate/", {"dataset": "holdout.csv"}).json()
        assert answer["results"]["overall"]["num_samples"] == evaluation.overall.num_samples
