"""Builds the site: notebooks as they are committed, the pages of `docs/`, and a reference made from the code. `--serve` shows it."""
import argparse
import ast
import dataclasses
import functools
import http.server
import importlib
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
import time
import tokenize
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat

ROOT = Path(__file__).parents[1]
STAGE, SITE = ROOT / "_proc" / "site", ROOT / "_docs"
MARKDOWN = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "datasets/README.md", "deploy/README.md", "deploy/kuberay/README.md"]
HIDDEN = {"hide", "default_exp"}  # directives of nbdev: of a cell that readers do not see
NO_SOURCE = {"hide_input", "echo: false"}
NO_OUTPUT = {"hide_output", "output: false"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def write(path: Path, content: str | bytes) -> Path:
    """Writes the file unless it holds this already, so that Sphinx reads anew only what changed."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
    return path


# ---- notebooks -------------------------------------------------------------------------------------------------------

def defined(source: str) -> list[str]:
    """Names that a cell defines at its top."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [name.id for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target]) if isinstance(name, ast.Name)]
    return names


def split_directives(source: str) -> tuple[set[str], str]:
    """nbdev's directives of a cell (`#| hide`), and its source without them."""
    lines = source.splitlines()
    marks = {line[2:].strip() for line in lines if line.startswith("#|")}
    return marks, "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")


def linked(text: str, symbols: dict[str, str], here: str = "") -> str:
    """Markdown with `names` of the package turned into links to the reference; code blocks, links and headings stay."""
    parts = re.split(r"(^```.*?^```$|^#.*$|\[[^\]]*\]\([^)]*\))", text, flags=re.S | re.M)
    link = lambda found: f"[`{found[1]}`](#{symbols[found[1].removesuffix('()')]})" if symbols.get(found[1].removesuffix("()"), here) != here else found[0]  # noqa: E731
    return "".join(part if i % 2 else re.sub(r"(?<!`)`([A-Za-z_]\w*(?:\(\))?)`(?!`)", link, part) for i, part in enumerate(parts))


def shown_outputs(cell: nbformat.NotebookNode, marks: set[str]) -> list[nbformat.NotebookNode]:
    """Outputs that a page can show: no widgets, which need a kernel, and no colors of a terminal."""
    if marks & NO_OUTPUT:
        return []
    outputs = []
    for output in cell.outputs:
        if "data" in output:
            output.data = {kind: value for kind, value in output.data.items() if not kind.startswith("application/vnd.jupyter.widget")}
            if "text/plain" in output.data and len(output.data) > 1 and "text/markdown" not in output.data and "text/latex" not in output.data:
                del output.data["text/plain"]
        elif output.output_type == "stream":
            output.text = ANSI.sub("", output.text)
        outputs.append(output)
    return outputs


def notebook_page(path: Path, symbols: dict[str, str], exported: list[str]) -> str:
    """The notebook as nbdev would show it, its exported code in sight, each exported name a place that links can reach."""
    notebook = nbformat.read(path, as_version=4)
    module, cells = path.stem.split("_", 1)[-1], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, symbols)
        if cell.cell_type != "code":
            cells.append(cell)
            continue
        marks, cell.source = split_directives(cell.source)
        if {mark.partition(" ")[0] for mark in marks} & HIDDEN:
            continue
        cell.outputs = shown_outputs(cell, marks)
        if marks & NO_SOURCE:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "remove-input"]
        if any(mark.startswith("export") for mark in marks):
            places = [name for name in defined(cell.source) if name in exported]
            if places:
                cells.append(nbformat.v4.new_markdown_cell("\n".join(f"({place('nb', module, name)})=" for name in places), id=f"at-{cell.id}"))
        cells.append(cell)
    notebook.cells = cells
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return nbformat.writes(notebook)


def place(kind: str, module: str, symbol: str) -> str:
    """Name of the place where an exported name stands: kind 'ref' in the reference, 'nb' in the notebook.

    Sphinx does not tell `service`, `PredictionService` and `SERVICE` apart, so the name says which of these it is."""
    case = "constant-" if symbol.isupper() else "class-" if symbol[0].isupper() else ""
    return f"{kind}-{module}-{case}{symbol}"


