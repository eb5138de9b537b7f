"""The embedded tables have the properties that their data card claims."""
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "datasets"))
import measures  # noqa: E402

from madewithml.data import build_texts, read_labeled_table, read_table  # noqa: E402
from madewithml.data_validation import validate_dataset  # noqa: E402
from madewithml.evaluate import baseline_f1  # noqa: E402

TAGS = ["computer-vision", "mlops", "natural-language-processing", "other"]
TABLES = {"dataset.csv": 1000, "holdout.csv": 250, "unlabeled.csv": 200}


@pytest.fixture(scope="module")
def all_rows() -> pd.DataFrame:
    tables = [read_table(ROOT / "datasets" / name) for name in TABLES]
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize(("name", "min_rows"), TABLES.items())
def test_size_and_columns(name: str, min_rows: int) -> None:
    rows = read_table(ROOT / "datasets" / name)
    assert len(rows) >= min_rows
    label = [] if name == "unlabeled.csv" else ["tag"]
    assert list(rows) == ["id", "created_on", "title", "description", *label]


def test_no_duplicates(all_rows: pd.DataFrame) -> None:
    assert all_rows["id"].is_unique
    assert measures.near_duplicates(build_texts(all_rows)) == []
    assert measures.paraphrases(build_texts(all_rows)) == []


def test_near_duplicates_are_found() -> None:
    texts = ["one two three four five six seven eight nine ten",
             "One two three four five six, seven eight nine ten eleven!", "something else"]
    assert [pair[1:] for pair in measures.near_duplicates(texts)] == [(0, 1)]


def test_paraphrases_are_found() -> None:
    texts = ["Drowsy driver alarm: it beeps when the eye aspect ratio falls",
             "Counting apples in orchard photos",
             "Eye aspect ratio low, beep! My drowsy driver alarm"]
    assert [pair[1:] for pair in measures.paraphrases(texts)] == [(0, 2)]


@pytest.mark.parametrize("name", ["dataset.csv", "holdout.csv"])
def test_expectations(name: str) -> None:
    results = validate_dataset(ROOT / "datasets" / name, labels=TAGS)
    assert results.success, [result for result in results.expectations if not result.success]


def test_bag_of_words_is_not_enough() -> None:
    train = read_labeled_table(ROOT / "datasets" / "dataset.csv")
    holdout = read_labeled_table(ROOT / "datasets" / "holdout.csv")
    assert 0.6 < baseline_f1(train, holdout) < measures.MAX_BASELINE
