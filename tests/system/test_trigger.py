"""`madewithml trigger`: validates new tables, retrains, and promotes only a better challenger."""
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
import yaml
from moto.server import ThreadedMotoServer

from madewithml.data import stratified_split
from madewithml.schemas import MonitorResults
from tests.conftest import CLI, ROOT, Run, fork_cli, kill_cli, run_cli

DATASET = ROOT / "datasets" / "dataset.csv"
HOLDOUT = str(ROOT / "datasets" / "holdout.csv")
TRIALS = 3  # of each; one takes two minutes
# Both versions have the same size, so other load on the machine is no reason to reject one. And a
# champion trained on 300 rows passes some behavioral tests by luck.
PROMOTION_POLICY = {"max_p99_latency_ratio": 10, "max_p50_latency_ratio": 10, "max_p99_ms": 1000,
                    "max_new_behavior_failures": 3}


def run_python(code: str, cwd: Path) -> str:
    """Stdout of Python code, whose storage is in `cwd`."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True,
                          text=True, check=True).stdout


class Loop:
    """A directory in which the trigger is called."""

    def __init__(self, folder: Path, dataset_loc: Path, **policy) -> None:
        self.folder, self.new = folder, folder / "new"
        self.state_dir = folder / "storage" / "trigger"
        self.new.mkdir()
        (folder / "policy.yaml").write_text(yaml.safe_dump({"min_file_age_s": 0} | policy))
        (folder / "promotion.yaml").write_text(yaml.safe_dump(PROMOTION_POLICY))
        self.args = ["--policy", "policy.yaml", "--new-data", "new",
                     "--promotion-policy", "promotion.yaml",
                     "--dataset-loc", str(dataset_loc), "--holdout-loc", HOLDOUT]

    def add(self, rows: pd.DataFrame, name: str = "batch.csv") -> None:
        rows.to_csv(self.new / name, index=False)

    def trigger(self, *args: str, **variables: str) -> subprocess.CompletedProcess:
        return fork_cli("trigger", *self.args, *args, cwd=self.folder, **variables)

    @property
    def ledger(self) -> list[dict]:
        path = self.state_dir / "ledger.jsonl"
        if not path.is_file():
            return []
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return list({entry["id"]: entry for entry in entries}.values())

    @property
    def decisions(self) -> list[tuple[str, str]]:
        return [(entry["decision"], entry["status"]) for entry in self.ledger]

    @property
    def champion(self) -> int:
        code = "from madewithml.registry import get_aliases; print(get_aliases()['champion'])"
        return int(run_python(code, self.folder))


def swap_labels(rows: pd.DataFrame, share: float, seed: int = 0) -> pd.DataFrame:
    """The rows with this share of their labels replaced by another."""
    rows, rng = rows.reset_index(drop=True).copy(), np.random.default_rng(seed)
    labels = sorted(set(rows["tag"]))
    for i in rng.choice(len(rows), round(share * len(rows)), replace=False):
        rows.loc[i, "tag"] = rng.choice([label for label in labels if label != rows.loc[i, "tag"]])
    return rows


def make_loop(run: Run, folder: Path, dataset_loc: Path, **policy) -> Loop:
    """A loop with a copy of the run's storage and champion."""
    shutil.copytree(run.folder / "storage", folder / "storage")
    return Loop(folder, dataset_loc, **policy)


def decides_nothing(done: subprocess.CompletedProcess) -> bool:
    return done.returncode == 0 and '"decision": "nothing"' in done.stdout


