"""The settings of the embedded server: their defaults, their command-line flags, and back (no torch here)."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

from megatron_scope.errors import DataError

DTypeName = Literal["float32", "bfloat16"]
LoadFormat = Literal["auto", "dummy"]


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Everything `serve` needs; `port=0` takes a free port, `context_length=None` the model's own."""

    model: str
    host: str = "127.0.0.1"
    port: int = 30000
    dtype: DTypeName = "float32"
    load_format: LoadFormat = "auto"  # dummy: random weights, until a trainer sends some
    max_running_requests: int = 256
    context_length: int | None = None
    max_total_tokens: int = 65536  # of key-value cache, over all running requests
    threads: int = 1
    weight_version: str = "default"  # what SGLang calls weights that no update has numbered
    api_key_env: str | None = None  # environment variable that holds the API key
    port_file: str | None = None  # written with the bound port once the server listens
    parent_pid: int | None = None  # end when this process is gone


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `serve`; their defaults are those of `ServeOptions`."""
    default = {field.name: field.default for field in dataclasses.fields(ServeOptions)}
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="HF_DIR",
        help="Hugging Face folder: config.json, safetensors, tokenizer",
    )
    add("--host", default=default["host"])
    add("--port", type=int, default=default["port"], help="0 takes a free one (see --port-file)")
    add("--dtype", choices=("float32", "bfloat16"), default=default["dtype"])
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default=default["load_format"],
        help="dummy: random weights, until a trainer sends some",
    )
    add("--max-running-requests", type=int, default=default["max_running_requests"], metavar="N")
    add(
        "--context-length",
        type=int,
        default=default["context_length"],
        metavar="N",
        help="default: the model's",
    )
    add(
        "--max-total-tokens",
        type=int,
        default=default["max_total_tokens"],
        metavar="N",
        help="key-value cache",
    )
    add("--threads", type=int, default=default["threads"], metavar="N", help="CPU threads of the model")
    add(
        "--weight-version",
        default=default["weight_version"],
        metavar="V",
        help="version of the weights in HF_DIR",
    )
    add(
        "--api-key-env",
        default=default["api_key_env"],
        metavar="NAME",
        help="variable that holds the API key",
    )
    add("--port-file", default=default["port_file"], metavar="F", help="file to write the bound port to")
    add("--parent-pid", type=int, default=default["parent_pid"], metavar="PID", help="end when PID is gone")


def options_from(arguments: argparse.Namespace) -> ServeOptions:
    """The options that parsed `add_serve_arguments` flags stand for."""
    return ServeOptions(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ServeOptions)}
    )


def flags_of(options: ServeOptions) -> list[str]:
    """The command-line flags that give `options` back; settings that are None are left out."""
    flags: list[str] = []
    for field in dataclasses.fields(ServeOptions):
        value = getattr(options, field.name)
        if value is not None:
            flags += ["--" + field.name.replace("_", "-"), str(value)]
    return flags


def require_model_folder(folder: str) -> None:
    """DataError unless `folder` has a config.json: found out before anything slow is imported."""
    if not (Path(folder) / "config.json").is_file():
        raise DataError(f"{folder}: got no config.json; expected a Hugging Face model folder: mend --model")


def write_port_file(path: str, port: int) -> None:
    """Writes `port` in one atomic rename, so that a reader sees nothing or all of it."""
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(f"{port}\n")
    temporary.replace(target)
