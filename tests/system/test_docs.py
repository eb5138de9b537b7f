"""The site builds without a warning, its links hold, it opens offline, and its samples run."""
import ast
import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import papermill
import psutil
import pytest
import typer
import yaml
from typer.exceptions import TyperException

from madewithml.cli import app
from madewithml.config import PromotionPolicy, ServeConfig, Settings, UserError
from madewithml.pipeline import parse_parameters
from madewithml.ray_session import find_free_ports

from ..conftest import ROOT, Run, get_clean_env, is_running

HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
OTHERS = ["README.md", "CONTRIBUTING.md", "deploy/README.md", "deploy/kuberay/README.md",
          "docs/notebooks.md"]
SAMPLES = [*HOW_TO, *(ROOT / name for name in OTHERS)]
BIN = Path(sys.executable).parent
FILES = {  # what checks the content of a file that a page names
    "policy.yaml": PromotionPolicy.model_validate,
    "models.yaml": lambda models: ServeConfig(models=models),
}
MODULES = sorted((ROOT / "madewithml").glob("[!_]*.py"))


# ---- samples --------------------------------------------------------------------------------

@dataclass
class Block:
    """A sample of a page, and what the comment in front of it says of its test.

    `<!-- test: slow -->` takes long, `serve` runs until the page ends, `exit 2` ends so.
    `check, why` is not run here; its commands and options are looked up.
    `<!-- file: NAME -->` is written to that file. A `text` block without one shows lines that
    the block before must print; … stands for anything."""

    page: Path
    line: int
    language: str
    text: str
    test: str = ""
    file: str = ""

    def __str__(self) -> str: return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The samples of a page, in order."""
    found, comment, current = [], {}, None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if current is not None:
            if line == "```":
                found.append(current)
                current, comment = None, {}
            else:
                current.text += line + "\n"
        elif line.startswith("```") and not line.startswith("```{"):
            current = Block(page, number, line[3:].strip(), "", **comment)
        elif match := re.fullmatch(r"<!-- (test|file): (.*) -->", line):
            comment[match[1]] = match[2]
        elif line.strip():
            comment = {}
    assert current is None, f"{page}: a block that does not end"
    return found


def slow(page: Path) -> bool:
    return any(block.test.split(",")[0] in ("slow", "serve") for block in blocks(page))


def commands(text: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Each simple command of a script, also inside `$(…)`: what it sets for itself, its words."""
    nested = re.findall(r"\$\(([^()]*)\)", text)
    for part in [re.sub(r"\$\([^()]*\)", "SUBSTITUTED", text), *nested]:
        line = part.replace("\\\n", " ").replace("\n", "\n; ")
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True  # `#` still begins a comment
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[|&;]+", word):
                command.append(word)
                continue
            if command and command[0] == "export":
                command.pop(0)
            sets = {}
            while command and re.match(r"[A-Za-z_]\w*=", command[0]):
                name, _, value = command.pop(0).partition("=")
                sets[name] = value
            if command or sets:
                yield sets, command
            command = []


def check_cli(words: list[str]) -> None:
    """The command and its options exist, also those that it passes on to a workload."""
    name, *options = words
    command = typer.main.get_command(app)
    run = command.commands["run"]
    while hasattr(command, "commands"):
        assert options and options[0] in command.commands, words
        command = command.commands[options[0]]
        name = f"{name} {options.pop(0)}"
    parsed = command.make_context(name, list(options)).params  # raises for a wrong option or value
    if "args" in parsed:
        workload = parsed.get("name", parsed.get("workload"))
        passed_on = [word for word in parsed["args"] or [] if word != "--"]
        if workload == "run":
            run.make_context("madewithml run", passed_on)
        else:
            parse_parameters(workload, passed_on)


def check_papermill(args: list[str]) -> None:
    """The notebook has these parameters."""
    known = set(papermill.inspect_notebook(str(ROOT / args[0])))
    assert {args[i + 1] for i, arg in enumerate(args) if arg == "-p"} <= known, args


def check_command(sets: dict[str, str], words: list[str]) -> None:
    """Settings, commands, options and files that a command names exist."""
    for name in sets:
        if name.startswith("MADEWITHML_"):
            assert name.removeprefix("MADEWITHML_").lower() in Settings.model_fields, name
    if not words:
        return
    program, *args = words[:words.index(">")] if ">" in words else words
    if program == "madewithml":
        check_cli([program, *args])
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
        assert {arg for arg in args if "=" not in arg} <= targets, words
    elif program == "papermill":
        check_papermill(args)
    for arg in args:
        if arg.startswith("deploy/") and not arg.endswith("/"):
            assert (ROOT / arg).exists(), words


