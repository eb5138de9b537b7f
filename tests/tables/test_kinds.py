"""Tables of every kind, in every format that can hold them, through all stages.

`make test` reads and validates them; `make test-tables` also trains, evaluates and predicts."""
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from madewithml.config import TrainOptions, UserError
from madewithml.data import read_training_table, read_with_labels
from madewithml.data_validation import validate_dataset
from madewithml.evaluate import evaluate_model
from madewithml.models import resolve_encoder
from madewithml.predict import predict_table
from madewithml.ray_session import ray_session
from madewithml.schemas import TrainResults
from madewithml.tables import read_table_file
from madewithml.train import train_model
from madewithml.utils import temporary_env, temporary_storage
from tests.tables.kinds import (
    FORMATS, KINDS, WITHOUT_HEADER, Kind, formats_of, some_formats_of, write_kind)

COLUMNS = {"MADEWITHML_TEXT_COLUMNS": "text", "MADEWITHML_LABEL_COLUMN": "label"}
ACCEPTED = [name for name, kind in KINDS.items() if not kind.refused]
REFUSED = [name for name, kind in KINDS.items() if kind.refused]
OLD = ("prediction", "confidence", "probability_a")


@pytest.fixture(autouse=True)
def columns() -> Iterator[None]:
    with temporary_env(COLUMNS):
        yield


def empty_as_none(values: list[str | None]) -> list[str | None]:
    """A format without gaps has empty cells."""
    return [value or None for value in values]


def check_values(kind: Kind, path: Path) -> None:
    """The texts and labels are those of the rows, whatever the format."""
    rows = read_with_labels(path)
    assert empty_as_none(rows["text"].tolist()) == empty_as_none(kind.expected_texts())
    assert [label for label in rows["label"] if label] == kind.expected_labels()


@pytest.mark.parametrize("name", ACCEPTED)
def test_same_values_in_every_format(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    for file_format in some_formats_of(kind):
        check_values(kind, write_kind(kind, file_format, tmp_path))


@pytest.mark.parametrize("name", ACCEPTED)
def test_repairs_are_counted(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    _, repairs = read_training_table(write_kind(kind, formats_of(kind)[0], tmp_path))
    assert len(repairs) == len(kind.repairs)
    for part, num_rows in kind.repairs.items():
        assert [repair.num_rows for repair in repairs if part in repair.name] == [num_rows]


@pytest.mark.parametrize("name", ACCEPTED)
def test_no_expectation_of_severity_error_fails(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    results = validate_dataset(write_kind(kind, formats_of(kind)[0], tmp_path))
    failed = {result.name for result in results.expectations
              if not result.success and result.severity == "warning"}
    assert results.success
    assert all(any(part in name for name in failed) for part in kind.warnings), failed


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    for file_format in some_formats_of(kind):
        with pytest.raises(UserError) as raised:
            read_training_table(write_kind(kind, file_format, tmp_path))
        reason = kind.refused
        if kind.refused_row is not None:
            reason += str(kind.refused_row + (1 if file_format in WITHOUT_HEADER else 2))
        assert reason in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of random weights, small enough to train in a second."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(resolve_encoder("embedded"))
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                         num_attention_heads=2, intermediate_size=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """One Ray and one MLflow storage for all kinds."""
    with temporary_storage(), ray_session():
        yield


def train_tiny(path: Path, encoder: Path) -> TrainResults:
    config = {"num_epochs": 1, "num_frozen_layers": 0}
    return train_model(path, TrainOptions(encoder=str(encoder), train_loop_config=config))


def family(file_format: str) -> str:
    """Suffix of a table of predictions with the same types of values."""
    if file_format in ("parquet", "feather"): return "parquet"
    return "jsonl" if file_format.startswith("json") else "csv"


def check_predictions(path: Path, output: Path) -> list[str]:
    """The other columns are those of the input, type for type; returns the predictions."""
    before = read_table_file(path)
    before = before.drop_columns([name for name in OLD if name in before.column_names])
    after = read_table_file(output)
    kept = after.select(before.column_names)
    assert kept.schema.types == before.schema.types
    assert kept.to_pylist() == before.to_pylist()
    return after["prediction"].to_pylist()


@pytest.mark.tables
@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("name", ACCEPTED)
def test_all_stages(name: str, encoder: Path, tmp_path: Path) -> None:
    """Trained in one format, the next kind in the next; read, evaluated and predicted in all."""
    kind = KINDS[name]
    formats = formats_of(kind)
    paths = {file_format: write_kind(kind, file_format, tmp_path) for file_format in formats}
    trained_on = formats[ACCEPTED.index(name) % len(formats)]
    results = train_tiny(paths[trained_on], encoder)
    assert results.labels == sorted(set(kind.expected_labels()))
    used = read_training_table(paths[trained_on])[0]
    assert results.num_train + results.num_val == len(used)
    scores, predictions = set(), set()
    for file_format, path in paths.items():
        check_values(kind, path)
        scores.add(evaluate_model(results.run_id, path, behavior_loc=None).overall.f1)
        if file_format in some_formats_of(kind):
            output = tmp_path / f"predictions-{FORMATS.index(file_format)}.{family(file_format)}"
            predict_table(results.run_id, path, output)
            predictions.add(tuple(check_predictions(path, output)))
    assert len(scores) == len(predictions) == 1
    assert set(predictions.pop()) <= set(results.labels)
