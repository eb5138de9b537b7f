"""The model trained by this test session is good enough, and for the right reasons."""
from pathlib import Path

import mlflow
import numpy as np
import pytest

from madewithml.config import bundled_dir
from madewithml.evaluate import load_behavioral_tests, run_behavioral_tests
from madewithml.predict import Predictor

MIN_PASS_RATE = {"minimum functionality": 0.9, "invariance": 0.9, "directional": 0.7}


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    uri = f"sqlite:///{trained.folder / 'storage' / 'mlflow' / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    return Predictor(Path(mlflow.artifacts.download_artifacts(
        run_id=trained.run_id, artifact_path="checkpoint", tracking_uri=uri)))


@pytest.mark.parametrize(("kind", "min_pass_rate"), MIN_PASS_RATE.items())
def test_behavior(kind: str, min_pass_rate: float, predictor: Predictor) -> None:
    tests = load_behavioral_tests(bundled_dir("datasets") / "holdout.csv")
    tests = tests[tests["kind"] == kind].reset_index(drop=True)
    results = run_behavioral_tests(tests, predictor.predict_proba, predictor.labels)
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


def test_empty_and_long_texts(predictor: Predictor) -> None:
    probabilities = predictor.predict_proba(["", "word " * 5000, "🙂", "\x00\ufffd"])
    assert probabilities.shape == (4, 4)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
