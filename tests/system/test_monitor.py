"""The monitor as an operator or a schedule calls it, on logs that the service's own journal wrote."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from madewithml.config import ServeConfig
from madewithml.data import read_table, build_texts
from madewithml.engine import Engine
from madewithml.prediction_log import PredictionLog
from madewithml.predict import labels_with_fallback
from madewithml.schemas import MonitorResults, read_results

from ..conftest import ROOT, Run

TABLES = ROOT / "datasets"


def texts_of(name: str) -> list[str]:
    return build_texts(read_table(TABLES / f"{name}.csv"))


@pytest.fixture(scope="module")
def engine(trained: Run) -> Engine:
    return Engine(next((trained.folder / "storage").rglob(f"{trained.run_id}/artifacts/checkpoint")), run_id=trained.run_id)


def write_log(folder: Path, engine: Engine, texts: list[str], **options) -> Path:
    """Answers the texts and logs them as the service does."""
    journal, ids = PredictionLog(ServeConfig(log_dir=str(folder), **options)), [engine.encode(text) for text in texts]
    probabilities = engine.predict_proba(ids)
    for text, row, p, label in zip(texts, ids, probabilities, labels_with_fallback(probabilities, engine.labels), strict=True):
        assert journal.add(text, version=1, run_id=engine.run_id, num_tokens=len(row), unknown_tokens=row.count(engine.unknown_id), prediction=label,
                           confidence=float(p.max()), probabilities=dict(zip(engine.labels, map(float, p), strict=True)))
    journal.close()
    return folder


def monitor(run: Run, log: Path, *options: str) -> tuple[int, str, MonitorResults]:
    """Exit code, what was said on stderr, and the results."""
    results = log.with_suffix(".json")
    done = run.cli("monitor", "--log-dir", str(log), "--run-id", run.run_id, "--results-fp", str(results), *options)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stderr, read_results(MonitorResults, results)


def alarms(results: MonitorResults) -> set[str]:
    return {test.name for test in results.tests if test.alarm}


def test_registering_keeps_a_reference(trained: Run) -> None:
    assert next((trained.folder / "storage").rglob(f"{trained.run_id}/artifacts/reference/reference.parquet")).stat().st_size < 5_000_000


def test_usual_traffic(trained: Run, engine: Engine, tmp_path: Path) -> None:
    code, said, results = monitor(trained, write_log(tmp_path / "log", engine, texts_of("unlabeled")[:120], log_text="keep"))
    assert (code, said, results.num_samples, results.has_enough_rows, results.explanation) == (0, "", 120, True, None)
    assert alarms(results) == set() and results.performance.source == "estimate" and not results.performance.alarm


def test_new_topic(trained: Run, engine: Engine, tmp_path: Path) -> None:
    strange = texts_of("offtopic")[:30]
    code, said, results = monitor(trained, write_log(tmp_path / "log", engine, texts_of("unlabeled")[:70] + strange, log_text="keep"))
    assert code == 1 and said.startswith("Check failed: ") and "text (p " in said and said.count("\n") == 1
    assert "text" in alarms(results) and results.drift and results.explanation.auc > 0.6
    assert sum(row.text in {text[:160] for text in strange} for row in results.explanation.rows) >= 6  # of the eight


def test_a_class_that_vanished_in_a_log_without_texts(trained: Run, engine: Engine, tmp_path: Path) -> None:
    texts = texts_of("unlabeled") + texts_of("holdout")
    said = labels_with_fallback(engine.predict_proba([engine.encode(text) for text in texts]), engine.labels)
    log = write_log(tmp_path / "log", engine, [text for text, label in zip(texts, said, strict=True) if label != "mlops"][:100])
    code, stderr, results = monitor(trained, log)
    assert code == 1 and alarms(results) == {"predicted classes"} and "mlops" in stderr
    assert {test.name for test in results.tests if "holds no text" in test.observed} == {"text", "language"}
    assert results.explanation is None


def test_thirty_rows_raise_no_alarm(trained: Run, engine: Engine, tmp_path: Path) -> None:
    code, said, results = monitor(trained, write_log(tmp_path / "log", engine, texts_of("offtopic")[:30], log_text="keep"))
    assert (code, said, results.num_samples, results.has_enough_rows, results.tests, results.alarm) == (0, "", 30, False, [], False)


def test_late_labels(trained: Run, engine: Engine, tmp_path: Path) -> None:
    judge = read_table(TABLES / "holdout.csv").iloc[:120]
    log = write_log(tmp_path / "log", engine, build_texts(judge))
    wrong = judge["tag"].where(np.arange(len(judge)) % 3 > 0, "other")
    for name, tags, expected in (("right", judge["tag"], 0), ("wrong", wrong, 1)):
        judge.assign(tag=tags).to_csv(tmp_path / f"{name}.csv", index=False)
        code, said, results = monitor(trained, log, "--labels", str(tmp_path / f"{name}.csv"))
        assert (code, results.performance.source, results.performance.num_samples, results.performance.alarm) == (expected, "labels", 120, bool(expected)), said
        assert not results.drift


@pytest.mark.parametrize(("options", "said"), [
    (["--log-dir", "nowhere"], "nowhere: no such directory"),
    (["--log-dir", "."], "holds no log of predictions"),
    (["--log-dir", "log", "--since", "lately"], "--since: 'lately'"),
    (["--log-dir", "log", "--window", "10"], "--window must be 50 to 2000"),
    (["--log-dir", "log", "--labels", "labels.csv"], "labels.csv: no such file"),
    (["--log-dir", "log", "--alias", "emperor"], "has no emperor"),
], ids=["no folder", "no log", "since", "window", "labels", "alias"])
def test_told_in_one_line(trained: Run, options: list[str], said: str) -> None:
    log = trained.folder / "log"
    if not log.is_dir():
        journal = PredictionLog(ServeConfig(log_dir=str(log)))
        journal.add("a text", version=1, run_id=trained.run_id, num_tokens=4, unknown_tokens=0, prediction="other", confidence=0.9, probabilities={"other": 0.9})
        journal.close()
    run_id = [] if "--alias" in options else ["--run-id", trained.run_id]
    done = trained.cli("monitor", *options, *run_id, "--results-fp", "none.json")
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (trained.folder / "none.json").exists()


def test_workload_and_report(trained: Run, engine: Engine, tmp_path: Path) -> None:
    """The notebook of an alarm is kept with its plots, and the report shows the alarm."""
    log = write_log(tmp_path / "log", engine, texts_of("unlabeled")[:70] + texts_of("offtopic")[:30], log_text="keep")
    done = trained.cli("workload", "monitor", "--run-name", "watch", "--", "--log-dir", str(log), "--run-id", trained.run_id)
    folder = trained.folder / "results" / "watch"
    assert done.returncode == 1 and "raises an alarm: text" in done.stderr and str(folder / "monitor.failed.ipynb") in done.stderr, done.stdout + done.stderr
    cells = json.loads((folder / "monitor.failed.ipynb").read_text(encoding="utf-8"))["cells"]
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", [])) == 1
    assert trained.cli("report", "--run-name", "watch").returncode == 0
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "**Alarm**: 100 rows" in report and (folder / "plots" / "monitor.png").is_file()
    assert pd.read_json(folder / "monitor.json", typ="series")["alarm"]
