"""The service for its clients, its operator and an attacker: one `madewithml serve` for all."""
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import requests
from pyarrow import parquet

from madewithml.ray_session import find_free_ports

from ..conftest import CLI, ROOT, Run, get_clean_env, wait_until_ended

ITEM = {"title": "YOLO in the browser",
        "description": "Finds objects in a webcam's picture, without a server."}
LABELS = {"computer-vision", "mlops", "natural-language-processing", "other"}


@dataclass
class Served:
    """A running service."""

    url: str
    process: subprocess.Popen
    run: Run

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=30)

    def post(self, path: str, body: object = None, content: bytes | None = None,
             **headers: str) -> requests.Response:
        """Sends `body` as JSON, or `content` as it is."""
        headers = {"content-type": "application/json", **headers}
        return requests.post(self.url + path, content, body, headers=headers, timeout=30)

    def predict(self, body: object) -> dict:
        response = self.post("/predict/", body)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def serving(run: Run, *options: str, driver: Path | None = None,
            command: tuple[str, ...] = (CLI, "serve"), **variables: str) -> Iterator[Served]:
    """`madewithml serve`, or a driver, for the length of the block; no process of it remains."""
    port = find_free_ports(1)[0]
    words = [*command, "--port", str(port), *options]
    if driver:
        words = [sys.executable, str(driver), str(port)]
    with subprocess.Popen(words, cwd=run.folder, env=get_clean_env(**variables),
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True) as process:
        try:
            output = ""
            while "Ctrl-C stops it" not in output:
                line = process.stdout.readline()
                assert line, output
                output += line
            yield Served(f"http://127.0.0.1:{port}", process, run)
        finally:
            children = []
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
            if not driver:
                process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)  # closes standard input, which ends a driver
            wait_until_ended(children, 30)
            assert process.returncode == 0


@pytest.fixture(scope="module")
def served(promoted: Run) -> Iterator[Served]:
    config = '{"log_flush_interval_s": 1, "poll_interval_s": 0.5}'
    options = ("--log-dir", str(promoted.folder / "log"), "--config", config,
               "--allowed-data-dir", str(ROOT / "datasets"))
    with serving(promoted, *options) as service:
        yield service


def test_courses_clients(served: Served) -> None:
    assert served.get("/").json() == {"message": "OK", "status-code": 200, "data": {}}
    assert served.get("/run_id/").json() == {"run_id": served.run.run_id}
    response = served.predict(ITEM)
    [prediction] = response["results"]
    assert prediction["prediction"] == "computer-vision"
    assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert (response["version"], response["run_id"]) == (1, served.run.run_id)
    evaluation = served.post("/evaluate/", {"dataset": "holdout.csv"}).json()
    expected = served.run.json("evaluate")["overall"]["f1"]
    assert evaluation["results"]["overall"]["f1"] == pytest.approx(expected, abs=1e-9)


def test_health_version_metrics(served: Served) -> None:
    assert served.get("/v2/health/live").json() == {"live": True}
    assert served.get("/v2/health/ready").json() == {"ready": True}
    info = served.get("/version").json()
    assert (info["version"], info["alias"], info["rejected"]) == (1, "champion", None)
    assert len(info["labels"]) == 4
    served.predict([ITEM] * 3)
    metrics = served.get("/metrics").text
    for name in (
            'madewithml_requests_total{model="",route="/predict/",status="200"}',
            'madewithml_predictions_total{label="computer-vision",model="",version="1"}',
            "madewithml_request_seconds_bucket", "madewithml_batch_size_bucket",
            "madewithml_confidence_bucket", "madewithml_in_flight"):
        assert name in metrics, name


def test_pages_load_nothing_from_other_hosts(served: Served) -> None:
    for path in ("/ui", "/docs/", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
        response = served.get(path)
        assert response.status_code == 200, path
        if path in ("/ui", "/docs/"):
            assert "http://" not in response.text and "https://" not in response.text, path
            assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.fixture(scope="module")
def page(served: Served) -> Iterator:
    """A page of a real browser, which requests nothing from other hosts."""
    from playwright.sync_api import sync_playwright

    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, programs), None)
    if not chromium:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        urls = []
        page.on("request", lambda request: urls.append(request.url))
        yield page
        assert all(url.startswith((served.url, "data:")) for url in urls), urls
        browser.close()


