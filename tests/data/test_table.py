"""A labeled table meets the expectations: `pytest --dataset-loc=TABLE tests/data`."""
import pytest

from madewithml.columns import use_columns_of_table, use_settings_of_table
from madewithml.config import bundled_dir, get_settings
from madewithml.data import read_training_table, stratified_split
from madewithml.data_validation import expectations_table, validate_dataset
from madewithml.suite import find_suite


@pytest.fixture(scope="module")
def dataset_loc(request: pytest.FixtureRequest) -> str:
    """The table that is given, with its settings and columns; else the embedded one."""
    loc = request.config.getoption("--dataset-loc")
    if loc is None:
        return str(bundled_dir("datasets") / "dataset.csv")
    use_settings_of_table(loc)
    use_columns_of_table(loc)
    return loc


def test_meets_the_expectations(dataset_loc: str) -> None:
    """No expectation of the severity error fails: training is possible and meaningful."""
    results = validate_dataset(dataset_loc, suite=find_suite(dataset_loc))
    assert results.success, "\n" + expectations_table(results.expectations).to_string()


def test_each_label_keeps_a_row_in_training(dataset_loc: str) -> None:
    """A split for validation takes no label away."""
    rows, _ = read_training_table(dataset_loc)
    label = get_settings().label_column
    train, held_out = stratified_split(rows, 0.2)
    assert len(train) + len(held_out) == len(rows)
    assert set(train[label]) == set(rows[label])
