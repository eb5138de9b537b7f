"""The service's application in this process, without Ray, with an untrained classifier."""
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient
from pyarrow import parquet

from madewithml.config import ServeConfig
from madewithml.middleware import PUBLIC_PATHS
from madewithml.models import build_classifier, load_tokenizer, save_classifier, set_seed
from madewithml.service import PredictionService, create_app
from madewithml.tracking import (
    CHECKPOINT,
    fetch_checkpoint,
    get_or_create_experiment,
    mlflow_client,
)
from madewithml.utils import get_logger, temporary_storage

LABELS = ("computer-vision", "mlops", "natural-language-processing", "other")


def register_version(folder: Path, labels: tuple[str, ...] = LABELS,
                     name: str = "madewithml") -> str:
    """Registers an untrained classifier; the champion points to it. Returns the run's id."""
    client = mlflow_client()
    set_seed(0)
    model = build_classifier("embedded", {label: i for i, label in enumerate(labels)})
    run = client.create_run(get_or_create_experiment("demo")).info
    checkpoint = save_classifier(model, load_tokenizer("embedded"), folder / run.run_id, 64)
    client.log_artifacts(run.run_id, checkpoint, CHECKPOINT)
    version = client.create_model_version(name, run.artifact_uri, run.run_id).version
    client.set_registered_model_alias(name, "champion", version)
    return run.run_id


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Storage with an empty registered model."""
    with temporary_storage() as path:
        get_logger.cache_clear()
        mlflow_client().create_registered_model("madewithml")
        yield path
    get_logger.cache_clear()


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[PredictionService]:
    """A service of the champion, which follows it only when it is told to."""
    register_version(folder)
    config = ServeConfig(poll_interval_s=0, log_dir=str(folder / "log"), request_timeout_s=60)
    service = PredictionService(config)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: PredictionService) -> Iterator[TestClient]:
    """A client of the application."""
    with TestClient(create_app(service)) as client:
        yield client


@contextmanager
def client_with(service: PredictionService, **options: object) -> Iterator[TestClient]:
    """A client of the application with other options, for the length of the block."""
    config = service.config
    service.config = config.model_copy(update=options)
    try:
        with TestClient(create_app(service)) as client:
            yield client
    finally:
        service.config = config


def test_answers_single_items_and_lists_alike(client: TestClient) -> None:
    """Every item of a list gets the prediction that it gets alone."""
    items = [{"title": f"text {i} " * i} for i in range(1, 60)]
    answers = client.post("/predict/", json=items).json()["results"]
    alone = [client.post("/predict/", json=item).json()["results"][0] for item in items[:3]]
    assert len(answers) == 59
    assert [each["prediction"] for each in answers[:3]] == [each["prediction"] for each in alone]


@pytest.mark.parametrize("path", ["/predict", "/predict/"])
@pytest.mark.parametrize("description", [None, ""])
def test_answers_the_clients_of_the_course(path: str, description: str | None,
                                           service: PredictionService) -> None:
    """Without the final slash or a content type, called a form, with a null: the same answer."""
    content = json.dumps({"title": "text", "description": description})
    with TestClient(create_app(service), follow_redirects=False) as client:
        expected = client.post("/predict/", json={"title": "text"}).json()
        for kind in ("", "application/x-www-form-urlencoded", "text/plain"):
            response = client.post(path, content=content, headers={"content-type": kind})
            assert response.status_code == 200, response.text
            assert response.json() == expected
        null = client.post(path, content=json.dumps([{"title": "", "description": None}]))
        empty = client.post(path, json=[{"title": ""}])
        assert null.json() == empty.json()
        assert client.post(path, json=[{"title": None}]).status_code == 422


def test_evaluates_for_the_clients_of_the_course(client: TestClient) -> None:
    """The table is found without the final slash and without a content type."""
    content = json.dumps({"dataset": "no-such-table.csv"})
    for path in ("/evaluate", "/evaluate/"):
        assert client.post(path, content=content, follow_redirects=False).status_code == 404
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/predict/", "/evaluate/"} <= set(paths)
    assert not {"/predict", "/evaluate"} & set(paths)


@pytest.mark.parametrize("path", ["/", "/ui", "/ui/", "/docs/", "/run_id", "/run_id/", "/metrics"])
def test_reads_work_with_and_without_a_slash(path: str, client: TestClient) -> None:
    """And HEAD is answered as GET is."""
    for method in ("GET", "HEAD"):
        response = client.request(method, path, follow_redirects=False)
        assert (response.status_code, bool(response.content)) == (200, method == "GET")


def test_redoc_leads_to_the_documentation(client: TestClient) -> None:
    """The page of FastAPI that this service replaces by its own."""
    assert "swagger" in client.get("/redoc").text


@pytest.mark.parametrize("headers", [
    {"origin": "https://elsewhere.example"},
    {"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
])
def test_serves_no_page_of_another_site(headers: dict[str, str], client: TestClient) -> None:
    """A page that a visitor of this machine opens elsewhere cannot use the service."""
    response = client.post("/predict/", json={"title": "text"}, headers=headers)
    assert response.status_code == 403
    assert "--allowed-origin" in response.json()["detail"]


def test_serves_the_pages_that_are_named(service: PredictionService) -> None:
    """They may read the answer, after the browser has asked."""
    origin = "https://elsewhere.example"
    page = {"origin": origin, "sec-fetch-site": "cross-site"}
    with client_with(service, allowed_origins=(origin,)) as client:
        answer = client.post("/predict/", json={"title": "text"}, headers=page)
        asked = client.options("/predict/", headers=page | {
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type"})
        other = client.post("/predict/", json={"title": "text"},
                            headers=page | {"origin": "https://other.example"})
    assert (answer.status_code, asked.status_code, other.status_code) == (200, 200, 403)
    assert answer.headers["access-control-allow-origin"] == origin
    assert asked.headers["access-control-allow-origin"] == origin


def test_answers_no_other_host_name(service: PredictionService) -> None:
    """A name that leads to this machine, but is not its own, is another site's."""
    with client_with(service, allowed_hosts=("localhost",)) as client:
        codes = [client.post("/predict/", json={"title": "text"}, headers={"host": host})
                 .status_code for host in ("localhost:8000", "elsewhere.example")]
    assert codes == [200, 403]


