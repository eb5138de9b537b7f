"""Packaging: everything it knows comes from `settings.ini`."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"madewithml.workloads": "nbs/workloads", "madewithml.datasets": "datasets"}
root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = [name.removesuffix("_requirements") for name in settings if name.endswith("_requirements")]
# A markdown README is generated from nbs/index.ipynb; links in it are relative to the repository.
long_description = (root / "README.md").read_text(encoding="utf-8")

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=long_description,
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    keywords=settings["keywords"],
    # The wheel contains the workload notebooks and the embedded tables.
    packages=[*find_packages(include=["madewithml", "madewithml.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "madewithml": ["static/*", "scripts/*", "py.typed"],
        "madewithml.workloads": ["*.ipynb"],
        "madewithml.datasets": ["*.csv", "*.md", "*.yaml"],
    },
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{name}_requirements"].split() for name in extras},
    entry_points={"console_scripts": settings["console_scripts"].split("\n")},
    zip_safe=False,
)
