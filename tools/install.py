"""Makes the virtual environment, adds an extra of `settings.ini` to it, or renews the lock.

`requirements.lock` fixes the version of every package. Needs nothing but Python."""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from configparser import ConfigParser, SectionProxy
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = "# Every package of the environment, pinned; written by `make lock` from settings.ini.\n"


def pip(python: Path, *args: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *args]
    subprocess.run(command, check=True)


def install_packages(python: Path, *args: str) -> None:
    """With uv, a minute faster; with pip, which reads pip's settings, where uv finds less."""
    command = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python),
               "--compile-bytecode", "-c", str(LOCK), *args]
    if subprocess.run(command, check=False).returncode:
        print("uv cannot install this here; taking pip.", file=sys.stderr)
        pip(python, "install", "-qq", "-c", str(LOCK), *args)


def read_settings() -> SectionProxy:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def get_python(folder: Path) -> Path:
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def make_venv(folder: Path) -> Path:
    """An empty virtual environment; returns its Python."""
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}. "
                 "Name another with `make PYTHON=python3.12 …`.")
    if folder.is_symlink():
        folder.unlink()  # clearing it would empty its target
    venv.create(folder, with_pip=True, clear=True)
    return get_python(folder)


def has_local_build(python: Path, requirement: str) -> bool:
    """Whether pip finds a build of torch with a local version, such as 2.13.0+cpu."""
    command = [str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps",
               "--report", "-", requirement]
    plan = subprocess.run(command, capture_output=True, text=True, check=False)
    if plan.returncode:
        return False
    return "+" in json.loads(plan.stdout)["install"][0]["metadata"]["version"]


def install_torch(python: Path, requirement: str, backend: str) -> None:
    """On Linux the build of torch for this machine.

    pip's default there brings gigabytes of CUDA to machines without a GPU."""
    has_gpu = shutil.which("nvidia-smi") is not None
    if sys.platform != "linux" or (backend == "auto" and has_gpu):
        return  # pip's default is right
    if backend == "auto" and has_local_build(python, requirement):
        pip(python, "install", "-qq", "--no-deps", requirement)
        return
    chosen = "cpu" if backend == "auto" else backend
    # uv knows the index of each build of torch.
    command = [str(python), "-m", "uv", "pip", "install", "--python", str(python),
               "--torch-backend", chosen, requirement]
    if subprocess.run(command, check=False).returncode:
        print(f"The {chosen} build of torch cannot be reached from here; taking pip's default.",
              file=sys.stderr)


def install(folder: Path, backend: str) -> None:
    """The packages that a run needs, and this package in editable form."""
    print(f"Installing what a run needs into {folder} (once; about a minute).", flush=True)
    python = make_venv(folder)
    pip(python, "install", "-qq", "-c", str(LOCK), "setuptools", "wheel", "uv")
    pins = LOCK.read_text(encoding="utf-8").splitlines()
    install_torch(python, next(pin for pin in pins if pin.startswith("torch==")), backend)
    install_packages(python, "--no-build-isolation", "-e", str(ROOT))


def add_extra(folder: Path, extra: str) -> None:
    """The further packages of an extra."""
    print(f"Installing what `{extra}` needs into {folder} (once).", flush=True)
    wanted = read_settings()[f"{extra}_requirements"].split()
    install_packages(get_python(folder), *wanted)


def lock() -> None:
    """Resolves settings.ini anew, for the oldest Python that it names, and pins the result."""
    settings = read_settings()
    wanted = ["setuptools>=77", "wheel", "uv"]
    for name in settings:
        if name.endswith("requirements"):
            wanted += settings[name].split()
    with tempfile.TemporaryDirectory() as folder:
        python = make_venv(Path(folder) / "venv")
        pip(python, "install", "-qq", "--upgrade", "pip")
        options = ["-qq", "--dry-run", "--ignore-installed", "--report", "-", "--target", folder,
                   "--python-version", settings["min_python"], "--only-binary", ":all:"]
        command = [str(python), "-m", "pip", "install", *options, *wanted]
        plan = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = [package["metadata"] for package in json.loads(plan.stdout)["install"]]
    pins = [f"{package['name']}=={package['version'].partition('+')[0]}" for package in found]
    pins.sort(key=str.lower)
    LOCK.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"{LOCK.name}: {len(pins)} packages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", nargs="?", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch-backend", default="auto",
                        help="auto, cpu or a CUDA version such as cu128")
    parser.add_argument("--extra", help="add what this extra of settings.ini needs")
    parser.add_argument("--lock", action="store_true", help="renew requirements.lock")
    options = parser.parse_args()
    try:
        if options.lock:
            lock()
        elif options.extra:
            add_extra(options.venv, options.extra)
        else:
            install(options.venv, options.torch_backend)
    except subprocess.CalledProcessError as error:
        words = " ".join(map(str, error.cmd[:6]))
        sys.exit(f"Installing failed: {words} … ended with {error.returncode}.")
