"""Tuning, a cluster of several nodes, a job submitted to it, and a bucket as shared storage."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import mlflow
import nbformat
import psutil
import pytest
import requests
from moto.server import ThreadedMotoServer

from madewithml.schemas import RESULT_SCHEMAS, BaseResults
from tests.conftest import ROOT, kill_cli, run_cli

pytestmark = pytest.mark.slow

DATASET = str(ROOT / "datasets" / "dataset.csv")
SMALL = ["--num-epochs", "2", "--num-samples", "120"]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}


def read_results(folder: Path, workload: str) -> BaseResults:
    """The validated results of a workload in the folder of its run."""
    text = (folder / f"{workload}.json").read_text(encoding="utf-8")
    return RESULT_SCHEMAS[workload].model_validate_json(text)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory from which a cluster of a head and two workers was started."""
    folder = tmp_path_factory.mktemp("cluster")
    done = run_cli("cluster", "up", "--workers", "2", "--cpus", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    yield folder
    done = run_cli("cluster", "down", cwd=folder)
    assert done.stdout == "3 node(s) stopped.\n", done.stderr


def test_submit_returns_the_results(cluster: Path) -> None:
    done = run_cli("submit", "train", "--run-name", "submitted", "--", "--dataset-loc", DATASET,
                   "--num-workers", "2", *SMALL, cwd=cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2/2" in done.stdout  # the log was followed
    folder = cluster / "results" / "submitted"
    results = read_results(folder, "train")
    assert results.params["num_workers"] == 2
    assert results.metrics[0].num_rows == results.num_train
    notebook = nbformat.read(folder / "train.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize(("args", "code"), [
    (["train", "--", "--no-such", "1"], 2),
    (["validate", "--", "--dataset-loc", "bad.csv"], 1),
], ids=["wrong option", "failed check"])
def test_submit_exits_as_the_job(args: list[str], code: int, cluster: Path) -> None:
    header, *rows = (ROOT / "datasets" / "holdout.csv").read_text().splitlines(keepends=True)
    one_label = [row for row in rows if row.rstrip().endswith(",mlops")]
    (cluster / "bad.csv").write_text(header + "".join(one_label))
    done = run_cli("submit", *args, cwd=cluster)
    assert done.returncode == code, done.stdout + done.stderr


def test_cluster_requires_its_token(cluster: Path) -> None:
    """Without the token there is no job and no status, and the dashboard is on loopback only."""
    state = json.loads((cluster / "storage" / "cluster" / "state.json").read_text())
    dashboard = state["dashboard"]
    assert dashboard.startswith("http://127.0.0.1:")
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        assert requests.get(dashboard + path, timeout=10).status_code == 401, path
    response = requests.post(dashboard + "/api/jobs/", json={"entrypoint": "true"}, timeout=10)
    assert response.status_code == 401
    done = run_cli("submit", "train", "--", *SMALL, cwd=cluster, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2, done.stderr
    assert "Cannot submit jobs to a Ray cluster" in done.stderr, done.stderr


@contextmanager
def autoscaling_head(folder: Path) -> Iterator[None]:
    """A head node without CPUs whose autoscaler can add one worker, by Ray's fake provider."""
    worker = {"resources": {"CPU": 1, "object_store_memory": 200_000_000}, "node_config": {},
              "min_workers": 0, "max_workers": 1}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    provider = {"type": "fake_multinode", "head_node_id": "f" * 51 + "00000",
                "disable_node_updaters": True, "disable_launch_config_check": True}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands",
             "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
             "cluster_synced_files", "rsync_exclude", "rsync_filter")
    config = {
        "cluster_name": "fake", "max_workers": 1, "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5, "head_node_type": "ray.head.default",
        "available_node_types": {"worker": worker, "ray.head.default": head},
        "provider": provider, "auth": {}, "docker": {}, "file_mounts": {},
        "file_mounts_sync_continuously": False, **{name: [] for name in lists}}
    (folder / "cluster.json").write_text(json.dumps(config))
    temp = tempfile.mkdtemp()  # a socket's path must be short
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
               f"--autoscaling-config={folder / 'cluster.json'}", "--num-cpus=0", "--port=6379",
               "--disable-usage-stats", "--include-dashboard=false", f"--temp-dir={temp}"]
    env = os.environ | TOKEN | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    log = folder / "head.log"
    with log.open("w") as file, subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True) as process:
        try:
            end = time.monotonic() + 60
            while "--block" not in log.read_text() and time.monotonic() < end:
                time.sleep(0.5)
            yield
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            for child in psutil.wait_procs(children, timeout=30)[1]:
                child.kill()
            shutil.rmtree(temp)


