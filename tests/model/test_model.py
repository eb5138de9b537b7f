"""The model that this test run trained: good enough, and for the right reasons."""
import numpy as np
import pytest

from madewithml.evaluate import read_behavioral_tests, run_behavioral_tests
from madewithml.predict import Predictor


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    from pathlib import Path
    import mlflow
    uri = f"sqlite:///{trained.folder / 'storage' / 'mlflow' / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    return Predictor(Path(mlflow.artifacts.download_artifacts(run_id=trained.run_id, artifact_path="checkpoint", tracking_uri=uri)))


@pytest.mark.parametrize(("kind", "least"), [("minimum functionality", 0.9), ("invariance", 0.9), ("directional", 0.7)])
def test_behavior_of(kind: str, least: float, predictor: Predictor) -> None:
    cases = read_behavioral_tests()
    outcome = run_behavioral_tests(cases[cases["kind"] == kind].reset_index(drop=True), predictor.predict_proba, predictor.labels)
    failed = [case for case in outcome if not case.success]
    assert len(outcome) >= 8
    assert len(failed) <= (1 - least) * len(outcome), failed


def test_better_than_counting_words(trained) -> None:
    overall = trained.json("evaluate")["overall"]
    assert overall["f1"] > 0.90
    assert overall["f1"] > overall["baseline_f1"] + 0.02


def test_confidence_means_something(trained) -> None:
    overall, bins = trained.json("evaluate")["overall"], trained.json("evaluate")["calibration"]
    assert overall["expected_calibration_error"] < 0.15
    sure = [b for b in bins if b["num_samples"] >= 20]
    assert sure[-1]["accuracy"] > sure[0]["accuracy"]


def test_empty_and_long_texts_get_an_answer(predictor: Predictor) -> None:
    probabilities = predictor.predict_proba(["", "word " * 5000, "🙂", "\x00\ufffd"])
    assert probabilities.shape == (4, 4)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
