"""Checks that what the notebooks generate is in sync with them, or runs their tests."""
import argparse
import contextlib
import difflib
import filecmp
import os
import posixpath
import re
import shutil
import sys
import tempfile
import warnings
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.config import set_version
from nbdev.doclinks import nbdev_export
from nbdev.test import nbdev_test

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
HIDDEN = {"__pycache__", ".ipynb_checkpoints", ".last_checked"}


def generate(folder: Path) -> None:
    """Exports, cleans and writes the README inside `folder`."""
    with contextlib.chdir(folder):
        config = ConfigParser(delimiters=["="])
        config.read("settings.ini", encoding="utf-8")
        set_version("madewithml", config["DEFAULT"]["version"])
        nbdev_export(path="nbs")
        nbdev_clean(fname="nbs")
        write_readme()


def write_readme() -> None:
    """README.md from the index, whose links are seen from nbs/."""
    index = nbformat.read("nbs/index.ipynb", as_version=4)
    index.cells = [cell for cell in index.cells if not cell.source.startswith("#| hide")]
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text = re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)",
                  lambda link: f"]({posixpath.normpath('nbs/' + link[1])})",
                  exporter.from_notebook_node(index)[0])
    head = "<!-- made from nbs/index.ipynb by `make export`; edit that -->\n"
    Path("README.md").write_text(f"{head}{text.strip()}\n", encoding="utf-8")


def generated(folder: Path) -> set[Path]:
    """Files that are generated, relative to `folder`."""
    tops = [folder / "madewithml", folder / "nbs"]
    paths = [folder / "README.md", *(path for top in tops for path in top.rglob("*"))]
    found = {path.relative_to(folder) for path in paths if path.is_file()}
    return {path for path in found if not HIDDEN & set(path.parts)}


def out_of_sync() -> list[Path]:
    """Files that differ from what would be generated now."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "copy"
        copy.mkdir()
        for name in ("settings.ini", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        for name in ("madewithml", "nbs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*HIDDEN))
        for module in (copy / "madewithml").glob("*.py"):
            module.unlink()  # what no notebook exports any more must not stay
        generate(copy)
        both = generated(ROOT) | generated(copy)
        same, _, _ = filecmp.cmpfiles(ROOT, copy, both, shallow=False)
        return sorted(both - set(same))


def find_notebook(name: str) -> str:
    """The file name of a stage notebook. Ends the program if there is none of that name."""
    names = [path.stem for path in sorted(NBS.glob("[0-9]*.ipynb"))]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4) or names[-1:]
        sys.exit(f"There is no notebook nbs/{name}.ipynb; give its name, such as NB={close[0]}.")
    return f"{name}.ipynb"


def run_tests(**options) -> None:
    """Runs cells of the stage notebooks; ends the program if one fails."""
    warnings.simplefilter("ignore")
    del sys.argv[1:]  # options of this program are none of a notebook's
    with tempfile.TemporaryDirectory() as work:
        for name in ("STORAGE_DIR", "RESULTS_DIR"):
            os.environ[f"MADEWITHML_{name}"] = f"{work}/{name.lower()}"
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        with contextlib.chdir(ROOT):
            nbdev_test(path="nbs", timing=True, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true", help="export, clean and write README.md")
    parser.add_argument("--run", action="store_true", help="run all cells that are not slow")
    parser.add_argument("--slow", action="store_true", help="run notebooks that have slow cells")
    parser.add_argument("--notebook", metavar="NAME", help="run one, such as 24_train")
    options = parser.parse_args()
    if options.fix:
        generate(ROOT)
    elif options.notebook is not None:
        run_tests(file_glob=find_notebook(options.notebook))
    elif options.slow:
        texts = {path.stem: path.read_text(encoding="utf-8") for path in NBS.glob("*.ipynb")}
        slow = "|".join(stem for stem, text in texts.items() if '"#| slow' in text)
        run_tests(flags="slow", file_re=slow, n_workers=1)
    elif options.run:
        run_tests(n_workers=2)
    elif wrong := out_of_sync():
        print("Not in sync with the notebooks, or not clean:", *(f"  {path}" for path in wrong),
              "Run `make export` and look at the difference.", sep="\n")
        sys.exit(1)
    else:
        print("Modules, notebooks and README.md are in sync.")
