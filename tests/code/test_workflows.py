"""The files of `.github/`: against the checkers of GitHub's workflows, and against our own rules. Each check is shown to refuse a broken file."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yaml"))
CHECKERS = {
    "actionlint": ["actionlint", "-no-color", "-shellcheck=", "-pyflakes=", *(f".github/workflows/{path.name}" for path in WORKFLOWS)],
    "zizmor": ["zizmor", "--offline", "--no-progress", "--persona", "auditor", "--strict-collection", ".github"],
    "schema of workflows": ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *(f".github/workflows/{path.name}" for path in WORKFLOWS)],
    "schema of actions": ["check-jsonschema", "--builtin-schema", "vendor.github-actions", *(str(path.relative_to(ROOT)) for path in ACTIONS)],
}
# What each checker must see: the file, a text in it, and what somebody might make of it.
MISTAKES = {
    "actionlint": ("workloads.yaml", "env.CLUSTER != 'true'", "secrets.RAY_ADDRESS == ''"),
    "zizmor": ("workloads.yaml", "madewithml run $OPTIONS", "madewithml run ${{ github.event.pull_request.title }}"),
    "schema of workflows": ("tests.yaml", "timeout-minutes: 60", "timeout-minutes: soon"),
    "schema of actions": ("../actions/setup/action.yaml", "using: composite", "using: magic"),
}


def check(name: str, folder: Path) -> subprocess.CompletedProcess:
    program, *options = CHECKERS[name]
    return subprocess.run([str(Path(sys.executable).with_name(program)), *options], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", CHECKERS)
def test_checkers_find_nothing(name: str) -> None:
    done = check(name, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CHECKERS)
def test_checkers_see_a_mistake(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    file, right, wrong = MISTAKES[name]
    path = tmp_path / ".github" / "workflows" / file
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    done = check(name, tmp_path)
    assert done.returncode != 0, done.stdout + done.stderr


# --- our own rules

def guard(path: Path, text: str) -> None:
    """Least rights, everything pinned, short steps, nothing of a stranger's in a command."""
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {} and workflow["concurrency"]["group"], path.name
    assert "pull_request_target" not in text
    for line in re.findall(r"uses: (.+)", text):
        assert re.fullmatch(r"\$/\.github/actions/\w+|[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line.strip()), f"{path.name}: {line}"
    for name, job in workflow["jobs"].items():
        assert job["permissions"] and job["timeout-minutes"] <= 120, f"{path.name}: {name}"
        if workflow[True].keys() & {"pull_request"}:
            assert set(job["permissions"].values()) == {"read"}, f"{path.name}: {name} may write while strangers' code runs"
        for step in job["steps"]:
            if "run" in step:
                lines = step["run"].strip().splitlines()
                assert len(lines) <= 2 and all(re.match(r"(\.venv/bin/madewithml|make) ", line) for line in lines), f"{path.name}: {step['run']}"
                assert "${{" not in step["run"], f"{path.name}: {step['run']}"
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False and "ref" not in step["with"], path.name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_our_rules(path: Path) -> None:
    guard(path, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("right", "wrong"), [
    ("permissions: {}", "permissions: read-all"), (" # v6.0.3", ""), ("@df4cb1c069e1874edd31b4311f1884172cec0e10", "@v6"), ("contents: read", "contents: write"),
    ("persist-credentials: false", "persist-credentials: true"), ("run: .venv/bin/madewithml run $OPTIONS", "run: pip install x"), ("run $OPTIONS", "run ${{ github.head_ref }}"), ("timeout-minutes: 120", "timeout-minutes: 360"),
])
def test_our_rules_refuse(right: str, wrong: str) -> None:
    path = next(path for path in WORKFLOWS if path.stem == "workloads")
    text = path.read_text(encoding="utf-8")
    assert right in text
    with pytest.raises(AssertionError):
        guard(path, text.replace(right, wrong))


def test_every_workflow_of_the_issue_is_there() -> None:
    assert {path.stem for path in WORKFLOWS} == {"comment", "documentation", "monitor", "release", "serve", "tests", "workloads"}


def test_targets_and_commands_exist() -> None:
    """What the steps call is there: targets of the Makefile, commands of the package and their options."""
    import typer.main

    from madewithml.cli import app
    commands, targets = typer.main.get_command(app).commands, re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for path in WORKFLOWS:
        steps = [step for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]]
        for line in [line for step in steps for line in step.get("run", "").splitlines()]:
            program, command, *rest = line.split()
            if program == "make":
                assert command in targets, f"{path.name}: {line}"
            else:
                assert command in commands, f"{path.name}: {line}"
                options = {name for parameter in commands[command].params for name in parameter.opts}
                own = rest[:rest.index("--")] if "--" in rest else rest
                assert {word for word in own if word.startswith("--")} <= options, f"{path.name}: {line}"
