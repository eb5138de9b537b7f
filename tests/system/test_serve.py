"""The service as its clients, its operator and a stranger meet it: one `madewithml serve`, started once."""
import http.client
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
from pyarrow import parquet

from ..conftest import ROOT, Run, get_clean_env, is_running

HOLDOUT = ROOT / "datasets" / "holdout.csv"
ITEM = {"title": "YOLO in the browser", "description": "Finds objects in a webcam's picture, without a server."}


@dataclass
class Served:
    """A running service."""

    url: str
    process: subprocess.Popen
    run: Run

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def ask(self, path: str, body: object = None, method: str | None = None, raw: bytes | None = None, **headers: str) -> tuple[int, object, dict]:
        """Status, body and headers of an answer."""
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"content-type": "application/json", **headers}, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                text, status, got = answer.read(), answer.status, dict(answer.headers)
        except urllib.error.HTTPError as error:
            text, status, got = error.read(), error.code, dict(error.headers)
        kind = next((value for name, value in got.items() if name.lower() == "content-type"), "")
        return status, json.loads(text) if kind.startswith("application/json") else text.decode(), {name.lower(): value for name, value in got.items()}


@contextmanager
def serving(run: Run, *options: str, driver: Path | None = None, **variables: str) -> Iterator[Served]:
    """`madewithml serve`, or a driver of its own, for the length of the block; nothing of it is left afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(driver), str(port)] if driver else [str(Path(sys.executable).with_name("madewithml")), "serve", "--port", str(port), *options]
    with subprocess.Popen(command, cwd=run.folder, env=get_clean_env(**variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as process:
        try:
            said = ""
            while "Ctrl-C stops it" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            yield Served(f"http://127.0.0.1:{port}", process, run)
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            if not driver:
                process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)  # closes standard input, which ends a driver
            until = time.monotonic() + 30
            while (left := [child for child in family if is_running(child)]) and time.monotonic() < until:
                time.sleep(0.2)
            assert not left, left
            assert process.returncode == 0


@pytest.fixture(scope="module")
def served(trained: Run) -> Iterator[Served]:
    done = trained.cli("promote")
    assert done.returncode == 0, done.stdout + done.stderr
    with serving(trained, "--log-dir", str(trained.folder / "log"), "--allowed-data-dir", str(ROOT / "datasets"), "--config", '{"log_flush_interval_s": 1, "poll_interval_s": 0.5}') as service:
        yield service


def test_courses_clients(served: Served) -> None:
    assert served.ask("/")[1] == {"message": "OK", "status-code": 200, "data": {}}
    assert served.ask("/run_id/")[1] == {"run_id": served.run.run_id}
    status, answer, _ = served.ask("/predict/", ITEM)
    assert status == 200
    assert answer["results"][0]["prediction"] == "computer-vision"
    assert sum(answer["results"][0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert (answer["version"], answer["run_id"]) == (1, served.run.run_id)
    judged = served.ask("/evaluate/", {"dataset": "holdout.csv"})[1]
    assert judged["results"]["overall"]["f1"] == pytest.approx(served.run.json("evaluate")["overall"]["f1"], abs=1e-9)


def test_health_version_metrics(served: Served) -> None:
    assert served.ask("/v2/health/live")[1] == {"live": True} and served.ask("/v2/health/ready")[1] == {"ready": True}
    about = served.ask("/version")[1]
    assert (about["version"], about["alias"], about["rejected"], len(about["labels"])) == (1, "champion", None, 4)
    served.ask("/predict/", [ITEM] * 3)
    text = served.ask("/metrics")[1]
    for name in ("madewithml_requests_total{route=\"/predict/\",status=\"200\"}", "madewithml_predictions_total{label=\"computer-vision\",version=\"1\"}", "madewithml_request_seconds_bucket",
                 "madewithml_batch_size_bucket", "madewithml_confidence_bucket", "madewithml_in_flight"):
        assert name in text, name


def test_pages_need_nothing_from_outside(served: Served) -> None:
    for path in ("/ui", "/docs/", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
        status, text, headers = served.ask(path)
        assert status == 200, path
        if path in ("/ui", "/docs/"):
            assert "http://" not in text and "https://" not in text, path
            assert "default-src 'none'" in headers["content-security-policy"]


@pytest.fixture(scope="module")
def page(served: Served) -> Iterator:
    """A page of a real browser, and the addresses that it asked."""
    from playwright.sync_api import sync_playwright

    chromium = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if not chromium:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.asked = []
        tab.on("request", lambda request: tab.asked.append(request.url))
        yield tab
        assert all(url.startswith((served.url, "data:")) for url in tab.asked), tab.asked
        browser.close()


def test_a_person_types_and_sees_the_class(page, served: Served) -> None:
    page.goto(f"{served.url}/ui")
    page.get_by_label("Title").fill("Detecting objects in drone video")
    page.get_by_label("Description").fill("A YOLO model draws boxes around cars and people in each frame.")
    page.get_by_role("button").click()
    page.wait_for_selector(".row.best")
    assert page.locator(".row.best .label").inner_text() == "computer-vision"
    assert page.locator(".row").count() == 4
    assert page.locator("#note").inner_text().startswith("computer-vision, predicted by version")
    page.screenshot(path=served.run.folder / "ui.png")


def test_examples_work_when_clicked(page, served: Served) -> None:
    page.goto(f"{served.url}/docs")
    page.get_by_text("/predict/", exact=True).first.click()
    page.get_by_role("button", name="Execute").click()
    page.wait_for_selector(".live-responses-table tbody .response-col_status")
    assert page.locator(".live-responses-table tbody .response-col_status").first.inner_text().startswith("200")
    page.screenshot(path=served.run.folder / "docs.png")


def test_examples_of_the_documentation_work(served: Served) -> None:
    paths = served.ask("/openapi.json")[1]["paths"]
    for path in ("/predict/", "/evaluate/"):
        for example in paths[path]["post"]["requestBody"]["content"]["application/json"]["examples"].values():
            assert served.ask(path, example["value"])[0] == 200, example


def same_labels(served: Served, table: str, batch: pd.DataFrame, alone: int) -> float:
    """Every row gets the label that batch prediction gave it, in a list and alone; returns the largest difference of a probability."""
    rows = pd.read_csv(ROOT / "datasets" / f"{table}.csv").fillna("")
    items, answers = rows[["title", "description"]].to_dict("records"), []
    for begin in range(0, len(items), 37):
        answers += served.ask("/predict/", items[begin:begin + 37])[1]["results"]
    assert [answer["prediction"] for answer in answers] == batch["prediction"].tolist()
    singles = [served.ask("/predict/", item)[1]["results"][0] for item in items[:alone]]
    assert [answer["prediction"] for answer in singles] == batch["prediction"].tolist()[:alone]
    return max(abs(answer["probabilities"][label] - row[f"probability_{label}"]) for some in (answers, singles) for answer, (_, row) in zip(some, batch.iterrows(), strict=False) for label in answer["probabilities"])


def test_parity_with_batch_prediction(served: Served) -> None:
    assert same_labels(served, "unlabeled", pd.read_csv(served.run.results / "predictions.csv"), 40) < 0.02


HOSTILE = {
    "empty": (b"", 422), "null": (b"null", 422), "number": (b"7", 422), "text": (b'"title"', 422), "empty list": (b"[]", 422), "no title": (b"{}", 422), "title is a number": (b'{"title": 7}', 422),
    "title is null": (b'{"title": null}', 422), "unknown field": (b'{"title": "a", "desciption": "b"}', 422), "broken": (b'{"title": "a"', 422), "trailing": (b'{"title": "a"}x', 422),
    "deep": (b"[" * 50_000, 4), "deep and closed": (b"[" * 50_000 + b"]" * 50_000, 4), "no UTF-8": (b'{"title": "\xff\xfe"}', 4), "too many": (json.dumps([ITEM] * 101).encode(), 422),
    "long title": (json.dumps({"title": "a" * 50_001}).encode(), 422), "20 MB": (b"x" * 20_000_000, 413), "lone surrogate": (b'{"title": "\\ud800"}', 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_body(name: str, served: Served) -> None:
    content, expected = HOSTILE[name]
    begin = time.monotonic()
    status, answer, _ = served.ask("/predict/", raw=content, method="POST")
    assert isinstance(answer["detail"], str) and "\n" not in answer["detail"] and "Traceback" not in answer["detail"], answer
    assert len(answer["detail"]) < 300
    assert status == expected or status // 100 == expected, (status, answer)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("dataset", ["../README.md", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.csv", "http://169.254.169.254/latest", "s3://bucket/x.csv", "\0", "a" * 900, "."])
def test_hostile_dataset(dataset: str, served: Served) -> None:
    status, answer, _ = served.ask("/evaluate/", {"dataset": dataset})
    assert (status, answer["detail"]) == (404, "There is no such table in the allowed directories.")


def test_slow_and_lying_senders(served: Served) -> None:
    """A body that does not come is answered within two seconds, and the connection is closed."""
    for head in (b"POST /predict/ HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{\"title\"", b"POST /predict/ HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
            begin = time.monotonic()
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 408"), head
            assert time.monotonic() - begin < 2


TEXTS = ["🙂", "a", "ن ص عربي", "‮txt.exe", "x" * 10_000, "12345 67890", "\t\n\r", "\x01\x02", "...", "日本語のテキスト", "<script>alert(1)</script>", "' OR 1=1 --", "e\u0301" * 100]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_unusual_but_honest_text(text: str, served: Served) -> None:
    status, answer, _ = served.ask("/predict/", {"title": text, "description": text})
    assert status == 200 and answer["results"][0]["prediction"] in {"computer-vision", "mlops", "natural-language-processing", "other"}


def test_errors_say_nothing_of_the_inside(served: Served) -> None:
    assert served.ask("/nowhere")[0] == 404
    assert served.ask("/predict/", method="GET")[0] == 405
    headers = served.ask("/predict/", ITEM)[2]
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in served.ask("/predict/", ITEM, origin="http://elsewhere.example")[2]


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def listening(served: Served) -> dict[int, str]:
    """Ports that the service's processes open to other machines, and whose they are."""
    found = {}
    for process in [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in ("127.0.0.1", "::1"):
                found[connection.laddr.port] = process.name()
    return found


def test_what_a_stranger_on_the_network_can_reach(served: Served, tmp_path: Path) -> None:
    """Only Ray's own ports, which do nothing without Ray's token; one of each replica unpickles what it gets, and does not get that far."""
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    rejected, bomb = [], tmp_path / "exploded"
    for port, name in listening(served).items():
        assert "haproxy" not in name, name
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/")
            assert connection.getresponse().status >= 400, (port, name)
        except (OSError, http.client.HTTPException):
            pass  # no HTTP
        finally:
            connection.close()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as error:
            request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Bomb(bomb)))
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=2)
        if error.value.code() == grpc.StatusCode.UNAUTHENTICATED:
            rejected.append(name)
    assert not bomb.exists()
    assert any("ServeRepli" in name for name in rejected), rejected


