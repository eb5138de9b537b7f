"""The model trained by this test session is good enough, and for the right reasons."""
from pathlib import Path

import mlflow
import numpy as np
import pytest

from madewithml.config import bundled_dir
from madewithml.engine import Engine
from madewithml.evaluate import load_behavioral_tests, run_behavioral_tests

MIN_PASS_RATE = {"minimum functionality": 0.9, "invariance": 0.9, "directional": 0.7}


@pytest.fixture(scope="module")
def engine(trained) -> Engine:
    uri = f"sqlite:///{trained.folder / 'storage' / 'mlflow' / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    return Engine(Path(mlflow.artifacts.download_artifacts(
        run_id=trained.run_id, artifact_path="checkpoint", tracking_uri=uri)))


@pytest.mark.parametrize(("kind", "min_pass_rate"), MIN_PASS_RATE.items())
def test_behavior(kind: str, min_pass_rate: float, engine: Engine) -> None:
    tests = load_behavioral_tests(bundled_dir("datasets") / "holdout.csv")
    tests = tests[tests["kind"] == kind].reset_index(drop=True)
    results = run_behavioral_tests(tests, engine.predict_proba, engine.labels)
    failed = [result for result in results if not result.success]
    assert len(results) >= 8
    assert len(failed) <= (1 - min_pass_rate) * len(results), failed


def test_better_than_bag_of_words(trained) -> None:
    overall = trained.json("evaluate")["overall"]
    assert overall["f1"] > 0.90
    assert overall["f1"] > overall["baseline_f1"] + 0.02


def test_confidence_is_calibrated(trained) -> None:
    results = trained.json("evaluate")
    assert results["overall"]["expected_calibration_error"] < 0.15
    large_bins = [bin_ for bin_ in results["calibration"] if bin_["num_samples"] >= 20]
    assert large_bins[-1]["accuracy"] > large_bins[0]["accuracy"]


def test_empty_and_long_texts(engine: Engine) -> None:
    probabilities = engine.predict_proba(["", "word " * 5000, "🙂", "\x00\ufffd"])
    assert probabilities.shape == (4, 4)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
