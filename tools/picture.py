"""Renders a pull request comment as GitHub shows it, by default for `nbs/images`.

Needs Chromium."""
import argparse
import io
import shutil
import sys
from pathlib import Path

import mistune
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PAGE = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; padding: 20px; width: 860px; color: #1f2328;
  font: 14px/1.5 "Segoe UI", "Noto Sans", "DejaVu Sans", Helvetica, Arial, sans-serif; }
.box { border: 1px solid #d1d9e0; border-radius: 6px; }
.head { padding: 8px 16px; background: #f6f8fa; border-bottom: 1px solid #d1d9e0; color: #59636e; }
.head b { color: #1f2328; }
.head span { border: 1px solid #d1d9e0; border-radius: 2em; padding: 0 6px; font-size: 12px; }
.body { padding: 16px; }
h3 { font-size: 1.25em; margin: 0 0 12px; }
p, table, details { margin: 0 0 12px; }
.body > :last-child { margin-bottom: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #d1d9e0; padding: 5px 12px; }
tr:nth-child(2n) td { background: #f6f8fa; }
a { color: #0969da; text-decoration: none; }
code { background: #818b981f; padding: .2em .4em; border-radius: 6px;
  font: 85% ui-monospace, "DejaVu Sans Mono", monospace; }
</style><div class="box"><div class="head"><b>github-actions</b> <span>bot</span> commented</div>
<div class="body">BODY</div></div>"""


def draw(markdown: str, opened: list[str]) -> bytes:
    """A PNG of the comment, with the parts of these titles unfolded."""
    plugins = ["table", "strikethrough", "url"]
    html = mistune.create_markdown(escape=False, plugins=plugins)(markdown)
    for title in opened:
        summary = f"<summary>{title}</summary>"
        html = html.replace(f"<details>{summary}", f"<details open>{summary}")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 400}, device_scale_factor=1.5)
        page.set_content(PAGE.replace("BODY", html))
        picture = page.screenshot(full_page=True)
        browser.close()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    with io.BytesIO() as file:  # 64 colors are enough for text, at a third of the size
        image.quantize(64).save(file, "PNG", optimize=True)
        return file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("markdown", type=Path, help="output of `madewithml pr-comment --compare`")
    parser.add_argument("--open", nargs="*", default=["Classes"], help="titles of unfolded parts")
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/images/comment.png")
    options = parser.parse_args()
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_bytes(draw(options.markdown.read_text(encoding="utf-8"), options.open))
    print(f"{options.output.name}: {options.output.stat().st_size / 1000:.0f} kB", file=sys.stderr)
