"""What clusters do, done on purpose: on a head with two worker nodes, processes are killed at points of the work's own progress.

`make test-faults`; half an hour on 2 cores. A table of what was lost and how long recovery took is printed at the end.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from madewithml.ray_session import find_free_ports
from tests.conftest import ROOT, run_cli

pytestmark = pytest.mark.fault

DATASET = str(ROOT / "datasets" / "dataset.csv")
EPOCHS, STEPS = 3, 9  # of 144 training rows in batches of 16
POINTS = ["step:1", "step:5", "step:9", "step:10", "step:17", "step:26", "save:1", "save:2", "upload:1", "upload:2"]
TABLE: list[dict] = []


def summary() -> str:
    """What was lost and how long recovery took, a line per fault; empty where nothing was tried."""
    if not TABLE:
        return ""
    table = pd.DataFrame(TABLE).groupby("fault", sort=False).agg(trials=("fault", "size"), finished=("finished", "sum"), epochs_repeated=("repeated", "max"),
                                                                 rows_lost=("rows_lost", "sum"), metrics_lost=("metrics_lost", "sum"),
                                                                 seconds_median=("seconds", "median"), seconds_max=("seconds", "max"))
    return table.round(1).to_string()


def ended(driver: subprocess.Popen) -> subprocess.CompletedProcess:
    """What a driver said and how it ended; it is killed after a time in which every trial ends."""
    with driver:
        try:
            out, error = driver.communicate(timeout=560)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise
    return subprocess.CompletedProcess(driver.args, driver.returncode, out, error)


class Cluster:
    """A head and two worker nodes of `madewithml cluster up`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.up()

    def up(self) -> None:
        done = run_cli("cluster", "up", "--workers", "2", "--cpus", "2", cwd=self.folder)
        assert done.returncode == 0 or "is running already" in done.stderr, done.stderr

    @property
    def address(self) -> str:
        return json.loads((self.folder / "storage" / "cluster" / "state.json").read_text())["address"]

    def start(self, folder: Path, *args: str, **variables: str) -> subprocess.Popen:
        """The driver of a trial, its storage in the trial's folder."""
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token",
                                    "MADEWITHML_STORAGE_DIR": str(folder / "storage")} | variables
        command = [sys.executable, str(Path(__file__).with_name("fault_driver.py")), "--folder", str(folder), "--dataset", DATASET, *args]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def drive(self, folder: Path, *args: str, **variables: str) -> subprocess.CompletedProcess:
        """Runs the driver of a trial to its end."""
        return ended(self.start(folder, *args, **variables))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    run_cli("cluster", "down", cwd=cluster.folder)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Results of a training that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cluster.drive(folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def logged(folder: Path, uri: str = "") -> list[mlflow.entities.Run]:
    """The MLflow runs of a trial."""
    client = mlflow.MlflowClient(uri or f"sqlite:///{folder}/storage/mlflow/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("faults").experiment_id])


def judge(fault: str, folder: Path, done: subprocess.CompletedProcess, uri: str = "") -> dict:
    """Enters the trial into the table; fails where the run did not finish whole."""
    finished = done.returncode == 0 and (folder / "results.json").is_file()
    row = {"fault": fault, "finished": finished, "repeated": float("nan"), "rows_lost": 0, "metrics_lost": 0, "seconds": float("nan")}
    TABLE.append(row)
    assert finished, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    results = json.loads((folder / "results.json").read_text())
    row["rows_lost"] = sum(results["num_train"] - epoch["rows"] for epoch in results["metrics"])
    runs = logged(folder, uri)
    client = mlflow.MlflowClient(uri or f"sqlite:///{folder}/storage/mlflow/mlflow.db")
    row["metrics_lost"] = EPOCHS - len({metric.step for metric in client.get_metric_history(runs[0].info.run_id, "val_loss")})
    steps = [json.loads(line) for line in (folder / "steps").read_text().splitlines()] if (folder / "steps").is_file() else []
    if (folder / "struck").is_file():
        struck = float((folder / "struck").read_text())
        before, after = [step for step in steps if step["time"] <= struck], [step for step in steps if step["time"] > struck]
        if after:
            row["seconds"] = after[0]["time"] - struck
            reached = max((step["epoch"] for step in before), default=1)
            row["repeated"] = reached - after[0]["epoch"] + 1 if after[0]["step"] == 1 and after[0]["epoch"] <= reached else 0
    assert len(runs) == 1 and runs[0].info.status == "FINISHED", [run.info.status for run in runs]
    assert row["rows_lost"] == 0 and row["metrics_lost"] == 0
    return results


def assert_same(results: dict, undisturbed: dict) -> None:
    for one, other in zip(results["metrics"], undisturbed["metrics"], strict=True):
        assert abs(one["val_loss"] - other["val_loss"]) < 1e-6, (results["metrics"], undisturbed["metrics"])


@pytest.mark.parametrize("point", POINTS)
def test_worker_killed(point: str, cluster: Cluster, undisturbed: dict, tmp_path: Path) -> None:
    """Training goes on from the last checkpoint, at most one epoch is done again, and it ends where it would have."""
    done = cluster.drive(tmp_path, "--victim", "worker", "--point", point)
    results = judge("kill -9 of a training worker", tmp_path, done)
    assert (tmp_path / "struck").is_file() and TABLE[-1]["repeated"] <= 1
    assert_same(results, undisturbed)


@pytest.mark.parametrize("point", POINTS)
def test_node_killed(point: str, cluster: Cluster, tmp_path: Path) -> None:
    """The same with two workers and the raylet of one of their nodes."""
    cluster.up()
    done = cluster.drive(tmp_path, "--victim", "node", "--point", point, "--workers", "2")
    results = judge("kill -9 of a worker node, two workers", tmp_path, done)
    assert (tmp_path / "struck").is_file() and TABLE[-1]["repeated"] <= 1
    assert results["params"]["num_workers"] == 2
    cluster.up()


@pytest.mark.parametrize("point", POINTS)
def test_driver_killed(point: str, cluster: Cluster, undisturbed: dict, tmp_path: Path) -> None:
    """The same command started again resumes."""
    killed = cluster.drive(tmp_path, "--victim", "driver", "--point", point)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "results.json").exists()
    done = cluster.drive(tmp_path, "--victim", "driver", "--point", point)
    results = judge("kill -9 of the driver, started again", tmp_path, done)
    assert TABLE[-1]["repeated"] <= 1
    assert_same(results, undisturbed)


def test_unwritable_storage(cluster: Cluster, tmp_path: Path) -> None:
    """A disk that fills up while a checkpoint is written: one clear line, and the last good checkpoint still serves."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        # room for the first checkpoint and not for the second: what is left is taken when the first is there
        done = cluster.drive(tmp_path, "--victim", "driver", "--point", "step:12", MADEWITHML_SHARED_URI=str(disk))
        assert done.returncode == -signal.SIGKILL
        free = shutil.disk_usage(disk).free
        with (disk / "ballast").open("wb") as file:
            file.write(bytes(free - 40_000_000))
        done = cluster.drive(tmp_path, MADEWITHML_SHARED_URI=str(disk))
        assert done.returncode != 0 and "could not be written" in done.stderr and "no space left on device" in done.stderr, done.stderr
        (disk / "ballast").unlink()
        done = cluster.drive(tmp_path, MADEWITHML_SHARED_URI=str(disk))
        judge("disk full while a checkpoint is written", tmp_path, done)
        assert TABLE[-1]["repeated"] <= 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize("damage", ["truncated", "one byte changed"])
def test_damaged_checkpoint(damage: str, cluster: Cluster, undisturbed: dict, tmp_path: Path) -> None:
    """It is rejected by its digest, the one before is used, and the log says so."""
    cluster.drive(tmp_path, "--victim", "driver", "--point", "step:20")
    job = next((tmp_path / "storage" / "ray").iterdir())
    checkpoints = sorted(job.glob("checkpoint_2*"))
    assert len(checkpoints) == 2
    weights = checkpoints[-1] / "classifier" / "model.safetensors"
    with weights.open("r+b") as file:
        if damage == "truncated":
            file.truncate(weights.stat().st_size - 1000)
        else:
            file.seek(weights.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    done = cluster.drive(tmp_path)
    assert "epoch 2 is rejected (classifier/model.safetensors does not match its digest)" in done.stderr, done.stderr
    results = judge(f"checkpoint {damage}", tmp_path, done)
    assert TABLE[-1]["repeated"] <= 2
    assert_same(results, undisturbed)


def test_prediction_worker_killed(cluster: Cluster, tmp_path: Path) -> None:
    """Of 100,000 rows each is predicted once, in order."""
    cluster.drive(tmp_path, "--epochs", "1")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/storage/mlflow/mlflow.db")
    classifier = client.download_artifacts(logged(tmp_path)[0].info.run_id, "checkpoint", str(tmp_path))
    table = tmp_path / "table.parquet"
    pd.DataFrame({"id": range(100_000), "title": [f"title {i}" for i in range(100_000)], "description": ""}).to_parquet(table, row_group_size=5000)
    (tmp_path / "results.json").unlink()
    done = cluster.drive(tmp_path, "--victim", "worker", "--point", "block:5", "--classifier", classifier, "--output", str(tmp_path / "out.parquet"), "--dataset", str(table))
    finished = done.returncode == 0
    TABLE.append({"fault": "kill of a worker, batch prediction", "finished": finished, "repeated": 0, "rows_lost": 0, "metrics_lost": 0, "seconds": float("nan")})
    assert finished, done.stderr[-4000:]
    assert (tmp_path / "struck").is_file()
    out = pd.read_parquet(tmp_path / "out.parquet")
    TABLE[-1]["rows_lost"] = 100_000 - out["id"].nunique()
    assert out["id"].tolist() == list(range(100_000)) and out["prediction"].notna().all()


def test_tracking_server_away(cluster: Cluster, tmp_path: Path) -> None:
    """MLflow gone for 30 s: training goes on, and every metric is there in the end."""
    port = find_free_ports(1)[0]
    uri, log = f"http://127.0.0.1:{port}", (tmp_path / "server.log").open("w")

    def serve() -> subprocess.Popen:
        server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
                                   "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "artifacts")],
                                  stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 90
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < until and server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            time.sleep(0.2)
        return server

    server = serve()
    driver = cluster.start(tmp_path, "--point", "step:0", MADEWITHML_TRACKING_URI=uri)
    while not ((tmp_path / "steps").is_file() and len((tmp_path / "steps").read_text().splitlines()) >= 5):
        assert driver.poll() is None, driver.stderr.read()[-3000:]
        time.sleep(0.05)
    os.killpg(server.pid, signal.SIGKILL)
    time.sleep(30)  # the length of the fault, not a guess at progress
    server = serve()
    try:
        judge("MLflow server away for 30 s", tmp_path, ended(driver), uri)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
