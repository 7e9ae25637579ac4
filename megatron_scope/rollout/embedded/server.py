"""`serve`: the embedded server as a process, from its options to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from megatron_scope.errors import ConfigError
from megatron_scope.rollout.embedded.options import ServeOptions, write_port_file

if TYPE_CHECKING:
    from megatron_scope.rollout.embedded.model import ServedModel

SHUTDOWN_S = 0.5
PARENT_POLL_S = 1.0


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM, SIGINT or the end of `options.parent_pid`.

    Raises ConfigError (busy port, no API key, bad number) or DataError (model folder) before it listens.
    """
    _check(options)
    api_key = _api_key(options.api_key_env)
    listener = _bind(options)
    with listener:
        from megatron_scope.rollout.embedded.model import ServedModel

        model = ServedModel(options.model, options.dtype)
        asyncio.run(_serve(options, listener, model, api_key))


async def _serve(
    options: ServeOptions, listener: socket.socket, model: ServedModel, api_key: str | None
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
        await _until_stopped(stop, options.parent_pid)
    finally:
        await runner.cleanup()
        app.close()


async def _until_stopped(stop: asyncio.Event, parent_pid: int | None) -> None:
    """Returns on a signal, or once the process `parent_pid` is no longer the one it was."""
    born = None if parent_pid is None else _birth(parent_pid)
    while not stop.is_set():
        if parent_pid is not None and (born is None or _birth(parent_pid) != born):
            print(
                f"embedded server: parent process {parent_pid} is gone, ending", file=sys.stderr, flush=True
            )
            return
        try:
            await asyncio.wait_for(stop.wait(), PARENT_POLL_S)
        except TimeoutError:
            continue


def _birth(pid: int) -> str | None:
    """What tells a live process from a later one of the same number; None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _answers_signals(pid)
    return None if fields[0] in "ZX" else fields[19]


def _answers_signals(pid: int) -> str | None:
    """For systems without /proc: a constant while the process exists."""
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "alive"


def _check(options: ServeOptions) -> None:
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
