"""Tuning, a cluster of several nodes, a job sent to it, and a bucket for what must outlive a machine."""
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import mlflow
import nbformat
import psutil
import pytest
from moto.server import ThreadedMotoServer

from madewithml.schemas import RESULT_SCHEMAS
from tests.conftest import ROOT, kill_cli, run_cli

pytestmark = pytest.mark.slow

DATASET = str(ROOT / "datasets" / "dataset.csv")
SMALL = ["--num-epochs", "2", "--num-samples", "120"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory from which a cluster of a head and two workers was started."""
    folder = tmp_path_factory.mktemp("cluster")
    done = run_cli("cluster", "up", "--workers", "2", "--cpus", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    yield folder
    done = run_cli("cluster", "down", cwd=folder)
    assert done.stdout == "3 node(s) stopped.\n", done.stderr


def test_submit_brings_results_home(cluster: Path) -> None:
    done = run_cli("submit", "train", "--run-name", "sent", "--", "--dataset-loc", DATASET, "--num-workers", "2", *SMALL, cwd=cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2/2" in done.stdout  # the log was followed
    results = RESULT_SCHEMAS["train"].model_validate_json((cluster / "results" / "sent" / "train.json").read_text())
    assert results.params["num_workers"] == 2 and results.metrics[0].num_rows == results.num_train
    notebook = nbformat.read(cluster / "results" / "sent" / "train.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize(("args", "code"), [
    (["train", "--", "--no-such", "1"], 2),
    (["validate", "--", "--dataset-loc", "bad.csv"], 1),
], ids=["wrong option", "failed check"])
def test_submit_ends_as_the_job_did(args: list[str], code: int, cluster: Path) -> None:
    header, *rows = (ROOT / "datasets" / "holdout.csv").read_text().splitlines(keepends=True)
    (cluster / "bad.csv").write_text(header + 2 * "".join(rows))  # each id twice
    done = run_cli("submit", *args, cwd=cluster)
    assert done.returncode == code, done.stdout + done.stderr


def test_a_stranger_is_refused(cluster: Path) -> None:
    """Without the token no job, no status; and nothing that takes jobs listens beyond the loopback address."""
    import requests
    state = json.loads((cluster / "storage" / "cluster" / "state.json").read_text())
    assert state["dashboard"].startswith("http://127.0.0.1:")
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        assert requests.get(state["dashboard"] + path, timeout=10).status_code == 401, path
    assert requests.post(state["dashboard"] + "/api/jobs/", json={"entrypoint": "true"}, timeout=10).status_code == 401
    done = run_cli("submit", "train", "--", *SMALL, cwd=cluster, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2 and "Cannot submit jobs to a Ray cluster" in done.stderr, done.stderr


def test_waits_for_nodes_that_are_made_when_they_are_needed(tmp_path: Path) -> None:
    """Ray's autoscaler, with its own provider of pretended nodes: none at first, and one when the training asks for it."""
    kinds = {"worker": {"resources": {"CPU": 1, "object_store_memory": 200_000_000}, "node_config": {}, "min_workers": 0, "max_workers": 1},
             "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    provider = {"type": "fake_multinode", "head_node_id": "f" * 51 + "00000", "disable_node_updaters": True, "disable_launch_config_check": True}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    (tmp_path / "cluster.json").write_text(json.dumps({
        "cluster_name": "pretended", "max_workers": 1, "upscaling_speed": 1.0, "idle_timeout_minutes": 5, "head_node_type": "ray.head.default", "available_node_types": kinds, "provider": provider,
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, **{name: [] for name in lists}}))
    with socket.socket() as free:
        if not free.connect_ex(("127.0.0.1", 6379)):
            pytest.skip("needs port 6379, where the pretended nodes look for their head")
    temp = tempfile.mkdtemp()  # a socket's path must be short
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    environment = os.environ | token | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--autoscaling-config={tmp_path / 'cluster.json'}", "--num-cpus=0", "--port=6379",
               "--disable-usage-stats", "--include-dashboard=false", f"--temp-dir={temp}"]
    with (tmp_path / "head.log").open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as head:
        try:
            until = time.monotonic() + 60
            while "--block" not in (tmp_path / "head.log").read_text() and time.monotonic() < until:
                time.sleep(0.5)
            command = ["train", "--dataset-loc", DATASET, *SMALL]
            done = run_cli(*command, cwd=tmp_path, RAY_ADDRESS="127.0.0.1:6379", **token)
            assert done.returncode == 2 and "room for 0" in done.stderr and "MADEWITHML_NODE_WAIT_TIMEOUT_S" in done.stderr, done.stderr
            done = run_cli(*command, cwd=tmp_path, RAY_ADDRESS="127.0.0.1:6379", MADEWITHML_NODE_WAIT_TIMEOUT_S="120", **token)
            assert done.returncode == 0 and "Waiting up to 120 s for nodes" in done.stderr, done.stderr
        finally:
            family = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            for process in psutil.wait_procs(family, timeout=30)[1]:
                process.kill()
            shutil.rmtree(temp)


