"""Fixtures and helpers of all tests: commands of the project, and one trained model."""
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
from subprocess import CompletedProcess

import psutil
import pytest

ROOT = Path(__file__).parents[1]
CLI = str(Path(sys.executable).with_name("madewithml"))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background: the processes of the tests would inherit it and ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the course's data and model tests."""
    parser.addoption("--dataset-loc", help="labeled table that tests/data checks and tests/model "
                                           "evaluates on (default: the embedded ones)")
    parser.addoption("--run-id", help="MLflow run whose classifier tests/model checks (default: "
                                      "one is trained)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A table that is given is checked instead of the embedded ones."""
    if config.getoption("--dataset-loc") and collection_path.name == "test_datasets.py":
        return True
    return None


def get_clean_env(**variables: str) -> dict[str, str]:
    """This process's environment for a command of the project, without what points it elsewhere."""
    prefixes = ("MADEWITHML_", "RAY_", "GITHUB_", "MAKE", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return env | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **variables}


def run_cli(*args: str, cwd: Path, timeout: int = 600, **variables: str) -> CompletedProcess:
    """Runs `madewithml ARGS` in `cwd`, with its storage there."""
    env = get_clean_env(**variables)
    return subprocess.run([CLI, *args], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=timeout, check=False)


# Most commands spend seconds on importing Ray, MLflow and PyTorch. A server imports them once.
FORK_SERVER = multiprocessing.get_context("forkserver")
MODULES = [path.stem for path in (ROOT / "madewithml").glob("[a-z]*.py")]
FORK_SERVER.set_forkserver_preload([f"madewithml.{name}" for name in MODULES])


def _run_command(args: tuple[str, ...], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ.clear()  # it is as old as the server
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["madewithml", *args]
    from madewithml.cli import main
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which a fork of multiprocessing leaves out


def fork_cli(*args: str, cwd: Path, timeout: int = 600, **variables: str) -> CompletedProcess:
    """`run_cli` in a second instead of eight, for tests that are not about starting up."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        arguments = (args, cwd, get_clean_env(**variables), files)
        process = FORK_SERVER.Process(target=_run_command, args=arguments)
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        stdout, stderr = (file.read_text(encoding="utf-8") for file in files)
        return CompletedProcess(args, process.exitcode, stdout, stderr)


def kill_cli(*args: str, cwd: Path, at: str, linger: float = 0, **variables: str) -> None:
    """Runs `madewithml ARGS` and kills it `linger` seconds after a line with `at` shows."""
    env = get_clean_env(PYTHONUNBUFFERED="1", **variables)
    with subprocess.Popen([CLI, *args], cwd=cwd, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, start_new_session=True) as process:
        children = []
        if any(at in line for line in process.stdout):
            time.sleep(linger)
            children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    wait_until_ended(children, 90)  # two helpers of Ray notice after a minute


def wait_until_ended(processes: list[psutil.Process], timeout: float) -> None:
    """Waits until none of them runs; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while running := [process for process in processes if is_running(process)]:
        assert time.monotonic() < end, running
        time.sleep(0.2)


def is_running(process: psutil.Process) -> bool:
    """Whether it runs: a zombie does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Run:
    """A finished run: where it was made and what it wrote."""

    folder: Path

    def cli(self, *args: str) -> CompletedProcess:
        return fork_cli(*args, cwd=self.folder)

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


@pytest.fixture(scope="session")
def promoted(trained: Run) -> Run:
    """The same run, whose version is the champion: what can be promoted once a session."""
    done = trained.cli("promote")
    assert done.returncode == 0, done.stdout + done.stderr
    return trained


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of the fault tests, where they ran."""
    faults = sys.modules.get("tests.system.test_faults")
    if faults and (table := faults.summary()):
        terminalreporter.section("faults")
        terminalreporter.write_line(table)
