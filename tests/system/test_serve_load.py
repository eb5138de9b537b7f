"""The service under load: while its model and its code change, while its processes die, and with far too much to do. Minutes each; `make test-load`."""
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
from pathlib import Path

import pandas as pd
import psutil
import pytest

from ..conftest import ROOT, Run
from ..load import Outcome, open_loop, percentile, summary
from .test_serve import Served, same_labels, serving

pytestmark = pytest.mark.load
ITEMS = pd.read_csv(ROOT / "datasets" / "holdout.csv").fillna("")[["title", "description"]].to_dict("records")
TABLE: list[str] = []  # what was seen, printed at the end


@pytest.fixture(scope="module")
def ready(trained: Run) -> Run:
    """A registry with two sound versions, the first of them champion."""
    done = trained.cli("promote")
    assert done.returncode == 0 or "no version" in done.stderr.lower() or "champion already" in done.stderr, done.stderr
    registry(trained, "copy", "sound")
    registry(trained, "alias", "champion", "1")
    return trained


def registry(run: Run, *arguments: str) -> str:
    """Changes the run's registry, in a process of its own."""
    code = """
import sys
from madewithml.registry import register_model
from madewithml.tracking import CHECKPOINT, fetch_checkpoint, mlflow_client, get_run
client, what = mlflow_client(), sys.argv[1]
if what == "alias": client.set_registered_model_alias("madewithml", sys.argv[2], sys.argv[3])
if what == "toggle":
    import time
    for i in range(int(sys.argv[2])):
        client.set_registered_model_alias("madewithml", "champion", str(2 - i % 2))
        time.sleep(float(sys.argv[3]))
if what == "copy":
    old = client.get_model_version("madewithml", "1").run_id
    run = client.create_run(get_run(old).info.experiment_id).info.run_id
    client.log_artifacts(run, str(fetch_checkpoint(old)), CHECKPOINT)
    print(register_model(run).version)
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=run.folder, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def versions(outcomes: list[Outcome]) -> set[int]:
    return {json.loads(outcome.body)["version"] for outcome in outcomes if outcome.status == 200}


def family(served: Served, name: str) -> list[psutil.Process]:
    """The service's processes whose title has `name`."""
    found = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()) or name in process.name():
                found.append(process)
    return found


