"""The command line as a user calls it."""
import io
import json
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from madewithml.pr_comment import read_artifact
from madewithml.schemas import RESULT_SCHEMAS
from madewithml.tables import write_csv
from tests.conftest import ROOT, fork_cli, run_cli

DATASETS = ROOT / "datasets"
DATASET = str(DATASETS / "dataset.csv")
HEADER = "id,created_on,title,description,tag\n"
VALID = "".join(f"{i},2025-01-01,title {i},description {i},{'a' if i % 2 else 'b'}\n"
                for i in range(8))
INVALID_TABLES = {
    "missing column": ("id,created_on,tag\n" + "1,2025-01-01,a\n2,2025-01-02,b\n" * 4,
                       "it is not clear which column is the text"),
    "empty table": (HEADER, "the table has no rows"),
    "single label": (HEADER + "1,2025-01-01,some,row,a\n2,2025-01-01,another,row,a\n",
                     "the only label is 'a'"),
    "ragged row": (HEADER + VALID + "9,2025-01-01,short,a\n", "line 10: 4 fields instead of 5"),
    "no file": (None, "no such file"),
}
MISTAKES = {
    "no cluster": (["submit", "train"], "No cluster is named"),
    "no workload": (["submit", "no-such-workload"], "There is no workload"),
    "no cluster up": (["cluster", "status"], "No cluster was started"),
    "workload option": (["workload", "train", "--", "--epochs", "2"], "has no option '--epochs'"),
    "workload value": (
        ["workload", "train", "--", "--num-epochs", "0"], "num_epochs: Input should"),
    "run name of report": (["report", "--run-name", "a/b"], "--run-name 'a/b' must not contain"),
    "run name of workload": (["workload", "validate", "--run-name", ".."],
                             "--run-name '..' must be a plain name"),
    "no GitHub token": (["pr-comment", "--event", "event.json"],
                        "The environment variable 'GITHUB_TOKEN' is missing"),
}
SLOW_MISTAKES = {
    "search space": (["tune", "--dataset-loc", DATASET, "--search-space",
                      '{"speed": {"choice": [1]}}'], "'speed'"),
    "initial point": (["tune", "--dataset-loc", DATASET, "--initial-params", '[{"patience": 1}]'],
                      "'patience' is not searched"),
}


def assert_one_line(stderr: str, reason: str) -> None:
    """The error is one line that contains the reason."""
    assert stderr.startswith("Error: ") and stderr.count("\n") == 1 and reason in stderr, stderr


@pytest.mark.parametrize("mistake", INVALID_TABLES)
@pytest.mark.parametrize("command", ["train", "run"])
def test_invalid_table(command: str, mistake: str, tmp_path: Path) -> None:
    """One line on stderr, exit code 2, and no new file."""
    content, reason = INVALID_TABLES[mistake]
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "table.csv").write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    done = run_cli(command, "--dataset-loc", "table.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert_one_line(done.stderr, reason)
    assert done.stderr.startswith("Error: table.csv: ")
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_columns_and_labels_are_checked_before_training(tmp_path: Path) -> None:
    """A label column that is also the text, and a holdout with a label that nobody learns."""
    write_csv(pd.DataFrame({"text": [f"text {i}" for i in range(40)], "class": ["a", "b"] * 20}),
              tmp_path / "train.csv")
    write_csv(pd.DataFrame({"text": ["one", "two"], "class": ["a", "c"]}), tmp_path / "test.csv")
    run = ("run", "--dataset-loc", "train.csv")
    columns = ("--text-columns", "text", "--label-column", "text")
    for options, reason in ((columns, "'text' is the label column and a text column"),
                            (("--holdout-loc", "test.csv"), "test.csv: the label 'c' is none of")):
        done = fork_cli(*run, *options, cwd=tmp_path)
        assert done.returncode == 2
        assert reason in done.stderr.splitlines()[-1]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("args", "reason"), [
    (["--train-loop-config", '{"learning_rate": 1}'], "learning_rate"),
    (["--train-loop-config", "{oops"], "not JSON"),
    (["--num-epochs", "0"], "--num-epochs"),
    (["--seed", "4294967296"], "--seed: Input should be less than"),
    (["--no-such-option"], "No such option"),
])
def test_invalid_option(args: list[str], reason: str, tmp_path: Path) -> None:
    done = fork_cli("train", "--dataset-loc", DATASET, *args, cwd=tmp_path)
    assert done.returncode == 2 and reason in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("args", "reason"), [
    *(pytest.param(*mistake, id=name, marks=pytest.mark.slow)
      for name, mistake in SLOW_MISTAKES.items()),
    *(pytest.param(*MISTAKES[name], id=name) for name in MISTAKES)])