def test_killed_search_goes_on_from_the_finished_trials(tmp_path: Path) -> None:
    space = '{"lr": {"loguniform": [1e-5, 1e-3]}, "batch_size": {"choice": [8, 16]}}'
    command = ["tune", "--dataset-loc", DATASET, "--search-space", space, "--num-runs", "4", "--search-name", "mine", *SMALL]
    kill_cli(*command, cwd=tmp_path, at="trial 2/", linger=12)  # in the third trial; Ray Tune writes down every ten seconds which ones have ended
    done = run_cli(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\ntrial ") + done.stdout.startswith("trial ") <= 2, done.stdout  # the first two were not run again
    results = RESULT_SCHEMAS["tune"].model_validate_json((tmp_path / "results" / "tune" / "tune.json").read_text())
    assert len(results.trials) == 4 and all(trial.metrics for trial in results.trials)
    assert results.trials[0].params == {"lr": 2e-4, "batch_size": 16}  # the defaults are tried first
    assert min(trial.val_loss for trial in results.trials) == next(trial.val_loss for trial in results.trials if trial.trial_id == results.best_trial)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/storage/mlflow/mlflow.db")
    runs = client.search_runs([client.get_run(results.run_id).info.experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == results.run_id]
    assert len(runs) == 5 and {run.info.run_id for run in children} == {trial.run_id for trial in results.trials}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not list((tmp_path / "storage" / "trials").iterdir())

    done = run_cli("train", "--dataset-loc", DATASET, "--train-loop-config", "@results/tune/best.json", *SMALL, "--results-fp", "train.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = json.loads((tmp_path / "train.json").read_text())
    assert trained["params"]["lr"] == results.best_params["lr"]
    best = next(trial for trial in results.trials if trial.trial_id == results.best_trial)
    if best.status == "finished":  # the same training as the trial's
        assert abs(min(epoch["val_loss"] for epoch in trained["metrics"]) - min(epoch.val_loss for epoch in best.metrics)) < 1e-6


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3-compatible server on the loopback address, with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="shared")
    yield "s3://shared/team"
    server.stop()


def test_everything_that_must_last_lies_in_the_bucket(bucket: str, tmp_path: Path) -> None:
    """One setting: checkpoints, artifacts and results go there, and later commands read them from there."""
    done = run_cli("run", *SMALL, cwd=tmp_path, MADEWITHML_SHARED_URI=bucket)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="shared")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    assert any(key.startswith("team/mlflow/artifacts/") and key.endswith("checkpoint/model.safetensors") for key in keys), keys
    assert {f"team/results/main/{name}.json" for name in RESULT_SCHEMAS if name != "tune"} <= set(keys) and "team/results/main/report.md" in keys
    assert not [key for key in keys if key.startswith("team/ray/") and not key.endswith("/")]  # a finished training leaves no state
    assert not (tmp_path / "storage" / "ray").exists() and not (tmp_path / "storage" / "mlflow" / "artifacts").exists()
    run_id = json.loads((tmp_path / "results" / "main" / "train.json").read_text())["run_id"]
    done = run_cli("predict", "--run-id", run_id, "--title", "Translating Welsh", cwd=tmp_path, MADEWITHML_SHARED_URI=bucket)
    assert done.returncode == 0 and "prediction" in done.stdout, done.stderr


def test_killed_training_resumes_from_the_bucket(bucket: str, tmp_path: Path) -> None:
    command = ["train", "--dataset-loc", DATASET, "--num-epochs", "3", "--num-samples", "120", "--results-fp", "train.json"]
    kill_cli(*command, cwd=tmp_path, at="epoch 2/", MADEWITHML_SHARED_URI=bucket)
    done = run_cli(*command, cwd=tmp_path, MADEWITHML_SHARED_URI=bucket)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/3" not in done.stdout and "epoch 3/3" in done.stdout
    assert len(json.loads((tmp_path / "train.json").read_text())["metrics"]) == 3