def h2load(served: Served, connections: int, seconds: int, rate: float | None, folder: Path) -> list[Outcome]:
    """What `h2load`, a client in C that leaves most of the machine to the service, saw of each request; `rate` in requests/s over all connections, None for as fast as they are answered."""
    if not shutil.which("h2load"):
        pytest.skip("needs h2load (Debian: apt-get install nghttp2-client)")
    # A client sends one text, over all its connections at the same moment. So there are many, each with few connections and a text of its own, and they begin one after the other.
    clients = min(50, max(8, connections // 8))
    each, running = connections // clients, []
    for i in range(clients):
        body, seen = folder / f"body-{i}.json", folder / f"seen-{i}.tsv"
        body.write_text(json.dumps(ITEMS[i * len(ITEMS) // clients]), encoding="utf-8")
        command = ["h2load", "--h1", "-t", "1", "-D", str(seconds), "-c", str(each), *(["--rps", f"{rate / connections:.4f}"] if rate else []), "--log-file", str(seen), "-d", str(body),
                   "-H", "content-type: application/json", f"{served.url}/predict/"]
        seen.unlink(missing_ok=True)  # it is appended to
        running.append((subprocess.Popen(command, stdout=subprocess.DEVNULL), seen))
        time.sleep(connections / rate / clients if rate else 0)
    for process, _ in running:
        assert process.wait() == 0
    table = pd.concat([pd.read_csv(seen, sep="\t", names=["at", "status", "us"]) for _, seen in running])
    first = table["at"].min()
    return [Outcome((at - first) / 1e6, us / 1000, status) for at, status, us in table.itertuples(index=False)]


def knee(served: Served, folder: Path) -> float:
    """Requests/s that the service answers when 32 clients ask as fast as they can."""
    h2load(served, 32, 5, None, folder)
    return len(h2load(served, 32, 15, None, folder)) / 15


def tell(line: str) -> None:
    TABLE.append(line)
    print(line, flush=True)


def test_parity_on_every_row(ready: Run, tmp_path: Path) -> None:
    """Served, alone or with others, every row of the embedded tables gets the label of the batch job, in each precision."""
    for precision in ("bf16", "fp32"):
        with serving(ready, "--precision", precision) as served:
            for table in ("dataset", "holdout", "unlabeled"):
                done = ready.cli("predict", "--run-id", ready.run_id, "--dataset-loc", str(ROOT / "datasets" / f"{table}.csv"), "--output", str(tmp_path / f"{table}.parquet"))
                assert done.returncode == 0, done.stderr
                batch = pd.read_parquet(tmp_path / f"{table}.parquet")
                tell(f"{table}, {precision}: {len(batch)} rows, same labels; largest difference of a probability {same_labels(served, table, batch, len(batch)):.5f}")


def test_generated_requests(ready: Run, tmp_path: Path) -> None:
    """Ten thousand requests that schemathesis makes of the service's own description: no 5xx, no answer that is not in it."""
    with serving(ready) as served:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json", "--max-examples", "6000", "--continue-on-failure", "--request-timeout", "20",
                   "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance", "--workers", "2"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    calls = re.search(r"Test cases:\s*\n\s*([\d,]+) generated", done.stdout)
    tell(f"schemathesis: {calls[1] if calls else '?'} calls, {'no failure' if done.returncode == 0 else 'FAILED'}")
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(calls[1].replace(",", "")) >= 10_000, done.stdout[-3000:]


def test_fifty_champion_changes(ready: Run) -> None:
    """The alias moves fifty times at 100 requests/s: every answer is a 200 and names one of the two versions."""
    with serving(ready, "--config", '{"poll_interval_s": 0.5}') as served:
        outcomes = open_loop(served.url + "/predict/", ITEMS, 100, 100 * 320, {200: lambda: registry(ready, "toggle", "50", "6")})  # loading takes some seconds beside the answers
    line = summary("50 champion changes at 100 requests/s", outcomes)
    changes = sum(a != b for a, b in zip(*[[json.loads(o.body)["version"] for o in outcomes if o.status == 200][i:] for i in (0, 1)], strict=False))
    tell(f"{line}; the answers' version changed {changes} times")
    assert {outcome.status for outcome in outcomes} == {200}
    assert versions(outcomes) == {1, 2}
    assert changes >= 40


def test_ten_releases(ready: Run) -> None:
    """The code is replaced ten times at 100 requests/s: every answer is a 200, and in the end the last release answers."""
    seen = []
    with serving(ready, driver=Path(__file__).with_name("release_driver.py")) as served:
        def release() -> None:
            for i in range(10):
                served.process.stdin.write(f"release-{i}\n")
                served.process.stdin.flush()
                while "release-" not in (line := served.process.stdout.readline()):
                    assert line, "the driver ended"
                seen.append(served.ask("/version")[1]["git_commit"])
        done = threading.Thread(target=release)
        outcomes = []
        done.start()
        while done.is_alive():
            outcomes += open_loop(served.url + "/predict/", ITEMS, 100, 1000)
        done.join()
    tell(summary("10 releases at 100 requests/s", outcomes))
    assert seen == [f"release-{i}" for i in range(10)]
    assert {outcome.status for outcome in outcomes} == {200}


# What is killed, the title of its processes, and how many there are when all is well.
KILLS = [("replica", "ServeReplica", 2), ("proxy", "haproxy", 1), ("proxy manager", "HAProxyManager", 1), ("controller", "ServeController", 1)]


def victims(served: Served, name: str, title: str) -> list[psutil.Process]:
    """The processes to kill one of: HAProxies that have the port, replicas that answer (they listen when their model is warm, from port 30000 on), and all of the others."""
    found = family(served, title)
    if name not in ("proxy", "replica"):
        return found
    listens = {"proxy": lambda port: port == served.port, "replica": lambda port: 30_000 <= port <= 31_000}[name]
    return [process for process in found if any(one.status == psutil.CONN_LISTEN and listens(one.laddr.port) for one in connections(process))]


def connections(process: psutil.Process) -> list:
    """Those over TCP, none of a process that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.net_connections("tcp")
    return []


def await_whole(served: Served, name: str, title: str, whole: int, killed: psutil.Process | None = None) -> None:
    """Waits until there are as many as when all is well, without the one that was killed; 90 s at most, since Ray replaces the proxy's manager half a minute after the proxy's death."""
    end = time.monotonic() + 90
    while len([one for one in victims(served, name, title) if one != killed]) < whole and time.monotonic() < end:
        time.sleep(0.5)


def test_killed_processes(ready: Run) -> None:
    """Twenty kills of a replica (of two), the proxy and the controller, each at a request count: hardly a request fails, and none twice."""
    plan = [KILLS[i % len(KILLS)] for i in range(20)]
    every, rate, lost, recovered, whole_again = 600, 40.0, [], [], []
    with serving(ready, "--replicas", "2") as served:
        for name, title, whole in plan:
            def kill(name: str = name, title: str = title, whole: int = whole) -> None:
                victim, begin = victims(served, name, title)[0], time.monotonic()
                victim.send_signal(signal.SIGKILL)
                if name == "replica":
                    await_whole(served, name, title, whole, victim)
                    whole_again.append(time.monotonic() - begin)
            for retries in (0, 1):
                await_whole(served, name, title, whole)
                outcomes = open_loop(served.url + "/predict/", ITEMS, rate, every, {100: kill}, retries)
                failed = [outcome for outcome in outcomes if outcome.status != 200]
                lost.append((name, retries, len(failed), len(outcomes)))
                if retries == 0:
                    recovered.append(max((outcome.due - 100 / rate for outcome in failed), default=0))
                tell(f"kill of {name}, {retries} retries: {summary('', outcomes)}")
    without = [row for row in lost if row[1] == 0]
    share = sum(row[2] for row in without) / sum(row[3] for row in without)
    tell(f"failed without retry: {100 * share:.3f} %; longest recovery {max(recovered):.1f} s; two replicas answer again after {min(whole_again):.0f} to {max(whole_again):.0f} s")
    assert share <= 0.001
    assert sum(row[2] for row in lost if row[1] == 1) == 0
    assert max(recovered) <= 15


def test_overload(ready: Run, tmp_path: Path) -> None:
    """Ten times what it can do, for a minute: what is accepted is answered soon, the rest is rejected at once, and it is well again after."""
    with serving(ready) as served:
        peak = knee(served, tmp_path)
        replica = family(served, "ServeReplica")[0]
        before = replica.memory_info().rss
        seen = h2load(served, 600, 60, 10 * peak, tmp_path)
        after = replica.memory_info().rss
        time.sleep(5)
        burst = open_loop(served.url + "/predict/", ITEMS, 5000, 1000)  # who is rejected is told when to come back
        time.sleep(5)
        calm = open_loop(served.url + "/predict/", ITEMS, 0.3 * peak, int(0.3 * peak * 10))
    good, rest = ([outcome for outcome in seen if (outcome.status == 200) == well] for well in (True, False))
    tell(f"peak {peak:.0f} requests/s; overload {len(seen) / 60:.0f} requests/s: {len(good) / 60:.0f} a second accepted, p99 {percentile(good, 0.99):.0f} ms; {len(rest) / 60:.0f} a second rejected, "
         f"statuses {sorted({outcome.status for outcome in rest})}, p99 {percentile(rest, 0.99):.0f} ms; memory {100 * (after / before - 1):+.1f} %; {summary('after', calm)}")
    rejected = [outcome for outcome in burst if outcome.status != 200]
    assert rejected and all(outcome.status == 503 and outcome.headers.get("Retry-After") == "1" for outcome in rejected)
    assert len(seen) / 60 > 5 * peak
    assert {outcome.status for outcome in rest} <= {503, 429}
    assert len(good) / 60 >= 0.8 * peak and percentile(good, 0.99) < 1000
    assert percentile(rest, 0.99) < 50
    assert after < 1.1 * before
    assert {outcome.status for outcome in calm} == {200} and percentile(calm, 0.99) < 500


def test_soak(ready: Run, tmp_path: Path) -> None:
    """Half load for ten minutes: neither memory nor descriptors grow, and nothing fails."""
    with serving(ready, "--log-dir", str(ready.folder / "soak")) as served:
        peak = knee(served, tmp_path)
        replica = family(served, "ServeReplica")[0]
        h2load(served, 200, 60, 0.5 * peak, tmp_path)  # caches fill
        time.sleep(40)  # HAProxy keeps its connections to the replica for half a minute
        before = replica.memory_info().rss, replica.num_fds()
        seen = h2load(served, 200, 600, 0.5 * peak, tmp_path)
        time.sleep(40)
        after = replica.memory_info().rss, replica.num_fds()
    tell(f"peak {peak:.0f} requests/s; {summary('ten minutes at half of it', seen)}; memory {before[0] / 1e6:.0f} to {after[0] / 1e6:.0f} MB, descriptors {before[1]} to {after[1]}")
    assert {outcome.status for outcome in seen} == {200}
    assert after[0] < 1.02 * before[0]
    assert after[1] <= before[1] + 5


def test_ten_minutes_near_the_knee(ready: Run, tmp_path: Path) -> None:
    """Open-loop load at 80 % of what it can do, for ten minutes: no error."""
    with serving(ready) as served:
        peak = knee(served, tmp_path)
        seen = h2load(served, 400, 600, 0.8 * peak, tmp_path)
    tell(f"peak {peak:.0f} requests/s; {summary('ten minutes at 80 % of it', seen)}")
    assert {outcome.status for outcome in seen} == {200}
    assert len(seen) > 0.95 * 0.8 * peak * 600  # as many as were to be sent


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    """Writes down what was seen."""
    yield
    if folder := os.environ.get("MADEWITHML_LOAD_REPORT"):
        Path(folder).write_text("\n".join(TABLE) + "\n", encoding="utf-8")
