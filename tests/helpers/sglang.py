"""Real SGLang servers on this machine's CPU, started with the words of `megatron-scope launch`."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from megatron_scope.config import parse_config
from megatron_scope.rollout.launch import LaunchOptions, Role, launch_command

INSTALLER = Path(__file__).parents[2] / "tools" / "install_sglang_cpu.py"
START_TIMEOUT_S = 400.0  # 20 to 60 s on a quiet machine
STOP_TIMEOUT_S = 20.0
LOG_LINES = 30
CACHE_TOKENS = 16384  # enough for tiny models, and quick to make
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
# Linux counts as a process's parent the thread that made it: this one lives as long as the session.
_SPAWNER = ThreadPoolExecutor(1, thread_name_prefix="sglang-spawner")


def unsupported() -> str | None:
    """Why SGLang cannot run here; None where it can."""
    found = (platform.system(), platform.machine())
    return None if found == ("Linux", "x86_64") else f"SGLang's CPU engine needs Linux x86_64, not {found}"


def install() -> str:
    """The python of the cached environment with SGLang, made where it is absent."""
    done = subprocess.run([sys.executable, str(INSTALLER)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{INSTALLER.name} failed: {done.stderr}")
    return done.stdout.strip().splitlines()[-1]


class SglangServer:
    """A running server and its whole process tree; `close` or a `with` ends it.

    `settings` are sections of a config over those that a tiny model needs: 128 tokens of prompt, 126 of
    response, 16 requests at a time, float32. `environment` is added to the server's.
    """

    def __init__(
        self,
        python: str,
        model: Path,
        log_path: Path,
        *,
        role: Role = "rollout",
        port: int | None = None,
        tp: int = 1,
        extra: tuple[str, ...] = (),
        settings: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.model, self.log_path = model, log_path
        self.port = port or free_port()
        options = LaunchOptions(
            role=role,
            device="cpu",
            port=self.port,
            tp=tp,
            cores=os.cpu_count() or 1,
            python=python,
            extra=("--max-total-tokens", str(CACHE_TOKENS), *extra),
        )
        self.command = launch_command(_config(model, settings or {}), options)
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process that listens; its children run the model and the tokenizer."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        """Starts it, anew after `kill` or `close`, on the same port; `wait` until it is healthy."""
        assert self._process is None, "the server is running"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        words = [*self.command.words]
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**inherited, "OMP_NUM_THREADS": "1", **self.command.environment, **self._environment}
        if self.command.api_key_env is not None:
            words += ["--api-key", environment[self.command.api_key_env]]
        words += self.command.extra
        with self.log_path.open("ab") as log:
            self._process = _SPAWNER.submit(
                subprocess.Popen,
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log_path.parent,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            ).result()
        if wait:
            self.wait()

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns once the server is healthy; AssertionError with the end of its log where it is not."""
        deadline = time.monotonic() + timeout_s
        try:
            while not self.is_healthy():
                assert self._process is not None
                code = self._process.poll()
                assert code is None, f"sglang ended with exit code {code}:\n{self.log()}"
                assert time.monotonic() < deadline, f"sglang is not healthy in time:\n{self.log()}"
                time.sleep(0.25)
        except BaseException:
            self.kill()
            raise

    def is_healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5.0) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        """The end of its log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_LINES:])

    # ---- faults

    def kill(self) -> None:
        """kill -9 of the whole tree."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def suspend(self) -> None:
        """SIGSTOP to the whole tree: connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """SIGTERM, and kill -9 of what is left of the tree."""
        if self._process is None:
            return
        tree = self._tree()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None

    def __enter__(self) -> SglangServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def _signal(self, number: int) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class SglangServers:
    """Servers of a session: one for each model folder, shared by tests that leave it as it was."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python, self._folder = python, folder
        self._shared: dict[Path, SglangServer] = {}
        self._numbers = itertools.count(1)

    def shared(self, model: Path) -> SglangServer:
        """A server of `model`; who gives it other weights gives it back its own."""
        if model not in self._shared:
            self._shared[model] = self.own(model)
        return self._shared[model]

    def own(self, model: Path, **options: Any) -> SglangServer:
        """A server that nobody else uses, to be closed by who asked for it; the options are
        `SglangServer`'s. Several may be started side by side, each in a thread.
        """
        log = self._folder / f"{next(self._numbers)}-{model.name}.log"
        return SglangServer(self.python, model, log, **options)

    def close(self) -> None:
        for server in self._shared.values():
            server.close()
        self._shared.clear()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _config(model: Path, settings: dict[str, Any]) -> Any:
    own = {
        "student": {"hf": str(model)},
        "teacher": {"hf": str(model)},
        "data": {"max_prompt_tokens": 128},
        "rollout": {"max_new_tokens": 126, "max_concurrent_requests": 16},
        "train": {"precision": "float32"},
    }
    sections = {name: {**own.get(name, {}), **settings.get(name, {})} for name in {**own, **settings}}
    return parse_config(sections, "test")


def _die_with_parent() -> None:
    """A killed test session leaves no server: SGLang's other processes end with its first."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
