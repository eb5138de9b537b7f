"""A classifier is good enough, and for the right reasons: `pytest --run-id=RUN tests/model`.

Without the option, it is the one that the test session trains on the embedded table."""
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from madewithml.columns import use_columns_of_run
from madewithml.config import bundled_dir
from madewithml.engine import Engine
from madewithml.evaluate import evaluate_model, load_behavioral_tests, run_behavioral_tests
from madewithml.tables import table_hash
from madewithml.tracking import fetch_checkpoint, get_run

EMBEDDED = bundled_dir("datasets")
MIN_PASS_RATE = {"minimum functionality": 0.9, "invariance": 0.9, "directional": 0.7}


@pytest.fixture(scope="module")
def run_id(request: pytest.FixtureRequest) -> str | None:
    """The run that is given, whose columns are used."""
    run_id = request.config.getoption("--run-id")
    if run_id:
        use_columns_of_run(run_id)
    return run_id


@pytest.fixture(scope="module")
def tables(run_id: str | None, request: pytest.FixtureRequest) -> tuple[str, str | None]:
    """The table that was trained on, and one that was not; None if it is not known."""
    given = request.config.getoption("--dataset-loc")
    embedded = str(EMBEDDED / "dataset.csv"), str(EMBEDDED / "holdout.csv")
    if run_id is None:
        return embedded
    run = get_run(run_id).data
    if run.params.get("dataset_digest") == table_hash(embedded[0]):
        return embedded[0], given or embedded[1]
    return run.tags["dataset_loc"], given


@pytest.fixture(scope="module")
def engine(run_id: str | None, request: pytest.FixtureRequest) -> Engine:
    """The classifier of the run."""
    if run_id:
        return Engine(fetch_checkpoint(run_id))
    trained = request.getfixturevalue("trained")
    uri = f"sqlite:///{trained.folder / 'storage' / 'mlflow' / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    return Engine(Path(mlflow.artifacts.download_artifacts(
        run_id=trained.run_id, artifact_path="checkpoint", tracking_uri=uri)))


@pytest.fixture(scope="module")
def evaluation(run_id: str | None, tables: tuple[str, str | None],
               request: pytest.FixtureRequest) -> dict:
    """Its results on a table that it was not trained on."""
    if run_id is None:
        return request.getfixturevalue("trained").json("evaluate")
    train_loc, holdout_loc = tables
    if holdout_loc is None:
        pytest.skip("needs a labeled table that the run was not trained on: --dataset-loc")
    return evaluate_model(run_id, holdout_loc, train_loc=train_loc).model_dump()


@pytest.fixture(scope="module")
def behavior(tables: tuple[str, str | None]) -> pd.DataFrame:
    """The behavioral tests beside the tables."""
    for loc in tables[::-1]:
        if loc and len(tests := load_behavioral_tests(loc)):
            return tests
    pytest.skip("there is no behavior.csv beside the table; `madewithml init` makes one")


@pytest.mark.parametrize(("kind", "min_pass_rate"), MIN_PASS_RATE.items())
def test_behavior(kind: str, min_pass_rate: float, engine: Engine, behavior: pd.DataFrame) -> None:
    """The share of the cases of each kind that must pass."""
    tests = behavior[behavior["kind"] == kind].reset_index(drop=True)
    if tests.empty:
        pytest.skip(f"no test of the kind {kind!r}")
    results = run_behavioral_tests(tests, engine.predict_proba, engine.labels)
    failed = [result for result in results if not result.success]
    assert len(failed) <= (1 - min_pass_rate) * len(results), failed


def test_embedded_behavior_is_tested(run_id: str | None, behavior: pd.DataFrame) -> None:
    """Each kind has at least eight cases."""
    if run_id:
        pytest.skip("of another run")
    assert behavior["kind"].value_counts().reindex(list(MIN_PASS_RATE)).min() >= 8


def test_better_than_bag_of_words(run_id: str | None, evaluation: dict) -> None:
    """Than TF-IDF and logistic regression on the same rows."""
    overall = evaluation["overall"]
    assert overall["f1"] > overall["baseline"] + 0.02
    assert run_id or overall["f1"] > 0.90


def test_confidence_is_calibrated(run_id: str | None, evaluation: dict) -> None:
    """Confidence is near accuracy; after two epochs, more of it means more right answers."""
    assert evaluation["overall"]["calibration_error"] < 0.15
    large_bins = [bin_ for bin_ in evaluation["calibration"] if bin_["num_samples"] >= 20]
    assert run_id or large_bins[-1]["accuracy"] > large_bins[0]["accuracy"]


def test_empty_and_long_texts(engine: Engine) -> None:
    """Every text gets probabilities."""
    probabilities = engine.predict_proba(["", "word " * 5000, "🙂", "\x00\ufffd"])
    assert probabilities.shape == (4, len(engine.labels))
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
