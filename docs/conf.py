"""Sphinx's configuration. `tools/docs.py` stages the pages and calls Sphinx; nothing here asks another host."""
from configparser import ConfigParser
from pathlib import Path

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")

project = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
copyright = author
version = release = settings["DEFAULT"]["version"]
language = "en"

extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.githubpages"]  # the last: GitHub serves `_static`, too
root_doc = "index"
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"  # a page shows what was committed
nb_merge_streams = True
nb_ipywidgets_js = {}  # else each page asks a CDN for widgets
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
