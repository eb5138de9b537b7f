"""Builds the site into `_docs/`: lays out in `_proc/site` what Sphinx reads, and calls it."""
import ast
import re
import shutil
import sys
import time
from pathlib import Path
from textwrap import indent

from sphinx.cmd.build import main as sphinx
from typer.cli import get_docs_for_click
from typer.main import get_command

ROOT = Path(__file__).parents[1]
STAGE, SITE = ROOT / "_proc" / "site", ROOT / "_docs"
# Directories and files of the repository that pages are made from or link to.
COPIED = [
    "nbs", "docs", "deploy", "datasets", ".github",
    *(path.name for path in ROOT.glob("[A-Z]*.md")), "LICENSE", "requirements.lock",
]
EXIT_CODES = (
    "Exit codes: 0 success; 1 a failed check; 2 a user's mistake, in one line; 130 interrupted.\n\n"
)
LINES = 15  # of a constant in the reference; the rest is cut


def write(name: str, text: str) -> Path:
    """Writes a page unless it has this text already: Sphinx reads again what is newer."""
    path = STAGE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def index_page() -> str:
    """The README, its links to this repository made relative, and the contents of the site."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    toctree = (ROOT / "docs" / "toctree.txt").read_text(encoding="utf-8")
    return re.sub(r"\]\(https?://[^)]*/blob/main/", "](", readme) + "\n" + toctree


def commands_page() -> str:
    """Every command of `madewithml`, as typer documents it."""
    sys.path.insert(0, str(ROOT))
    from madewithml.cli import app
    command = get_command(app)
    context = command.context_class(command, info_name="madewithml")
    text = get_docs_for_click(obj=command, ctx=context, name="madewithml")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # sentences that are cut off
    return text.replace("**Usage**", EXIT_CODES + "**Usage**", 1)


def targets_page() -> str:
    """The targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rows = re.findall(r"^([a-z-]+):.*?## (.*)$", makefile, flags=re.M)
    table = "\n".join(f"| `make {name}` | {text} |" for name, text in rows)
    return f"# The targets of `make`\n\n| target | what it does |\n|---|---|\n{table}\n"


def reference_entry(name: str, node: ast.stmt, source: list[str]) -> str:
    """The directive for an exported name: autodoc's, or the code of a constant."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    if any(re.search(r"\.(command|deployment)\b", decorator) for decorator in decorators):
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        return f".. py:{kind}:: {name}\n\n{indent(ast.get_docstring(node), '   ')}\n"
    if isinstance(node, ast.ClassDef):
        return f".. autoclass:: {name}\n   :members:\n"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f".. autofunction:: {name}\n"
    lines = source[node.lineno - 1 : node.end_lineno]
    lines = lines if len(lines) <= LINES else [*lines[:LINES], "…"]
    code = indent("\n".join(lines), " " * 6)
    return f".. py:data:: {name}\n\n   .. code-block:: python\n\n{code}\n"


def reference_page(module: Path) -> str:
    """Every name that a module exports, in the order of its notebook."""
    source = module.read_text(encoding="utf-8")
    notebook = Path(re.search(r"File to edit: (.*)\.$", source, flags=re.M)[1]).stem
    tree, nodes = ast.parse(source), {}
    for node in tree.body:
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            nodes[getattr(target, "id", getattr(target, "name", ""))] = node
    exported = [name for name in ast.literal_eval(nodes["__all__"].value) if name in nodes]
    entries = "\n".join(reference_entry(name, nodes[name], source.split("\n")) for name in exported)
    name = module.stem
    return f"""{name}
{"=" * len(name)}

.. automodule:: madewithml.{name}
   :no-members:
.. py:currentmodule:: madewithml.{name}

Module ``madewithml.{name}``, exported from the notebook :doc:`/nbs/{notebook}`.

{entries}"""


def stage() -> None:
    """Lays out what Sphinx reads as in the repository, so that relative links hold."""
    STAGE.mkdir(parents=True, exist_ok=True)
    for name in COPIED:  # with their times, so that Sphinx reads again only what changed
        if (ROOT / name).is_dir():
            shutil.rmtree(STAGE / name, ignore_errors=True)
            shutil.copytree(ROOT / name, STAGE / name)
        else:
            shutil.copy2(ROOT / name, STAGE / name)
    pages = {"index.md": index_page(), "commands.md": commands_page(), "targets.md": targets_page()}
    for module in sorted((ROOT / "madewithml").glob("[!_]*.py")):
        pages[f"reference/{module.stem}.rst"] = reference_page(module)
    written = {write(name, text) for name, text in pages.items()}
    for path in (STAGE / "reference").iterdir():
        if path not in written:
            path.unlink()  # of a module that was removed
    for page in SITE.glob("[!_]*/**/*.html"):
        if not list(STAGE.glob(f"{page.relative_to(SITE).with_suffix('')}.*")):
            page.unlink()  # of a page that was removed


if __name__ == "__main__":
    begin = time.monotonic()
    stage()
    options = ["-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT / "docs")]
    if code := sphinx([*options, "-d", str(STAGE.parent / "doctrees"), str(STAGE), str(SITE)]):
        sys.exit(code)
    pages = len(list(SITE.rglob("*.html")))
    print(f"{pages} pages in {time.monotonic() - begin:.0f} s: {SITE / 'index.html'}", flush=True)
