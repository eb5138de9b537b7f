"""Many models behind one service on Ray Serve: each answers as it does alone, and under overload
a busy one leaves the others alone."""
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..conftest import Run
from .test_serve import ITEM, Served, serving
from .test_serve_load import find_processes

MODELS = """
support: {model_name: madewithml}
tags: {model_name: madewithml, version: 1}
missing: {model_name: madewithml, version: 7}
"""


@pytest.fixture(scope="module")
def many(promoted: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = tmp_path_factory.mktemp("many") / "models.yaml"
    file.write_text(MODELS)
    log: Path = promoted.folder / "many-log"
    with serving(promoted, "--models", f"@{file}", "--log-dir", str(log), "--max-queued", "4",
                 "--config", '{"log_flush_interval_s": 1}') as served:
        yield served


def test_each_model_answers(many: Served) -> None:
    answers = [many.post(f"/models/{name}/predict/", ITEM).json() for name in ("support", "tags")]
    assert answers[0] == answers[1]
    assert answers[0]["results"][0]["prediction"] == "computer-vision"
    assert (answers[0]["version"], answers[0]["run_id"]) == (1, many.run.run_id)
    infer = {"inputs": [{"name": "title", "shape": [1], "datatype": "BYTES",
                         "data": [ITEM["title"]]}]}
    assert many.post("/v2/models/tags/infer", infer).json()["model_name"] == "tags"


def test_a_missing_version_is_its_own_failure(many: Served) -> None:
    response = many.post("/models/missing/predict/", ITEM)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "30")
    assert many.post("/models/other/predict/", ITEM).status_code == 404
    assert many.post("/predict/", ITEM).status_code == 404
    state = next(each for each in many.get("/models").json() if each["name"] == "missing")
    assert (state["state"], "no version 7" in state["reason"]) == ("failed", True)


def test_a_busy_model_leaves_the_other_alone(many: Served) -> None:
    """Of 40 clients at once, each of a model that may have four requests in flight, some are
    rejected; the one client of another model never is."""
    def ask(name: str, count: int) -> list[int]:
        items = [ITEM] * 10
        return [many.post(f"/models/{name}/predict/", items).status_code for _ in range(count)]

    with ThreadPoolExecutor(41) as pool:
        busy = [pool.submit(ask, "support", 5) for _ in range(40)]
        alone = pool.submit(ask, "tags", 10)
        statuses = {status for each in busy for status in each.result()}
    assert statuses == {200, 503}
    assert set(alone.result()) == {200}
    metrics = many.get("/metrics").text
    assert 'madewithml_requests_total{model="tags",route="/predict/",status="200"}' in metrics
    assert 'madewithml_model_loads_total{model="tags"} 1.0' in metrics


def test_a_dropped_model_gives_its_memory_back(promoted: Run) -> None:
    """Six models in turn, with memory for one: the replica does not grow from one round to the
    next, and not by more than two models from the first load on."""
    names = ",".join(f"m{i}=run {promoted.run_id}" for i in range(6))
    with serving(promoted, "--models", names, "--model-memory-mb", "150") as served:
        replica = find_processes(served, "ServeReplica")[0]
        sizes = []
        for _ in range(3):
            for i in range(6):
                assert served.post(f"/models/m{i}/predict/", ITEM).status_code == 200
                sizes.append(replica.memory_info().rss / 1e6)
        assert served.get("/models").json()[5]["state"] == "loaded"
        assert 'madewithml_model_loads_total{model="m3"} 3.0' in served.get("/metrics").text
    assert max(sizes) < sizes[0] + 250, sizes
    assert max(sizes[12:]) < max(sizes[:6]) + 100, sizes


def test_pages_and_logs_by_model(many: Served, promoted: Run) -> None:
    assert 'href="models/support/ui"' in many.get("/ui").text
    assert "models/support" not in many.get("/models/support/ui").text  # its links are relative
    folders = {path.name for path in (promoted.folder / "many-log").iterdir()}
    assert folders == {"support", "tags"}
