"""The loop: tables of new labeled rows come, are judged, and a better model takes over by itself; a worse one never does."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
import yaml
from moto.server import ThreadedMotoServer

from madewithml.data import stratified_split
from madewithml.schemas import MonitorResults
from tests.conftest import ROOT, Run, fork_cli, run_cli

HOLDOUT = str(ROOT / "datasets" / "holdout.csv")
TRIALS = 10


class Loop:
    """A directory with a champion, in which the trigger is called."""

    def __init__(self, folder: Path, root: Path, **policy) -> None:
        self.folder, self.new = folder, folder / "new"
        self.new.mkdir()
        (folder / "policy.yaml").write_text(yaml.safe_dump({"min_file_age_s": 0} | policy))
        # Both versions are of one size: what else runs on the machine is no reason. And what a champion of 300 rows passes of the behavior tests, it passes by luck.
        (folder / "promotion.yaml").write_text("max_p99_latency_ratio: 10\nmax_p50_latency_ratio: 10\nmax_p99_ms: 1000\nmax_new_behavior_failures: 3")
        self.args = ["--policy", "policy.yaml", "--new-data", "new", "--promotion-policy", "promotion.yaml", "--dataset-loc", str(root), "--holdout-loc", HOLDOUT]

    def come(self, rows: pd.DataFrame, name: str = "batch.csv") -> None:
        rows.to_csv(self.new / name, index=False)

    def trigger(self, *more: str, **variables: str) -> subprocess.CompletedProcess:
        return fork_cli("trigger", *self.args, *more, cwd=self.folder, **variables)

    @property
    def ledger(self) -> list[dict]:
        path = self.folder / "storage" / "trigger" / "ledger.jsonl"
        return list({entry["id"]: entry for entry in map(json.loads, path.read_text().splitlines())}.values()) if path.is_file() else []

    @property
    def champion(self) -> int:
        code = "from madewithml.registry import get_aliases; print(get_aliases()['champion'])"
        return int(subprocess.run([sys.executable, "-c", code], cwd=self.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout)


def swapped(rows: pd.DataFrame, share: float, seed: int = 0) -> pd.DataFrame:
    """The rows with this part of their labels replaced by another."""
    rows, rng = rows.reset_index(drop=True).copy(), np.random.default_rng(seed)
    names = sorted(set(rows["tag"]))
    for i in rng.choice(len(rows), round(share * len(rows)), replace=False):
        rows.loc[i, "tag"] = rng.choice([name for name in names if name != rows.loc[i, "tag"]])
    return rows


def loop_of(run: Run, folder: Path, root: Path, **policy) -> Loop:
    """A loop that begins with the run's champion; what it does is not seen by another."""
    shutil.copytree(run.folder / "storage", folder / "storage")
    return Loop(folder, root, **policy)


