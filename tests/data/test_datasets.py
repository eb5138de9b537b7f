"""The embedded tables are what their data card says."""
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "datasets"))
import measures  # noqa: E402

from madewithml.data import read_labeled_table, read_table, build_texts  # noqa: E402
from madewithml.evaluate import baseline_f1  # noqa: E402
from madewithml.data_validation import validate_dataset  # noqa: E402

TAGS = ["computer-vision", "mlops", "natural-language-processing", "other"]
TABLES = {"dataset.csv": 1000, "holdout.csv": 250, "unlabeled.csv": 200}


@pytest.fixture(scope="module")
def everything() -> pd.DataFrame:
    return pd.concat([read_table(ROOT / "datasets" / name) for name in TABLES], ignore_index=True)


@pytest.mark.parametrize(("name", "least"), TABLES.items())
def test_size_and_columns(name: str, least: int) -> None:
    rows = read_table(ROOT / "datasets" / name)
    assert len(rows) >= least
    assert list(rows) == ["id", "created_on", "title", "description", *([] if name == "unlabeled.csv" else ["tag"])]


def test_no_row_twice(everything: pd.DataFrame) -> None:
    assert everything["id"].is_unique
    assert measures.near_duplicates(build_texts(everything)) == []
    assert measures.retellings(build_texts(everything)) == []


def test_near_duplicates_are_found() -> None:
    texts = ["one two three four five six seven eight nine ten", "One two three four five six, seven eight nine ten eleven!", "something else"]
    assert [pair[1:] for pair in measures.near_duplicates(texts)] == [(0, 1)]


def test_a_project_told_twice_is_found() -> None:
    texts = ["Drowsy driver alarm: it beeps when the eye aspect ratio falls", "Counting apples in orchard photos", "Eye aspect ratio low, beep! My drowsy driver alarm"]
    assert [pair[1:] for pair in measures.retellings(texts)] == [(0, 2)]


@pytest.mark.parametrize("name", ["dataset.csv", "holdout.csv"])
def test_expectations(name: str) -> None:
    results = validate_dataset(ROOT / "datasets" / name, labels=TAGS)
    assert results.success, [e for e in results.expectations if not e.success]


def test_a_counter_of_words_is_not_enough() -> None:
    train, holdout = (read_labeled_table(ROOT / "datasets" / name) for name in ("dataset.csv", "holdout.csv"))
    assert 0.6 < baseline_f1(train, holdout) < measures.MAX_BASELINE
