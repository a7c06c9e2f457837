"""The tests on other versions: ``make compat``.

They run on every Python that is found (``python3.N`` on the PATH, or pyenv's) with the newest torch and lightning, and
on the oldest of those Pythons with the oldest torch and lightning that pyproject.toml promises. Each has a virtual
environment of its own in ``.venv-compat``. At the end a table is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-compat"
PROMISED = re.compile(r'^  "(torch|lightning|torchmetrics|tensorboard)>=([\d.]+)",', re.MULTILINE)
OLDEST = dict(PROMISED.findall((ROOT / "pyproject.toml").read_text()))
VERSIONS = """
import sys
from importlib.metadata import version
print(sys.version.split()[0], version("torch"), version("lightning"))
"""


def pythons() -> Iterator[tuple[str, str]]:
    """Versions such as "3.10", and the interpreters that run."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in (f"3.{minor}" for minor in range(10, 30)):
        installed = sorted(pyenv.glob(f"{version}.*/bin/python"), key=lambda path: int(path.parts[-3].split(".")[2]))
        for python in filter(None, [shutil.which(f"python{version}"), *map(str, reversed(installed))]):
            code = "import ensurepip, sys, venv; print('{}.{}'.format(*sys.version_info))"
            told = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if told.stdout.strip() == version:  # pyenv has a python3.N on the PATH for versions that don't run
                yield version, python
                break


def install(python: str, folder: Path, oldest: bool) -> None:
    """Make or update a virtual environment."""
    run = folder / "bin" / "python"
    if not run.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    environment = {**os.environ, "PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([run, "-m", "pip", "install", "--upgrade", "pip>=25.1"], check=True, env=environment)
    command = [run, "-m", "pip", "install", "--editable", ".[examples]", "--group", "dev"]
    if oldest:
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}.0.*\n" for name, version in OLDEST.items()))
        environment["PIP_CONSTRAINT"] = str(constraints)
    else:
        command += ["--upgrade", *OLDEST]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)


def tested(python: str, folder: Path, oldest: bool, arguments: list[str]) -> tuple[list[str], bool]:
    """A row of the table, and whether the tests passed."""
    try:
        install(python, folder, oldest)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, flush=True)
        return [folder.name, "could not be installed", "", "", "", ""], False
    run = folder / "bin" / "python"
    versions = subprocess.run([run, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    print(f"Python {versions[0]}, torch {versions[1]}, lightning {versions[2]}:", flush=True)
    last = ""
    with subprocess.Popen([run, "-m", "pytest", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        for last in tests.stdout or ():
            print(last, end="", flush=True)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped|failed|error)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    row = [*versions, str(counts.get("passed", 0)), str(counts.get("skipped", 0)), str(failed)]
    return row, tests.returncode == 0


def main() -> int:
    """Test what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", default="", help='only those, as "3.10 3.13"')
    parser.add_argument(
        "--versions", choices=["oldest", "newest", "both"], default="both", help="of torch and lightning"
    )
    parser.add_argument("--all", action="store_true", help="the slow tests, too")
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    options = parser.parse_args()
    found = [pair for pair in pythons() if not options.pythons or pair[0] in options.pythons.split()]
    if missing := set(options.pythons.split()) - {version for version, _ in found}:
        print("Found no Python", *sorted(missing), "that runs.")
    runs = [(version, python, False) for version, python in found if options.versions != "oldest"]
    runs += [(version, python, True) for version, python in found[:1] if options.versions != "newest"]
    arguments = ["-n", "2", "-q", *([] if options.all else ["-m", "not slow"]), *shlex.split(options.pytest)]
    rows, good = [], bool(runs) and not missing
    for version, python, oldest in runs:
        folder = HOME / f"{version}-{'oldest' if oldest else 'newest'}"
        row, passed = tested(python, folder, oldest, arguments)
        rows.append(row)
        good = good and passed
    for row in [["Python", "torch", "lightning", "passed", "skipped", "failed"], ["---"] * 6, *rows]:
        print("|", " | ".join(row), "|")
    return not good


if __name__ == "__main__":
    sys.exit(main())
