"""Every notebook runs from a fresh kernel, top to bottom, and writes nothing to stderr."""
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from tests.conftest import ROOT, Run

NBS = ROOT / "nbs"
ALL = sorted(path.relative_to(NBS).with_suffix("").as_posix() for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
# Parameters that make each small. Light ones run with `make test`, the rest with `make test-slow`, or where they say.
LIGHT = {"explore/eda": {"max_rows": 300}, "explore/one_row": {"num_samples": 96}}
SLOW = {
    "explore/error_analysis": {"dataset_loc": "SMALL", "num_epochs": 1},
    "explore/baselines": {"num_samples": 160, "num_epochs": 1, "rounds": 1},
    "explore/cross_validation": {"dataset_loc": "SMALL", "folds": 2, "variants": {"default": {"num_epochs": 1}}},
    "explore/scaling": {"prepare_sizes": [500, 1000, 2000], "predict_sizes": [500, 1000, 2000], "repeats": 1, "train_samples": 80},
    "explore/training_speed": {"num_samples": 96, "num_epochs": 2},
    "explore/tuning": {"num_runs": 2},
}
TRAINED = {"explore/drift_power": {"windows": 2}}  # needs a run
SERVED = {"explore/serving_speed": {"clients": [1, 8], "seconds": 1, "rounds": 1}}


def execute(name: str, parameters: dict, folder: Path, storage: Path | None = None) -> nbformat.NotebookNode:
    """The notebook, executed in a kernel of its own."""
    small = folder / "small.csv"
    pd.read_csv(ROOT / "datasets" / "dataset.csv").head(160).to_csv(small, index=False)
    parameters = {key: str(small) if value == "SMALL" else value for key, value in parameters.items()}
    with pytest.MonkeyPatch.context() as patch:
        for variable in [variable for variable in os.environ if variable.startswith(("MADEWITHML_", "RAY_ADDRESS"))]:
            patch.delenv(variable)
        patch.setenv("MADEWITHML_STORAGE_DIR", str(storage or folder / "storage"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        return papermill.execute_notebook(str(NBS / f"{name}.ipynb"), str(folder / "executed.ipynb"), parameters, cwd=str(folder), progress_bar=False,
                                          kernel_name="python3", extra_arguments=["--log-level=ERROR"])


def noise(notebook: nbformat.NotebookNode) -> list[str]:
    """What its cells wrote to stderr."""
    return [output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream" and output.name == "stderr"]


def covered() -> set[str]:
    """Notebooks that some target runs: stages by tools/check.py, workloads by the tests of pipeline and commands, the rest here."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    pipeline = (NBS / "71_pipeline.ipynb").read_text(encoding="utf-8")
    names = {path.stem for path in (NBS / "workloads").glob("*.ipynb")}
    run = {name for name in names if f'Workload(\\"{name}\\"' in pipeline or re.search(rf'(cli\(|run_cli\(|command = \[|args = \[)"{name}"', tests)}
    stages = {path.stem for path in NBS.glob("*.ipynb")}  # nbdev_test takes all that lie beside no .notest
    return stages | {f"workloads/{name}" for name in run} | LIGHT.keys() | SLOW.keys() | TRAINED.keys() | SERVED.keys()


def test_every_notebook_is_run() -> None:
    """No notebook without a target that runs it, and no target without its notebook."""
    assert not (NBS / ".notest").exists()
    assert sorted(covered() ^ set(ALL)) == []


@pytest.mark.parametrize("name", [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_runs(name: str, tmp_path: Path) -> None:
    """From a fresh kernel, with nothing on stderr."""
    assert noise(execute(name, (LIGHT | SLOW)[name], tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_runs_with_a_run(name: str, trained: Run, tmp_path: Path) -> None:
    """The same, for what looks at a trained run."""
    assert noise(execute(name, TRAINED[name], tmp_path, trained.folder / "storage")) == []


@pytest.mark.load
@pytest.mark.skipif(not (shutil.which("wrk") and importlib.util.find_spec("litserve")), reason="needs wrk and litserve, which nothing else needs")
@pytest.mark.parametrize("name", SERVED)
def test_runs_with_a_champion(name: str, trained: Run, tmp_path: Path) -> None:
    """The benchmark of the service, on a champion."""
    assert trained.cli("promote").returncode == 0
    execute(name, SERVED[name], tmp_path, trained.folder / "storage")


def test_looks_at_a_table_of_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own table with an own text and label column, a doubled row and a wrong label: the notebook finds both."""
    rows = pd.read_csv(ROOT / "datasets" / "dataset.csv").query("tag in ['computer-vision', 'mlops']").head(120)
    table = pd.DataFrame({"body": rows["title"] + ". " + rows["description"], "topic": rows["tag"]}).reset_index(drop=True)
    table = pd.concat([table, table.iloc[[3]].assign(topic=table["topic"][3])], ignore_index=True)
    table.loc[7, "topic"] = {"mlops": "computer-vision", "computer-vision": "mlops"}[table["topic"][7]]
    table.to_csv(tmp_path / "mine.csv", index=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text('MADEWITHML_TEXT_COLUMNS=["body"]\nMADEWITHML_LABEL_COLUMN=topic\n', encoding="utf-8")
    executed = execute("explore/eda", {"dataset_loc": "mine.csv"}, tmp_path)
    shown = "\n".join(output.get("data", {}).get("text/html", "") for cell in executed.cells for output in cell.get("outputs", []))
    assert re.search(r"<th>the text of another row</th>\s*<td>1</td>", shown)
    assert re.search(rf"<td>9</td>\s*<td>{table['topic'][7]}</td>", shown), "row 9 of the file is not among the suspicious ones"


def test_lab_settings_are_known() -> None:
    """JupyterLab ignores a setting that it does not know, and a workspace whose notebook is gone opens empty."""
    schemas = Path(sys.prefix) / "share" / "jupyter" / "lab" / "schemas"
    overrides = json.loads((ROOT / "tools" / "lab" / "labconfig" / "default_setting_overrides.json").read_text(encoding="utf-8"))
    for plugin, settings in overrides.items():
        extension, name = plugin.split(":")
        known = json.loads((schemas / extension / f"{name}.json").read_text(encoding="utf-8"))["properties"]
        assert settings.keys() <= known.keys(), plugin
    workspace = json.loads((ROOT / "tools" / "lab" / "workspace.json").read_text(encoding="utf-8"))["data"]
    assert workspace["layout-restorer:data"]["left"]["current"] == "@jupyterlab/toc:plugin"
    for widget in workspace["layout-restorer:data"]["main"]["dock"]["widgets"]:
        assert (NBS / workspace[widget]["data"]["path"]).is_file(), widget


@pytest.mark.slow
def test_lab_opens_with_the_table_of_contents(tmp_path: Path) -> None:
    """As `make lab` starts it: the contents on the left, the first notebook beside them, and no request to anywhere else."""
    from playwright.sync_api import sync_playwright

    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    environment = os.environ | {"JUPYTER_CONFIG_PATH": str(ROOT / "tools" / "lab"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
                                "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    lab = [str(Path(sys.executable).with_name("jupyter")), "lab"]
    subprocess.run([*lab, "workspaces", "import", str(ROOT / "tools" / "lab" / "workspace.json")], env=environment, check=True, capture_output=True)
    shutil.copy(NBS / "index.ipynb", tmp_path)  # opening a notebook may rewrite its metadata
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [*lab, "--no-browser", f"--port={url.rsplit(':', 1)[1]}", "--IdentityProvider.token=", "--allow-root"]  # the loopback address alone, for seconds
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server, sync_playwright() as playwright:
        try:
            until = time.monotonic() + 60
            while not _answers(f"{url}/api") and time.monotonic() < until:
                time.sleep(0.3)
            browser, asked = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]), []
            page = browser.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"{url}/lab")
            page.wait_for_selector("#table-of-contents", state="visible", timeout=60_000)
            page.wait_for_selector("#table-of-contents >> text=Two commands", timeout=60_000)
            assert page.locator(".jp-NotebookPanel").count() == 1
            assert all(address.startswith((url, "data:", "blob:")) for address in asked), asked
            browser.close()
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return True
    except urllib.error.URLError:
        return False