def test_page_shows_the_predicted_class(page, served: Served) -> None:
    page.goto(f"{served.url}/ui")
    page.get_by_label("Title").fill("Detecting objects in drone video")
    description = "A YOLO model draws boxes around cars and people in each frame."
    page.get_by_label("Description").fill(description)
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
    status = ".live-responses-table tbody .response-col_status"
    page.wait_for_selector(status)
    assert page.locator(status).first.inner_text().startswith("200")
    page.screenshot(path=served.run.folder / "docs.png")


def test_examples_of_the_documentation_work(served: Served) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    for path in ("/predict/", "/evaluate/"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]
        for example in body["examples"].values():
            assert served.post(path, example["value"]).status_code == 200, example


def compare_predictions(served: Served, table: str, batch: pd.DataFrame, num_single: int) -> float:
    """Checks that every row gets the label of batch prediction, in a list and, for the first
    `num_single` rows, alone. Returns the largest difference of a probability."""
    rows = pd.read_csv(ROOT / "datasets" / f"{table}.csv").fillna("")
    items = rows[["title", "description"]].to_dict("records")
    chunks = [items[start:start + 37] for start in range(0, len(items), 37)]
    results = [result for chunk in chunks for result in served.predict(chunk)["results"]]
    single_results = [served.predict(item)["results"][0] for item in items[:num_single]]
    labels = batch["prediction"].tolist()
    assert [result["prediction"] for result in results] == labels
    assert [result["prediction"] for result in single_results] == labels[:num_single]
    pairs = [*zip(results, batch.to_dict("records"), strict=True),
             *zip(single_results, batch.head(num_single).to_dict("records"), strict=True)]
    return max(abs(probability - row[f"probability_{label}"])
               for result, row in pairs for label, probability in result["probabilities"].items())


def test_parity_with_batch_prediction(served: Served) -> None:
    batch = pd.read_csv(served.run.results / "predictions.csv")
    assert compare_predictions(served, "unlabeled", batch, 40) < 0.02


HOSTILE = {  # body and status; one digit stands for all statuses that begin with it
    "empty": (b"", 422),
    "null": (b"null", 422),
    "number": (b"7", 422),
    "text": (b'"title"', 422),
    "empty list": (b"[]", 422),
    "no title": (b"{}", 422),
    "title is a number": (b'{"title": 7}', 422),
    "title is null": (b'{"title": null}', 422),
    "unknown field": (b'{"title": "a", "desciption": "b"}', 422),
    "broken": (b'{"title": "a"', 422),
    "trailing": (b'{"title": "a"}x', 422),
    "deep": (b"[" * 50_000, 4),
    "deep and closed": (b"[" * 50_000 + b"]" * 50_000, 4),
    "no UTF-8": (b'{"title": "\xff\xfe"}', 4),
    "too many": (json.dumps([ITEM] * 101).encode(), 422),
    "long title": (json.dumps({"title": "a" * 50_001}).encode(), 422),
    "20 MB": (b"x" * 20_000_000, 413),
    "lone surrogate": (b'{"title": "\\ud800"}', 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_body(name: str, served: Served) -> None:
    content, expected = HOSTILE[name]
    start = time.monotonic()
    response = served.post("/predict/", content=content)
    detail = response.json()["detail"]
    assert isinstance(detail, str) and "\n" not in detail and "Traceback" not in detail, detail
    assert len(detail) < 300
    status = response.status_code
    assert status == expected or status // 100 == expected, (status, detail)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("dataset", [
    "../README.md", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "http://127.0.0.1:1/x.csv", "http://169.254.169.254/latest", "s3://bucket/x.csv",
    "\0", "a" * 900, "."])
def test_hostile_dataset(dataset: str, served: Served) -> None:
    response = served.post("/evaluate/", {"dataset": dataset})
    detail = "There is no such table in the allowed directories."
    assert (response.status_code, response.json()["detail"]) == (404, detail)