@pytest.mark.parametrize("page", SAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_samples_are_well_formed(page: Path) -> None:
    """Every command, option and setting of a page exists, run or not; Python and YAML parse."""
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(block), "exec")
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            assert block.file, f"{block} needs the name of a file, or it would be run"
            FILES.get(block.file, lambda fields: None)(yaml.safe_load(block.text))
        elif block.language == "bash" and not block.file:
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            for sets, words in commands(block.text):
                check_command(sets, words)


@pytest.mark.parametrize("text", [
    "madewithml trane", "madewithml train --dataset-loc a.csv --learning-rate 1",
    "madewithml submit train -- --no-such 1", "make everything",
    "MADEWITHML_STORRAGE=a madewithml version", "madewithml predict --run-id $(madewithml best)",
])
def test_the_check_finds_what_is_wrong(text: str) -> None:
    with pytest.raises((AssertionError, UserError, TyperException)):
        for sets, words in commands(text):
            check_command(sets, words)


def find_missing(shown: str, printed: str) -> list[str]:
    """The lines that a page shows and that were not printed; … stands for anything."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    wanted = filter(None, (" ".join(line.split()) for line in shown.splitlines()))
    patterns = {line: ".*".join(map(re.escape, line.split("…"))) for line in wanted}
    return [line for line, pattern in patterns.items()
            if not any(re.fullmatch(pattern, printed_line) for printed_line in lines)]


@contextlib.contextmanager
def background(command: list[str], cwd: Path, env: dict[str, str]) -> Iterator[None]:
    """The command for the length of the block, from when it says that Ctrl-C stops it."""
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        printed = ""
        while "Ctrl-C stops it" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        family = psutil.Process(process.pid).children(recursive=True)
        try:
            yield
        finally:
            os.killpg(process.pid, 2)
            process.communicate(timeout=60)
            psutil.wait_procs(family, timeout=30)
            assert not [child for child in family if is_running(child)]


def is_skipped(block: Block) -> bool:
    """Whether the block is only checked here, or is for a machine without a GPU."""
    has_gpu = shutil.which("nvidia-smi") is not None
    return block.test.startswith("check") or ("where there is no GPU" in block.test and has_gpu)


def run_block(block: Block, text: str, folder: Path, env: dict[str, str]) -> tuple[str, str]:
    """What the block printed, and what was wrong with its exit code."""
    shell = ["bash", "-euo", "pipefail", "-c"]
    command = [sys.executable, "-c"] if block.language == "python" else shell
    done = subprocess.run([*command, text], cwd=folder, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=600, check=False)
    code = re.match(r"exit (\d+)", block.test)
    good = done.returncode == (int(code[1]) if code else 0)
    problem = f"{block} ended with {done.returncode}:\n{text}\n{done.stdout}"
    return done.stdout, "" if good else problem


def run_page(page: Path, folder: Path, env: dict[str, str]) -> None:
    """Runs the samples of a page one after the other in a directory."""
    port = str(find_free_ports(1)[0])
    for name in ("datasets", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    printed, failed = None, ""
    with contextlib.ExitStack() as stack:
        for block in blocks(page):
            text = block.text.replace("8000", port)
            if is_skipped(block) or (failed and "always" not in block.test):
                printed = None
            elif block.file:
                (folder / block.file).write_text(text, encoding="utf-8")
            elif block.language == "text":
                lines = find_missing(block.text, printed) if printed is not None else []
                failed = f"{block}: {lines} not in:\n{printed}" if lines else failed
            elif block.test.startswith("serve"):
                stack.enter_context(background(shlex.split(text), folder, env))
            else:
                printed, problem = run_block(block, text, folder, env)
                failed = failed or problem
    assert not failed, failed


@pytest.mark.parametrize("page", [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if slow(page) else [])
    for page in HOW_TO if page.stem != "index"
])
def test_how_to_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A page's samples, run as by a reader after `make run`, with a registered model of its own."""
    env = get_clean_env(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    text = page.read_text(encoding="utf-8")
    if "<!-- storage: own -->" not in text:
        trained: Run = request.getfixturevalue("trained")
        shutil.copytree(trained.results, tmp_path / "results" / "main")
        env["MADEWITHML_STORAGE_DIR"] = str(trained.folder / "storage")
        env["MADEWITHML_REGISTRY_NAME"] = f"how-to-{page.stem}"
        if "promote" in text:  # `make run` ends with a registered version
            command = ["madewithml", "register", "--run-id", trained.run_id]
            subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    run_page(page, tmp_path, env)


# ---- the site -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def site() -> Path:
    """The site, built as `make docs` does."""
    done = subprocess.run([sys.executable, "tools/docs.py"], cwd=ROOT, capture_output=True,
                          text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return ROOT / "_docs"


class Page(HTMLParser):
    """What a page says, links to and loads, and the ids in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loads, self.ids = set(), set(), set()
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.ids.add(value)
            elif name in ("src", "href") and value:
                (self.links if tag == "a" else self.loads).add(value)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @cached_property
    def text(self) -> str:
        """Its text, typographic quotes and dashes as a keyboard has them."""
        text = " ".join("".join(self.words).split())
        for plain, typographic in {"'": "‘’", '"': "“”", "...": "…"}.items():
            text = re.sub(f"[{typographic}]", plain, text)
        return text


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Page]:
    """Every page of the site, by its path in it."""
    paths = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    return {path.relative_to(site).as_posix(): Page(path) for path in paths}


def is_good_address(link: str) -> bool:
    """Whether a link to elsewhere is a whole address: of this machine, or by https."""
    address = urlsplit(link)
    host = address.hostname or ""
    local = host in ("127.0.0.1", "localhost") and address.scheme in ("http", "https")
    return local or (address.scheme == "https" and "." in host and " " not in link)


def test_links_hold(site: Path, pages: dict[str, Page]) -> None:
    """Every link inside the site finds its page and its id. Nothing is loaded from elsewhere."""
    broken = []
    for name, page in pages.items():
        for link in page.links | page.loads:
            address = urlsplit(link)
            if address.scheme == "data":
                continue
            if address.scheme:
                good = link not in page.loads and is_good_address(link)
            else:
                path = unquote(address.path)
                target = os.path.normpath(Path(name).parent / path) if path else name
                good = not link.startswith("/") and (site / target).is_file()
                if good and address.fragment and target in pages:
                    good = unquote(address.fragment) in pages[target].ids
            if not good:
                broken.append((name, link))
    assert not broken, broken
    assert len(pages) > 60


def test_every_notebook_has_a_page(pages: dict[str, Page]) -> None:
    """Each notebook is there without its hidden cells and nbdev's directives."""
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if path.name == "index.ipynb" or ".ipynb_checkpoints" in path.parts:
            continue
        text = pages[path.relative_to(ROOT).with_suffix(".html").as_posix()].text
        assert not re.search(r"#\|\s*(export|hide|default_exp|slow|cuda)", text), path.name
        assert "nbdev_export()" not in text, path.name


def read_comments(path: Path) -> dict[int, str]:
    """The comment of each line of a module, as the reference shows it."""
    with path.open("rb") as file:
        comments = [token for token in tokenize.tokenize(file.readline)
                    if token.type == tokenize.COMMENT]
    texts = [comment.string.removeprefix("#").replace("`", "").replace("…", "...")
             for comment in comments]
    return {comment.start[0]: " ".join(text.split())
            for comment, text in zip(comments, texts, strict=True)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_exported_name_is_in_the_reference(pages: dict[str, Page], path: Path) -> None:
    """With a link to its code in a notebook, each parameter and what the code says of it."""
    page, comments = pages[f"reference/{path.stem}.html"], read_comments(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exported = next(ast.literal_eval(node.value) for node in tree.body
                    if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    for node in tree.body:
        if getattr(node, "name", None) not in exported:
            continue
        assert f"madewithml.{path.stem}.{node.name}" in page.ids
        assert any(link.endswith(f"#code-{node.name}") for link in page.links), node.name
        if isinstance(node, ast.FunctionDef) and path.stem != "cli":  # its options have a page
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                own_line = argument.lineno != node.lineno
                comment = comments.get(argument.end_lineno, "") if own_line else ""
                where = f"{node.name}: {argument.arg}"
                assert argument.arg in page.text and comment in page.text, where


def test_every_command_and_target_is_in_the_reference(pages: dict[str, Page]) -> None:
    text = pages["commands.html"].text
    for command in typer.main.get_command(app).commands.values():
        for below in getattr(command, "commands", {"": command}).values():
            options = [option for parameter in below.params for option in parameter.opts]
            options = [option for option in options if option.startswith("--")]
            assert all(option in text for option in options), command.name
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.M)
    assert all(f"make {target}" in pages["targets.html"].text for target in targets)


# ---- in a browser ---------------------------------------------------------------------------

PAGES = ["index.html", "nbs/24_train.html", "docs/how-to/serve.html", "docs/design.html",
         "reference/config.html", "commands.html"]
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
THEME = "theme => { Object.assign(document.documentElement.dataset, {theme, mode: theme}) }"
OVERHANG = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
STYLE = "([place, what]) => getComputedStyle(document.querySelector(place))[what]"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where `make docs-serve` shows the site."""
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory",
               str(site), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        line = process.stdout.readline()
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        finally:
            process.send_signal(2)
            assert process.wait(timeout=20) == 0


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def tab(request: pytest.FixtureRequest, site: Path) -> Iterator:
    """A tab of a browser that reaches this machine only, and fails for a request elsewhere."""
    from playwright.sync_api import sync_playwright
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not chromium:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    outside, wrong = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        width, height = request.param
        page = browser.new_page(viewport={"width": width, "height": height})

        def route(route) -> None:
            if urlsplit(route.request.url).hostname in ("127.0.0.1", None):
                return route.continue_()
            outside.append(route.request.url)
            return route.abort()

        page.route("**/*", route)
        def note_error(error: Exception) -> None:
            # From the disk a page may not fetch others: results come without their excerpts.
            if not (page.url.startswith("file:") and str(error) == "Failed to fetch"):
                wrong.append(str(error))

        def note_status(response) -> None:
            if response.status >= 400:
                wrong.append(f"{response.status} {response.url}")

        page.on("pageerror", note_error)
        page.on("response", note_status)
        yield page
        browser.close()
    assert not outside and not wrong, (outside, wrong)


def test_pages_open_at_desk_and_phone(tab, address: str) -> None:
    """Each has its title, and nothing sticks out of the window, in light and dark."""
    for name in PAGES:
        tab.goto(address + name)
        assert tab.locator("h1").first.is_visible()
        for theme in ("light", "dark"):
            tab.evaluate(THEME, theme)
            assert tab.evaluate(OVERHANG) <= 0, (name, theme)
            ink = tab.evaluate(STYLE, ["article p, article li", "color"])
            paper = tab.evaluate(STYLE, ["body", "backgroundColor"])
            light = [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in (ink, paper)]
            assert abs(light[0] - light[1]) > 0.5, (name, theme, ink, paper)


@pytest.mark.parametrize("where", ["served", "as a file"])
def test_search_finds_and_leads_on(tab, address: str, site: Path, where: str) -> None:
    """A search and a result that is followed, from the server and from the disk."""
    home = address if where == "served" else site.as_uri() + "/"
    tab.goto(home + "index.html")
    tab.locator("button.search-button__button:visible").first.click()
    field = tab.locator("input[type=search]:visible").first
    field.fill("calibration")
    field.press("Enter")
    summary = tab.locator("#search-results .search-summary", has_text="finished")
    summary.wait_for()  # results come one by one
    results = tab.locator("#search-results li a")
    assert results.count() >= 3
    links = [results.nth(i).get_attribute("href") for i in range(results.count())]
    chosen = next(i for i, link in enumerate(links) if "30_evaluate" in link)
    results.nth(chosen).click()
    tab.wait_for_url("**/nbs/30_evaluate.html*")
    assert "alibration" in tab.locator("article").inner_text()


def read_printed_numbers(path: Path) -> set[float]:
    """Every number in the outputs of a notebook."""
    numbers = set()
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            shown = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            numbers |= {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", shown)}
    return numbers


def test_figures_of_the_design_are_those_of_the_notebooks() -> None:
    """Each figure in a table of the design page rounds one of a notebook that its section links."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").replace("−", "-")
    checked = 0
    for section in text.split("\n## ")[1:]:
        rows = [line for line in section.splitlines() if line.startswith("|")]
        cells = [cell.strip() for row in rows for cell in row.split("|")]
        links = set(re.findall(r"\((\.\./nbs/\S+\.ipynb)\)", section))
        numbers = set().union(*(read_printed_numbers(ROOT / "docs" / link) for link in links))
        for figure in cells:
            if re.fullmatch(r"-?[\d.]+", figure):
                digits = len(figure.partition(".")[2])
                good = any(round(number, digits) == float(figure) for number in numbers)
                assert good, (section.splitlines()[0], figure)
                checked += 1
    assert checked > 10


def test_every_requirement_is_locked() -> None:
    """What a run and each extra ask for is pinned."""
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    lists = [value for name, value in config["DEFAULT"].items() if name.endswith("requirements")]
    wanted = {re.split(r"[<>=\[]", word)[0] for value in lists for word in value.split()}
    lock = (ROOT / "requirements.lock").read_text().replace("_", "-").lower().splitlines()
    assert len(lists) > 3 and wanted <= {line.split("==")[0] for line in lock}
