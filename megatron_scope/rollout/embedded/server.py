"""`serve`: the embedded server as a process, from its options to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from megatron_scope.errors import ConfigError
from megatron_scope.rollout.embedded.options import ServeOptions, require_model_folder, write_port_file
from megatron_scope.rollout.open_files import raise_limit

if TYPE_CHECKING:
    from megatron_scope.rollout.embedded.model import ServedModel

SHUTDOWN_S = 0.2
PARENT_POLL_S = 1.0


class Parent:
    """The process that this server must not outlive; its birth tells it from a later one of its number."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._born = self._birth()

    def is_alive(self) -> bool:
        """False once the process is gone, or a zombie."""
        return self._born is not None and self._birth() == self._born

    def _birth(self) -> str | None:
        """Its start time from /proc; on systems without /proc a constant while the process exists."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None if Path("/proc/self/stat").exists() else self._answers_signals()
        return None if fields[0] in "ZX" else fields[19]

    def _answers_signals(self) -> str | None:
        try:
            os.kill(self.pid, 0)
        except OSError:
            return None
        return "alive"


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM, SIGINT or the end of `options.parent_pid`.

    Raises ConfigError (busy port, no API key, bad number) or DataError (model folder) before it listens.
    """
    _check(options)
    raise_limit()
    api_key = _api_key(options.api_key_env)
    parent = None if options.parent_pid is None else Parent(options.parent_pid)
    with _bind(options) as listener:
        from megatron_scope.rollout.embedded.model import ServedModel

        model = ServedModel(options.model, options.dtype, options.load_format)
        asyncio.run(_serve(options, listener, model, api_key, parent))


async def _serve(
    options: ServeOptions,
    listener: socket.socket,
    model: ServedModel,
    api_key: str | None,
    parent: Parent | None,
) -> None:
    from megatron_scope.rollout.embedded.app import EmbeddedApp
    from megatron_scope.rollout.embedded.tokenizer import load_tokenizer

    decode, eos_ids = load_tokenizer(options.model)
    model.eos_ids |= eos_ids
    app = EmbeddedApp(options, model, decode, api_key)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        app.application(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener, backlog=1024).start()
        port = listener.getsockname()[1]
        if options.port_file is not None:
            write_port_file(options.port_file, port)
        print(
            f"embedded server: {options.model} on http://{options.host}:{port}", file=sys.stderr, flush=True
        )
        await _until_stopped(stop, parent)
    finally:
        await runner.cleanup()
        app.close()


async def _until_stopped(stop: asyncio.Event, parent: Parent | None) -> None:
    """Returns on a signal, or once the parent is gone."""
    while not stop.is_set():
        if parent is not None and not parent.is_alive():
            print(
                f"embedded server: parent process {parent.pid} is gone, ending", file=sys.stderr, flush=True
            )
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), PARENT_POLL_S)


def _check(options: ServeOptions) -> None:
    require_model_folder(options.model)
    for name in ("max_running_requests", "context_length", "max_total_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: expected at least 1")
    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port is {options.port}: expected 0 (a free one) to 65535")


def _api_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"--api-key-env is {name}: that environment variable is not set; export it with the key"
        )
    return key


def _bind(options: ServeOptions) -> socket.socket:
    """Takes the port before the model is loaded; connections are refused until the server listens."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family[0], family[1])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(family[4])
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {options.host}:{options.port}: {error.strerror or error}; free the port, "
            "or give another --port"
        ) from error
    return listener
