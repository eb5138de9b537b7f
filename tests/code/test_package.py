"""The package as a programmer meets it."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "madewithml").glob("[!_]*.py"))
ORDER = [path.stem[3:] for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
HEAVY = {"torch", "ray", "mlflow", "transformers", "pandas", "great_expectations"}


def run_code(code: str, folder: Path) -> str:
    """What the code prints, in a Python of its own that starts in `folder`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          check=True)
    return done.stdout.strip()


def test_importing_creates_nothing(tmp_path: Path) -> None:
    """Importing every module writes no file and starts no process."""
    names = ", ".join(f"madewithml.{path.stem}" for path in MODULES)
    code = f"import {names}; import psutil; print(len(psutil.Process().children()))"
    assert run_code(code, tmp_path) == "0"
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_heavy_package(tmp_path: Path) -> None:
    """`madewithml --help` answers without loading what takes seconds."""
    code = f"import sys, madewithml.cli; print(*sorted({HEAVY} & set(sys.modules)))"
    assert run_code(code, tmp_path) == ""


@pytest.mark.parametrize("name", ["tracking", "registry", "evaluate", "promotion", "rollout"])
def test_lookups_load_no_framework(name: str, tmp_path: Path) -> None:
    """A command that fails before it needs a model does not load what models need."""
    heavy = {"torch", "ray", "transformers", "sklearn", "matplotlib"}
    code = f"import sys, madewithml.{name}; print(*sorted({heavy} & set(sys.modules)))"
    assert run_code(code, tmp_path) == ""


def find_imports(module: Path) -> set[str]:
    """Names of what a module imports; `madewithml.NAME` for a relative import."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(("madewithml." if node.level else "") + (node.module or ""))
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_imports_only_lower_numbers(module: Path) -> None:
    """A module imports only modules whose notebook comes before its own, and never nbdev."""
    names = find_imports(module)
    packages = {name.split(".")[0] for name in names}
    assert not packages & {"nbdev", "fastcore"}
    siblings = {name.split(".")[1] for name in names if name.startswith("madewithml.")} - {""}
    allowed = ORDER[:ORDER.index(module.stem)] if siblings else []
    assert siblings <= set(allowed)


def test_every_option_has_help() -> None:
    """No command has an option without an explanation."""
    import typer.main

    from madewithml.cli import app
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_notebooks_are_small_and_name_no_local_path() -> None:
    """No notebook over 300 KB, no path of this machine, no error in an output."""
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        assert len(text) < 300_000, path
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, path
        assert '"output_type": "error"' not in text, path
