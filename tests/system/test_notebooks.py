"""Every notebook runs from a fresh kernel, top to bottom, and writes nothing to stderr."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import requests

from madewithml.ray_session import find_free_ports
from tests.conftest import ROOT, Run

NBS = ROOT / "nbs"
LAB = ROOT / "tools" / "lab"
ALL = {path.relative_to(NBS).with_suffix("").as_posix() for path in NBS.rglob("*.ipynb")
       if ".ipynb_checkpoints" not in path.parts}
TYPES = {"str", "int", "float", "bool", "list", "dict"}  # of parameters
# Parameters that make each notebook small; SMALL_TABLE stands for the path of a small table.
SMALL_TABLE = "small.csv"
FAST = {  # run by `make test`
    "explore/canary_power": {"num_rollouts": 20, "num_requests": 2000},
    "explore/eda": {"max_rows": 300},
    "explore/one_row": {"num_samples": 96},
    "explore/reading_speed": {"num_rows": 500, "rounds": 1},
}
SLOW = {  # run by `make test-slow`
    "explore/any_table": {"options": ["--num-epochs", "1", "--num-samples", "160"]},
    "explore/error_analysis": {"dataset_loc": SMALL_TABLE, "num_epochs": 1},
    "explore/baselines": {"num_samples": 160, "num_epochs": 1, "rounds": 1},
    "explore/cross_validation": {"dataset_loc": SMALL_TABLE, "folds": 2,
                                 "variants": {"default": {"num_epochs": 1}}},
    "explore/scaling": {"prepare_sizes": [500, 1000, 2000], "predict_sizes": [500, 1000, 2000],
                        "repeats": 1, "train_samples": 80},
    "explore/training_speed": {"num_samples": 96, "num_epochs": 2, "rounds": 1},
    "explore/prediction_speed": {"num_rows": 400, "rounds": 1},
    "explore/tuning": {"dataset_loc": SMALL_TABLE, "num_runs": 2, "seeds": [1]},
}
TRAINED = {"explore/drift_power": {"windows": 2}}  # needs a run
SERVED = {"explore/serving_speed": {"clients": [1, 8], "seconds": 1, "rounds": 1},
          "explore/multi_model_speed": {"num_models": 6, "clients": 4, "seconds": 2, "rounds": 1}}


def execute(name: str, parameters: dict, folder: Path,
            storage: Path | None = None) -> nbformat.NotebookNode:
    """The notebook, executed in a kernel of its own."""
    table = pd.read_csv(ROOT / "datasets" / "dataset.csv").head(160)
    table.to_csv(folder / SMALL_TABLE, index=False)
    parameters = {key: str(folder / SMALL_TABLE) if value == SMALL_TABLE else value
                  for key, value in parameters.items()}
    with pytest.MonkeyPatch.context() as patch:
        for variable in list(os.environ):
            if variable.startswith(("MADEWITHML_", "RAY_ADDRESS")):
                patch.delenv(variable)
        patch.setenv("MADEWITHML_STORAGE_DIR", str(storage or folder / "storage"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        return papermill.execute_notebook(
            str(NBS / f"{name}.ipynb"), str(folder / "executed.ipynb"), parameters,
            cwd=str(folder), progress_bar=False, kernel_name="python3",
            extra_arguments=["--log-level=ERROR"])


@pytest.mark.parametrize("path", [path for path in sorted(NBS.rglob("*.ipynb"))
                                  if path.parent.name in ("workloads", "explore")],
                         ids=lambda path: path.stem)
def test_parameters_have_a_type_and_a_description(path: Path) -> None:
    """As `papermill --help-notebook` shows them."""
    parameters = papermill.inspect_notebook(str(path))
    assert parameters
    for name, parameter in parameters.items():
        assert parameter["inferred_type_name"] in TYPES, name
        assert parameter["help"], name


def get_outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def get_stderr(notebook: nbformat.NotebookNode) -> list[str]:
    """What its cells wrote to stderr."""
    return [output.text for output in get_outputs(notebook) if output.get("name") == "stderr"]


def find_tested_notebooks() -> set[str]:
    """Notebooks that some target runs: those of the stages by tools/check.py, those of the
    workloads by the tests of the pipeline and the commands, and the rest here."""
    paths = (ROOT / "tests").rglob("*.py")
    tests = "".join(path.read_text(encoding="utf-8") for path in paths)
    pipeline = (NBS / "72_pipeline.ipynb").read_text(encoding="utf-8")

    def is_run(workload: str) -> bool:
        in_tests = rf'(cli\(|run_cli\(|command = \[|args = \[)"{workload}"'
        in_pipeline = f'Workload(\\"{workload}\\"' in pipeline
        return in_pipeline or re.search(in_tests, tests) is not None

    workloads = {path.stem for path in (NBS / "workloads").glob("*.ipynb")}
    stages = {path.stem for path in NBS.glob("*.ipynb")}  # nbdev_test runs all of this folder
    explored = FAST.keys() | SLOW.keys() | TRAINED.keys() | SERVED.keys()
    return stages | explored | {f"workloads/{name}" for name in workloads if is_run(name)}


def test_every_notebook_is_run() -> None:
    """No notebook without a target that runs it, and no target without its notebook."""
    assert not (NBS / ".notest").exists()
    assert sorted(find_tested_notebooks() ^ ALL) == []


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_runs(name: str, tmp_path: Path) -> None:
    """From a fresh kernel, with nothing on stderr."""
    assert get_stderr(execute(name, (FAST | SLOW)[name], tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_runs_with_a_run(name: str, trained: Run, tmp_path: Path) -> None:
    """The same for a notebook that reads a trained run."""
    executed = execute(name, TRAINED[name], tmp_path, trained.folder / "storage")
    assert get_stderr(executed) == []


has_load_tools = shutil.which("wrk") and importlib.util.find_spec("litserve")


@pytest.mark.load
@pytest.mark.skipif(not has_load_tools, reason="needs wrk and litserve")
@pytest.mark.parametrize("name", SERVED)
def test_runs_with_a_champion(name: str, promoted: Run, tmp_path: Path) -> None:
    """The benchmarks of the service; the first needs a champion."""
    execute(name, SERVED[name], tmp_path, promoted.folder / "storage")


def test_eda_of_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with other text and label columns, a duplicated row and a wrong label: the notebook
    finds both mistakes."""
    rows = pd.read_csv(ROOT / "datasets" / "dataset.csv")
    rows = rows.query("tag in ['computer-vision', 'mlops']").head(120).reset_index(drop=True)
    table = pd.DataFrame({"body": rows["title"] + ". " + rows["description"],
                          "topic": rows["tag"]})
    duplicate = table.iloc[[3]].assign(topic=table["topic"][3])
    table = pd.concat([table, duplicate], ignore_index=True)
    opposite = {"mlops": "computer-vision", "computer-vision": "mlops"}
    table.loc[7, "topic"] = opposite[table["topic"][7]]
    table.to_csv(tmp_path / "other.csv", index=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(
        'MADEWITHML_TEXT_COLUMNS=["body"]\nMADEWITHML_LABEL_COLUMN=topic\n', encoding="utf-8")
    executed = execute("explore/eda", {"dataset_loc": "other.csv"}, tmp_path)
    data = [output.get("data", {}) for output in get_outputs(executed)]
    html = "\n".join(formats.get("text/html", "") for formats in data)
    assert re.search(r"<th>the text of another row</th>\s*<td>1</td>", html)
    suspicious = rf"<td>9</td>\s*<td>{table['topic'][7]}</td>"
    assert re.search(suspicious, html), "row 9 of the file is not among the suspicious ones"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_lab_settings_are_known() -> None:
    """JupyterLab ignores an unknown setting, and opens an empty page if a notebook is missing."""
    schemas = Path(sys.prefix) / "share" / "jupyter" / "lab" / "schemas"
    overrides = read_json(LAB / "labconfig" / "default_setting_overrides.json")
    for plugin, settings in overrides.items():
        extension, name = plugin.split(":")
        known = read_json(schemas / extension / f"{name}.json")["properties"]
        assert settings.keys() <= known.keys(), plugin
    workspace = read_json(LAB / "workspace.json")["data"]
    layout = workspace["layout-restorer:data"]
    assert layout["left"]["current"] == "@jupyterlab/toc:plugin"
    for widget in layout["main"]["dock"]["widgets"]:
        assert (NBS / workspace[widget]["data"]["path"]).is_file(), widget


@contextmanager
def running_lab(folder: Path) -> Iterator[str]:
    """The URL of a JupyterLab in the folder, with the settings and workspace of `make lab`."""
    env = os.environ | {
        "JUPYTER_CONFIG_PATH": str(LAB), "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    lab = [str(Path(sys.executable).with_name("jupyter")), "lab"]
    subprocess.run([*lab, "workspaces", "import", str(LAB / "workspace.json")], env=env,
                   check=True, capture_output=True)
    port = find_free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    # It needs no token: it listens on the loopback address, for seconds.
    command = [*lab, "--no-browser", f"--port={port}", "--IdentityProvider.token=", "--allow-root"]
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + 60
            while not is_up(f"{url}/api") and time.monotonic() < end:
                time.sleep(0.3)
            yield url
        finally:
            server.terminate()


def is_up(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


@pytest.mark.slow
def test_lab_opens_with_the_table_of_contents(tmp_path: Path) -> None:
    """The contents on the left, the first notebook beside them, and no request to other hosts."""
    from playwright.sync_api import sync_playwright

    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    shutil.copy(NBS / "index.ipynb", tmp_path)  # opening a notebook may rewrite its metadata
    with running_lab(tmp_path) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        urls = []
        page.on("request", lambda request: urls.append(request.url))
        page.goto(f"{url}/lab")
        contents = "#table-of-contents"
        page.wait_for_selector(contents, state="visible", timeout=60_000)
        page.wait_for_selector(f"{contents} >> text=Two commands", timeout=60_000)
        assert page.locator(".jp-NotebookPanel").count() == 1
        assert all(address.startswith((url, "data:", "blob:")) for address in urls), urls
        browser.close()