@pytest.mark.parametrize("body", [
    b'Content-Length: 500\r\n\r\n{"title"',
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
], ids=["too short", "unfinished chunk"])
def test_unfinished_body(body: bytes, served: Served) -> None:
    """A body that does not arrive is answered within two seconds with a 408."""
    head = b"POST /predict/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        start = time.monotonic()
        connection.sendall(head + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - start < 2


TEXTS = ["🙂", "a", "ن ص عربي", "‮txt.exe", "x" * 10_000, "12345 67890", "\t\n\r", "\x01\x02", "...",
         "日本語のテキスト", "<script>alert(1)</script>", "' OR 1=1 --", "e\u0301" * 100]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_unusual_but_valid_text(text: str, served: Served) -> None:
    [result] = served.predict({"title": text, "description": text})["results"]
    assert result["prediction"] in LABELS


def test_errors_and_headers_reveal_nothing(served: Served) -> None:
    assert served.get("/nowhere").status_code == 404
    assert served.get("/predict/").status_code == 405
    headers = served.post("/predict/", ITEM).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    headers = served.post("/predict/", ITEM, origin="http://elsewhere.example").headers
    assert "access-control-allow-origin" not in headers


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def find_open_ports(served: Served) -> dict[int, str]:
    """Ports that the service opens to other machines, and the names of their processes."""
    main = psutil.Process(served.process.pid)
    ports = {}
    for process in [main, *main.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            is_local = connection.laddr.ip in ("127.0.0.1", "::1")
            if connection.status == psutil.CONN_LISTEN and not is_local:
                ports[connection.laddr.port] = process.name()
    return ports


def test_open_ports_require_rays_token(served: Served, tmp_path: Path) -> None:
    """Only Ray's own ports are open to the network, and they do nothing without Ray's token.

    One port of each replica unpickles the requests that it accepts: it must not accept ours.
    """
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    exploded = tmp_path / "exploded"
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Bomb(exploded)))
    unauthenticated = []
    for port, name in find_open_ports(served).items():
        assert "haproxy" not in name, name
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/")
            assert connection.getresponse().status >= 400, (port, name)
        except (OSError, http.client.HTTPException):
            pass  # no HTTP
        finally:
            connection.close()
        with (grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
              pytest.raises(grpc.RpcError) as error):
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=2)
        if error.value.code() == grpc.StatusCode.UNAUTHENTICATED:
            unauthenticated.append(name)
    assert not exploded.exists()
    assert any("ServeRepli" in name for name in unauthenticated), unauthenticated


def test_predictions_are_logged(served: Served) -> None:
    served.predict({"title": "To be logged"})
    time.sleep(2.5)
    table = parquet.read_table(served.run.folder / "log")
    assert table.num_rows > 0 and table["text"].null_count == table.num_rows
    assert set(table["version"].to_pylist()) == {1}


NEW_CHAMPION = """
import sys
from madewithml.tracking import CHECKPOINT, fetch_checkpoint, get_run, mlflow_client

run_id, condition = sys.argv[1:]
client = mlflow_client()
run = client.create_run(get_run(run_id).info.experiment_id).info
client.log_artifacts(run.run_id, str(fetch_checkpoint(run_id)), CHECKPOINT)
if condition == "corrupt":
    path = fetch_checkpoint(run.run_id) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
champion = client.get_registered_model("madewithml").aliases["champion"]
client.set_registered_model_alias("madewithml", "previous", champion)
version = client.create_model_version("madewithml", run.artifact_uri, run.run_id).version
client.set_registered_model_alias("madewithml", "champion", version)
"""


def register_champion(run: Run, condition: str) -> None:
    """Makes a copy of the trained model the champion, `intact` or `corrupt`."""
    command = [sys.executable, "-c", NEW_CHAMPION, run.run_id, condition]
    done = subprocess.run(command, cwd=run.folder, env=os.environ | {"HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_new_champion_answers_and_corrupt_one_does_not(served: Served) -> None:
    """A new version takes over in place; a corrupt one never answers, and can be rolled back."""
    register_champion(served.run, "intact")
    done = served.run.cli("rollout-status", "--url", served.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert served.predict(ITEM)["version"] == 2

    register_champion(served.run, "corrupt")
    done = served.run.cli("rollout-status", "--url", served.url, "--timeout", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "version 2 answers; rejected" in done.stderr, done.stdout + done.stderr
    assert served.predict(ITEM)["version"] == 2
    assert served.get("/version").json()["rejected"]["version"] == 3

    done = served.run.cli("rollback", "--reason", "version 3 is damaged")
    assert json.loads(done.stdout) == {"champion": 2, "previous": 3}
    assert served.run.cli("rollout-status", "--url", served.url).returncode == 0
    assert served.get("/version").json()["rejected"] is None