def test_waits_for_nodes_of_the_autoscaler(tmp_path: Path) -> None:
    """Without a wait the cluster has no room; with one, the autoscaler adds a node."""
    with socket.socket() as client:
        if not client.connect_ex(("127.0.0.1", 6379)):
            pytest.skip("needs port 6379, where the fake nodes look for their head")
    command = ["train", "--dataset-loc", DATASET, *SMALL]
    address = TOKEN | {"RAY_ADDRESS": "127.0.0.1:6379"}
    with autoscaling_head(tmp_path):
        done = run_cli(*command, cwd=tmp_path, **address)
        assert done.returncode == 2, done.stderr
        assert "fits only 0" in done.stderr, done.stderr
        assert "MADEWITHML_NODE_WAIT_TIMEOUT_S" in done.stderr, done.stderr
        done = run_cli(*command, cwd=tmp_path, **address, MADEWITHML_NODE_WAIT_TIMEOUT_S="120")
        assert done.returncode == 0, done.stderr
        assert "Waiting up to 120 s for nodes" in done.stderr, done.stderr


def test_killed_search_resumes_after_the_finished_trials(tmp_path: Path) -> None:
    space = '{"lr": {"loguniform": [1e-5, 1e-3]}, "batch_size": {"choice": [8, 16]}}'
    command = ["tune", "--dataset-loc", DATASET, "--search-space", space, "--num-runs", "4",
               "--search-name", "resumed", *SMALL]
    # In the third trial: Ray Tune saves every ten seconds which trials have ended.
    kill_cli(*command, cwd=tmp_path, at="trial 2/", linger=12)
    done = run_cli(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    printed_trials = re.findall(r"^trial ", done.stdout, re.MULTILINE)
    assert len(printed_trials) <= 2, done.stdout  # the first two were not run again
    results = read_results(tmp_path / "results" / "tune", "tune")
    assert len(results.trials) == 4 and all(trial.metrics for trial in results.trials)
    assert results.trials[0].params == {"lr": 2e-4, "batch_size": 16}  # the defaults are first
    [best] = [trial for trial in results.trials if trial.trial_id == results.best_trial]
    assert best.val_loss == min(trial.val_loss for trial in results.trials)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/storage/mlflow/mlflow.db")
    runs = client.search_runs([client.get_run(results.run_id).info.experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == results.run_id]
    child_ids = {run.info.run_id for run in children}
    assert len(runs) == 5 and child_ids == {trial.run_id for trial in results.trials}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not list((tmp_path / "storage" / "trials").iterdir())

    done = run_cli("train", "--dataset-loc", DATASET, "--train-loop-config",
                   "@results/tune/best.json", *SMALL, "--results-fp", "train.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = read_results(tmp_path, "train")
    assert trained.params["lr"] == results.best_params["lr"]
    if best.status == "finished":  # the same training as the trial's
        trial_loss = min(epoch.val_loss for epoch in best.metrics)
        assert abs(min(epoch.val_loss for epoch in trained.metrics) - trial_loss) < 1e-6


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3-compatible server on the loopback address, with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="shared")
    yield "s3://shared/team"
    server.stop()


def test_run_is_in_the_bucket(bucket: str, tmp_path: Path) -> None:
    """One setting: checkpoints, artifacts and results go there, and later commands read them."""
    done = run_cli("run", *SMALL, cwd=tmp_path, MADEWITHML_SHARED_URI=bucket)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="shared")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    model = "team/mlflow/artifacts/.+checkpoint/model.safetensors"
    assert any(re.fullmatch(model, key) for key in keys), keys
    folder = tmp_path / "results" / "main"
    names = {path.name for path in folder.glob("*.json")}
    files = ("validate", "train", "evaluate", "predict", "register", "seconds")
    assert names == {f"{file}.json" for file in files}
    assert {f"team/results/main/{name}" for name in [*names, "report.md"]} <= set(keys)
    ray_files = [key for key in keys if key.startswith("team/ray/") and not key.endswith("/")]
    assert not ray_files  # a finished training leaves no state
    assert not (tmp_path / "storage" / "ray").exists()
    assert not (tmp_path / "storage" / "mlflow" / "artifacts").exists()
    run_id = read_results(folder, "train").run_id
    done = run_cli("predict", "--run-id", run_id, "--title", "Translating Welsh", cwd=tmp_path,
                   MADEWITHML_SHARED_URI=bucket)
    assert done.returncode == 0 and "prediction" in done.stdout, done.stderr


def test_killed_training_resumes_from_the_bucket(bucket: str, tmp_path: Path) -> None:
    command = ["train", "--dataset-loc", DATASET, "--num-epochs", "3", "--num-samples", "120",
               "--results-fp", "train.json"]
    kill_cli(*command, cwd=tmp_path, at="epoch 2/", MADEWITHML_SHARED_URI=bucket)
    done = run_cli(*command, cwd=tmp_path, MADEWITHML_SHARED_URI=bucket)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/3" not in done.stdout and "epoch 3/3" in done.stdout
    assert len(read_results(tmp_path, "train").metrics) == 3
