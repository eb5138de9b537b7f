"""Executes notebooks and names committed outputs that are of another kind than the fresh ones."""
import argparse
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.config import get_config

ROOT = Path.cwd()
FLAGS = "|".join(get_config().tst_flags.split())
NOT_RUN = re.compile(rf"^#\|\s*(({FLAGS})\s*$|eval:\s*false)|nbdev_export\(", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
TEMPORARY = re.escape(os.path.join(tempfile.gettempdir(), "tmp")) + r"\w{8}/?"
VOLATILE = {  # what must not be committed
    "an absolute path": r"(?<![\w.:/<])/(tmp|home|root|work|usr|opt|var|Users)/[\w.-]+",
    "an address": r"\b(?!127\.|0\.0\.0\.0)(\d{1,3}\.){3}\d{1,3}:\d+",
    "a process id": r"\bpid[=: ]+\d+",
}


def is_run(cell: nbformat.NotebookNode) -> bool:
    """Whether nbdev_test runs it: code that is not slow, not for a GPU, no export, to be run."""
    return cell.cell_type == "code" and not NOT_RUN.search(cell.source)


class Client(NotebookClient):
    async def async_execute_cell(self, cell, *args, **kwargs):
        return await super().async_execute_cell(cell, *args, **kwargs) if is_run(cell) else cell


def execute(path: Path, work: str) -> nbformat.NotebookNode:
    """The notebook with fresh outputs of the cells that are run. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = Client(notebook, timeout=900, extra_arguments=["--log-level=ERROR"],
                    store_widget_state=False, resources={"metadata": {"path": ROOT / "nbs"}})
    client.execute()
    runs: dict[str, str] = {}
    for cell in filter(is_run, notebook.cells):
        shown = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.outputs = [stable(output, work, runs) for output in shown
                        if WIDGET not in output.get("data", {})]
    return notebook


def stable(output, work: str, runs: dict[str, str]):
    """The same without folders of this execution; ids of runs become RUN_ID_1, RUN_ID_2, …"""
    if isinstance(output, dict):
        return nbformat.from_dict({key: value if key == "image/png" else stable(value, work, runs)
                                   for key, value in output.items()})
    if not isinstance(output, str):
        return output
    text = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", output)
    text = re.sub(r"^[^\n]*\r(?!\n)", "", text, flags=re.MULTILINE)  # overwritten progress bars
    for folder in (work, str(ROOT), sys.prefix):
        text = text.replace(f"{folder}/", "")
    return re.sub(r"\b[0-9a-f]{32}\b",
                  lambda run: runs.setdefault(run[0], f"RUN_ID_{len(runs) + 1}"),
                  re.sub(TEMPORARY, "", text))


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """Kinds of a cell's outputs; all text of one stream is one output."""
    streams = {output.name for output in cell.outputs if output.output_type == "stream"}
    others = [output for output in cell.outputs if output.output_type != "stream"]
    return sorted([*streams, *(" ".join([output.output_type, *sorted(output.get("data", []))])
                               for output in others)])


def check(path: Path, work: str, write: bool) -> list[str]:
    """A line for each output that is wrong, after storing the fresh ones with `write`."""
    try:
        fresh = execute(path, work)
    except CellExecutionError as error:
        return [f"{path.name}: a cell failed, nothing is written.\n{error}"]
    wrong = []
    for was, now in zip(nbformat.read(path, as_version=4).cells, fresh.cells, strict=True):
        if is_run(now) and not write and kinds(was) != kinds(now):
            wrong.append(f"{path.name} [{now.id}] has {kinds(was)}, gives {kinds(now)}")
        text = "\n".join(text for output in (now if write else was).get("outputs", [])
                         for kind, text in {**output, **output.get("data", {})}.items()
                         if kind.startswith("text"))
        wrong += [f"{path.name} [{now.id}] shows {what}" for what, pattern in VOLATILE.items()
                  if re.search(pattern, text)]
    if write:
        nbformat.write(fresh, path)
        nbdev_clean(fname=str(path))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: stages with no slow cell")
    parser.add_argument("--write", action="store_true", help="store the fresh outputs, cleaned")
    options = parser.parse_args()
    chosen = options.notebooks or [path for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
                                   if '"#| slow' not in path.read_text(encoding="utf-8")]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as pool:
        os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "IN_TEST": "1",
                       "OMP_WAIT_POLICY": "PASSIVE", "MADEWITHML_STORAGE_DIR": f"{work}/storage",
                       "MADEWITHML_RESULTS_DIR": f"{work}/results"}
        wrong = sum(pool.map(lambda path: check(path, work, options.write), chosen), [])
    print(*wrong or ["Nothing is wrong with the outputs."], sep="\n")
    sys.exit(bool(wrong))
