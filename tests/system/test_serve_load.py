"""The service under load: while its model and code change, processes die, or it is overloaded.

Minutes each; `make test-load`.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pandas as pd
import psutil
import pytest

from ..conftest import ROOT, Run
from ..load import Outcome, open_loop, percentile, summary
from .test_serve import Served, compare_predictions, serving

pytestmark = pytest.mark.load
HOLDOUT = pd.read_csv(ROOT / "datasets" / "holdout.csv").fillna("")
ITEMS = HOLDOUT[["title", "description"]].to_dict("records")
REPORT: list[str] = []  # a line for each measurement
NUM_CLIENTS = 32  # processes of h2load

CHANGE_REGISTRY = """
import sys, time
from madewithml.registry import register_model
from madewithml.tracking import CHECKPOINT, fetch_checkpoint, get_run, mlflow_client

client = mlflow_client()
match sys.argv[1:]:
    case "set-champion", version:
        client.set_registered_model_alias("madewithml", "champion", version)
    case "toggle-champion", count, pause:
        for i in range(int(count)):
            client.set_registered_model_alias("madewithml", "champion", str(2 - i % 2))
            time.sleep(float(pause))
    case ["copy"]:
        original = client.get_model_version("madewithml", "1").run_id
        run = client.create_run(get_run(original).info.experiment_id).info.run_id
        client.log_artifacts(run, str(fetch_checkpoint(original)), CHECKPOINT)
        register_model(run)
