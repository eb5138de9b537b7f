"""Failures of a cluster, caused on purpose: processes are killed at points of the work's progress.

`make test-faults` starts a head with two worker nodes and takes half an hour on 2 cores. At the
end it prints a table of what was lost and how long the recovery took.
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
from subprocess import CompletedProcess

import mlflow
import pandas as pd
import pytest

from madewithml.ray_session import find_free_ports
from tests.conftest import ROOT, run_cli

pytestmark = pytest.mark.fault

DATASET = str(ROOT / "datasets" / "dataset.csv")
DRIVER = str(Path(__file__).with_name("fault_driver.py"))
EPOCHS = 3  # of 9 steps: 144 training rows in batches of 16
POINTS = ["step:1", "step:5", "step:9", "step:10", "step:17", "step:26",
          "save:1", "save:2", "upload:1", "upload:2"]
TRIALS: list[dict] = []


def summary() -> str:
    """What was lost and how long recovery took, a line per fault; empty without a trial."""
    if not TRIALS:
        return ""
    table = pd.DataFrame(TRIALS).groupby("fault", sort=False).agg(
        trials=("fault", "size"), finished=("finished", "sum"),
        epochs_repeated=("repeated", "max"), rows_lost=("rows_lost", "sum"),
        metrics_lost=("metrics_lost", "sum"), seconds_median=("seconds", "median"),
        seconds_max=("seconds", "max"))
    return table.round(1).to_string()


def wait_for_driver(driver: subprocess.Popen) -> CompletedProcess:
    """Output and exit code of a driver; it is killed after a time in which every trial ends."""
    with driver:
        try:
            stdout, stderr = driver.communicate(timeout=560)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise
    return CompletedProcess(driver.args, driver.returncode, stdout, stderr)


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
        state = self.folder / "storage" / "cluster" / "state.json"
        return json.loads(state.read_text())["address"]

    def start(self, folder: Path, *args: str, **variables: str) -> subprocess.Popen:
        """The driver of a trial, with its storage in the trial's folder."""
        own = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_ADDRESS": self.address,
               "RAY_AUTH_MODE": "token", "MADEWITHML_STORAGE_DIR": str(folder / "storage")}
        command = [sys.executable, DRIVER, "--folder", str(folder), "--dataset", DATASET, *args]
        return subprocess.Popen(command, cwd=folder, env=os.environ | own | variables, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def drive(self, folder: Path, *args: str, **variables: str) -> CompletedProcess:
        """Runs the driver of a trial to its end."""
        return wait_for_driver(self.start(folder, *args, **variables))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    run_cli("cluster", "down", cwd=cluster.folder)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Results of a training without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cluster.drive(folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def mlflow_client(folder: Path, uri: str = "") -> mlflow.MlflowClient:
    return mlflow.MlflowClient(uri or f"sqlite:///{folder}/storage/mlflow/mlflow.db")


def find_runs(client: mlflow.MlflowClient) -> list[mlflow.entities.Run]:
    """The MLflow runs of a trial."""
    return client.search_runs([client.get_experiment_by_name("faults").experiment_id])


def measure_recovery(folder: Path) -> dict[str, float]:
    """Seconds to the first step after the fault, and the epochs repeated; nothing without both."""
    if not (folder / "struck").is_file():
        return {}
    struck = float((folder / "struck").read_text())
    lines = (folder / "steps").read_text().splitlines() if (folder / "steps").is_file() else []
    steps = [json.loads(line) for line in lines]
    before = [step for step in steps if step["time"] <= struck]
    after = [step for step in steps if step["time"] > struck]
    if not after:
        return {}
    first = after[0]
    reached = max((step["epoch"] for step in before), default=1)
    repeats = first["step"] == 1 and first["epoch"] <= reached
    return {"seconds": first["time"] - struck,
            "repeated": reached - first["epoch"] + 1 if repeats else 0}


def check_trial(fault: str, folder: Path, done: CompletedProcess, uri: str = "") -> dict:
    """Results of a trial that finished and lost nothing; it is added to the table."""
    finished = done.returncode == 0 and (folder / "results.json").is_file()
    trial = {"fault": fault, "finished": finished, "repeated": float("nan"), "rows_lost": 0,
             "metrics_lost": 0, "seconds": float("nan")}
    TRIALS.append(trial)
    assert finished, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    results = json.loads((folder / "results.json").read_text())
    trial["rows_lost"] = sum(results["num_train"] - epoch["num_rows"]
                             for epoch in results["metrics"])
    client = mlflow_client(folder, uri)
    runs = find_runs(client)
    history = client.get_metric_history(runs[0].info.run_id, "val_loss")
    trial["metrics_lost"] = EPOCHS - len({metric.step for metric in history})
    trial |= measure_recovery(folder)
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert trial["rows_lost"] == 0 and trial["metrics_lost"] == 0
    return results


def assert_same(results: dict, undisturbed: dict) -> None:
    for epoch, expected in zip(results["metrics"], undisturbed["metrics"], strict=True):
        assert abs(epoch["val_loss"] - expected["val_loss"]) < 1e-6, (results, undisturbed)


@pytest.mark.parametrize("point", POINTS)
def test_worker_killed(point: str, cluster: Cluster, undisturbed: dict, tmp_path: Path) -> None:
    """Training resumes from the last checkpoint, repeats at most one epoch, and ends the same."""
    done = cluster.drive(tmp_path, "--victim", "worker", "--point", point)
    results = check_trial("kill -9 of a training worker", tmp_path, done)
    assert (tmp_path / "struck").is_file() and TRIALS[-1]["repeated"] <= 1
    assert_same(results, undisturbed)


@pytest.mark.parametrize("point", POINTS)
def test_node_killed(point: str, cluster: Cluster, tmp_path: Path) -> None:
    """The same with two workers and the raylet of one of their nodes."""
    cluster.up()
    done = cluster.drive(tmp_path, "--victim", "node", "--point", point, "--workers", "2")
    results = check_trial("kill -9 of a worker node, two workers", tmp_path, done)
    assert (tmp_path / "struck").is_file() and TRIALS[-1]["repeated"] <= 1
    assert results["params"]["num_workers"] == 2
    cluster.up()


@pytest.mark.parametrize("point", POINTS)
def test_driver_killed(point: str, cluster: Cluster, undisturbed: dict, tmp_path: Path) -> None:
    """The same command, started again, resumes."""
    killed = cluster.drive(tmp_path, "--victim", "driver", "--point", point)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "results.json").exists()
    done = cluster.drive(tmp_path, "--victim", "driver", "--point", point)
    results = check_trial("kill -9 of the driver, started again", tmp_path, done)
    assert TRIALS[-1]["repeated"] <= 1
    assert_same(results, undisturbed)


def test_full_disk(cluster: Cluster, tmp_path: Path) -> None:
    """A disk that is full at the second checkpoint is one clear line; the first one is kept."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        done = cluster.drive(tmp_path, "--victim", "driver", "--point", "step:12",
                             MADEWITHML_SHARED_URI=str(disk))
        assert done.returncode == -signal.SIGKILL
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(free - 40_000_000))
        done = cluster.drive(tmp_path, MADEWITHML_SHARED_URI=str(disk))
        assert done.returncode != 0, done.stderr
        assert "could not be written" in done.stderr, done.stderr
        assert "no space left on device" in done.stderr, done.stderr
        (disk / "ballast").unlink()
        done = cluster.drive(tmp_path, MADEWITHML_SHARED_URI=str(disk))
        check_trial("disk full while a checkpoint is written", tmp_path, done)
        assert TRIALS[-1]["repeated"] <= 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def damage_file(path: Path, damage: str) -> None:
    """Cuts off the end of the file, or changes a byte in its middle."""
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-1000:]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "one byte changed"])
def test_corrupt_checkpoint(
    damage: str, cluster: Cluster, undisturbed: dict, tmp_path: Path,
) -> None:
    """It is rejected by its checksums, the previous one is used, and the log says so."""
    cluster.drive(tmp_path, "--victim", "driver", "--point", "step:20")
    job = next((tmp_path / "storage" / "ray").iterdir())
    checkpoints = sorted(job.glob("checkpoint_2*"))
    assert len(checkpoints) == 2
    damage_file(checkpoints[-1] / "classifier" / "model.safetensors", damage)
    done = cluster.drive(tmp_path)
    reason = "classifier/model.safetensors does not match its digest"
    assert f"epoch 2 is rejected ({reason})" in done.stderr, done.stderr
    results = check_trial(f"checkpoint {damage}", tmp_path, done)
    assert TRIALS[-1]["repeated"] <= 2
    assert_same(results, undisturbed)


@pytest.mark.parametrize("victim", ["worker", "driver"])
@pytest.mark.parametrize("output", ["out.parquet", "out.parquet/"])
def test_prediction_killed(victim: str, output: str, cluster: Cluster, tmp_path: Path) -> None:
    """Each of 100,000 rows is predicted once, in order; a committed shard is not computed again."""
    cluster.drive(tmp_path, "--epochs", "1")
    client = mlflow_client(tmp_path)
    run_id = find_runs(client)[0].info.run_id
    classifier = client.download_artifacts(run_id, "checkpoint", str(tmp_path))
    ids = range(100_000)
    table = pd.DataFrame({"id": ids, "title": [f"title {i}" for i in ids], "description": ""})
    table.to_parquet(tmp_path / "table.parquet", row_group_size=5000)
    (tmp_path / "results.json").unlink()
    args = ("--classifier", classifier, "--output", f"{tmp_path}/{output}",
            "--dataset", str(tmp_path / "table.parquet"))
    point = "shard:3" if victim == "worker" else "commit:6"
    done = cluster.drive(tmp_path, "--victim", victim, "--point", point, *args)
    if victim == "driver":
        assert done.returncode != 0 and not (tmp_path / "out.parquet").exists()
        done = cluster.drive(tmp_path, *args)
        assert "6 of 13 shards were predicted by an earlier attempt" in done.stderr
    finished = done.returncode == 0
    TRIALS.append({"fault": f"kill of a {victim}, batch prediction", "finished": finished,
                   "repeated": 0, "rows_lost": 0, "metrics_lost": 0, "seconds": float("nan")})
    assert finished, done.stderr[-4000:]
    assert (tmp_path / "struck").is_file()
    out = pd.read_parquet(tmp_path / "out.parquet")
    TRIALS[-1]["rows_lost"] = len(ids) - out["id"].nunique()
    assert out["id"].tolist() == list(ids) and out["prediction"].notna().all()


def start_tracking_server(folder: Path, port: int) -> subprocess.Popen:
    """An MLflow server that accepts connections, in a process group of its own."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
               "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db",
               "--artifacts-destination", str(folder / "artifacts")]
    log = folder / "server.log"
    with log.open("a") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 90
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < deadline and server.poll() is None, log.read_text()[-2000:]
        time.sleep(0.2)
    return server


def test_tracking_server_unreachable(cluster: Cluster, tmp_path: Path) -> None:
    """With MLflow away for 30 s, training continues and no metric is missing in the end."""
    port = find_free_ports(1)[0]
    uri = f"http://127.0.0.1:{port}"
    steps = tmp_path / "steps"
    server = start_tracking_server(tmp_path, port)
    driver = cluster.start(tmp_path, "--point", "step:0", MADEWITHML_TRACKING_URI=uri)
    while not (steps.is_file() and len(steps.read_text().splitlines()) >= 5):
        assert driver.poll() is None, driver.stderr.read()[-3000:]
        time.sleep(0.05)
    os.killpg(server.pid, signal.SIGKILL)
    time.sleep(30)  # the length of the fault, not a guess at progress
    server = start_tracking_server(tmp_path, port)
    try:
        done = wait_for_driver(driver)
        check_trial("MLflow server unreachable for 30 s", tmp_path, done, uri)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
