"""The files of `.github/`: read by GitHub's checkers and schemas, and held to rules of our own.

A test takes what it reads from `ROOT`. `test_mistake_is_found` runs it on a copy with a mistake.
"""
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "workflows": "workflows/*.yaml", "actions": "actions/*/action.yaml",
    "issue-forms": "ISSUE_TEMPLATE/[bf]*.yml", "issue-config": "ISSUE_TEMPLATE/config.yml"}
WORKFLOWS = sorted(path.stem for path in (ROOT / ".github" / "workflows").glob("*.yaml"))


def read(workflow: str) -> str:
    return (ROOT / ".github" / "workflows" / f"{workflow}.yaml").read_text(encoding="utf-8")


def run_checker(program: str, *args: str | Path) -> None:
    command = [str(Path(sys.executable).with_name(program)), *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint() -> None:
    paths = [f".github/workflows/{name}.yaml" for name in WORKFLOWS]
    run_checker("actionlint", "-no-color", "-shellcheck=", "-pyflakes=", *paths)


def test_zizmor() -> None:
    options = ("--offline", "--no-progress", "--persona", "auditor", "--strict-collection")
    run_checker("zizmor", *options, ".github")


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_of_github(name: str) -> None:
    paths = sorted((ROOT / ".github").glob(SCHEMAS[name]))
    run_checker("check-jsonschema", "--builtin-schema", f"vendor.github-{name}", *paths)


def test_schema_of_dependabot() -> None:
    path = ROOT / ".github" / "dependabot.yml"
    run_checker("check-jsonschema", "--builtin-schema", "vendor.dependabot", path)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_permissions_are_least(name: str) -> None:
    """Rights are given by job, and none to write where the code of a pull request runs."""
    workflow = yaml.safe_load(read(name))
    assert workflow["permissions"] == {} and workflow["concurrency"]["group"]
    assert "pull_request_target" not in read(name)
    for job in workflow["jobs"].values():
        assert job["permissions"] and job["timeout-minutes"] <= 120
        if "pull_request" in workflow[True]:  # the key `on`
            assert set(job["permissions"].values()) == {"read"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned(name: str) -> None:
    pinned = r"\$/\.github/actions/\w+|[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
    for action in re.findall(r"uses: (.+)", read(name)):
        assert re.fullmatch(pinned, action.strip()), action
    for job in yaml.safe_load(read(name))["jobs"].values():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False and "ref" not in step["with"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_steps_are_short_and_their_commands_exist(name: str) -> None:
    """One or two lines that call targets of the Makefile, or commands with options they have."""
    import typer.main

    from madewithml.cli import app
    commands = typer.main.get_command(app).commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    jobs = yaml.safe_load(read(name))["jobs"].values()
    for script in [step["run"] for job in jobs for step in job["steps"] if "run" in step]:
        assert "${{" not in script and len(script.strip().splitlines()) <= 2, script
        for program, command, *words in map(str.split, script.strip().splitlines()):
            if program == "make":
                assert re.search(rf"^{command}:", makefile, re.M), script
                continue
            assert program == ".venv/bin/madewithml" and command in commands, script
            known = {option for parameter in commands[command].params for option in parameter.opts}
            words = words[:words.index("--")] if "--" in words else words
            assert {word for word in words if word.startswith("--")} <= known, script


def test_devcontainer_runs_a_target_of_the_makefile() -> None:
    path = ROOT / ".devcontainer" / "devcontainer.json"
    program, target = json.loads(path.read_text(encoding="utf-8"))["postCreateCommand"].split()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert program == "make" and re.search(rf"^{target}:", makefile, re.M)


@pytest.mark.parametrize(("test", "name", "right", "wrong"), [
    (test_actionlint, "workloads", "env.CLUSTER != 'true'", "secrets.RAY_ADDRESS == ''"),
    (test_zizmor, "workloads", "run $OPTIONS", "run ${{ github.event.pull_request.title }}"),
    (test_schemas_of_github, "workflows", "timeout-minutes: 60", "timeout-minutes: soon"),
    (test_schemas_of_github, "actions", "using: composite", "using: magic"),
    (test_schemas_of_github, "issue-forms", "type: textarea", "type: magic"),
    (test_schema_of_dependabot, "", "interval: monthly", "interval: soon"),
    (test_permissions_are_least, "workloads", "permissions: {}", "permissions: read-all"),
    (test_permissions_are_least, "workloads", "contents: read", "contents: write"),
    (test_permissions_are_least, "workloads", "timeout-minutes: 120", "timeout-minutes: 360"),
    (test_actions_are_pinned, "workloads", " # v6.0.3", ""),
    (test_actions_are_pinned, "workloads", "df4cb1c069e1874edd31b4311f1884172cec0e10", "v6"),
    (test_actions_are_pinned, "workloads", "credentials: false", "credentials: true"),
    (test_steps_are_short_and_their_commands_exist, "workloads", "madewithml run", "pip install"),
    (test_steps_are_short_and_their_commands_exist, "workloads", "$OPTIONS", "${{ github.ref }}"),
    (test_steps_are_short_and_their_commands_exist, "tests", "make test", "make tests"),
    (test_steps_are_short_and_their_commands_exist, "comment", "--event", "--events"),
])
def test_mistake_is_found(test: Callable, name: str, right: str, wrong: str, tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    shutil.copy(ROOT / "Makefile", tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    texts = {path: path.read_text(encoding="utf-8")
             for path in (tmp_path / ".github").rglob("*.y*ml")}
    assert any(right in text for text in texts.values())
    for path, text in texts.items():
        path.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test(name) if name and test.__code__.co_argcount else test()
