#!/usr/bin/env python3
"""Makes a virtual environment in which an unmodified SGLang serves on a CPU, and prints its python's path.

    python tools/install_sglang_cpu.py [--dir DIR]

The environment is cached (default: megatron_scope/ in $XDG_CACHE_HOME or ~/.cache), under a name that holds
a hash of all that goes into it: a second call returns at once, and a changed list makes a new one. Callers at
the same time wait for one another. What was not finished is made anew.

This script needs nothing but Python 3.11 and pip's way to a package index. Where that has the CUDA build of
torch first, point pip at the CPU build (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS): it is smaller by gigabytes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SGLANG = "0.5.23"
TORCH = "torch==2.13.0"  # the only one whose dependencies pip chooses: they differ between its builds
SOURCES = Path(__file__).resolve().parent / "sglang_cpu"
REQUIREMENTS = SOURCES / "requirements.txt"
STAND_INS = ("import_only.py", "torchvision", "sgl_kernel")  # of SOURCES; why: import_only.py
STARTED = ".megatron_scope_started"  # written first: the folder is this script's
DONE = ".megatron_scope_done"  # written last
ERROR_LINES = 15  # of a failed command's output
# What a server imports at its start, so that a broken environment is found here.
PROOF = "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler"


class InstallError(Exception):
    """One message, for a person."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", metavar="DIR", type=Path, help="make it here (default: the cache)")
    options = parser.parse_args(arguments)
    try:
        print(install(options.dir or default_folder()))
    except (InstallError, OSError) as error:
        print(f"install_sglang_cpu: {error}", file=sys.stderr)
        return 1
    return 0


def default_folder() -> Path:
    """The cached environment's place."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "megatron_scope" / f"sglang-{SGLANG}-cpu-{fingerprint()}"


def fingerprint() -> str:
    """A hash of what is installed, and of the Python that runs it."""
    digest = hashlib.sha256(repr((sys.version_info[:2], platform.machine(), TORCH)).encode())
    for file in (REQUIREMENTS, *stand_in_files()):
        digest.update(str(file.relative_to(SOURCES)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def stand_in_files() -> list[Path]:
    found = [SOURCES / name for name in STAND_INS]
    return sorted(file for path in found for file in ([path] if path.is_file() else path.rglob("*.py")))


def install(folder: Path) -> Path:
    """The python of a whole environment in `folder`, which is made unless it is there."""
    if not supported():
        raise InstallError(
            f"this machine is {platform.system()} {platform.machine()}; SGLang's CPU engine is installed on "
            "Linux x86_64 only: serve on such a machine, or use rollout.engine=embedded"
        )
    folder = folder.expanduser().absolute()
    python = folder / "bin" / "python"
    if not (folder / DONE).exists():
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not (folder / DONE).exists():  # another caller may have made it meanwhile
                _make(folder, python)
    return python


def supported() -> bool:
    """Whether there are packages for this machine."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def _make(folder: Path, python: Path) -> None:
    if folder.exists() and not (folder / STARTED).exists() and any(folder.iterdir()):
        raise InstallError(f"{folder} holds something else; give an empty or new folder to --dir")
    _say(f"installing sglang {SGLANG} for the CPU into {folder}; this takes some minutes")
    _remove(folder)
    folder.mkdir(parents=True)  # in its place from the start: an environment cannot be moved
    (folder / STARTED).touch()
    _run([sys.executable, "-m", "venv", str(folder)], "making the environment")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    _run([*pip, TORCH], "installing torch")
    # The list is complete. Without --no-deps, SGLang would bring the CUDA packages that it names.
    _run([*pip, "--no-deps", "-r", str(REQUIREMENTS)], "installing sglang")
    _add_stand_ins(python)
    _run([str(python), "-c", PROOF], "importing what was installed")
    (folder / DONE).write_text(f"{fingerprint()}\n", encoding="utf-8")


def _remove(folder: Path) -> None:
    """An unfinished environment, out of the way at once: a removal that is cut short is not met again."""
    aside = folder.with_name(f"{folder.name}.old")
    if aside.exists() and not (aside / STARTED).exists():
        raise InstallError(f"{aside} is in the way and not of this script; move it, or give another --dir")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _add_stand_ins(python: Path) -> None:
    """Copies them, so that the environment outlives this checkout, behind the packages that are installed."""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(_run(command, "looking for site-packages").strip())
    home = packages / "megatron_scope_stand_ins"
    for file in stand_in_files():
        target = home / file.relative_to(SOURCES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (packages / "megatron_scope_stand_ins.pth").write_text(f"{home}\n", encoding="utf-8")


def _run(command: list[str], doing: str) -> str:
    """What the command prints; InstallError with the end of that where it fails."""
    # A checkout on PYTHONPATH, or an active environment, must not reach into the new one.
    kept = os.environ.keys() - {"PYTHONPATH", "PYTHONHOME"}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: os.environ[name] for name in kept},
        check=False,
    )
    if done.returncode:
        end = "\n".join(done.stdout.strip().splitlines()[-ERROR_LINES:])
        raise InstallError(f"{doing} failed with exit code {done.returncode}: {' '.join(command)}\n{end}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone in here among all processes; the lock ends with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another installation ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