@pytest.mark.parametrize(("body", "detail"), [
    ({"title": "a", "text": "b"}, "text: Extra inputs are not permitted."),
    ({"title": 7}, "title: Input should be a valid string."),
    ({"titel": "a"}, "titel: Extra inputs are not permitted."),
    ({}, "an item needs 'title' or 'description'."),
    ([], "List should have at least 1 item after validation, not 0."),
    ([{"title": "a"}, {}], "1: an item needs 'title' or 'description'."),
    ("text", "Input should be a valid dictionary or object to extract fields from."),
])
def test_names_the_wrong_field(body: object, detail: str, client: TestClient) -> None:
    """A body that does not match the schema is answered with the field and the reason."""
    response = client.post("/predict/", json=body)
    found, _, example = response.json()["detail"].partition(" Example: ")
    assert (response.status_code, found) == (422, detail)
    assert client.post("/predict/", content=example).status_code == 200


@pytest.mark.parametrize("content", [b"title=text", b"", b"{'title': 'text'}", b"\xff"])
def test_names_a_body_that_is_not_json(content: bytes, client: TestClient) -> None:
    """A form, nothing, Python: one sentence with an example."""
    response = client.post("/predict/", content=content)
    assert response.status_code in (400, 422), response.text
    assert "Example: {" in response.json()["detail"]


TEXTS = ["BERT reads", "YOLO sees", ""]


def v2_request(**parameters: object) -> dict:
    """The texts as a request of the Open Inference Protocol."""
    titles = {"name": "title", "shape": [3], "datatype": "BYTES", "data": TEXTS}
    notes = {"name": "description", "shape": [3], "datatype": "BYTES", "data": ["a", "b", "c"]}
    return {"id": "7", "inputs": [titles, notes], "parameters": parameters}


def expected_answers(client: TestClient) -> list[dict]:
    items = [{"title": text, "description": note} for text, note in zip(TEXTS, "abc", strict=True)]
    return client.post("/predict/", json=items).json()["results"]


