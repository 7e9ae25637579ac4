"""The embedded server as a child process of the trainer."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from megatron_scope.errors import RolloutError
from megatron_scope.rollout.embedded.options import ServeOptions, flags_of

COMMAND = (sys.executable, "-m", "megatron_scope", "serve")
LOG_LINES = 20  # of the child's log that an error quotes
POLL_S = 0.05
STOP_S = 5.0  # between SIGTERM and SIGKILL


class EmbeddedServer:
    """Starts `serve` on a free port, waits until it is healthy, and ends it; a context manager.

    `port`, `port_file` and `parent_pid` of `options` are filled in here: the child ends with this process,
    whatever happens to it. RolloutError, with the end of the child's log, where it does not become healthy.
    """

    def __init__(
        self, options: ServeOptions, *, log_path: str | Path, start_timeout_s: float = 120.0
    ) -> None:
        self._options = options
        self._log_path, self._start_timeout_s = Path(log_path), start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None

    @property
    def url(self) -> str:
        """http://HOST:PORT of the running server."""
        if self._port is None:
            raise RolloutError("the embedded server is not running; call start() first")
        return f"http://{self._options.host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The child's process id, None when it does not run."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once the server is healthy."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="embedded-server-") as folder:
            port_file = Path(folder) / "port"
            options = dataclasses.replace(
                self._options, port=0, port_file=str(port_file), parent_pid=os.getpid()
            )
            with self._log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [*COMMAND, *flags_of(options)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C at the terminal is the trainer's to handle
                )
            try:
                self._wait(port_file, time.monotonic() + self._start_timeout_s)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Ends the child: SIGTERM, and SIGKILL where that does not do; safe to call twice."""
        process, self._process, self._port = self._process, None, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def check(self) -> None:
        """RolloutError if the child has ended on its own."""
        if self._process is not None and self._process.poll() is not None:
            raise RolloutError(self._epitaph(f"ended with exit code {self._process.returncode}"))

    def _wait(self, port_file: Path, deadline: float) -> None:
        while True:
            self.check()
            if self._port is None and port_file.exists():
                self._port = int(port_file.read_text())
            if self._port is not None and self._is_healthy():
                return
            if time.monotonic() > deadline:
                raise RolloutError(self._epitaph(f"is not healthy after {self._start_timeout_s:g} s"))
            time.sleep(POLL_S)

    def _is_healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5.0) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _epitaph(self, what: str) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        quoted = "\n".join(lines) or "(empty)"
        who = f"the embedded server of {self._options.model}"
        return f"{who} {what}; the end of its log {self._log_path}:\n{quoted}"
