"""The service's application in this process, without Ray, with an untrained classifier."""
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pyarrow import parquet

from madewithml.config import ServeConfig
from madewithml.models import build_classifier, load_tokenizer, save_classifier, set_seed
from madewithml.serve import PredictionService, create_app
from madewithml.tracking import (
    CHECKPOINT,
    fetch_checkpoint,
    get_or_create_experiment,
    mlflow_client,
)
from madewithml.utils import get_logger, temporary_storage

LABELS = ("computer-vision", "mlops", "natural-language-processing", "other")


def register_version(folder: Path) -> str:
    """Registers an untrained classifier; the champion points to it. Returns the run's id."""
    client = mlflow_client()
    set_seed(0)
    model = build_classifier("embedded", {name: i for i, name in enumerate(LABELS)})
    run = client.create_run(get_or_create_experiment("demo")).info
    checkpoint = save_classifier(model, load_tokenizer("embedded"), folder / run.run_id, 64)
    client.log_artifacts(run.run_id, checkpoint, CHECKPOINT)
    version = client.create_model_version("madewithml", run.artifact_uri, run.run_id).version
    client.set_registered_model_alias("madewithml", "champion", version)
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


def test_answers_single_items_and_lists_alike(client: TestClient) -> None:
    """Every item of a list gets the prediction that it gets alone."""
    items = [{"title": f"text {i} " * i} for i in range(1, 60)]
    answers = client.post("/predict/", json=items).json()["results"]
    alone = [client.post("/predict/", json=item).json()["results"][0] for item in items[:3]]
    assert len(answers) == 59
    assert [each["prediction"] for each in answers[:3]] == [each["prediction"] for each in alone]


@pytest.mark.parametrize(("body", "detail"), [
    ({"title": 7}, "title: Input should be a valid string."),
    ({"titel": "a"}, "title: Field required."),
    ([], "List should have at least 1 item after validation, not 0."),
    ([{"title": "a"}, {}], "1.title: Field required."),
])
def test_names_the_wrong_field(body: object, detail: str, client: TestClient) -> None:
    """A body that does not match the schema is answered with the field and the reason."""
    response = client.post("/predict/", json=body)
    assert (response.status_code, response.json()["detail"]) == (422, detail)


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
    """What the tests above asked for: a list of 59 and three single items."""
    service.recorder.prediction_log.close()
    assert parquet.read_table(folder / "log").num_rows == 62