def test_open_inference_protocol(client: TestClient, service: PredictionService) -> None:
    """Metadata of server and model, ready, and the same answers as `/predict/`."""
    version = str(service.engine.version)
    base = "/v2/models/madewithml"
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    metadata = client.get(base).json()
    assert metadata["versions"] == [version]
    assert [each["name"] for each in metadata["inputs"]] == ["title", "description"]
    for path in (base, f"{base}/versions/{version}"):
        assert client.get(f"{path}/ready").json() == {"name": "madewithml", "ready": True}
        answer = client.post(f"{path}/infer", json=v2_request(top_k=2)).json()
        assert (answer["id"], answer["model_version"]) == ("7", version)
        outputs = {each["name"]: each for each in answer["outputs"]}
        expected = expected_answers(client)
        assert outputs["label"]["data"] == [each["prediction"] for each in expected]
        ranked = [list(each["probabilities"])[:2] for each in expected]
        assert outputs["top_labels"]["data"] == sum(ranked, [])
        labels = metadata["parameters"]["labels"]
        assert outputs["probabilities"]["shape"] == [3, len(labels)]
        assert outputs["probabilities"]["data"][:len(labels)] == [
            expected[0]["probabilities"][label] for label in labels]


@pytest.mark.parametrize(("path", "change", "status", "error"), [
    ("/v2/models/other", {}, 404, "There is no model 'other', only 'madewithml'."),
    ("/v2/models/madewithml/versions/99", {}, 404, "Version '99' is not served"),
    ("/v2/models/madewithml", {"inputs": []}, 400, "inputs: List should have at least 1 item"),
    ("/v2/models/madewithml", {"outputs": [{"name": "x"}]}, 400, "There is no output 'x'"),
    ("/v2/models/madewithml", {"parameters": {"top_k": 0}}, 400, "parameters: top_k"),
    ("/v2/models/madewithml", {"parameters": {"threshold": 0.9}}, 400, "needs a fallback label"),
])
def test_open_inference_protocol_errors(path: str, change: dict, status: int, error: str,
                                        client: TestClient) -> None:
    """In the protocol's own form, one sentence."""
    response = client.post(f"{path}/infer", json=v2_request() | change)
    assert response.status_code == status
    assert response.json()["error"].startswith(error) or error in response.json()["error"]


def test_mlflow_scoring_protocol(client: TestClient) -> None:
    """`/ping`, and the same labels as `/predict/` from each form of a table."""
    assert client.get("/ping").status_code == client.get("/health").status_code == 200
    expected = [each["prediction"] for each in expected_answers(client)]
    rows = [{"title": text, "description": note} for text, note in zip(TEXTS, "abc", strict=True)]
    split = {"columns": ["description", "title"],
             "data": [[row["description"], row["title"]] for row in rows]}
    columns = {name: [row[name] for row in rows] for name in ("title", "description")}
    for body in ({"dataframe_records": rows}, {"dataframe_split": split}, {"instances": rows},
                 {"inputs": columns, "params": {"top_k": 2}}):
        predictions = client.post("/invocations", json=body).json()["predictions"]
        assert [each["label"] for each in predictions] == expected
    assert len(predictions[0]["probabilities"]) == 2
    table = "title,description\nBERT reads,a\nYOLO sees,b\n,c\n"
    answer = client.post("/invocations", content=table, headers={"content-type": "text/csv"})
    assert [each["label"] for each in answer.json()["predictions"]] == expected
    wrong = client.post("/invocations", json={"rows": rows})
    assert (wrong.status_code, wrong.json()["error_code"]) == (400, "BAD_REQUEST")


def test_protocols_have_the_same_limits(client: TestClient, service: PredictionService) -> None:
    """As many items and characters as `/predict/` takes, and no more."""
    limit = service.config.max_items_per_request
    rows = [{"title": "a"}] * (limit + 1)
    for body in ({"instances": rows}, {"instances": [{"title": "a" * 50_001}]}, {"instances": []}):
        assert client.post("/invocations", json=body).status_code == 400
    assert client.post("/invocations", json={"instances": rows[:limit]}).status_code == 200


def test_errors_have_the_form_of_their_protocol(client: TestClient) -> None:
    """Those of the limits too: clients of each protocol find the reason where they look."""
    elsewhere = {"origin": "https://elsewhere.example"}
    keys = {"/predict/": "detail", "/v2/models/madewithml/infer": "error",
            "/invocations": "message"}
    for path, key in keys.items():
        response = client.post(path, json={"title": "text"}, headers=elsewhere)
        assert (response.status_code, "--allowed-origin" in response.json()[key]) == (403, True)


