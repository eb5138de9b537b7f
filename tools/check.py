"""Checks that what is generated equals what it is generated from, and runs the notebooks' own tests. `--fix` generates instead."""
import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATE = """
import sys; sys.argv = sys.argv[:1]
import posixpath, re
from pathlib import Path
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbconvert import MarkdownExporter
import nbformat
nbdev_export()
for notebook in sorted(Path("nbs").rglob("*.ipynb")):
    if ".ipynb_checkpoints" not in notebook.parts: nbdev_clean(fname=str(notebook))
index = nbformat.read("nbs/index.ipynb", as_version=4)
index.cells = [cell for cell in index.cells if not cell.source.startswith("#| hide")]
exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
text, resources = exporter.from_notebook_node(index)
text = re.sub(r"\\]\\((?![a-z]+:|#)([^)\\s]+)\\)", lambda link: f"]({posixpath.normpath('nbs/' + link[1])})", text)  # links are seen from nbs/ there, from here in README.md
Path("README.md").write_text("<!-- made from nbs/index.ipynb by `make export`; edit that -->\\n" + text.strip() + "\\n", encoding="utf-8")
"""
GENERATED = ("madewithml", "nbs", "README.md")


def generate(folder: Path) -> None:
    """Exports, cleans and writes the README inside `folder`."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", GENERATE], cwd=folder, check=True, env=os.environ | {"PYTHONPATH": str(folder)})


def files(folder: Path) -> list[Path]:
    """Files that are generated, relative to `folder`."""
    found = [path for top in GENERATED for path in ([folder / top] if (folder / top).is_file() else (folder / top).rglob("*"))]
    hidden = {"__pycache__", ".ipynb_checkpoints", ".last_checked"}
    return sorted(path.relative_to(folder) for path in found if path.is_file() and not hidden & set(path.relative_to(folder).parts))


def out_of_sync() -> list[Path]:
    """Files that differ from what would be generated now."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "copy"
        copy.mkdir()
        for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        for name in ("madewithml", "nbs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_modidx.py"))
        for module in (copy / "madewithml").glob("*.py"):
            if module.name != "__init__.py":
                module.unlink()  # what no notebook exports any more must not stay
        generate(copy)
        both = sorted({*files(ROOT), *files(copy)})
        return [path for path in both if not ((ROOT / path).is_file() and (copy / path).is_file() and filecmp.cmp(ROOT / path, copy / path, shallow=False))]


def slow_notebooks() -> str:
    """Pattern of the stage notebooks that have a cell marked slow."""
    return "|".join(path.stem for path in sorted((ROOT / "nbs").glob("*.ipynb")) if '"#| slow' in path.read_text(encoding="utf-8"))


def test_notebooks(slow: bool) -> int:
    """Runs the cells of the stage notebooks that are not marked slow, or those that have such cells with them; returns the exit code."""
    chosen = f"flags='slow', file_re='{slow_notebooks()}', n_workers=1" if slow else "n_workers=2"
    code = f"import sys; sys.argv = sys.argv[:1]; from nbdev.test import nbdev_test; nbdev_test({chosen}, timing=True)"
    with tempfile.TemporaryDirectory() as work:
        variables = {"MADEWITHML_STORAGE_DIR": f"{work}/storage", "MADEWITHML_RESULTS_DIR": f"{work}/results", "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=os.environ | variables, check=False).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true", help="export, clean and write README.md")
    parser.add_argument("--no-run", action="store_true", help="do not run the notebooks' tests")
    parser.add_argument("--slow", action="store_true", help="run the notebooks that have cells marked slow, with these")
    options = parser.parse_args()
    if options.fix:
        generate(ROOT)
        sys.exit()
    if options.slow:
        sys.exit(test_notebooks(slow=True))
    if wrong := out_of_sync():
        print("Not in sync with the notebooks, or not clean:", *(f"  {path}" for path in wrong), "Run `make export` and look at the difference.", sep="\n")
        sys.exit(1)
    print("Modules, notebooks and README.md are in sync.", flush=True)
    if not options.no_run:
        sys.exit(test_notebooks(slow=False))
