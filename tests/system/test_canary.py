"""Thirty releases by canary under load; a third of them are bad, and the command is killed in some.
Another is judged by delayed labels.

An hour; `make test-load`.
"""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from ..conftest import CLI, Run, get_clean_env
from ..load import Outcome, open_loop, summary
from .test_serve import Served, serving
from .test_serve_load import HOLDOUT, ITEMS, find_processes

pytestmark = pytest.mark.load

# What the gate would find is let pass: here it is for the canary to find.
POLICY = {"max_metric_drop": 1, "max_class_metric_drop": 1, "max_slice_metric_drop": 1,
          "max_calibration_increase": 1, "max_new_behavior_failures": 1000, "max_p99_ms": 1e6,
          "max_p99_latency_ratio": 1e3, "max_p50_latency_ratio": 1e3, "max_size_ratio": 100,
          "canary": {"steps": [0.05, 0.5, 1], "min_step_requests": 20, "max_hours": 0.06,
                     "max_failure_rate": 0.05, "max_abstention_increase": 0.1,
                     "max_slow_increase": 0.2}}
RATE = 50  # requests/s
KINDS = ["good", "wrong", "good", "slow", "good", "ending", "good", "good", "hanging"]
NUM_RELEASES = int(os.environ.get("MADEWITHML_RELEASES", "30"))
RELEASES = [KINDS[i % len(KINDS)] for i in range(NUM_RELEASES)]
KILLED = {2, 4, 7, 12, 20}  # releases during which the command is killed


def register(run: Run, kind: str) -> int:
    """A new version of this kind, the challenger."""
    script = Path(__file__).with_name("release_model.py")
    done = subprocess.run([sys.executable, str(script), kind], cwd=run.folder, env=get_clean_env(),
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def start_canary(run: Run, *options: str) -> subprocess.Popen:
    command = [CLI, "canary", "start", "--policy", "canary.yaml", "--dataset-loc", "few.csv",
               "--results-fp", "results/canary.json", *options]
    return subprocess.Popen(command, cwd=run.folder, env=get_clean_env(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def find_canary_process(served: Served) -> int:
    """The process that computes the canary: it was started before the control's."""
    processes = find_processes(served, "madewithml.engine_process")
    return min(processes, key=lambda process: process.create_time()).pid


def harm(served: Served, kind: str, done: threading.Event) -> None:
    """Ends or stops the canary's process whenever it answers."""
    number = {"ending": signal.SIGKILL, "hanging": signal.SIGSTOP}[kind]
    while not done.wait(2):
        share = (served.get("/version").json()["canary"] or {}).get("share", 0)
        if share and find_processes(served, "madewithml.engine_process"):
            os.kill(find_canary_process(served), number)


def release(served: Served, kind: str, is_killed: bool, *options: str) -> tuple[str, int]:
    """Releases a version of this kind; its decision and version."""
    run = served.run
    version = register(run, kind)
    done = threading.Event()
    if kind in ("ending", "hanging"):
        threading.Thread(target=harm, args=(served, kind, done), daemon=True).start()
    command = start_canary(run, *options)
    if is_killed:
        for line in command.stdout:
            if line.startswith("share 50%"):
                command.kill()
                break
        command.wait()
        command = start_canary(run, *options)
    output, _ = command.communicate(timeout=400)
    done.set()
    assert command.returncode in (0, 1), output
    results = json.loads((run.folder / "results" / "canary.json").read_text(encoding="utf-8"))
    assert results["version"] == version, output
    print(f"version {version}, {kind}: {results['decision']} {results['reason']}", flush=True)
    return results["decision"], version


def count_switches(outcomes: list[Outcome], version: int) -> dict[str, int]:
    """How often callers moved to this version, and away from it, by the order of the requests."""
    by_caller = defaultdict(list)
    for i, outcome in enumerate(outcomes):
        by_caller[i % len(ITEMS)].append(json.loads(outcome.body)["version"] == version)
    switches = {"to": 0, "from": 0}
    for sides in by_caller.values():
        switches["to"] += sum(not before and after for before, after in pairwise(sides))
        switches["from"] += sum(before and not after for before, after in pairwise(sides))
    return switches


def release_under_load(served: Served, kind: str, is_killed: bool, *options: str,
                       rate: float = RATE) -> tuple[str, int, list[Outcome]]:
    """The decision, the version, and the requests during the release and after it."""
    send = lambda: open_loop(served.url + "/predict/", ITEMS, rate, len(ITEMS))
    with ThreadPoolExecutor(1) as thread:
        releasing = thread.submit(release, served, kind, is_killed, *options)
        outcomes = []
        while not releasing.done():
            outcomes += send()
    time.sleep(4)  # the service follows the alias
    outcomes += send()
    assert {outcome.status for outcome in outcomes} == {200}
    return *releasing.result(), outcomes


def write_files(run: Run, **canary: object) -> None:
    """The policy, with other fields of its canary, and the gate's holdout."""
    policy = POLICY | {"canary": POLICY["canary"] | canary}
    (run.folder / "canary.yaml").write_text(yaml.safe_dump(policy), encoding="utf-8")
    text = "title,description,tag\n" + "".join(
        f"a model of {i},which answers,{('mlops', 'other')[i % 2]}\n" for i in range(8))
    (run.folder / "few.csv").write_text(text, encoding="utf-8")


def test_thirty_releases(promoted: Run) -> None:
    """Every good release is promoted and every bad one taken back; every request is answered, and
    a caller goes to a good version once, and does not come back."""
    write_files(promoted)
    with serving(promoted, "--config", '{"poll_interval_s": 0.5}') as served:
        for i, kind in enumerate(RELEASES):
            decision, version, outcomes = release_under_load(served, kind, i in KILLED)
            print(summary(f"release {i}, {kind}: {decision}", outcomes), flush=True)
            assert decision == ("promoted" if kind == "good" else "taken back")
            switches = count_switches(outcomes, version)
            assert switches["from"] == (0 if kind == "good" else switches["to"]), switches
            answered = served.get("/version").json()["version"]
            assert (answered == version) == (kind == "good")


def test_delayed_labels(promoted: Run) -> None:
    """Where nothing else would show it, labels that come later take a wrong version back.

    They are read twice a minute, so a step is long enough for that."""
    write_files(promoted, max_disagreement=0.99, steps=[0.5, 1], min_step_requests=800)
    HOLDOUT.to_csv(promoted.folder / "labels.csv", index=False)
    config = '{"poll_interval_s": 0.5, "log_flush_interval_s": 1}'
    with serving(promoted, "--log-dir", "canary-log", "--config", config) as served:
        decision, _, outcomes = release_under_load(
            served, "wrong", False, "--labels", "labels.csv", "--log-dir", "canary-log", rate=25)
    print(summary(f"labels, wrong: {decision}", outcomes), flush=True)
    results = json.loads((promoted.folder / "results" / "canary.json").read_text(encoding="utf-8"))
    assert decision == "taken back" and results["reason"].startswith("errors"), results["reason"]
