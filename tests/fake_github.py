"""A stand-in for GitHub's REST API: the endpoints that our code calls, with tokens and pages."""
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

REPOSITORY = {"id": 1, "full_name": "team/classifier", "default_branch": "main"}
BOT = "github-actions[bot]"
PAGE_SIZE = 2


@dataclass
class FakeGitHub:
    """What GitHub knows. The next request of a method in `failing` or `lossy` gets a 502; of one in
    `lossy` it takes effect all the same."""

    url: str = ""
    pulls: list[dict] = field(default_factory=list)
    comments: list[dict] = field(default_factory=list)
    runs: list[dict] = field(default_factory=list)
    artifacts: list[dict] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)  # of the artifacts
    tokens: dict[str, dict[str, str]] = field(default_factory=dict)  # permissions of each
    failing: set[str] = field(default_factory=lambda: {"GET", "POST", "PATCH"})
    lossy: set[str] = field(default_factory=set)

    def upload(self, run: int, name: str, files: dict[str, str | bytes]) -> None:
        number = len(self.artifacts)
        self.artifacts.append({"id": number, "name": name, "run": run, "expired": False})
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in files.items():
                archive.writestr(path, data)
        self.contents.append(content.getvalue())

    def request(self, method: str, path: str, query: dict, body: dict) -> Any:
        """The answer; an artifact's is its number."""
        match [method, *path.split("/")[1:]]:
            case ["GET", "pulls"]:
                answer = select(self.pulls, state=query["state"], label=query["head"])
            case ["GET", "issues", number, "comments"]:
                answer = select(self.comments, pull=int(number))
            case ["POST", "issues", number, "comments"]:
                url = f"https://github.example/team/classifier/pull/{number}"
                answer = {"id": 1000 + len(self.comments), "pull": int(number), "html_url": url,
                          "user": {"login": BOT}, **body}
                self.comments.append(answer)
            case ["PATCH", "issues", "comments", number]:
                [answer] = select(self.comments, id=int(number))
                answer.update(body)
            case ["GET", "actions", "workflows", name, "runs"]:
                wanted = {key: query[key] for key in ("branch", "event", "status")}
                answer = {"workflow_runs": select(self.runs, workflow=name, **wanted)[::-1]}
            case ["GET", "actions", "runs", run, "artifacts"]:
                artifacts = select(self.artifacts, run=int(run), name=query["name"])
                answer = {"artifacts": artifacts}
            case ["GET", "actions", "artifacts", number, "zip"]:
                answer = int(number)
            case _:
                raise KeyError(path)
        return answer


def select(items: list[dict], **wanted: Any) -> list[dict]:
    return [item for item in items if item.items() >= wanted.items()]


class _Handler(BaseHTTPRequestHandler):
    github: FakeGitHub

    def reply(self, status: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle_request(self) -> None:
        github, url, method = self.github, urlsplit(self.path), self.command
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        authorization = self.headers.get("Authorization", "")
        if url.path.startswith("/store/"):  # another host, which must not see the token
            content = github.contents[int(url.path.removeprefix("/store/"))]
            return self.reply(400) if authorization else self.reply(200, content)
        granted = github.tokens.get(authorization.removeprefix("Bearer "))
        if granted is None or method in github.failing:
            github.failing.discard(method)
            return self.reply(401 if granted is None else 502)
        path = re.sub(r"^/(repos/team/classifier|repositories/1)", "", url.path)
        permission = "actions" if path.startswith("/actions/") else "pull-requests"
        if granted.get(permission) not in {"write", "read" if method == "GET" else "write"}:
            return self.reply(403)
        query = dict(parse_qsl(url.query))
        answer = github.request(method, path, query, body)
        if method in github.lossy:
            github.lossy.discard(method)
            self.reply(502)
        elif isinstance(answer, int):
            store = github.url.replace("127.0.0.1", "localhost")
            self.reply(302, Location=f"{store}/store/{answer}")
        elif isinstance(answer, list):
            self.reply_page(answer, path, int(query.get("page", 1)))
        else:
            self.reply(200, json.dumps(answer).encode())

    def reply_page(self, items: list[dict], path: str, page: int) -> None:
        end = page * PAGE_SIZE
        headers = {}
        if len(items) > end:  # GitHub addresses the next page by the repository's id
            next_page = f"{self.github.url}/repositories/1{path}?page={page + 1}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self.reply(200, json.dumps(items[end - PAGE_SIZE:end]).encode(), **headers)

    do_GET = do_POST = do_PATCH = handle_request

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def fake_github() -> Iterator[FakeGitHub]:
    """Serves a fake GitHub for the length of the block."""
    github = FakeGitHub()
    handler = type("Handler", (_Handler,), {"github": github})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        github.url = f"http://127.0.0.1:{server.server_port}"
        yield github
        server.shutdown()
