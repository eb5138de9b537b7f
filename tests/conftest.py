"""What the tests share: one run of the whole pipeline, made by the command line as a user calls it."""
import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = ROOT.parent / "shared" / "data" / "course_dataset.csv"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background; what is started here would inherit it and never end by Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment_of(variables: dict[str, str]) -> dict[str, str]:
    """This process's environment for a command of the project, without what points it elsewhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MADEWITHML_", "RAY_ADDRESS"))}
    return environment | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **variables}


def run_cli(*args: str, cwd: Path, timeout: int = 600, **variables: str) -> subprocess.CompletedProcess:
    """Runs `madewithml ARGS` in `cwd`, with its storage there."""
    command = [str(Path(sys.executable).with_name("madewithml")), *args]
    return subprocess.run(command, cwd=cwd, env=environment_of(variables), capture_output=True, text=True, timeout=timeout, check=False)


# Most commands spend seconds on importing Ray, MLflow and PyTorch. A server imports them once; each command is a fork of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"madewithml.{name}" for name in ("retrain", "monitor", "serve", "tune", "submit", "local_cluster", "pr_comment", "cli")])


def _command(args: tuple[str, ...], cwd: Path, environment: dict[str, str], output: Path) -> None:
    """The command itself, in its own process."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()  # that of the server is as old as the server
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["madewithml", *args]
    from madewithml.cli import main
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which a fork of multiprocessing leaves out


def call_cli(*args: str, cwd: Path, timeout: int = 600, **variables: str) -> subprocess.CompletedProcess:
    """The same in a second instead of eight, for what is not about starting up."""
    with tempfile.TemporaryDirectory() as output:
        process = FORKS.Process(target=_command, args=(args, cwd, environment_of(variables), Path(output)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        said, complained = (Path(output, name).read_text(encoding="utf-8") if Path(output, name).exists() else "" for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(args, process.exitcode, said, complained)


def kill_cli(*args: str, cwd: Path, at: str, linger: float = 0, **variables: str) -> None:
    """Runs `madewithml ARGS` and kills it (-9) `linger` seconds after a line with `at` shows; returns when its children have noticed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", **variables}
    command = [str(Path(sys.executable).with_name("madewithml")), *args]
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as process:
        family = []
        for line in process.stdout:
            if at in line:
                time.sleep(linger)
                family = psutil.Process(process.pid).children(recursive=True)
                break
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 90  # two helpers of Ray notice after a minute
    while (left := [child for child in family if running(child)]) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left, left  # nothing stays behind


def running(process: psutil.Process) -> bool:
    """Whether it still runs: one that ended and that nobody has asked about does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Run:
    """A finished run: where it was made and what it wrote."""

    folder: Path

    def cli(self, *args: str) -> subprocess.CompletedProcess:
        return call_cli(*args, cwd=self.folder)

    @property
    def results(self) -> Path:
        return self.folder / "results" / "main"

    def json(self, workload: str) -> dict:
        return json.loads((self.results / f"{workload}.json").read_text(encoding="utf-8"))

    @property
    def run_id(self) -> str:
        return self.json("train")["run_id"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The embedded data, trained for two epochs, evaluated, predicted and registered."""
    folder = tmp_path_factory.mktemp("run")
    done = run_cli("run", "--num-epochs", "2", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return Run(folder)


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of the fault tests, where they ran."""
    faults = sys.modules.get("tests.system.test_faults")
    if faults and (table := faults.summary()):
        terminalreporter.section("faults")
        terminalreporter.write_line(table)
