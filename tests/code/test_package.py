"""The package as a programmer meets it."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "madewithml").glob("*.py") if not path.name.startswith("_"))
ORDER = [path.stem[3:] for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]


def test_importing_creates_nothing(tmp_path: Path) -> None:
    """Importing every module writes no file and starts no process."""
    names = ", ".join(f"madewithml.{path.stem}" for path in MODULES)
    code = f"import {names}; import psutil; print(len(psutil.Process().children()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_heavy_package() -> None:
    """`madewithml --help` answers without loading what takes seconds."""
    code = "import sys, madewithml.cli; print(*sorted({'torch', 'ray', 'mlflow', 'transformers', 'pandas', 'great_expectations'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_imports_only_lower_numbers(module: Path) -> None:
    """A module imports only modules whose notebook comes before its own, and never nbdev."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [("madewithml." if node.level else "") + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] not in {"nbdev", "fastcore"}, f"{module.name} imports {name}"
            if name.startswith("madewithml.") and name != "madewithml.":
                assert ORDER.index(name.split(".")[1]) < ORDER.index(module.stem), f"{module.name} imports {name}"


def test_every_option_has_help() -> None:
    """No command has an option without an explanation."""
    import typer.main

    from madewithml.cli import app
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_notebooks_are_small_and_tell_no_path() -> None:
    """No notebook over 300 KB, no path of this machine, no error in an output."""
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        assert len(text) < 300_000, path
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, path
        assert '"output_type": "error"' not in text, path