# ---- reference -------------------------------------------------------------------------------------------------------

def modules() -> Iterator[tuple[str, ModuleType, Path]]:
    """Name, module and notebook of everything that is exported, in the order of the notebooks."""
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        found = re.search(r'#\| default_exp (\w+)', path.read_text(encoding="utf-8"))
        if found:
            yield found[1], importlib.import_module(f"madewithml.{found[1]}"), path


def anchors(found: list[tuple[str, ModuleType, Path]]) -> dict[str, str]:
    """The place in the reference of each exported name. Names that are also plain words of English get no link from prose."""
    places: dict[str, str] = {}
    for name, module, _ in found:
        for symbol in module.__all__:
            places.setdefault(symbol, place("ref", name, symbol))
    return places


def cell_text(value: object) -> str:
    """Text that may stand in a table of Markdown."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def code(value: object) -> str:
    """Code that may stand in a table of Markdown."""
    text = cell_text(value)
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else ""


def annotation(kind: Any) -> str:
    """A type as it is written."""
    if kind in (inspect.Parameter.empty, None):
        return "" if kind is inspect.Parameter.empty else "None"
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", text)


def shown_default(value: Any) -> str:
    """A default as it is written, without addresses in memory."""
    if isinstance(value, Enum):
        return value.name
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; columns in which nothing stands are left out."""
    keep = [i for i, _ in enumerate(head) if any(row[i] for row in rows)]
    lines = [[head[i] for i in keep], ["---"] * len(keep), *([row[i] for i in keep] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signature(name: str, function: Any, skip: int = 0) -> str:
    """Call of the function with its defaults, over several lines where one is too long."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    words, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY)
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        words.append(prefix + parameter.name + ("" if parameter.default is parameter.empty else f"={shown_default(parameter.default)}"))
    line = f"{name}({', '.join(words)})"
    if len(line) > 88:
        line = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + ")"
    return f"```python\n{line}\n```"


def comments(thing: Any) -> dict[str, str]:
    """The comment beside each parameter of a function, or beside each field of a class, in the code.

    fastcore's docments finds the same, but takes the comment of a last `**parameter` for that of what is returned."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
    beside = {token.start[0]: token.string.lstrip("# ") for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef):
        places = {field.target.id: field for field in node.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)}
    else:
        given = node.args
        places = {argument.arg: argument for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg] if argument}
    return {name: beside[place.end_lineno] for name, place in places.items() if place.end_lineno in beside and place.lineno != node.lineno}


def parameters(function: Any, skip: int = 0) -> str:
    """The parameters with what the code says of each, and the type of what is returned."""
    described = comments(function.__init__ if inspect.isclass(function) and "__init__" in vars(function) and not dataclasses.is_dataclass(function) else function)
    call, rows = inspect.signature(function), []
    for name, parameter in list(call.parameters.items())[skip:]:
        default = "" if parameter.default is parameter.empty else code(shown_default(parameter.default))
        rows.append([code(name), cell_text(described.get(name, "")), code(annotation(parameter.annotation)), default])
    if call.return_annotation not in (call.empty, None):
        rows.append(["returns", "", code(annotation(call.return_annotation)), ""])
    return table(["parameter", "what it is", "type", "default"], rows) if rows else ""


def is_model(kind: type) -> bool:
    """Whether the class declares its fields with pydantic."""
    return hasattr(kind, "model_fields")


