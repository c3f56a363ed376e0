"""The environment that the project runs in: make ``.venv`` from the lock, or check the active one.

``environment.py make`` is run by the Python that ``.venv`` is to have, ``environment.py check`` and
``environment.py run ARGUMENTS`` (Python with these arguments and the words of the variable ARGS) by the environment's
own.  Only the standard library is needed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
LOCK = CHECKOUT / "requirements.lock"
INSTALL = "python -m pip install -r requirements.lock && python -m pip install --no-deps -e ."


def make() -> None:
    """Make ``.venv``, unless another process has just made it."""
    folder = CHECKOUT / ".venv"
    with open(CHECKOUT / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "installed.lock"
        if done.is_file() and done.read_bytes() == LOCK.read_bytes() and (folder / "bin" / "python").exists():
            return
        print(f"making .venv from requirements.lock with Python {sys.version.split()[0]}, some minutes the first time")
        content = LOCK.read_bytes()
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        for more in (["-r", str(LOCK)], ["--no-deps", "--no-build-isolation", "-e", str(CHECKOUT)]):
            if subprocess.run([*pip, *more]).returncode:
                sys.exit("error: pip could not install requirements.lock into .venv; its message is above")
        done.write_bytes(content)


def check() -> None:
    """Leave with an error when this environment lacks packages of the lock; name those of another version."""
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        sys.exit(f"error: Python 3.11 to 3.13 is needed, the active environment has {sys.version.split()[0]}")
    missing, other = [], []
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE):
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != version:
            other.append(f"{name} {found} (lock: {version})")
    if missing:
        sys.exit(
            f"error: the active environment ({sys.prefix}) lacks {len(missing)} packages of requirements.lock: "
            f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}\n"
            f"Install them:   {INSTALL}\nor deactivate the environment: make then makes its own .venv."
        )
    if other:
        print(f"note: {len(other)} packages are not as in requirements.lock: {', '.join(other[:4])}", file=sys.stderr)


def run() -> None:
    """Replace this process by Python with the arguments and the words of ARGS."""
    try:
        words = shlex.split(os.environ.get("ARGS", ""))
    except ValueError as error:  # a quotation mark that is not closed
        sys.exit(f"error: ARGS={os.environ['ARGS']}: {error}")
    os.execv(sys.executable, [sys.executable, *sys.argv[2:], *words])


if __name__ == "__main__":
    try:
        {"make": make, "check": check, "run": run}[sys.argv[1]]()
    except OSError as error:
        advice = "room and the right to write are needed in the checkout, and the Python of its environment"
        sys.exit(f"error: {error.filename or CHECKOUT}: {error.strerror}; {advice}")