def test_mistake_is_one_line(args: list[str], reason: str, tmp_path: Path) -> None:
    done = fork_cli(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert_one_line(done.stderr, reason)
    assert list(tmp_path.iterdir()) == []


def test_invalid_setting(tmp_path: Path) -> None:
    done = fork_cli("report", cwd=tmp_path, MADEWITHML_MAX_LENGTH="many")
    assert done.returncode == 2
    assert_one_line(done.stderr, "max_length")


def test_run_writes_everything(trained) -> None:
    """Each workload wrote its results, of their schema, and its executed notebook."""
    for name in ("validate", "train", "evaluate", "predict", "register"):
        RESULT_SCHEMAS[name].model_validate(trained.json(name))
        notebook = nbformat.read(trained.results / f"{name}.ipynb", as_version=4)
        assert any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
        assert any(cell.get("outputs") for cell in notebook.cells)
    report = (trained.results / "report.md").read_text(encoding="utf-8")
    assert f"{trained.json('evaluate')['overall']['f1']:.3f}" in report
    assert (trained.results / "data_docs").is_dir()
    stdout = (trained.folder / "stdout.txt").read_text(encoding="utf-8")
    assert "Files:" in stdout and stdout.splitlines()[-1].startswith("Next: madewithml promote")


def test_results_are_what_the_comment_accepts(trained) -> None:
    """The workflow sends all JSON files of the results directory to the one that comments."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path in trained.results.glob("*.json"):
            archive.write(path, path.name)
    assert read_artifact(data.getvalue())["train"].run_id == trained.run_id


def test_every_training_row_is_used(trained) -> None:
    train = trained.json("train")
    assert [epoch["num_rows"] for epoch in train["metrics"]] == [train["num_train"]] * 2
    assert train["num_train"] + train["num_val"] == len(pd.read_csv(DATASET))


def test_second_run_repeats_nothing(trained) -> None:
    before = (trained.results / "train.json").stat().st_mtime
    done = trained.cli("run", "--num-epochs", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged, results are up to date") == 5
    assert (trained.results / "train.json").stat().st_mtime == before


def test_predict_one_item(trained) -> None:
    done = trained.cli("predict", "--run-id", trained.run_id, "--title", "Translating Welsh",
                       "--description", "A language model translates sentences.")
    item = json.loads(done.stdout)[0]
    assert item["prediction"] == "natural-language-processing"
    probabilities = list(item["probabilities"].values())
    assert probabilities == sorted(probabilities, reverse=True)
    unsure = trained.cli("predict", "--run-id", trained.run_id, "--title", "x", "--threshold", "1")
    assert json.loads(unsure.stdout)[0]["prediction"] == "other"


def test_predicted_table_is_complete_and_in_order(trained) -> None:
    predictions = pd.read_csv(trained.results / "predictions.csv")
    source = pd.read_csv(DATASETS / "unlabeled.csv")
    assert predictions["id"].tolist() == source["id"].tolist()
    probabilities = predictions.filter(like="probability_")
    assert probabilities.shape[1] == 4
    assert (probabilities.sum(axis=1) - 1).abs().max() < 1e-4


def test_best_run_and_evaluate_agree(trained) -> None:
    best = trained.cli("get-best-run-id", "--experiment-name", "madewithml",
                       "--metric", "best_val_loss", "--mode", "min")
    assert best.stdout.strip() == trained.run_id
    results_fp = trained.folder / "again.json"
    slices = '{"questions": "text.str.contains(\'?\', regex=False)"}'
    done = trained.cli("evaluate", "--run-id", trained.run_id, "--slices", slices,
                       "--dataset-loc", str(DATASETS / "holdout.csv"),
                       "--results-fp", str(results_fp))
    assert done.returncode == 0, done.stderr
    again = json.loads(results_fp.read_text())
    assert again["overall"]["f1"] == trained.json("evaluate")["overall"]["f1"]
    assert again["slices"]["questions"]["num_samples"] > 0


def test_unknown_run(trained) -> None:
    done = trained.cli("predict", "--run-id", "0" * 32, "--title", "x")
    assert done.returncode == 2
    assert_one_line(done.stderr, "No MLflow run")


def test_serve_options_win_over_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` has every field of `--config`, the token above all, unless an option is given."""
    from madewithml import serve
    from madewithml.cli import app
    served = []
    monkeypatch.setattr(serve, "serve_forever",
                        lambda config, *_: served.append(config.model_dump(mode="json")))
    config = {"alias": "challenger", "run_id": "abc", "model_name": "other", "precision": "fp32",
              "runtime": "torch", "shadow_challenger": True, "token_file": "token",
              "allowed_data_dirs": ["tables"], "log_dir": "log", "log_sample_rate": 0.5,
              "log_text": "keep", "threads": 4}
    command = ["serve", "--config", json.dumps(config)]
    options = ["--alias", "previous", "--token-file", "/other/token", "--log-text", "hash",
               "--threads", "0"]
    changed = {"alias": "previous", "token_file": "/other/token", "log_text": "hash", "threads": 0}
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, *options]).exit_code == 0
    assert {name: served[0][name] for name in config} == config
    assert {name: served[1][name] for name in config} == config | changed
