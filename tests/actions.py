"""Runs a workflow of GitHub Actions on this machine: its `run:` blocks, by bash, in a clone."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from .conftest import get_clean_env
from .fake_github import REPOSITORY, FakeGitHub


@dataclass
class WorkflowRun:
    """The only job of a workflow after it ran."""

    outcomes: dict[str, str] = field(default_factory=dict)  # of each step
    stdout: dict[str, str] = field(default_factory=dict)  # of each step, stderr within
    summary: str = ""

    @property
    def success(self) -> bool:
        return "failure" not in self.outcomes.values()


def evaluate(expression: str, values: dict[str, object]) -> str:
    """A name's value, else 'true' or 'false': GitHub's operators are those of bash's `[[ ]]`."""
    def look_up(match: re.Match) -> str:
        term = match[0]
        return term if term[0] == "'" else f" {shlex.quote(str(values.get(term, '')))}"

    name = r"\w+(?:\.\w+)+"  # a value of a context
    if re.fullmatch(name, expression):
        return str(values.get(expression, ""))
    test = re.sub(rf"'[^']*'|\w+\(\)|{name}", look_up, expression)
    script = f"shopt -s nocasematch; [[ {test} ]]"
    code = subprocess.run(["bash", "-c", script], check=False).returncode
    assert code in (0, 1), test
    return "false" if code else "true"


def is_due(step: dict, values: dict[str, object]) -> bool:
    """Whether the step is to run: its `if` implies success() where it calls no function."""
    condition = str(step.get("if", "success()")).removeprefix("${{").removesuffix("}}")
    if "()" not in condition:
        condition = f"success() && ({condition})"
    return evaluate(condition, values) == "true"


def fill(settings: dict[str, object], values: dict[str, object]) -> dict[str, str]:
    """The settings with each `${{ }}` replaced."""
    def replace(match: re.Match) -> str:
        return evaluate(match[1], values)
    return {name: re.sub(r"\$\{\{ *(.*?) *\}\}", replace, str(setting))
            for name, setting in settings.items()}


def use_action(step: dict, checkout: Path, github: FakeGitHub, run_id: int) -> None:
    """What the action does, as far as the next steps and other workflows see it."""
    action = step["uses"].split("@")[0]
    if action == "$/.github/actions/setup":  # the environment of the tests serves as `.venv`
        (checkout / ".venv").symlink_to(sys.prefix)
    elif action == "actions/upload-artifact":
        patterns = [re.sub("/$", "/**/*", path) for path in step["with"]["path"].split()]
        paths = [path for pattern in patterns for path in checkout.glob(pattern)]
        if files := {path.name: path.read_bytes() for path in paths if path.is_file()}:
            github.upload(run_id, step["with"]["name"], files)
    else:
        assert action == "actions/checkout", action


def run_workflow(workflow: str, origin: Path, checkout: Path, github: FakeGitHub, event: dict,
                 contexts: dict, before: dict[str, Callable] | None = None) -> WorkflowRun:
    """Clones `origin` and runs the steps of the workflow's only job that are due, in order.

    `contexts` are `secrets`, `vars` and what `github` has beside the event; the functions in
    `before` are called before the steps of these names.
    """
    shutil.rmtree(checkout, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(origin), str(checkout)], check=True)
    definition = (checkout / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    [job] = yaml.safe_load(definition)["jobs"].values()
    token = f"token-{len(github.tokens)}"
    github.tokens[token] = job["permissions"]
    facts = {"event": event, "run_id": 0, "token": token} | contexts.get("github", {})
    values = pd.json_normalize(contexts | {"github": facts}).to_dict("records")[0]
    values |= {"success()": "true", "failure()": "", "cancelled()": ""}
    run = WorkflowRun()
    if evaluate(job.get("if", "success()"), values) == "false":
        return run
    job_env = fill(job.get("env", {}), values)
    values |= {f"env.{name}": value for name, value in job_env.items()}
    event_path, summary_path = (checkout.with_suffix(suffix) for suffix in (".event", ".summary"))
    event_path.write_text(json.dumps(event), encoding="utf-8")
    summary_path.write_text("", encoding="utf-8")
    env = get_clean_env(
        PYTHONPATH=str(checkout), CI="true", GITHUB_ACTOR="octocat", GITHUB_API_URL=github.url,
        GITHUB_SERVER_URL="https://github.example", GITHUB_REPOSITORY=REPOSITORY["full_name"],
        GITHUB_RUN_ID=str(facts["run_id"]), GITHUB_EVENT_PATH=str(event_path),
        GITHUB_STEP_SUMMARY=str(summary_path)) | job_env
    for step in job["steps"]:
        title = step.get("name") or step["uses"].split("@")[0]
        outcome = "skipped"
        if is_due(step, values):
            (before or {}).get(title, lambda: None)()
            outcome = "success"
            if "uses" in step:
                use_action(step, checkout, github, facts["run_id"])
            else:
                done = subprocess.run(
                    ["bash", "-e", "-c", step["run"]], cwd=checkout, timeout=900, check=False,
                    env=env | fill(step.get("env", {}), values),
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                run.stdout[title] = done.stdout
                outcome = "failure" if done.returncode else "success"
        run.outcomes[title] = values[f"steps.{step.get('id')}.outcome"] = outcome
        if outcome == "failure":
            values |= {"success()": "", "failure()": "true"}
    run.summary = summary_path.read_text(encoding="utf-8")
    return run
