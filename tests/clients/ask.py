"""Asks a service through a client that others wrote: `python ask.py CLIENT URL MODEL`.

Reads rows, columns by name, as JSON from standard input; writes the label of each."""
import asyncio
import atexit
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

BATCH_ROWS = 50
Rows = list[dict[str, str]]


def requests(url: str, model: str, rows: Rows) -> list[str]:
    """The course's client: no content type, no slash at the end, a row at a time."""
    import requests
    answers = [requests.post(f"{url}/predict", data=json.dumps(row), timeout=60) for row in rows]
    return [answer.json()["results"][0]["prediction"] for answer in answers]


def triton(url: str, model: str, rows: Rows) -> list[str]:
    """Triton's client: texts as bytes behind the JSON."""
    import numpy as np
    from tritonclient import http
    client = http.InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert client.get_server_metadata()["name"] == "madewithml"
    columns = [tensor["name"] for tensor in client.get_model_metadata(model)["inputs"]]
    inputs = []
    for name in columns:
        texts = np.array([row[name] for row in rows], dtype=np.object_)
        inputs.append(http.InferInput(name, list(texts.shape), "BYTES"))
        inputs[-1].set_data_from_numpy(texts)
    outputs = [http.InferRequestedOutput(name) for name in ("label", "top_scores")]
    answer = client.infer(model, inputs, outputs=outputs, request_id="7", parameters={"top_k": 2})
    assert answer.get_response()["id"] == "7"
    scores = answer.as_numpy("top_scores")
    assert scores.shape == (len(rows), 2)
    assert (scores[:, 0] >= scores[:, 1]).all()
    return [label if isinstance(label, str) else label.decode()
            for label in answer.as_numpy("label")]


def kserve(url: str, model: str, rows: Rows) -> list[str]:
    """KServe's client of the same protocol: texts in the JSON."""
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    async def ask() -> list[str]:
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
        assert await client.is_server_ready(url)
        assert await client.is_server_live(url)
        assert await client.is_model_ready(url, model)
        inputs = [InferInput(name, [len(rows)], "BYTES", [row[name] for row in rows])
                  for name in rows[0]]
        answer = await client.infer(url, InferRequest(model, inputs), model_name=model)
        [labels] = [output.data for output in answer.outputs if output.name == "label"]
        return labels
    return asyncio.run(ask())


@cache
def generate_client(url: str) -> ModuleType:
    """The package that openapi-python-client writes from the service's own description."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning",
               "--url", f"{url}/openapi.json", "--meta", "none", "--output-path",
               f"{folder}/generated"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of ruff, which it calls
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, folder)
    importlib.import_module("generated.api.default.predict")
    return importlib.import_module("generated")


def openapi(url: str, model: str, rows: Rows) -> list[str]:
    """A generated client."""
    generated = generate_client(url)
    client = generated.Client(base_url=url, raise_on_unexpected_status=True)
    items = [generated.models.Item.from_dict(row) for row in rows]
    answer = generated.api.default.predict.sync(client=client, body=items)
    return [result.prediction for result in answer.results]


CLIENTS = {function.__name__: function for function in (requests, triton, kserve, openapi)}

if __name__ == "__main__":
    _, client, url, model = sys.argv
    rows = json.load(sys.stdin)
    labels = []
    for begin in range(0, len(rows), BATCH_ROWS):
        labels += CLIENTS[client](url, model, rows[begin:begin + BATCH_ROWS])
    print(json.dumps(labels))
