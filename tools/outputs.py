"""Executes stage notebooks and names the committed outputs that differ in kind from fresh ones; `--write` stores these."""
import argparse
import os
import re
import socket
import sys
import tempfile
from collections import Counter
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
VOLATILE = {  # what must not be committed, after the replacements of `_stable`
    "absolute path": re.compile(r"(?<![\w.:/<])/(tmp|home|root|work|usr|opt|var|Users)/[\w.-]+"),
    "host name": re.compile(rf"\b{re.escape(socket.gethostname())}\b"),
    "address": re.compile(r"\b(?!127\.|0\.0\.0\.0)(\d{1,3}\.){3}\d{1,3}:\d+"),
    "process id": re.compile(r"\bpid[=: ]+\d+"),
}


class Client(NotebookClient):
    """Runs what nbdev_test runs: no cell that is slow, needs a GPU, exports or is not to be run."""

    async def async_execute_cell(self, cell, *args, **kwargs):
        return cell if NOT_RUN.search(cell.source) else await super().async_execute_cell(cell, *args, **kwargs)


def execute(path: Path) -> nbformat.NotebookNode:
    """A copy of the notebook with fresh outputs; cells that are not run keep theirs. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as work:
        env = {"PYTHONPATH": f"{ROOT}", "PYTHONWARNINGS": "ignore", "IN_TEST": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        for name in ("storage", "results"):
            env |= dict.fromkeys((f"MADEWITHML_{name.upper()}_DIR", f"MADEWITHML_{name.upper()}"), f"{work}/{name}")
        client = Client(notebook, timeout=900, store_widget_state=False, resources={"metadata": {"path": ROOT / "nbs"}},
                        extra_arguments=["--log-level=ERROR"])
        client.execute(env=os.environ | env)
        names: dict[str, str] = {}
        for cell in notebook.cells:
            if cell.cell_type == "code" and not NOT_RUN.search(cell.source):
                cell.outputs = [_stable(output, work, names) for output in cell.outputs if _is_shown(output)]
    return notebook


def _is_shown(output: nbformat.NotebookNode) -> bool:
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def _stable(output, work: str, names: dict[str, str]):
    """The same with places and run ids of this execution replaced, the latter by RUN_ID_1, RUN_ID_2, …"""
    if isinstance(output, dict):
        pictures = ("image/png", "image/jpeg")
        return nbformat.from_dict({k: v if k in pictures else _stable(v, work, names) for k, v in output.items()})
    if isinstance(output, list):
        return [_stable(value, work, names) for value in output]
    if not isinstance(output, str):
        return output
    text = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", output)
    text = re.sub(r"^[^\n]*\r(?!\n)", "", text, flags=re.MULTILINE)  # what a progress bar wrote over
    for place in (work, str(ROOT), sys.prefix):
        text = text.replace(f"{place}/", "")
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp\w{{8}}/?", "", text)
    return re.sub(r"\b[0-9a-f]{32}\b", lambda run: names.setdefault(run[0], f"RUN_ID_{len(names) + 1}"), text)


def kinds(cell: nbformat.NotebookNode) -> Counter:
    """How often each kind of output stands below a cell; text of one stream counts once."""
    found = Counter(f"{o.output_type} {' + '.join(sorted(o.data))}" for o in cell.outputs if "data" in o)
    found.update({f"stream {o.name}" for o in cell.outputs if o.output_type == "stream"})
    found.update(f"error {o.ename}" for o in cell.outputs if o.output_type == "error")
    return found


def compare(path: Path, write: bool) -> list[str]:
    """What is wrong with a notebook's outputs, a line each, after its execution and, with `write`, the storing."""
    try:
        fresh = execute(path)
    except CellExecutionError as error:
        return [f"{path.name}: a cell failed, nothing written: {error.ename}: {error.evalue}\n{error.traceback}"]
    cells = [cell for cell in fresh.cells if cell.cell_type == "code"]
    flagged = [f"{path.name} [{cell.id}]: {what} in an output" for cell in cells
               for what, pattern in VOLATILE.items() if pattern.search(_text(cell))]
    if write:
        nbformat.write(fresh, path)
        nbdev_clean(fname=str(path))
        return flagged
    old = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return flagged + [f"{path.name} [{now.id}]: committed {dict(kinds(was)) or 'nothing'}, now {dict(kinds(now)) or 'nothing'}"
                      for was, now in zip(old, cells, strict=True) if kinds(was) != kinds(now)]


def _text(cell: nbformat.NotebookNode) -> str:
    texts = [text for o in cell.outputs for kind, text in o.get("data", {"text": o.get("text", "")}).items()
             if not kind.startswith("image/p")]
    return "\n".join(map(str, texts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every stage notebook without a slow cell")
    parser.add_argument("--write", action="store_true", help="store the fresh outputs, cleaned")
    options = parser.parse_args()
    every = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    chosen = options.notebooks or [path for path in every if '"#| slow' not in path.read_text(encoding="utf-8")]
    with ThreadPoolExecutor(1 if options.write else 2) as pool:
        wrong = [line for lines in pool.map(lambda path: compare(path, options.write), chosen) for line in lines]
    fine = "Stored." if options.write else "Committed outputs are of the kinds that the notebooks give now."
    print(*wrong or [fine], sep="\n")
    sys.exit(bool(wrong))