def test_openapi_has_the_limits_and_empty_responses(client: TestClient) -> None:
    """What a generated client is told of each route."""
    paths = client.get("/openapi.json").json()["paths"]
    assert "content" not in paths["/ping"]["get"]["responses"]["200"]
    for path, routes in paths.items():
        for method, route in routes.items():
            wanted = {"401", "503"} if path not in PUBLIC_PATHS else set()
            wanted |= {"408", "413", "504"} if method == "post" else set()
            assert wanted <= route["responses"].keys(), (method, path)


def test_reads_no_table_outside_the_allowed_directories(client: TestClient) -> None:
    """A path that leaves the directory is as good as a missing one."""
    assert client.post("/evaluate/", json={"dataset": "../settings.ini"}).status_code == 404


def test_follows_the_champion_but_not_to_a_corrupt_version(
        service: PredictionService, client: TestClient, folder: Path) -> None:
    """A new version takes over in place; a corrupt one is reported and never answers."""
    second = register_version(folder)
    service.versions.refresh()
    assert client.get("/run_id/").json() == {"run_id": second}
    weights = fetch_checkpoint(register_version(folder)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    service.versions.try_refresh()
    info = client.get("/version").json()
    assert (info["version"], info["rejected"]["version"]) == (2, 3)


def test_logs_every_prediction(service: PredictionService, folder: Path) -> None:
    """What the tests above asked for: a list of 59, three single items, four times six, a named
    page, a named host, seven examples; 12 texts by the one protocol, 18 by the other, 100 at once.
    """
    service.recorder.prediction_log.close()
    assert parquet.read_table(folder / "log").num_rows == 59 + 3 + 4 * 6 + 1 + 1 + 7 + 12 + 18 + 100


@contextmanager
def listening(service: PredictionService) -> Iterator[str]:
    """A real server of the application for the length of the block; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module", params=[77, 151, 1000])
def many_classes(request: pytest.FixtureRequest, folder: Path) -> Iterator[PredictionService]:
    """A service of a model whose classes are named by numbers, which browsers reorder."""
    name = f"classes-{request.param}"
    mlflow_client().create_registered_model(name)
    register_version(folder, tuple(str(i) for i in range(request.param)), name)
    service = PredictionService(ServeConfig(model_name=name, poll_interval_s=0,
                                            request_timeout_s=60))
    yield service
    service.close()


def test_page_shows_the_most_probable_of_many_classes(many_classes: PredictionService) -> None:
    """Ten bars in descending order, and how many classes more there are."""
    from playwright.sync_api import sync_playwright

    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    num_classes = len(many_classes.engine.labels)
    with listening(many_classes) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 800, "height": 900})
        page.goto(f"{url}/ui")
        page.get_by_label("Title").fill("YOLO in the browser")
        page.get_by_role("button").click()
        page.wait_for_selector(".more")
        answer = page.request.post(f"{url}/predict", data={"title": "YOLO in the browser"}).json()
        probabilities = answer["results"][0]["probabilities"]
        assert len(probabilities) == num_classes
        shares = sorted(probabilities.values(), reverse=True)[:10]
        shown = page.locator(".row .share").all_inner_texts()
        assert shown == [f"{100 * share:.1f} %" for share in shares]
        assert page.locator(".more").inner_text().startswith(f"{num_classes - 10} more, together")
        assert page.evaluate("document.body.scrollHeight") <= 1000
        browser.close()


def test_metrics_of_many_classes_are_bounded(many_classes: PredictionService) -> None:
    """A series per predicted class up to 200 classes, one for all beyond."""
    items = [{"title": f"text {i} " * i} for i in range(1, 60)]
    with TestClient(create_app(many_classes)) as client:
        client.post("/predict/", json=items)
        lines = client.get("/metrics").text.splitlines()
    version = f'version="{many_classes.engine.version}"'
    without_class = [line for line in lines
                     if f'_total{{label="",model="",{version}}}' in line]
    assert len(without_class) == (len(many_classes.engine.labels) > 200)
    assert sum(line.startswith("madewithml_predictions_total") for line in lines) <= 200
