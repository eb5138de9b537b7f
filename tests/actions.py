"""Plays GitHub: runs the `run:` steps of a workflow as a runner does, and answers the part of the REST API that they use."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

REPOSITORY = {"id": 1, "full_name": "team/classifier", "default_branch": "main"}
BOT = "github-actions[bot]"


@dataclass
class GitHub:
    """What GitHub knows, and its API over HTTP. It asks for a job's token and for the permission of that job."""

    url: str = ""
    pulls: list[dict] = field(default_factory=list)
    comments: list[dict] = field(default_factory=list)
    runs: list[dict] = field(default_factory=list)
    artifacts: list[dict] = field(default_factory=list)
    tokens: dict[str, dict[str, str]] = field(default_factory=dict)
    trouble: set[str] = field(default_factory=lambda: {"GET", "POST", "PATCH"})  # the first of each is answered with 502

    def token(self, permissions: dict[str, str]) -> str:
        """The token of a job with these permissions."""
        self.tokens[f"token-{len(self.tokens)}"] = permissions
        return f"token-{len(self.tokens) - 1}"

    def upload(self, run: int, name: str, content: bytes) -> None:
        self.artifacts.append({"id": len(self.artifacts) + 1, "name": name, "run": run, "expired": False, "content": content})

    def answer(self, method: str, path: str, query: dict[str, str], body: dict) -> tuple[Any, str, str]:
        """What is asked for, the permission that it needs, and the path of a list's pages."""
        if path == "/repos/team/classifier/pulls":
            owner, branch = query["head"].split(":")
            return [pull for pull in self.pulls if pull["state"] == query["state"] and pull["head"]["user"]["login"] == owner and pull["head"]["ref"] == branch], "pull-requests: read", path
        if found := re.fullmatch(r"/repos/team/classifier/issues/(\d+)/comments|/repositories/1/issues/(\d+)/comments", path):
            number = int(found[1] or found[2])
            if method == "POST":
                self.comments.append({"id": 1000 + len(self.comments), "pull": number, "user": {"login": BOT}, "html_url": f"https://github.example/team/classifier/pull/{number}", **body})
                return self.comments[-1], "pull-requests: write", ""
            return [comment for comment in self.comments if comment["pull"] == number], "pull-requests: read", f"/repositories/1/issues/{number}/comments"
        if found := re.fullmatch(r"/repos/team/classifier/issues/comments/(\d+)", path):
            comment = next(comment for comment in self.comments if comment["id"] == int(found[1]))
            comment.update(body)
            return comment, "pull-requests: write", ""
        if found := re.fullmatch(r"/repos/team/classifier/actions/runs/(\d+)/artifacts", path):
            return {"artifacts": [{k: v for k, v in one.items() if k != "content"} for one in self.artifacts if one["run"] == int(found[1]) and one["name"] == query["name"]]}, "actions: read", ""
        if found := re.fullmatch(r"/repos/team/classifier/actions/workflows/([\w.]+)/runs", path):
            return {"workflow_runs": [run for run in reversed(self.runs) if all(run[name] == query[name] for name in ("branch", "event", "status")) and run["workflow"] == found[1]]}, "actions: read", ""
        if found := re.fullmatch(r"/repos/team/classifier/actions/artifacts/(\d+)/zip", path):
            return int(found[1]), "actions: read", ""
        raise KeyError(path)


