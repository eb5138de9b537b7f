"""Sphinx's configuration, with hooks for notebooks and the reference. No page asks another host.

`tools/docs.py` lays out the pages and calls Sphinx."""
import importlib
import inspect
import json
import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from docutils import nodes
from fastcore.docments import docments
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MPLBACKEND", "agg")
for path in sorted((ROOT / "madewithml").glob("[!_]*.py")):
    importlib.import_module(f"madewithml.{path.stem}")  # once, not in each process of Sphinx

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")

project = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
copyright = author
version = release = settings["DEFAULT"]["version"]
language = "en"

extensions = [
    "myst_nb", "sphinx_copybutton", "sphinx.ext.autodoc", "sphinx.ext.linkcode",
    "sphinx.ext.githubpages",  # GitHub serves `_static`, too
]
root_doc = "index"
exclude_patterns = ["**/.ipynb_checkpoints", "nbs/index.ipynb", "README.md", ".github"]
default_role = "code"
smartquotes_action = "qe"  # no dashes: --seed is an option

autodoc_default_options = {"exclude-members": "model_config"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

nb_execution_mode = "off"  # a page shows what was committed
nb_merge_streams = True
nb_ipywidgets_js = {}  # else each page asks a CDN for widgets
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["colon_fence", "deflist"]  # no dollarmath: a dollar is a dollar
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "pydata_sphinx_theme"
html_title = project
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": project},
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "navigation_depth": 2,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "github-light",
    "pygments_dark_style": "github-dark",
}
html_sidebars = {"**": ["sidebar-nav-bs"], "index": [], "docs/course": [], "docs/design": []}


# ---- notebooks -------------------------------------------------------------------------------

def hide_directives(app: Sphinx, page: str, source: list[str]) -> None:
    """Takes nbdev's directives out of a notebook, and the cells that they hide."""
    if not page.startswith("nbs/"):
        return
    notebook = json.loads(source[0])
    cells = []
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).splitlines(keepends=True)
        marks = {line[2:].split()[0] for line in lines if re.match(r"#\|\s*\w", line)}
        cell["source"] = "".join(line for line in lines if not line.startswith("#|")).lstrip("\n")
        if not marks & {"hide", "default_exp"}:
            cells.append(cell)
    source[0] = json.dumps(notebook | {"cells": cells})


def mark_definitions(app: Sphinx, doctree: nodes.document) -> None:
    """Gives the cell that defines a name first an id, to which the reference links."""
    seen = set()
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code":
            code = next(cell.findall(nodes.literal_block), nodes.Text("")).astext()
            names = re.findall(r"^(?:async def |def |class |(?=\w+(?:: .*)? = ))(\w+)", code, re.M)
            cell["ids"] += [f"code-{name}" for name in dict.fromkeys(names) if name not in seen]
            seen |= set(names)


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Address of the notebook's cell that defines a name of the reference."""
    module = (ROOT / info["module"].replace(".", "/")).with_suffix(".py")
    notebook = re.search(r"File to edit: \.\./(.*)\.ipynb", module.read_text(encoding="utf-8"))[1]
    return f"../{notebook}.html#code-{info['fullname'].split('.')[0]}"


# ---- reference -------------------------------------------------------------------------------

SIGNS = {
    "ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤",
}


def describe_field(name: str, field: FieldInfo, comment: str) -> list[str]:
    """What a field of pydantic is, with its default and range, and its type."""
    notes = []
    if isinstance(field.default, str | int | float | tuple | Path):  # not None, nor another model
        notes.append(f"default `{field.default!r}`")
    for mark in field.metadata:
        bounds = {sign: getattr(mark, bound, None) for bound, sign in SIGNS.items()}
        notes += [f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None]
    text = (field.description or comment) + (f" ({', '.join(notes)})" if notes else "")
    kind = stringify_annotation(field.annotation, "smart")
    kind = re.sub(r"Annotated\[([^,]+), FieldInfo\(.*?\]\)\]", r"\1", kind)  # its range is a note
    return [f":param {name}: {text}", f":type {name}: {kind}"]


def describe_model(model: type[BaseModel]) -> list[str]:
    """The fields of a class of pydantic, with the comments beside them or their descriptions."""
    comments = {}
    for base in reversed(model.__mro__):
        if base.__module__.startswith("madewithml."):
            comments |= docments(base)
    return [line for name, field in model.model_fields.items()
            for line in describe_field(name, field, comments.get(name) or "")]


def describe_parameters(value: Any) -> list[str]:
    """The parameters of a function or class, with the comment beside each in the code."""
    comments = docments(value)
    function = value.__init__ if inspect.isclass(value) else value
    last = list(inspect.signature(function).parameters.values())[-1:]
    if last and last[0].kind is last[0].VAR_KEYWORD:
        comments[last[0].name] = comments.get("return")  # where fastcore puts its comment
    return [f":param {name}: {' '.join(comment.split())}"
            for name, comment in comments.items() if comment and name != "return"]


def is_model(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseModel)


def write_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str],
) -> None:
    """Markdown to reStructuredText, and what the code says of each parameter."""
    if what in ("class", "exception", "function", "method"):
        lines += ["", *(describe_model(value) if is_model(value) else describe_parameters(value))]
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`|^:\w+ \w+:)", line)
        parts[::2] = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
        if not line.startswith(":type"):
            lines[i] = "".join(parts)


def short_signature(
    app: Sphinx, what: str, name: str, value: Any, *_: Any,
) -> tuple[str, str] | None:
    """No signature for a class of pydantic: its fields stand below."""
    return ("", "") if is_model(value) else None


def set_dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx writes two hyphens between a parameter and its description."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def link_names(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Links `names` of the package in prose to the reference, where they are unambiguous."""
    found: dict[str, list[tuple[str, str]]] = {}
    for full, _, _, home, anchor, _ in app.env.domains["py"].get_objects():
        if full.count(".") == 2 and not full.startswith("madewithml.cli."):  # words like `train`
            found.setdefault(full.split(".")[2], []).append((home, anchor))
    for literal in list(doctree.findall(nodes.literal)):
        places = found.get(literal.astext().removesuffix("()"), [])
        if len(places) == 1 and isinstance(literal.parent, nodes.paragraph | nodes.entry):
            home, anchor = places[0]
            literal.replace_self(make_refnode(app.builder, page, home, anchor, literal.deepcopy()))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the functions above."""
    app.connect("source-read", hide_directives)
    app.connect("doctree-read", mark_definitions)
    app.connect("doctree-read", set_dashes)
    app.connect("autodoc-process-docstring", write_docstring)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