def test_predictions_are_logged(served: Served) -> None:
    served.ask("/predict/", {"title": "To be logged"})
    time.sleep(2.5)
    table = parquet.read_table(served.run.folder / "log")
    assert table.num_rows > 0 and table["text"].null_count == table.num_rows
    assert set(table["version"].to_pylist()) == {1}


def test_new_champion_answers_and_damaged_one_does_not(served: Served) -> None:
    """The service moves to another version in place; a damaged one never answers; and rollback brings the first one back."""
    code = """
import sys
from madewithml.tracking import CHECKPOINT, fetch_checkpoint, mlflow_client, get_run
client, old = mlflow_client(), sys.argv[1]
run = client.create_run(get_run(old).info.experiment_id).info
client.log_artifacts(run.run_id, str(fetch_checkpoint(old)), CHECKPOINT)
if sys.argv[2] == "damage":
    file = fetch_checkpoint(run.run_id) / "model.safetensors"
    content = bytearray(file.read_bytes()); content[-100] ^= 1; file.write_bytes(content)
client.set_registered_model_alias("madewithml", "previous", client.get_registered_model("madewithml").aliases["champion"])
client.set_registered_model_alias("madewithml", "champion", client.create_model_version("madewithml", run.artifact_uri, run.run_id).version)
"""
    def new_champion(what: str) -> None:
        done = subprocess.run([sys.executable, "-c", code, served.run.run_id, what], cwd=served.run.folder, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr

    new_champion("sound")
    done = served.run.cli("rollout-status", "--url", served.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert served.ask("/predict/", ITEM)[1]["version"] == 2

    new_champion("damage")
    done = served.run.cli("rollout-status", "--url", served.url, "--timeout", "5")
    assert done.returncode == 1 and "version 2 answers; rejected" in done.stderr, done.stdout + done.stderr
    assert served.ask("/predict/", ITEM)[1]["version"] == 2
    assert served.ask("/version")[1]["rejected"]["version"] == 3

    assert json.loads(served.run.cli("rollback", "--reason", "version 3 is damaged").stdout) == {"champion": 2, "previous": 3}
    assert served.run.cli("rollout-status", "--url", served.url).returncode == 0
    assert served.ask("/version")[1]["rejected"] is None
