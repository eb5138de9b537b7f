"""The command line as a user calls it."""
import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from madewithml.schemas import RESULT_SCHEMAS
from tests.conftest import ROOT, fork_cli, run_cli

HEADER = "id,created_on,title,description,tag\n"
GOOD = "".join(f"{i},2025-01-01,title {i},description {i},{'a' if i % 2 else 'b'}\n" for i in range(8))


@pytest.mark.parametrize(("content", "said"), [
    ("id,title,tag\n1,a,x\n", "column 'description' is missing"),
    (HEADER, "the table has no rows"),
    (HEADER + GOOD + "9,2025-01-01,lonely,row,c\n", "label 'c' has 1 row"),
    ((HEADER + GOOD).encode() + b"9,2025-01-01,caf\xe9,row,a\n", "row 10 (the header is row 1) is not UTF-8"),
    (HEADER + GOOD + "9,2025-01-01,short,a\n", "row 10 (the header is row 1) has 4 fields instead of 5"),
    (None, "no such file"),
], ids=["missing column", "empty table", "label seen once", "not UTF-8", "ragged row", "no file"])
@pytest.mark.parametrize("command", ["train", "run"])
def test_bad_table(command: str, content: str | bytes | None, said: str, tmp_path: Path) -> None:
    """One line on stderr, exit code 2, and no new file."""
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    done = run_cli(command, "--dataset-loc", "table.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Error: table.csv: ") and said in done.stderr, done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("args", "said"), [
    (["--train-loop-config", '{"learning_rate": 1}'], "learning_rate"),
    (["--train-loop-config", "{oops"], "not JSON"),
    (["--num-epochs", "0"], "--num-epochs"),
    (["--no-such-option"], "No such option"),
])
def test_bad_option(args: list[str], said: str, tmp_path: Path) -> None:
    done = fork_cli("train", "--dataset-loc", str(ROOT / "datasets" / "dataset.csv"), *args, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("args", "said"), [
    pytest.param(["tune", "--dataset-loc", str(ROOT / "datasets" / "dataset.csv"), "--search-space", '{"speed": {"choice": [1]}}'], "'speed'", marks=pytest.mark.slow),
    pytest.param(["tune", "--dataset-loc", str(ROOT / "datasets" / "dataset.csv"), "--initial-params", '[{"patience": 1}]'], "'patience' is not searched", marks=pytest.mark.slow),
    (["submit", "train"], "No cluster is named"),
    (["submit", "no-such-workload"], "There is no workload"),
    (["cluster", "status"], "No cluster was started"),
    (["workload", "train", "--", "--epochs", "2"], "has no option '--epochs'"),
    (["pr-comment", "--event", "event.json"], "The environment variable 'GITHUB_TOKEN' is missing"),
], ids=["search space", "initial point", "no cluster", "no workload", "no cluster up", "workload option", "no token of GitHub"])
def test_told_in_one_line(args: list[str], said: str, tmp_path: Path) -> None:
    done = fork_cli(*args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_setting(tmp_path: Path) -> None:
    done = fork_cli("report", cwd=tmp_path, MADEWITHML_MAX_LENGTH="many")
    assert done.returncode == 2 and "max_length" in done.stderr and done.stderr.count("\n") == 1


def test_run_wrote_everything(trained) -> None:
    """Each workload left its results, of their schema, and its executed notebook."""
    for name in ("validate", "train", "evaluate", "predict", "register"):
        RESULT_SCHEMAS[name].model_validate(trained.json(name))
        notebook = nbformat.read(trained.results / f"{name}.ipynb", as_version=4)
        assert any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
        assert any(cell.get("outputs") for cell in notebook.cells)
    report = (trained.results / "report.md").read_text(encoding="utf-8")
    assert f"{trained.json('evaluate')['overall']['f1']:.3f}" in report
    assert (trained.results / "data_docs").is_dir()
    assert "Files:" in (trained.folder / "stdout.txt").read_text(encoding="utf-8")


def test_every_training_row_is_seen(trained) -> None:
    train = trained.json("train")
    assert [epoch["num_rows"] for epoch in train["metrics"]] == [train["num_train"]] * 2
    assert train["num_train"] + train["num_val"] == len(pd.read_csv(ROOT / "datasets" / "dataset.csv"))


def test_second_run_does_nothing_again(trained) -> None:
    before = (trained.results / "train.json").stat().st_mtime
    done = trained.cli("run", "--num-epochs", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged, results are up to date") == 5
    assert (trained.results / "train.json").stat().st_mtime == before


def test_predict_one(trained) -> None:
    done = trained.cli("predict", "--run-id", trained.run_id, "--title", "Translating Welsh", "--description", "A language model translates sentences.")
    answer = json.loads(done.stdout)[0]
    assert answer["prediction"] == "natural-language-processing"
    assert list(answer["probabilities"].values()) == sorted(answer["probabilities"].values(), reverse=True)
    unsure = trained.cli("predict", "--run-id", trained.run_id, "--title", "x", "--threshold", "1")
    assert json.loads(unsure.stdout)[0]["prediction"] == "other"


def test_predicted_table_is_whole_and_in_order(trained) -> None:
    predictions, source = pd.read_csv(trained.results / "predictions.csv"), pd.read_csv(ROOT / "datasets" / "unlabeled.csv")
    assert predictions["id"].tolist() == source["id"].tolist()
    probabilities = predictions.filter(like="probability_")
    assert probabilities.shape[1] == 4
    assert (probabilities.sum(axis=1) - 1).abs().max() < 1e-4


def test_best_run_and_evaluate_agree(trained) -> None:
    best = trained.cli("get-best-run-id", "--experiment-name", "madewithml", "--metric", "best_val_loss", "--mode", "min")
    assert best.stdout.strip() == trained.run_id
    out = trained.folder / "again.json"
    done = trained.cli("evaluate", "--run-id", trained.run_id, "--dataset-loc", str(ROOT / "datasets" / "holdout.csv"),
                       "--slices", '{"questions": "text.str.contains(\'?\', regex=False)"}', "--results-fp", str(out))
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text())
    assert again["overall"]["f1"] == trained.json("evaluate")["overall"]["f1"]
    assert again["slices"]["questions"]["num_samples"] > 0


def test_unknown_run(trained) -> None:
    done = trained.cli("predict", "--run-id", "0" * 32, "--title", "x")
    assert done.returncode == 2 and "No MLflow run" in done.stderr and done.stderr.count("\n") == 1


def test_serve_takes_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--config` says of the service holds, a token above all, unless an option beside it says otherwise."""
    from madewithml import serve
    from madewithml.cli import app
    seen, command = [], ["serve", "--config"]
    monkeypatch.setattr(serve, "serve_forever", lambda config, *_: seen.append(config.model_dump(mode="json")))
    config = {"alias": "challenger", "run_id": "abc", "model_name": "other", "precision": "fp32", "runtime": "torch", "shadow_challenger": True, "token_file": "token", "allowed_data_dirs": ["tables"], "log_dir": "log",
              "log_sample_rate": 0.5, "log_text": "keep"}
    options = ["--alias", "previous", "--token-file", "/other/token", "--log-text", "hash"]
    for more in ([], options):
        assert CliRunner().invoke(app, [*command, json.dumps(config), *more]).exit_code == 0
    assert {name: seen[0][name] for name in config} == config
    assert {name: seen[1][name] for name in config} == config | {"alias": "previous", "token_file": "/other/token", "log_text": "hash"}