def _handler(hub: GitHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def send(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def answer(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            if parts.path.startswith("/store/"):  # where artifacts lie is another host, which must not see the token
                artifact = hub.artifacts[int(parts.path.rsplit("/", 1)[1]) - 1]
                return self.send(200, artifact["content"]) if "Authorization" not in self.headers else self.send(400, b"")
            permissions = hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
            if permissions is None:
                return self.send(401, b"{}")
            if self.command in hub.trouble:
                hub.trouble.discard(self.command)
                return self.send(502, b"{}")
            found, needed, pages = hub.answer(self.command, parts.path, query, body)
            name, level = needed.split(": ")
            if permissions.get(name) not in ({"write"} if level == "write" else {"read", "write"}):
                return self.send(403, b"{}")
            if isinstance(found, int):
                return self.send(302, b"", Location=f"http://localhost:{self.server.server_port}/store/{found}")
            headers = {}
            if pages and isinstance(found, list):  # two to a page, so that there are pages
                page = int(query.get("page", 1))
                if len(found) > 2 * page:
                    headers["Link"] = f'<{hub.url}{pages}?page={page + 1}>; rel="next"'
                found = found[2 * page - 2:2 * page]
            return self.send(201 if self.command == "POST" else 200, json.dumps(found).encode(), **headers)

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *args: object) -> None:
            pass
    return Handler


@contextmanager
def github() -> Iterator[GitHub]:
    """GitHub for the length of the block."""
    hub = GitHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()


# --- a runner

class Context(dict):
    """An object of GitHub's expressions: what is missing is empty."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name, "")
        return Context(value) if isinstance(value, dict) else value


def evaluate(expression: str, contexts: dict[str, Any]) -> Any:
    """The value of an expression of GitHub's: the few operators that our workflows use are Python's in other letters."""
    python = expression.replace("&&", " and ").replace("||", " or ")
    python = re.sub(r"!(?!=)", " not ", python)
    return eval(python, {"__builtins__": {}}, contexts)  # noqa: S307  our own workflow files


def fill(text: Any, contexts: dict[str, Any]) -> str:
    """The text with its `${{ }}` replaced."""
    def value(found: re.Match) -> str:
        result = evaluate(found[1].strip(), contexts)
        return str(result).lower() if isinstance(result, bool) else str(result)
    return re.sub(r"\$\{\{(.*?)\}\}", value, str(text))


@dataclass
class Played:
    """A job that was run."""

    outcome: dict[str, str]  # of each step
    said: dict[str, str]  # by each step
    summary: str

    @property
    def success(self) -> bool:
        return "failure" not in self.outcome.values()


def lend_environment(checkout: Path) -> None:
    """A `.venv` that is this test's own environment: `make install` finds it up to date, where a runner would need minutes."""
    folder = checkout / ".venv"
    folder.mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / part).symlink_to(Path(sys.prefix) / part)
    (folder / ".installed").touch()


def play(workflow: str, origin: Path, checkout: Path, hub: GitHub, event: dict, contexts: dict[str, Any], before: dict[str, Callable[[], None]] | None = None) -> Played:
    """Runs the only job of a workflow in a fresh clone of `origin`, its steps in order, as GitHub's runner does; `before` is called before the steps of these names."""
    shutil.rmtree(checkout, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(origin), str(checkout)], check=True)
    definition = yaml.safe_load((checkout / ".github" / "workflows" / workflow).read_text(encoding="utf-8"))
    [job] = definition["jobs"].values()
    work = checkout.parent / f"{checkout.name}-runner"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for name in ("event.json", "summary.md", "output", "path", "env"):
        (work / name).touch()
    (work / "event.json").write_text(json.dumps(event), encoding="utf-8")
    about = Context({"event": event, "repository": REPOSITORY["full_name"], "token": hub.token(job["permissions"]), **contexts.get("github", {})})
    failed, steps = [], Context()
    scope = {"github": about, "secrets": Context(contexts.get("secrets", {})), "vars": Context(contexts.get("vars", {})), "steps": steps, "true": True, "false": False,
             "success": lambda: not failed, "failure": lambda: bool(failed), "cancelled": lambda: False, "always": lambda: True}
    played = Played({}, {}, "")
    if "if" in job and not evaluate(job["if"], scope):
        return played
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MADEWITHML_", "RAY_", "GITHUB_", "MAKE", "MFLAGS"))} | {
        "CI": "true", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(checkout), "GITHUB_ACTIONS": "true", "GITHUB_ACTOR": "octocat", "GITHUB_API_URL": hub.url,
        "GITHUB_SERVER_URL": "https://github.example", "GITHUB_REPOSITORY": REPOSITORY["full_name"], "GITHUB_RUN_ID": str(about.run_id), "GITHUB_EVENT_PATH": str(work / "event.json"),
        "GITHUB_STEP_SUMMARY": str(work / "summary.md"), "GITHUB_OUTPUT": str(work / "output"), "GITHUB_PATH": str(work / "path"), "GITHUB_ENV": str(work / "env"), "GITHUB_WORKSPACE": str(checkout)}
    scope["env"] = Context({name: fill(value, scope) for name, value in {**definition.get("env", {}), **job.get("env", {})}.items()})
    for step in flat(job["steps"], checkout):
        name = step.get("name") or step.get("run") or step["uses"].split("@")[0]
        asked = str(step.get("if", "success()")).removeprefix("${{").removesuffix("}}")
        if not re.search(r"(success|failure|cancelled|always)\(\)", asked):
            asked = f"success() && ({asked})"
        if not evaluate(asked, scope):
            steps[step.get("id", "")] = {"outcome": "skipped"}
            played.outcome[name] = "skipped"
            continue
        if before and name in before:
            before[name]()
        if "uses" in step:
            use(step, checkout, hub, about)
            code, said = 0, ""
        else:
            variables = {key: fill(value, scope) for key, value in step.get("env", {}).items()}
            assert "${{" not in step["run"]
            done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=checkout, env=environment | scope["env"] | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900)
            code, said = done.returncode, done.stdout
        played.outcome[name], played.said[name] = "failure" if code else "success", said
        steps[step.get("id", "")] = {"outcome": played.outcome[name]}
        if code:
            failed.append(name)
    played.summary = (work / "summary.md").read_text(encoding="utf-8")
    return played


def flat(steps: list[dict], checkout: Path) -> Iterator[dict]:
    """The steps, with those of our own actions in their place."""
    for step in steps:
        if step.get("uses", "").startswith("$/"):
            lend_environment(checkout)
            yield from yaml.safe_load((checkout / step["uses"][2:] / "action.yaml").read_text(encoding="utf-8"))["runs"]["steps"]
        else:
            yield step


def use(step: dict, checkout: Path, hub: GitHub, about: Context) -> None:
    """What an action of GitHub's does, as far as it matters here."""
    action = step["uses"].split("@")[0]
    if action == "actions/upload-artifact":
        patterns = step["with"]["path"].split()
        found = [path for pattern in patterns for match in checkout.glob(pattern.rstrip("/")) for path in ([match] if match.is_file() else match.rglob("*")) if path.is_file()]
        if found:
            root = os.path.commonpath([path.parent for path in found])
            hub.upload(about.run_id, step["with"]["name"], zipped({str(path.relative_to(root)): path.read_bytes() for path in found}))
    else:
        assert action in {"actions/checkout", "actions/setup-python"}, action


def zipped(files: dict[str, bytes | str]) -> bytes:
    with io.BytesIO() as data:
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return data.getvalue()
