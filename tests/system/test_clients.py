"""The service, asked by clients that others wrote: the label of each row of a table."""
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from mlflow.pyfunc.scoring_server.client import ScoringServerClient

from ..clients.ask import CLIENTS
from ..conftest import ROOT, Run, get_clean_env
from .test_serve import Served, serving

pytestmark = pytest.mark.clients
HOLDOUT = ROOT / "datasets" / "holdout.csv"


@pytest.fixture(scope="module")
def served(promoted: Run) -> Iterator[Served]:
    with serving(promoted) as service:
        yield service


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """The text columns of the rows."""
    return pd.read_csv(HOLDOUT, keep_default_na=False)[["title", "description"]]


@pytest.fixture(scope="module")
def labels(trained: Run) -> list[str]:
    """The labels by `madewithml predict`."""
    output = trained.folder / "predicted.csv"
    done = trained.cli("predict", "--run-id", trained.run_id, "--dataset-loc", str(HOLDOUT),
                       "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return pd.read_csv(output)["prediction"].tolist()


@pytest.mark.parametrize("client", CLIENTS)
def test_client(client: str, served: Served, table: pd.DataFrame, labels: list[str]) -> None:
    """Clients with pins of their own, in the environment of `make test-clients`."""
    python = Path(os.environ["MADEWITHML_CLIENTS"]).absolute() / "bin" / "python"
    command = [str(python), str(ROOT / "tests" / "clients" / "ask.py"), client, served.url,
               "madewithml"]
    done = subprocess.run(command, input=json.dumps(table.to_dict("records")), env=get_clean_env(),
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == labels


def test_mlflow_client(served: Served, table: pd.DataFrame, labels: list[str]) -> None:
    """The client of `mlflow models serve`."""
    client = ScoringServerClient("127.0.0.1", served.port)
    client.wait_server_ready(timeout=30)
    predicted = []
    for begin in range(0, len(table), 50):
        answer = client.invoke(table.iloc[begin:begin + 50]).get_predictions()
        predicted += answer["label"].tolist()
    assert predicted == labels