@pytest.fixture(scope="module")
def served(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The trained run, its version promoted to champion."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(trained.folder / "storage", folder / "storage")
    run_python("from madewithml.registry import get_aliases, promote_version, register_model\n"
               f"name = register_model({trained.run_id!r}).model_name\n"
               "aliases = get_aliases(name)\n"
               "promote_version(name, aliases, aliases['challenger'])", folder)
    return Run(folder)


@pytest.fixture(scope="module")
def new_rows(trained: Run) -> pd.DataFrame:
    """Unlabeled rows with the champion's confident predictions as labels."""
    dates = pd.read_csv(ROOT / "datasets" / "unlabeled.csv")[["id", "created_on"]]
    predictions = pd.read_csv(trained.results / "predictions.csv")
    rows = predictions.merge(dates, on="id", suffixes=("", "_"))
    rows = rows[rows["confidence"] >= 0.8].rename(columns={"prediction": "tag"})
    return rows[["id", "created_on", "title", "description", "tag"]].reset_index(drop=True)


def test_poisoned_tables_are_rejected(served: Run, new_rows: pd.DataFrame,
                                      tmp_path: Path) -> None:
    """Each defect is reported with its reason and not trained on; the valid table is accepted."""
    loop = make_loop(served, tmp_path, DATASET, min_new_rows=10_000)
    champion = loop.champion
    rest = new_rows.iloc[100:].reset_index(drop=True)
    loop.add(new_rows.head(100), "a-valid.csv")
    loop.add(swap_labels(rest, 0.25), "swapped.csv")
    loop.add(pd.concat([rest, rest.head(30)]), "twice.csv")
    loop.add(pd.concat([rest, pd.read_csv(DATASET).head(10)]), "known.csv")
    loop.add(rest.assign(description=""), "empty.csv")
    loop.add(pd.concat([rest, pd.read_csv(HOLDOUT).head(5)]), "leak.csv")
    loop.add(rest.assign(tag="robotics"), "label.csv")
    loop.add(rest.drop(columns="tag"), "unlabeled.csv")
    (loop.new / "broken.parquet").write_bytes(b"PAR1" + b"\xff" * 40)
    (loop.new / "half.csv.part").write_text("id,cre")
    done = loop.trigger()
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Check failed: "), done.stderr
    assert done.stderr.rstrip().endswith("The champion is unchanged."), done.stderr

    stored = [json.loads(path.read_text()) for path in (loop.state_dir / "batches").glob("*.json")]
    results = {Path(result["uri"]).name: result for result in stored}
    reasons = {
        "swapped.csv": "labels agree with a confident champion",
        "twice.csv": "no text appears twice",
        "known.csv": "is in the training table",
        "empty.csv": "'description' is empty no more often",
        "leak.csv": "no text is in the holdout",
        "label.csv": "'tag' is one of",
        "unlabeled.csv": "column 'tag' is missing",
        "broken.parquet": "Parquet magic bytes not found",
    }
    statuses = {name: result["status"] for name, result in results.items()}
    assert statuses == {"a-valid.csv": "accepted"} | dict.fromkeys(reasons, "rejected")
    for name, reason in reasons.items():
        assert reason in results[name]["reason"] and reason in done.stdout
    assert "new/broken.parquet: " in results["broken.parquet"]["reason"]
    assert loop.decisions == [("alert", "")] and len(loop.ledger[0]["evidence"]["rejected"]) == 8
    assert loop.champion == champion
    assert decides_nothing(loop.trigger())  # each is reported once


def test_dry_run_leaves_no_trace(served: Run, new_rows: pd.DataFrame, tmp_path: Path) -> None:
    loop = make_loop(served, tmp_path, DATASET)
    loop.add(new_rows)
    done = loop.trigger("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"decision": "retrain"' in done.stdout, done.stdout
    assert loop.ledger == [] and not list(loop.state_dir.glob("*"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("args", "message"), [
    (["--new-data", "nowhere"], "nowhere: no such file or directory."),
    (["--monitor-results", "nowhere"], "--monitor-results: no such file or directory"),
    (["--policy", "nowhere.yaml"], "--policy: No such file or directory"),
    (["--promotion-policy", "nowhere.yaml"], "--promotion-policy: No such file or directory"),
    (["--dataset-loc", "nowhere.csv", "--holdout-loc", HOLDOUT], "nowhere.csv: no such file."),
    (["--dataset-loc", HOLDOUT], "--holdout-loc is required"),
    (["--train-loop-config", "{oops"], "not JSON"),
])
def test_wrong_option(args: list[str], message: str, tmp_path: Path) -> None:
    done = fork_cli("trigger", *args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_drift_in_two_windows_without_rows_alerts(tmp_path: Path) -> None:
    """The monitor overwrites its results; the ledger remembers the window before.

    A webhook that cannot be reached loses no decision."""
    (tmp_path / "policy.yaml").write_text("webhook_max_attempts: 1")
    for hour, decision in enumerate(["nothing", "nothing", "alert", "nothing"]):
        window = MonitorResults(run_id="r", version=1, window_start=f"2026-01-01T{hour:02}:00",
                                window_end=f"2026-01-01T{hour + 1:02}:00", num_samples=200,
                                has_enough_rows=True, tests=[], performance=None, drift=hour > 0,
                                alarm=hour > 0)
        (tmp_path / "monitor.json").write_text(window.model_dump_json())
        done = fork_cli("trigger", "--monitor-results", "monitor.json", "--policy", "policy.yaml",
                        cwd=tmp_path, MADEWITHML_WEBHOOK_URL="http://127.0.0.1:9/secret")
        assert done.returncode == 0, (hour, done.stdout, done.stderr)
        assert f'"decision": "{decision}"' in done.stdout, (hour, done.stdout, done.stderr)
        results = json.loads((tmp_path / "results" / "trigger" / "trigger.json").read_text())
        failed = "not delivered to 127.0.0.1 in 1 attempt(s): connection failed"
        assert results["notification_status"] == (failed if decision == "alert" else "")
    assert "secret" not in (tmp_path / "storage" / "trigger" / "ledger.jsonl").read_text()


def test_watch_finds_a_new_table_and_ends_cleanly(tmp_path: Path) -> None:
    loop = Loop(tmp_path, DATASET)
    command = [CLI, "trigger", *loop.args, "--watch", "0.5"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "No alarm" in process.stdout.readline()
        (loop.new / "late.csv").write_text("title,description,tag\na,b,c\n")
        lines = iter(process.stdout.readline, "nothing: No alarm and no new data.\n")
        lines = [line for line in lines if "late.csv" in line]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert lines[0].startswith(
        "new/late.csv: 1 new rows, rejected: the table has the columns of the training table "
        "(missing: id, created_on)"), lines
    assert [entry["decision"] for entry in loop.ledger] == ["nothing", "alert", "nothing"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A client of a local S3 server with an empty bucket, `s3://bucket`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
                        "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def test_new_tables_and_state_in_a_bucket(served: Run, new_rows: pd.DataFrame, tmp_path: Path,
                                          bucket) -> None:
    """A second machine knows what the first one did, and no credentials of a URI are stored."""
    content = new_rows.to_csv(index=False).encode()
    bucket.put_object(Bucket="bucket", Key="new/a.csv", Body=content)
    for machine, validates in (("one", True), ("two", False)):
        (tmp_path / machine).mkdir()
        loop = make_loop(served, tmp_path / machine, DATASET, min_new_rows=10_000)
        loop.args[3] = "s3://somebody:not-to-be-seen@bucket/new"
        done = loop.trigger(MADEWITHML_SHARED_URI="s3://bucket/shared")
        assert done.returncode == 0, done.stderr
        accepted = f"s3://bucket/new/a.csv: {len(new_rows)} new rows, accepted"
        assert (accepted in done.stdout) == validates, done.stdout
        assert f"{len(new_rows)} new labeled rows are waiting in 1 table" in done.stdout
        assert len(loop.ledger) == 1
        files = [path for path in loop.folder.rglob("trigger/**/*") if path.is_file()]
        assert not any(b"not-to-be-seen" in path.read_bytes() for path in files)


# --- minutes: with training

Tables = tuple[Path, pd.DataFrame]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """An original training table of 300 rows, and the rest of the embedded one."""
    folder = tmp_path_factory.mktemp("tables")
    rest, first = stratified_split(pd.read_csv(DATASET), 0.2, seed=0)
    first.to_csv(folder / "first.csv", index=False)
    return folder / "first.csv", rest


@pytest.fixture(scope="module")
def small(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A champion trained on 300 rows."""
    folder = tmp_path_factory.mktemp("small")
    train = ["run", "--dataset-loc", str(tables[0]), "--holdout-loc", HOLDOUT,
             "--num-epochs", "1"]
    for args in (train, ["promote"]):
        done = run_cli(*args, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_better_challenger_is_promoted(trial: int, small: Run, tables: Tables,
                                       tmp_path: Path) -> None:
    """New rows lead to a new champion without further action; the same call does nothing more."""
    loop = make_loop(small, tmp_path, tables[0])
    loop.add(tables[1].sample(600, random_state=trial))
    done = loop.trigger("--num-epochs", "1", "--seed", str(trial))
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = loop.ledger
    assert loop.decisions == [("retrain", "promoted")] and entry["causes"] == ["new data"], entry
    assert loop.champion == 2
    (lineage,) = (loop.state_dir / "tables").glob("*.json")
    num_rows = json.loads(lineage.read_text())["rows"]
    assert list(num_rows.values()) == [len(pd.read_csv(tables[0])), 600]
    assert decides_nothing(loop.trigger("--num-epochs", "1")) and loop.champion == 2
    print(f"trial {trial}: {entry['outcome']}")


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_worse_challenger_is_never_promoted(trial: int, small: Run, tables: Tables,
                                            tmp_path: Path) -> None:
    """Without the check of labels, half of them and more are swapped in what is trained on.

    The gate rejects the challenger, and the table is not tried again."""
    loop = make_loop(small, tmp_path, tables[0], check_agreement=False, cooldown_hours=0)
    rows = tables[1].sample(600, random_state=trial)
    loop.add(swap_labels(rows, 0.5 + 0.1 * trial, seed=trial))
    done = loop.trigger("--num-epochs", "1", "--seed", str(trial))
    message = "Check failed: Version 2 was not promoted: weighted F1"
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith(message), done.stdout + done.stderr
    assert loop.decisions == [("retrain", "rejected")]
    assert loop.champion == 1
    outcome = loop.ledger[0]["outcome"]
    assert decides_nothing(loop.trigger("--num-epochs", "1")) and loop.champion == 1
    print(f"trial {trial}: {outcome}")


@pytest.mark.slow
def test_failed_retrain_is_recorded_and_cools_down(small: Run, tables: Tables,
                                                   tmp_path: Path) -> None:
    """A user error in a retrain keeps the champion and the new rows; it is not repeated at once."""
    loop = make_loop(small, tmp_path, tables[0])
    loop.add(tables[1].sample(200, random_state=0))
    done = loop.trigger("--encoder", "/nowhere/model")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/nowhere/model" in done.stderr.splitlines()[-1], done.stdout + done.stderr
    assert loop.decisions == [("retrain", "failed")]
    assert "/nowhere/model" in loop.ledger[0]["outcome"] and loop.champion == 1
    again = loop.trigger()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "200 new labeled rows are waiting" in again.stdout, again.stdout
    assert "the cooldown is 24" in again.stdout, again.stdout


@pytest.mark.slow
def test_killed_retrain_is_resumed(small: Run, tables: Tables, tmp_path: Path) -> None:
    """After kill -9 the next trigger resumes with the same table and does not train twice."""
    loop = make_loop(small, tmp_path, tables[0], cooldown_hours=0)
    loop.add(tables[1].sample(600, random_state=1))
    kill_cli("trigger", *loop.args, "--num-epochs", "1", cwd=tmp_path, at="▶ evaluate")
    assert loop.decisions == [("retrain", "")] and loop.champion == 1
    done = loop.trigger("--num-epochs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "▶ train\n  unchanged, results are up to date" in done.stdout, done.stdout
    assert loop.decisions == [("retrain", ""), ("retrain", "promoted")] and loop.champion == 2