"""


@pytest.fixture(scope="module")
def ready(promoted: Run) -> Run:
    """A registry with two intact versions, the first of them champion."""
    change_registry(promoted, "copy")
    change_registry(promoted, "set-champion", "1")
    return promoted


def change_registry(run: Run, *args: str) -> None:
    """Changes the run's registry, in a process of its own."""
    command = [sys.executable, "-c", CHANGE_REGISTRY, *args]
    done = subprocess.run(command, cwd=run.folder, env=os.environ | {"HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def get_versions(outcomes: list[Outcome]) -> list[int]:
    """The versions that answered, in order."""
    good = [outcome for outcome in outcomes if outcome.status == 200]
    return [json.loads(outcome.body)["version"] for outcome in good]


def get_statuses(outcomes: list[Outcome]) -> set[int]:
    return {outcome.status for outcome in outcomes}


def find_processes(served: Served, name: str) -> list[psutil.Process]:
    """The service's processes whose title has `name`."""
    processes = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()) or name in process.name():
                processes.append(process)
    return processes


def run_h2load(served: Served, connections: int, seconds: int, rate: float | None,
               folder: Path) -> list[Outcome]:
    """The outcomes of `h2load`, a client in C that leaves most of the machine to the service.

    `connections` is rounded down to a multiple of the number of clients. `rate` is in requests/s
    over all connections; None: as fast as they are answered.
    """
    if not shutil.which("h2load"):
        pytest.skip("needs h2load (Debian: apt-get install nghttp2-client)")
    # A client sends one text, over all its connections at the same moment. So there are many
    # clients, each with few connections and a text of its own, which start one after the other.
    # As many at the peak as in an overload: texts differ in what they cost.
    num_clients = min(NUM_CLIENTS, connections)
    per_client = connections // num_clients
    pause = connections / rate / num_clients if rate else 0
    options = ["--h1", "-t", "1", "-D", str(seconds), "-c", str(per_client),
               "-H", "content-type: application/json"]
    if rate:
        options += ["--rps", f"{rate / (per_client * num_clients):.4f}"]
    clients, logs = [], []
    for i in range(num_clients):
        body, log = folder / f"body-{i}.json", folder / f"log-{i}.tsv"
        body.write_text(json.dumps(ITEMS[i * len(ITEMS) // num_clients]), encoding="utf-8")
        log.unlink(missing_ok=True)  # h2load appends to it
        command = ["h2load", *options, "--log-file", str(log), "-d", str(body),
                   f"{served.url}/predict/"]
        clients.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        logs.append(log)
        time.sleep(pause)
    for client in clients:
        assert client.wait() == 0
    names = ["start", "status", "us"]
    table = pd.concat([pd.read_csv(log, sep="\t", names=names) for log in logs])
    first = table["start"].min()
    return [Outcome((start - first) / 1e6, us / 1000, status)
            for start, status, us in table.itertuples(index=False)]


def measure_peak(served: Served, folder: Path) -> float:
    """Requests/s that the service answers when 32 clients send as fast as they can."""
    run_h2load(served, 32, 5, None, folder)
    return len(run_h2load(served, 32, 15, None, folder)) / 15


def report(line: str) -> None:
    REPORT.append(line)
    print(line, flush=True)


@pytest.fixture(scope="module")
def peak(ready: Run, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Requests/s of one replica at most, on this machine."""
    with serving(ready) as served:
        return measure_peak(served, tmp_path_factory.mktemp("peak"))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_parity_on_every_row(precision: str, ready: Run, tmp_path: Path) -> None:
    """Served, alone or with others, every row of the embedded tables gets the batch job's label."""
    with serving(ready, "--precision", precision) as served:
        for table in ("dataset", "holdout", "unlabeled"):
            dataset, output = ROOT / "datasets" / f"{table}.csv", tmp_path / f"{table}.parquet"
            done = ready.cli("predict", "--run-id", ready.run_id, "--dataset-loc", str(dataset),
                             "--output", str(output))
            assert done.returncode == 0, done.stderr
            batch = pd.read_parquet(output)
            difference = compare_predictions(served, table, batch, len(batch))
            report(f"{table}, {precision}: {len(batch)} rows, same labels; "
                   f"largest difference of a probability {difference:.5f}")


def test_generated_requests(ready: Run, tmp_path: Path) -> None:
    """Ten thousand requests that schemathesis generates from the service's schema: no 5xx, and no
    response that the schema does not have."""
    checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance",
              "response_schema_conformance")
    with serving(ready) as served:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run",
                   f"{served.url}/openapi.json", "--max-examples", "1000",  # of each operation
                   "--continue-on-failure", "--request-timeout", "20",
                   "--checks", ",".join(checks)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    num_calls = re.search(r"Test cases:\s*\n\s*([\d,]+) generated", done.stdout)
    result = "no failure" if done.returncode == 0 else "FAILED"
    report(f"schemathesis: {num_calls[1] if num_calls else '?'} calls, {result}")
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(num_calls[1].replace(",", "")) >= 10_000, done.stdout[-3000:]


def test_fifty_champion_changes(ready: Run, peak: float) -> None:
    """The alias moves fifty times under load: every response is a 200 of a known version."""
    rate = min(100, peak / 2)

    def toggle() -> None:
        change_registry(ready, "toggle-champion", "50", "6")  # loading takes some seconds

    with serving(ready, "--config", '{"poll_interval_s": 0.5}') as served:
        outcomes = open_loop(served.url + "/predict/", ITEMS, rate, int(rate * 320),
                             {int(2 * rate): toggle})
    versions = get_versions(outcomes)
    num_changes = sum(before != after for before, after in pairwise(versions))
    line = summary(f"50 champion changes at {rate:.0f} requests/s", outcomes)
    report(f"{line}; the responses' version changed {num_changes} times")
    assert get_statuses(outcomes) == {200}
    assert set(versions) == {1, 2}
    assert num_changes >= 40


def test_ten_releases(ready: Run, peak: float) -> None:
    """The code is replaced ten times under load: every response is a 200, and each release answers
    in the end."""
    rate = min(100, peak / 2)
    releases = [f"release-{i}" for i in range(10)]
    commits = []
    with serving(ready, driver=Path(__file__).with_name("release_driver.py")) as served:
        def release() -> None:
            for name in releases:
                served.process.stdin.write(f"{name}\n")
                served.process.stdin.flush()
                while "release-" not in (line := served.process.stdout.readline()):
                    assert line, "the driver ended"
                commits.append(served.get("/version").json()["git_commit"])
        thread = threading.Thread(target=release)
        thread.start()
        outcomes = []
        while thread.is_alive():
            outcomes += open_loop(served.url + "/predict/", ITEMS, rate, int(10 * rate))
        thread.join()
    report(summary(f"10 releases at {rate:.0f} requests/s", outcomes))
    assert commits == releases
    assert get_statuses(outcomes) == {200}


# What is killed, the title of its processes, and how many there are in normal operation.
KILLS = [("replica", "ServeReplica", 2), ("proxy", "haproxy", 1),
         ("proxy manager", "HAProxyManager", 1), ("controller", "ServeController", 1)]


def find_victims(served: Served, name: str, title: str) -> list[psutil.Process]:
    """The processes to kill one of: HAProxies that have the port, replicas that answer (they listen
    when their model is warm, from port 30000 on), and all of the others."""
    ports = {"proxy": range(served.port, served.port + 1), "replica": range(30_000, 31_001)}
    processes = find_processes(served, title)
    if name not in ports:
        return processes
    return [process for process in processes if find_listening_ports(process) & set(ports[name])]


def find_listening_ports(process: psutil.Process) -> set[int]:
    """Its TCP ports; none of a process that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {connection.laddr.port for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN}
    return set()


def wait_until_complete(served: Served, name: str, title: str, count: int,
                        killed: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes without the killed one, once there are `count`, or after 90 s: Ray replaces
    the proxy's manager half a minute after the proxy's death."""
    end = time.monotonic() + 90
    while True:
        running = [process for process in find_victims(served, name, title) if process != killed]
        if len(running) >= count or time.monotonic() > end:
            return running
        time.sleep(0.5)


def test_killed_processes(ready: Run, peak: float) -> None:
    """Twenty kills of a replica (of two), the proxy, its manager and the controller: hardly a
    request fails, and none that is sent again."""
    rate = min(40.0, 0.3 * peak)  # one replica must bear it while the other starts
    num_requests, killed_at = 600, 100
    failures, totals = {0: 0, 1: 0}, {0: 0, 1: 0}  # by the number of retries
    recovery_times, replacement_times = [], []
    with serving(ready, "--replicas", "2") as served:
        for name, title, count in KILLS * 5:
            def kill(name: str = name, title: str = title, count: int = count) -> None:
                victim = wait_until_complete(served, name, title, count)[0]
                start = time.monotonic()
                victim.send_signal(signal.SIGKILL)
                if name == "replica":
                    wait_until_complete(served, name, title, count, victim)
                    replacement_times.append(time.monotonic() - start)
            for retries in (0, 1):
                wait_until_complete(served, name, title, count)
                outcomes = open_loop(served.url + "/predict/", ITEMS, rate, num_requests,
                                     {killed_at: kill}, retries)
                failed = [outcome for outcome in outcomes if outcome.status != 200]
                failures[retries] += len(failed)
                totals[retries] += len(outcomes)
                if retries == 0:
                    delays = [outcome.due - killed_at / rate for outcome in failed]
                    recovery_times.append(max(delays, default=0))
                report(f"kill of {name}, {retries} retries: {summary('', outcomes)}")
    failure_rate = failures[0] / totals[0]
    report(f"failed without retry: {failure_rate:.3%}; "
           f"longest recovery {max(recovery_times):.1f} s; two replicas answer again after "
           f"{min(replacement_times):.0f} to {max(replacement_times):.0f} s")
    assert failure_rate <= 0.001
    assert failures[1] == 0
    assert max(recovery_times) <= 15


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_overload(ready: Run, tmp_path: Path) -> None:
    """Ten times its peak for a minute: what is accepted is answered soon, the rest is rejected at
    once, and the service is as fast as before afterwards.

    The network and HAProxy need processors for each rejected request, which are the replica's
    otherwise. So a processor second of the replica must answer as many requests as at the peak."""
    with serving(ready) as served:
        replica = find_processes(served, "ServeReplica")[0]
        begin = processor_seconds(replica)
        peak = measure_peak(served, tmp_path)
        at_peak = (processor_seconds(replica) - begin) / 20  # processors, at 5 + 15 s of load
    half_a_second = str(min(128, int(peak / 2)))  # as the option's help advises; 128: the default
    with serving(ready, "--max-queued", half_a_second) as served:
        url = served.url + "/predict/"
        replica = find_processes(served, "ServeReplica")[0]
        run_h2load(served, 32, 20, None, tmp_path)  # its memory reaches that of work
        memory_before = replica.memory_info().rss
        begin = processor_seconds(replica)
        overload = run_h2load(served, 600, 60, 10 * peak, tmp_path)
        share = (processor_seconds(replica) - begin) / 60 / at_peak
        memory_after = replica.memory_info().rss
        time.sleep(5)
        burst = open_loop(url, ITEMS, 5000, 1000)  # h2load logs no headers, such as Retry-After
        time.sleep(5)
        calm = open_loop(url, ITEMS, 0.3 * peak, int(0.3 * peak * 10))
    accepted = [outcome for outcome in overload if outcome.status == 200]
    rejected = [outcome for outcome in overload if outcome.status != 200]
    statuses = sorted(get_statuses(rejected))
    report(f"the replica has {share:.0%} of its processors at the peak")
    report(f"peak {peak:.0f} requests/s; overload {len(overload) / 60:.0f} requests/s: "
           f"{len(accepted) / 60:.0f} a second accepted, p99 {percentile(accepted, 0.99):.0f} ms; "
           f"{len(rejected) / 60:.0f} a second rejected, statuses {statuses}, "
           f"p99 {percentile(rejected, 0.99):.0f} ms; "
           f"memory {memory_after / memory_before - 1:+.1%}; {summary('after', calm)}")
    rejected_of_burst = [outcome for outcome in burst if outcome.status != 200]
    assert rejected_of_burst
    for outcome in rejected_of_burst:
        assert (outcome.status, outcome.headers.get("Retry-After")) == (503, "1")
    assert len(overload) / 60 > 5 * peak
    assert get_statuses(rejected) <= {503, 429}
    assert len(accepted) / 60 >= 0.8 * peak * share and percentile(accepted, 0.99) < 1000
    assert percentile(rejected, 0.99) < 50
    assert memory_after < 1.1 * memory_before
    assert get_statuses(calm) == {200} and percentile(calm, 0.99) < 500


def test_soak(ready: Run, tmp_path: Path) -> None:
    """Half load for ten minutes: neither memory nor descriptors grow, and nothing fails."""
    with serving(ready, "--log-dir", str(ready.folder / "soak")) as served:
        peak = measure_peak(served, tmp_path)
        replica = find_processes(served, "ServeReplica")[0]
        run_h2load(served, 200, 60, 0.5 * peak, tmp_path)  # caches fill
        time.sleep(40)  # HAProxy keeps its connections to the replica for half a minute
        memory_before, fds_before = replica.memory_info().rss, replica.num_fds()
        outcomes = run_h2load(served, 200, 600, 0.5 * peak, tmp_path)
        time.sleep(40)
        memory_after, fds_after = replica.memory_info().rss, replica.num_fds()
    report(f"peak {peak:.0f} requests/s; {summary('ten minutes at half of it', outcomes)}; "
           f"memory {memory_before / 1e6:.0f} to {memory_after / 1e6:.0f} MB, "
           f"descriptors {fds_before} to {fds_after}")
    assert get_statuses(outcomes) == {200}
    assert memory_after < 1.02 * memory_before
    assert fds_after <= fds_before + 5


def test_ten_minutes_near_the_peak(ready: Run, tmp_path: Path) -> None:
    """Open-loop load at 80 % of the peak for ten minutes: no error."""
    with serving(ready) as served:
        peak = measure_peak(served, tmp_path)
        outcomes = run_h2load(served, 400, 600, 0.8 * peak, tmp_path)
    report(f"peak {peak:.0f} requests/s; {summary('ten minutes at 80 % of it', outcomes)}")
    assert get_statuses(outcomes) == {200}
    assert len(outcomes) > 0.95 * 0.8 * peak * 600  # as many as were to be sent


@pytest.fixture(scope="module", autouse=True)
def written_report() -> Iterator[None]:
    """Writes the measurements into the file that MADEWITHML_LOAD_REPORT names."""
    yield
    if path := os.environ.get("MADEWITHML_LOAD_REPORT"):
        Path(path).write_text("\n".join(REPORT) + "\n", encoding="utf-8")
