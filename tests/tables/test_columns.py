"""The columns of a stranger's table are chosen, and a model keeps its own."""
import json
from pathlib import Path

import pytest

from tests.conftest import run_cli

TWEETS = "user,tweet,class\n" + "".join(
    f"{'xyz'[i % 3]}{i},this is tweet number {i} about nothing,{'happy' if i % 2 else 'sad'}\n"
    for i in range(12))
UNCLEAR = "city,tweet,mood\n" + "".join(
    f"{'xyz'[i % 3]},this is tweet number {i},{'ab'[i % 2]}\n" for i in range(12))


def validate(folder: Path, table: str, *options: str, **env: str):
    (folder / "table.csv").write_text(table, encoding="utf-8")
    return run_cli("validate", "--dataset-loc", "table.csv", "--results-fp", "results.json",
                   *options, cwd=folder, **env)


def checked(folder: Path) -> str:
    """Names of all expectations."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return " | ".join(expectation["name"] for expectation in results["expectations"])


def test_columns_are_chosen_and_reported(tmp_path: Path) -> None:
    done = validate(tmp_path, TWEETS)
    assert done.returncode == 0, done.stderr
    assert "text from 'tweet' (7 words on average), label from 'class'" in done.stderr
    assert "--text-columns, --label-column" in done.stderr
    assert "the table has the columns tweet, class" in checked(tmp_path)


def test_unclear_columns_are_one_line(tmp_path: Path) -> None:
    done = validate(tmp_path, UNCLEAR)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not clear which column is the label: city, mood" in done.stderr


@pytest.mark.parametrize(("options", "env"), [
    (["--text-columns", "tweet", "--label-column", "mood"], {}),
    ([], {"MADEWITHML_TEXT_COLUMNS": "tweet", "MADEWITHML_LABEL_COLUMN": "mood"}),
    ([], {"MADEWITHML_TEXT_COLUMNS": '["tweet"]', "MADEWITHML_LABEL_COLUMN": "mood"}),
], ids=["options", "settings", "JSON"])
def test_columns_are_named(options: list[str], env: dict[str, str], tmp_path: Path) -> None:
    done = validate(tmp_path, UNCLEAR, *options, **env)
    assert done.returncode == 0 and "text from" not in done.stderr, done.stderr
    assert "the table has the columns tweet, mood" in checked(tmp_path)


def test_wrong_setting_is_one_line(tmp_path: Path) -> None:
    done = validate(tmp_path, TWEETS, MADEWITHML_TEXT_COLUMNS='["tweet"')
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: Setting text_columns: ")


def test_warnings_fail_only_if_strict(tmp_path: Path) -> None:
    repeated = TWEETS + TWEETS.splitlines()[1] + "\n"
    assert validate(tmp_path, repeated).returncode == 0
    strict = validate(tmp_path, repeated, "--strict")
    assert strict.returncode == 1 and "'tweet' is unique" in strict.stderr