def bounds(field: Any) -> str:
    """The range of a field of pydantic."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    return ", ".join(f"{sign} {getattr(mark, name)}" for mark in field.metadata for name, sign in signs.items() if getattr(mark, name, None) is not None)


def fields(kind: type) -> str:
    """The fields of a class of pydantic, with their ranges and what the code says of each."""
    described: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("madewithml."):
            described |= comments(base)
    rows = []
    for name, field in kind.model_fields.items():
        made = field.default_factory not in (None, list, dict)  # such as the time of writing: another one each time
        default = "" if field.is_required() or made else code(shown_default(field.get_default(call_default_factory=True)))
        rows.append([code(name), cell_text(field.description or described.get(name, "")), code(annotation(field.annotation)), default, bounds(field)])
    return table(["field", "what it is", "type", "default", "range"], rows) if rows else ""


def methods(name: str, kind: type) -> str:
    """Methods and properties of the class itself that are meant for others."""
    parts = []
    for method, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if method.startswith("_") or method in getattr(kind, "__dataclass_fields__", {}) or not inspect.isroutine(function) or not (function.__module__ or "").startswith("madewithml."):
            continue
        if isinstance(value, property):
            parts.append(f"`{name}.{method}`\n: {inspect.getdoc(function) or ''} ({code(annotation(inspect.signature(function).return_annotation)) or 'property'})\n")
        else:
            skip = 0 if isinstance(value, staticmethod) else 1
            parts.append(f"### `{name}.{method}`\n\n{signature(method, function, skip)}\n\n{inspect.getdoc(function) or ''}\n\n{parameters(function, skip)}\n")
    return "\n".join(parts)


def as_written(symbol: str, module: str, most: int = 15) -> str:
    """What the code says of a constant, of many lines the first, or of a class that a decorator made into something else."""
    source = (ROOT / "madewithml" / f"{module}.py").read_text(encoding="utf-8")
    node = next(node for node in ast.parse(source).body if symbol in defined(ast.unparse(node)))
    if isinstance(node, ast.ClassDef):
        return f"```python\nclass {symbol}\n```\n\n{ast.get_docstring(node) or ''}"
    lines = source.splitlines()[node.lineno - 1:node.end_lineno]
    shown = "\n".join(lines if len(lines) <= most else [*lines[:most], "…"])
    return f"```python\n{shown}\n```"


def entry(symbol: str, value: Any, module: str) -> str:
    """One exported name of the reference."""
    doc, body = inspect.getdoc(value) or "", []
    if inspect.isclass(value):
        if is_model(value):
            body += [f"```python\nclass {symbol}\n```", doc, fields(value)]
        elif value.__init__ in (Exception.__init__, object.__init__):
            body += [f"```python\nclass {symbol}\n```", doc]
        else:
            body += [signature(symbol, value), doc, parameters(value)]
        body.append(methods(symbol, value))
    elif inspect.isroutine(value) or inspect.isroutine(getattr(value, "__wrapped__", None)):
        body += [signature(symbol, value), doc, parameters(value)]
    else:
        body.append(as_written(symbol, module))
    return f"({place('ref', module, symbol)})=\n## `{symbol}`\n\n" + "\n\n".join(part for part in body if part) + f"\n\n[Why, and the code](#{place('nb', module, symbol)})\n"


def reference_page(name: str, module: ModuleType, path: Path) -> str:
    """Every exported name of a module."""
    notebook = nbformat.read(path, as_version=4)
    title = next(line[2:] for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("# "))
    cells = [split_directives(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    homes = {symbol for marks, source in cells if "export" in marks for symbol in defined(source)}
    symbols = [symbol for symbol in module.__all__ if symbol in homes]
    first = (module.__doc__ or title).strip()
    entries = "\n".join(entry(symbol, getattr(module, symbol), name) for symbol in symbols) or "Nothing is exported by name.\n"
    return f"# `madewithml.{name}`\n\n{first}\n\nMade from the notebook [{title}](../nbs/{path.name}).\n\n{entries}"


def commands_page() -> str:
    """Every command of `madewithml` with its arguments and options."""
    import typer
    from madewithml.cli import app
    parts = ["# The command `madewithml`\n", "Exit codes: 0 it is done; 1 a check said no; 2 what was asked for is wrong, said in one line; 130 interrupted.\n"]

    def add(command: Any, words: str) -> None:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                add(below, f"{words} {name}")
            return
        context = command.context_class(command, info_name=words)
        rows = [[code(name), cell_text(text.strip())] for option in command.params if (record := option.get_help_record(context)) for name, text in [record]]
        shown = table(["option", "what it is"], rows)
        parts.append(f"(cmd-{words.replace(' ', '-')})=\n## `{words}`\n\n{inspect.cleandoc(command.help or '')}\n\n{shown}\n")

    add(typer.main.get_command(app), "madewithml")
    return "\n".join(parts)


def targets_page() -> str:
    """The targets of the Makefile."""
    rows = re.findall(r"^([a-z-]+):.*?## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    return "# The targets of `make`\n\nEach sets up what it needs.\n\n" + table(["target", "what it does"], [[f"`make {name}`", cell_text(text)] for name, text in rows]) + "\n"


# ---- the whole -------------------------------------------------------------------------------------------------------

def stage() -> Path:
    """Everything that Sphinx reads, laid out as in the repository so that relative links hold. Returns the directory."""
    found = list(modules())
    places = anchors(found)
    # A plain word in backticks may mean a column or an option; a name that is unmistakably code is linked.
    names = {name: place for name, place in places.items() if "_" in name or re.search(r"[a-z][A-Z]", name)}
    written = {write(STAGE / "reference" / f"{name}.md", reference_page(name, module, path)) for name, module, path in found}
    written |= {write(STAGE / "commands.md", commands_page()), write(STAGE / "targets.md", targets_page())}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts or path.name == "index.ipynb":
            continue
        own = next((module.__all__ for _, module, home in found if home == path), [])
        known = names | {name: places[name] for name in own if places[name].split("-")[1] == path.stem.split("_", 1)[-1]}
        written.add(write(STAGE / path.relative_to(ROOT), notebook_page(path, known, own)))
    pages = {path.relative_to(ROOT): path for path in (ROOT / "docs").rglob("*.md")} | {Path(name): ROOT / name for name in MARKDOWN}
    for name, path in pages.items():
        written.add(write(STAGE / name, linked(path.read_text(encoding="utf-8"), names)))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("\n", 1)[1]
    toctree = (ROOT / "docs" / "toctree.txt").read_text(encoding="utf-8")
    written.add(write(STAGE / "index.md", re.sub(r"\]\(https?://[^)]*/blob/main/", "](", readme) + "\n" + toctree))
    for name in ("deploy", "datasets", "nbs/images", ".github", "LICENSE", "requirements.lock"):
        top = ROOT / name
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts:
                written.add(write(STAGE / path.relative_to(ROOT), path.read_bytes()))
    for path in STAGE.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()  # of a page that is no more
    return STAGE


def build(clean: bool = False) -> int:
    """Stages and builds; returns Sphinx's exit code. A warning counts as an error."""
    from sphinx.cmd.build import main as sphinx
    begin = time.monotonic()
    if clean:
        shutil.rmtree(STAGE.parent, ignore_errors=True)
        shutil.rmtree(SITE, ignore_errors=True)
    os.environ.setdefault("MPLBACKEND", "agg")
    sys.path.insert(0, str(ROOT))
    source = stage()
    result = sphinx(["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT / "docs"), "-d", str(ROOT / "_proc" / "doctrees"), str(source), str(SITE)])
    if not result:
        print(f"{len(list(SITE.rglob('*.html')))} pages in {time.monotonic() - begin:.0f} s: {SITE / 'index.html'}", flush=True)
    return result


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not tell of each request."""

    def log_message(self, *args: object) -> None: pass


def serve(port: int) -> None:
    """Shows the site on the loopback address until Ctrl-C. Port 0 takes a free one."""
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", action="store_true", help="build everything anew")
    parser.add_argument("--serve", action="store_true", help="show the site that is there")
    parser.add_argument("--port", type=int, default=0, help="port to show it on; 0: a free one")
    options = parser.parse_args()
    if options.serve:
        serve(options.port)
    else:
        sys.exit(build(options.clean))