@pytest.fixture(scope="module")
def served(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The trained run with its version as the champion."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(trained.folder / "storage", folder / "storage")
    subprocess.run([sys.executable, "-c", f"from madewithml.registry import get_aliases, promote_challenger, register_model; name = register_model({trained.run_id!r}).model_name; promote_challenger(name, get_aliases(name))"],
                   cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return Run(folder)


@pytest.fixture(scope="module")
def fresh(trained: Run) -> pd.DataFrame:
    """Rows that nobody has labeled yet, labeled as the champion would where it is sure."""
    rows = pd.read_csv(trained.results / "predictions.csv").merge(pd.read_csv(ROOT / "datasets" / "unlabeled.csv")[["id", "created_on"]], on="id", suffixes=("", "_"))
    return rows[rows["confidence"] >= 0.8].rename(columns={"prediction": "tag"})[["id", "created_on", "title", "description", "tag"]].reset_index(drop=True)


def test_poisoned_tables_are_refused(served: Run, fresh: pd.DataFrame, tmp_path: Path) -> None:
    """Swapped labels, duplicates, an empty column, rows of the holdout, a wrong label, no table: each told with its reason, none learned from; the honest one is accepted."""
    loop = loop_of(served, tmp_path, ROOT / "datasets" / "dataset.csv", min_new_rows=10_000)
    before = loop.champion
    loop.come(fresh.head(100), "a-honest.csv")
    rest = fresh.iloc[100:].reset_index(drop=True)
    loop.come(swapped(rest, 0.25), "swapped.csv")
    loop.come(pd.concat([rest, rest.head(30)]), "twice.csv")
    loop.come(pd.concat([rest, pd.read_csv(ROOT / "datasets" / "dataset.csv").head(10)]), "known.csv")
    loop.come(rest.assign(description=""), "empty.csv")
    loop.come(pd.concat([rest, pd.read_csv(HOLDOUT).head(5)]), "leak.csv")
    loop.come(rest.assign(tag="robotics"), "label.csv")
    loop.come(rest.drop(columns="tag"), "unlabeled.csv")
    (loop.new / "broken.parquet").write_bytes(b"PAR1" + b"\xff" * 40)
    (loop.new / "half.csv.part").write_text("id,cre")
    done = loop.trigger()
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Check failed: ") and done.stderr.rstrip().endswith("The champion is unchanged."), done.stderr
    said = {Path(verdict["uri"]).name: verdict for verdict in (json.loads(path.read_text()) for path in (tmp_path / "storage" / "trigger" / "batches").glob("*.json"))}
    assert {name: verdict["status"] for name, verdict in said.items()} == {"a-honest.csv": "accepted"} | dict.fromkeys(
        ["swapped.csv", "twice.csv", "known.csv", "empty.csv", "leak.csv", "label.csv", "unlabeled.csv", "broken.parquet"], "rejected")
    for name, why in {"swapped": "labels agree with a confident champion", "twice": "no text appears twice", "known": "is in the training table", "empty": "'description' is empty no more often",
                      "leak": "no text is in the holdout", "label": "'tag' is one of", "unlabeled": "column 'tag' is missing"}.items():
        assert why in said[f"{name}.csv"]["reason"] and why in done.stdout
    assert "new/broken.parquet: " in said["broken.parquet"]["reason"] and "Parquet magic bytes not found" in said["broken.parquet"]["reason"]
    assert [entry["decision"] for entry in loop.ledger] == ["alert"] and len(loop.ledger[0]["evidence"]["rejected"]) == 8
    assert loop.champion == before
    again = loop.trigger()
    assert again.returncode == 0 and '"decision": "nothing"' in again.stdout  # each is told once


def test_dry_run_leaves_no_trace(served: Run, fresh: pd.DataFrame, tmp_path: Path) -> None:
    loop = loop_of(served, tmp_path, ROOT / "datasets" / "dataset.csv")
    loop.come(fresh)
    done = loop.trigger("--dry-run")
    assert done.returncode == 0 and '"decision": "retrain"' in done.stdout, done.stdout + done.stderr
    assert loop.ledger == [] and not (tmp_path / "results").exists() and not list((tmp_path / "storage" / "trigger").glob("*"))


@pytest.mark.parametrize(("args", "said"), [
    (["--new-data", "nowhere"], "nowhere: no such file or directory."),
    (["--monitor-results", "nowhere"], "--monitor-results: no such file or directory"),
    (["--policy", "nowhere.yaml"], "--policy: No such file or directory"),
    (["--promotion-policy", "nowhere.yaml"], "--promotion-policy: No such file or directory"),
    (["--dataset-loc", "nowhere.csv", "--holdout-loc", HOLDOUT], "nowhere.csv: no such file."),
    (["--dataset-loc", HOLDOUT], "--holdout-loc is required"),
    (["--train-loop-config", "{oops"], "not JSON"),
])
def test_wrong_option(args: list[str], said: str, tmp_path: Path) -> None:
    done = fork_cli("trigger", *args, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_drift_in_two_windows_without_rows_alerts(tmp_path: Path) -> None:
    """Each call sees the one results file that the monitor overwrites; the ledger remembers the window before. A webhook that nobody answers loses no decision."""
    (tmp_path / "policy.yaml").write_text("webhook_max_attempts: 1")
    for hour, decision in enumerate(["nothing", "nothing", "alert", "nothing"]):
        window = MonitorResults(run_id="r", version=1, window_start=f"2026-01-01T{hour:02}:00", window_end=f"2026-01-01T{hour + 1:02}:00", num_samples=200, has_enough_rows=True, tests=[],
                                performance=None, drift=hour > 0, alarm=hour > 0)
        (tmp_path / "monitor.json").write_text(window.model_dump_json())
        done = fork_cli("trigger", "--monitor-results", "monitor.json", "--policy", "policy.yaml", cwd=tmp_path, MADEWITHML_WEBHOOK_URL="http://127.0.0.1:9/secret")
        assert done.returncode == 0 and f'"decision": "{decision}"' in done.stdout, (hour, done.stdout, done.stderr)
        message = json.loads((tmp_path / "results" / "trigger" / "trigger.json").read_text())["notification_status"]
        assert message == ("not delivered to 127.0.0.1 in 1 attempt(s): connection failed" if decision == "alert" else "")
    assert "secret" not in (tmp_path / "storage" / "trigger" / "ledger.jsonl").read_text()


def test_watch_sees_what_comes_and_ends_cleanly(tmp_path: Path) -> None:
    loop = Loop(tmp_path, ROOT / "datasets" / "dataset.csv")
    command = [str(Path(sys.executable).with_name("madewithml")), "trigger", *loop.args, "--watch", "0.5"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "No alarm" in process.stdout.readline()
        (loop.new / "late.csv").write_text("title,description,tag\na,b,c\n")
        said = [line for line in iter(process.stdout.readline, "nothing: No alarm and no new data.\n") if "late.csv" in line]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert said[0].startswith("new/late.csv: 1 new rows, rejected: the table has the columns of the training table (missing: id, created_on)"), said
    assert [entry["decision"] for entry in loop.ledger] == ["nothing", "alert", "nothing"]


def test_new_tables_and_memory_in_a_bucket(served: Run, fresh: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables and what the loop remembers lie in a bucket; a second machine, empty, knows what the first did, and no secret of an address is written down."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        bucket = boto3.client("s3")
        bucket.create_bucket(Bucket="bucket")
        bucket.put_object(Bucket="bucket", Key="new/a.csv", Body=fresh.to_csv(index=False).encode())
        for machine, judged in (("one", True), ("two", False)):
            (tmp_path / machine).mkdir()
            loop = loop_of(served, tmp_path / machine, ROOT / "datasets" / "dataset.csv", min_new_rows=10_000)
            loop.args[3] = "s3://somebody:not-to-be-seen@bucket/new"
            done = loop.trigger(MADEWITHML_SHARED_URI="s3://bucket/shared")
            assert done.returncode == 0, done.stderr
            assert (f"s3://bucket/new/a.csv: {len(fresh)} new rows, accepted" in done.stdout) == judged, done.stdout
            assert f"{len(fresh)} new labeled rows are waiting in 1 table" in done.stdout
            assert len(loop.ledger) == 1
            assert not any(b"not-to-be-seen" in path.read_bytes() for path in loop.folder.rglob("trigger/**/*") if path.is_file())
    finally:
        server.stop()


# --- minutes: with training

@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A first training table of 300 rows, and the rest of the embedded one."""
    folder = tmp_path_factory.mktemp("tables")
    rest, first = stratified_split(pd.read_csv(ROOT / "datasets" / "dataset.csv"), 0.2, seed=0)
    first.to_csv(folder / "first.csv", index=False)
    return folder / "first.csv", rest


@pytest.fixture(scope="module")
def small(tables: tuple[Path, pd.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A champion that has seen 300 rows."""
    folder = tmp_path_factory.mktemp("small")
    for args in (["run", "--dataset-loc", str(tables[0]), "--holdout-loc", HOLDOUT, "--num-epochs", "1"], ["promote"]):
        done = run_cli(*args, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_better_challenger_is_promoted_unattended(trial: int, small: Run, tables: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    """New rows come, the trigger retrains, the gate agrees, the champion changes; the same call again does nothing."""
    loop = loop_of(small, tmp_path, tables[0])
    rows = tables[1].sample(600, random_state=trial)
    loop.come(rows)
    done = loop.trigger("--num-epochs", "1", "--seed", str(trial))
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = loop.ledger
    assert (entry["decision"], entry["causes"], entry["status"]) == ("retrain", ["new data"], "promoted"), entry
    assert loop.champion == 2
    (made_of,) = (json.loads(path.read_text()) for path in (tmp_path / "storage" / "trigger" / "tables").glob("*.json"))
    assert list(made_of["rows"].values()) == [len(pd.read_csv(tables[0])), 600]
    again = loop.trigger("--num-epochs", "1")
    assert again.returncode == 0 and '"decision": "nothing"' in again.stdout and loop.champion == 2
    print(f"trial {trial}: {entry['outcome']}")


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_worse_challenger_is_never_promoted(trial: int, small: Run, tables: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    """With the check of labels turned off, 40 to 67 % of swapped labels reach the training; the gate refuses what comes out, and it is not tried again."""
    loop = loop_of(small, tmp_path, tables[0], check_agreement=False, cooldown_hours=0)
    loop.come(swapped(tables[1].sample(600, random_state=trial), 0.4 + 0.03 * trial, seed=trial))
    done = loop.trigger("--num-epochs", "1", "--seed", str(trial))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("Check failed: Version 2 was not promoted: weighted F1"), done.stdout + done.stderr
    (entry,) = loop.ledger
    assert (entry["decision"], entry["status"]) == ("retrain", "rejected")
    assert loop.champion == 1
    again = loop.trigger("--num-epochs", "1")
    assert again.returncode == 0 and '"decision": "nothing"' in again.stdout and loop.champion == 1
    print(f"trial {trial}: {entry['outcome']}")


@pytest.mark.slow
def test_failed_retrain_is_written_down_and_cools_down(small: Run, tables: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    """A retrain that ends in a user's mistake says so in one line, keeps the champion and the new rows, and is not tried again at once."""
    loop = loop_of(small, tmp_path, tables[0])
    loop.come(tables[1].sample(200, random_state=0))
    done = loop.trigger("--encoder", "/nowhere/model")
    assert done.returncode == 2 and "/nowhere/model" in done.stderr.splitlines()[-1], done.stdout + done.stderr
    (entry,) = loop.ledger
    assert (entry["decision"], entry["status"]) == ("retrain", "failed") and "/nowhere/model" in entry["outcome"] and loop.champion == 1
    again = loop.trigger()
    assert again.returncode == 0 and "200 new labeled rows are waiting" in again.stdout and "the cooldown is 24" in again.stdout, again.stdout + again.stderr


@pytest.mark.slow
def test_killed_retrain_goes_on_and_blocks_nobody(small: Run, tables: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    """kill -9 in the middle of a retrain: the next trigger, after the cool-down, ends it with the same table and does not train twice."""
    from tests.conftest import kill_cli

    loop = loop_of(small, tmp_path, tables[0], cooldown_hours=0)
    loop.come(tables[1].sample(600, random_state=1))
    kill_cli("trigger", *loop.args, "--num-epochs", "1", cwd=tmp_path, at="▶ evaluate")
    assert [(entry["decision"], entry["status"]) for entry in loop.ledger] == [("retrain", "")] and loop.champion == 1
    done = loop.trigger("--num-epochs", "1")
    assert done.returncode == 0 and "▶ train\n  unchanged, results are up to date" in done.stdout, done.stdout + done.stderr
    assert [(entry["decision"], entry["status"]) for entry in loop.ledger] == [("retrain", ""), ("retrain", "promoted")] and loop.champion == 2
