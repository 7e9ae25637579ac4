"""The quickstart's scripts, a stand-in for the commands that they run, and the processes of their servers."""

from __future__ import annotations

import importlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def load(name: str) -> Any:
    """A script as a module; scripts import each other as neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(QUICKSTART)
        return importlib.import_module(name)


class Commands:
    """Stands in for the commands: keeps their words, and leaves behind the files that tell they are done."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.fails: Callable[[list[str]], bool] = lambda words: False

    def run(self, words: list[str], *, stdout: Any, stderr: int, env: dict[str, str]) -> Any:
        self.ran.append(list(words))
        self.environments.append(env)
        if self.fails(words):
            stdout.write("reading\nmegatron-scope: no space left\n")
            stdout.flush()
            return subprocess.CompletedProcess(words, 3)
        if words[0] == "mv":
            Path(words[1]).rename(words[2])
        elif words[1].endswith("task.py"):
            Path(words[3]).mkdir(parents=True)
        elif words[1] == "train":
            folder = Path(self.setting(words, "run.output_dir")) / "hf"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        else:
            output, responses = (Path(self.option(words, name)) for name in ("--output", "--responses"))
            output.parent.mkdir(exist_ok=True)
            output.write_text(json.dumps({"num_samples": int(self.option(words, "--samples"))}))
            responses.write_text("")
        return subprocess.CompletedProcess(words, 0)

    @staticmethod
    def setting(words: list[str], key: str) -> str:
        (value,) = [word.split("=", 1)[1] for word in words if word.startswith(f"{key}=")]
        return value

    @staticmethod
    def option(words: list[str], name: str) -> str:
        return words[words.index(name) + 1]

    def trained(self) -> list[str]:
        """Names of the runs that were trained, in order."""
        return [Path(self.setting(words, "run.output_dir")).name for words in self.ran if words[1] == "train"]

    def evaluated(self) -> list[str]:
        """Files that were written by evaluations, in order."""
        return [Path(self.option(words, "--output")).stem for words in self.ran if words[1] == "evaluate"]


def server_processes(url: str) -> list[psutil.Process]:
    """Of the server that was started with the URL's port; the first is the one that listens."""
    port = str(urlsplit(url).port)
    roots = [found for found in psutil.process_iter(["cmdline"]) if port in (found.info["cmdline"] or [])]
    return [*roots, *(child for root in roots for child in root.children(recursive=True))]


def survivors(processes: Sequence[psutil.Process], timeout_s: float = 20.0) -> list[psutil.Process]:
    """Those that still run after a while: a killed process takes a moment to end, and none that has ended
    must wait for its parent to notice.
    """
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
