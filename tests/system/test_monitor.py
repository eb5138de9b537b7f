"""`madewithml monitor` on prediction logs that were written as the service does."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from madewithml.config import ServeConfig
from madewithml.data import build_texts, read_table
from madewithml.engine import Engine
from madewithml.prediction_log import PredictionLog
from madewithml.probabilities import labels_with_fallback
from madewithml.schemas import MonitorResults, read_results

from ..conftest import ROOT, Run

TABLES = ROOT / "datasets"


def read_texts(name: str) -> list[str]:
    return build_texts(read_table(TABLES / f"{name}.csv"))


def find_artifact(run: Run, path: str) -> Path:
    return next((run.folder / "storage").rglob(f"{run.run_id}/artifacts/{path}"))


@pytest.fixture(scope="module")
def engine(trained: Run) -> Engine:
    return Engine(find_artifact(trained, "checkpoint"), run_id=trained.run_id)


def write_log(folder: Path, engine: Engine, texts: list[str], **options) -> Path:
    """Predicts the texts and logs the predictions as the service does."""
    log = PredictionLog(ServeConfig(log_dir=str(folder), **options))
    ids = [engine.encode(text) for text in texts]
    probabilities = engine.infer(ids)
    labels = labels_with_fallback(probabilities, engine.labels, engine.fallback_label)
    for text, tokens, row, label in zip(texts, ids, probabilities, labels, strict=True):
        assert log.add(text, version=1, run_id=engine.run_id, num_tokens=len(tokens),
                       unknown_tokens=tokens.count(engine.facts.unknown_id), prediction=label,
                       confidence=float(row.max()),
                       probabilities=dict(zip(engine.labels, map(float, row), strict=True)))
    log.close()
    return folder


def monitor(run: Run, log: Path, *options: str) -> tuple[int, str, MonitorResults]:
    """Exit code, stderr, and the results."""
    results = log.with_suffix(".json")
    done = run.cli("monitor", "--log-dir", str(log), "--run-id", run.run_id,
                   "--results-fp", str(results), *options)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stderr, read_results(MonitorResults, results)


def alarms(results: MonitorResults) -> set[str]:
    return {test.name for test in results.tests if test.alarm}


def test_registering_saves_a_reference(trained: Run) -> None:
    assert find_artifact(trained, "reference/reference.parquet").stat().st_size < 5_000_000


def test_usual_traffic(trained: Run, engine: Engine, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", engine, read_texts("unlabeled")[:120], log_text="keep")
    code, stderr, results = monitor(trained, log)
    assert (code, stderr) == (0, "")
    assert (results.num_samples, results.has_enough_rows, results.explanation) == (120, True, None)
    assert alarms(results) == set()
    assert results.performance.source == "estimate" and not results.performance.alarm


def test_new_topic(trained: Run, engine: Engine, tmp_path: Path) -> None:
    off_topic = read_texts("offtopic")[:30]
    texts = read_texts("unlabeled")[:70] + off_topic
    log = write_log(tmp_path / "log", engine, texts, log_text="keep")
    code, stderr, results = monitor(trained, log)
    assert code == 1 and stderr.startswith("Check failed: ") and stderr.count("\n") == 1
    assert "text (p " in stderr
    assert "text" in alarms(results) and results.drift and results.explanation.auc > 0.6
    beginnings = {text[:160] for text in off_topic}
    assert sum(row.text in beginnings for row in results.explanation.rows) >= 6  # of the eight


def test_missing_class_in_a_log_without_texts(trained: Run, engine: Engine,
                                              tmp_path: Path) -> None:
    texts = read_texts("unlabeled") + read_texts("holdout")
    probabilities = engine.predict_proba(texts)
    labels = labels_with_fallback(probabilities, engine.labels, engine.fallback_label)
    others = [text for text, label in zip(texts, labels, strict=True) if label != "mlops"]
    code, stderr, results = monitor(trained, write_log(tmp_path / "log", engine, others[:100]))
    assert code == 1 and alarms(results) == {"predicted classes"} and "mlops" in stderr
    without_text = {test.name for test in results.tests if "has no texts" in test.observed}
    assert without_text == {"text", "language"}
    assert results.explanation is None


def test_thirty_rows_raise_no_alarm(trained: Run, engine: Engine, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", engine, read_texts("offtopic")[:30], log_text="keep")
    code, stderr, results = monitor(trained, log)
    assert (code, stderr, results.num_samples) == (0, "", 30)
    assert (results.has_enough_rows, results.tests, results.alarm) == (False, [], False)


def test_delayed_labels(trained: Run, engine: Engine, tmp_path: Path) -> None:
    rows = read_table(TABLES / "holdout.csv").iloc[:120]
    log = write_log(tmp_path / "log", engine, build_texts(rows))
    wrong = rows["tag"].where(np.arange(len(rows)) % 3 > 0, "other")
    for name, tags, expected in (("right", rows["tag"], 0), ("wrong", wrong, 1)):
        labels = tmp_path / f"{name}.csv"
        rows.assign(tag=tags).to_csv(labels, index=False)
        code, stderr, results = monitor(trained, log, "--labels", str(labels))
        performance = results.performance
        assert code == expected, stderr
        assert (performance.source, performance.num_samples) == ("labels", 120)
        assert performance.alarm == bool(expected)
        assert not results.drift


@pytest.mark.parametrize(("options", "message"), [
    (["--log-dir", "nowhere"], "nowhere: no such directory"),
    (["--log-dir", "."], "contains no prediction log"),
    (["--log-dir", "log", "--since", "lately"], "--since: 'lately'"),
    (["--log-dir", "log", "--window", "10"], "--window must be 50 to 2000"),
    (["--log-dir", "log", "--labels", "labels.csv"], "labels.csv: no such file"),
    (["--log-dir", "log", "--alias", "emperor"], "has no emperor"),
], ids=["no folder", "no log", "since", "window", "labels", "alias"])
def test_user_errors(trained: Run, options: list[str], message: str) -> None:
    log_dir = trained.folder / "log"
    if not log_dir.is_dir():
        log = PredictionLog(ServeConfig(log_dir=str(log_dir)))
        log.add("a text", version=1, run_id=trained.run_id, num_tokens=4, unknown_tokens=0,
                prediction="other", confidence=0.9, probabilities={"other": 0.9})
        log.close()
    run_id = [] if "--alias" in options else ["--run-id", trained.run_id]
    done = trained.cli("monitor", *options, *run_id, "--results-fp", "none.json")
    assert done.returncode == 2 and done.stderr.startswith("Error: "), done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (trained.folder / "none.json").exists()


def test_workload_and_report(trained: Run, engine: Engine, tmp_path: Path) -> None:
    """The executed notebook of an alarm is kept with its plot; the report shows the alarm."""
    texts = read_texts("unlabeled")[:70] + read_texts("offtopic")[:30]
    log = write_log(tmp_path / "log", engine, texts, log_text="keep")
    done = trained.cli("workload", "monitor", "--run-name", "watch", "--",
                       "--log-dir", str(log), "--run-id", trained.run_id)
    folder = trained.folder / "results" / "watch"
    notebook = folder / "monitor.failed.ipynb"
    assert done.returncode == 1, done.stdout + done.stderr
    assert "raises an alarm: text" in done.stderr and str(notebook) in done.stderr, done.stderr
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert trained.cli("report", "--run-name", "watch").returncode == 0
    assert "**Alarm**: 100 rows" in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "plots" / "monitor.png").is_file()
    assert pd.read_json(folder / "monitor.json", typ="series")["alarm"]
