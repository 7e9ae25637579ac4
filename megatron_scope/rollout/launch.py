"""The command line of a SGLang server that fits a config: what `launch` prints and runs.

The flags are those of sglang 0.5; what is not set here is SGLang's own default.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_scope.config.keys import api_key
from megatron_scope.config.schema import Config, ModelConfig
from megatron_scope.errors import ConfigError, DataError

Role = Literal["rollout", "teacher"]
Device = Literal["cuda", "cpu"]

# What SGLang keeps of its context: it ends a response two tokens below the length, without a word, and
# refuses to score an input within seven of it.
CONTEXT_MARGIN_TOKENS: Mapping[Role, int] = {"rollout": 2, "teacher": 7}
# "The capital city of France is" at a token a byte, and 8 tokens of response: what SGLang asks itself first.
# A server whose context has no room for that ends.
WARM_UP_TOKENS = 29 + 8
# Key-value cache of a server on a CPU, unless one sequence is longer: left to itself SGLang takes most of the
# machine's memory.
CPU_CACHE_TOKENS = 65536
# Logits of a teacher's prompt are made for so many tokens at a time, not for all that are prefilled together:
# 1.2 GB in float32 at 150,000 ids.
LOGPROB_CHUNK_TOKENS = 2048

CPU_WORDS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-overlap-schedule", "--sleep-on-idle"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--mem-fraction-static", "0.3"),
)


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """What a config does not say of a server.

    `tp` is its tensor-parallel size; on a CPU its ranks share `cores`. `python` is the interpreter that has
    sglang, None this one. `extra` flags come last, so that they replace what is set here.
    """

    role: Role
    device: Device = "cuda"
    host: str = "127.0.0.1"
    port: int = 30000
    tp: int = 1
    cores: int = 1
    python: str | None = None
    extra: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LaunchCommand:
    """A command line, `extra` words last, and what it adds to the environment. `api_key_env` names the
    variable with the API key, which the words do not hold.
    """

    words: tuple[str, ...]
    extra: tuple[str, ...]
    environment: Mapping[str, str]
    api_key_env: str | None

    def as_shell(self) -> str:
        """One line for a POSIX shell; the shell fills in the API key."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        key = [] if self.api_key_env is None else ["--api-key", f'"${self.api_key_env}"']
        words, extra = (map(shlex.quote, part) for part in (self.words, self.extra))
        return " ".join([*settings, *words, *key, *extra])

    def run(self) -> None:
        """Becomes the server: this process is replaced. ConfigError where it cannot start."""
        words = [*self.words]
        if self.api_key_env is not None:
            words += ["--api-key", str(api_key("the config's api_key_env", self.api_key_env))]
        words += self.extra
        if shutil.which(words[0]) is None:
            raise ConfigError(f"--python is {words[0]}, which cannot be run; give a python that has sglang")
        if words[0] == sys.executable and importlib.util.find_spec("sglang") is None:
            raise ConfigError(
                f"{sys.executable} has no sglang: install megatron_scope[sglang], or set --python"
            )
        sys.stdout.flush()
        os.execvpe(words[0], words, {**os.environ, **self.environment})


def launch_command(config: Config, options: LaunchOptions) -> LaunchCommand:
    """The server that `config` needs for a role; ConfigError where it cannot serve it, DataError for a model
    folder without a sound config.json.
    """
    folder, words = _model(config, options.role)
    context = _context_length(config, folder, options.role)
    words += ["--host", options.host, "--port", str(options.port)]
    words += ["--dtype", config.train.precision.value, "--context-length", str(context)]
    if options.tp > 1:
        words += ["--tp-size", str(options.tp)]
    if options.role == "rollout":
        words += ["--max-running-requests", str(config.rollout.max_concurrent_requests)]
        # Servers that start with one seed would draw the same noise.
        words += ["--random-seed", str(config.run.seed + options.port)]
    # A line for each of a step's thousands of requests would bury what matters.
    words += ["--log-level-http", "warning"]
    if options.device == "cpu":
        words += [*CPU_WORDS, "--max-total-tokens", str(max(CPU_CACHE_TOKENS, context))]
    python = options.python or sys.executable
    return LaunchCommand(
        words=(python, "-m", "sglang.launch_server", *words),
        extra=options.extra,
        environment=_environment(options),
        api_key_env=(config.rollout if options.role == "rollout" else config.teacher).api_key_env,
    )


def _model(config: Config, role: Role) -> tuple[Path, list[str]]:
    """The Hugging Face folder to serve, and the flags that name it."""
    model: ModelConfig = config.student if role == "rollout" else config.teacher
    section = "student" if role == "rollout" else "teacher"
    if model.hf is None and model.megatron is None:
        raise ConfigError(f"{section}.hf is not set: --role {role} serves it; set it to a model folder")
    if model.megatron is not None and role == "teacher":
        raise ConfigError(
            f"teacher.megatron is {model.megatron}: SGLang reads no Megatron checkpoint; write a Hugging "
            "Face folder with megatron-scope convert to-hf, set teacher.hf to it and teacher.megatron to null"
        )
    folder = Path(model.companions).expanduser()
    words = ["--model-path", str(folder)]
    if model.megatron is not None:
        # The student's weights are in its checkpoint: the trainer sends them before the first rollout.
        words += ["--load-format", "dummy"]
    return folder, words


def _context_length(config: Config, folder: Path, role: Role) -> int:
    longest, margin = (
        config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        CONTEXT_MARGIN_TOKENS[role],
    )
    needed = longest + margin
    positions = _max_positions(folder)
    if positions is not None and needed > positions:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_new_tokens is {longest}, but {folder} has {positions} "
            f"positions and SGLang keeps {margin} of them to itself; lower one of the two to a sum of "
            f"{positions - margin}"
        )
    warm_up = WARM_UP_TOKENS + margin
    return max(needed, warm_up if positions is None else min(warm_up, positions))


def _max_positions(folder: Path) -> int | None:
    """What the model's config.json allows; None where it sets no limit."""
    path = folder / "config.json"
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
        settings = settings.get("text_config", settings)
        return settings.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: {error}; expected a Hugging Face model folder") from error


def _environment(options: LaunchOptions) -> dict[str, str]:
    """Models are folders here: nothing is to be looked up on a hub."""
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if options.role == "teacher":
        environment["SGLANG_ENABLE_LOGPROB_CHUNK"] = "1"
        environment["SGLANG_LOGPROB_CHUNK_SIZE"] = str(LOGPROB_CHUNK_TOKENS)
    if options.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        if options.tp > 1:
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = _core_ranges(options.cores, options.tp)
            environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def _core_ranges(cores: int, ranks: int) -> str:
    """0-3|4-7: the cores of each rank."""
    share = max(1, cores // ranks)
    return "|".join(f"{rank * share}-{(rank + 1) * share - 1}" for rank in range(ranks))


# ---- the command line


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `launch`; their defaults are those of `LaunchOptions`."""
    default = {field.name: field.default for field in dataclasses.fields(LaunchOptions)}
    add = parser.add_argument
    add("--role", required=True, choices=("rollout", "teacher"), help="the student's or the teacher's server")
    add("--device", choices=("cuda", "cpu"), default=default["device"], help="default: cuda")
    add("--host", default=default["host"], help="0.0.0.0 lets other machines in (default 127.0.0.1)")
    add("--port", type=int, default=default["port"], help="default 30000")
    add("--tp", type=int, default=default["tp"], metavar="N", help="tensor-parallel size (default 1)")
    add("--python", metavar="PATH", help="the python that has sglang (default: this one)")
    add("--run", dest="start", action="store_true", help="become the server instead of printing the command")
    parser.epilog = "Words after -- go to sglang as they are."


def options_from(arguments: argparse.Namespace) -> LaunchOptions:
    """The options of a parsed command line; ConfigError for numbers out of range."""
    if not 1 <= arguments.port <= 65535:
        raise ConfigError(f"--port is {arguments.port}; expected 1 to 65535")
    if arguments.tp < 1:
        raise ConfigError(f"--tp is {arguments.tp}; expected 1 or more")
    cores = len(os.sched_getaffinity(0))
    if arguments.device == "cpu" and arguments.tp > cores:
        raise ConfigError(f"--tp is {arguments.tp}, but there are {cores} cores; each rank needs one")
    return LaunchOptions(
        role=arguments.role,
        device=arguments.device,
        host=arguments.host,
        port=arguments.port,
        tp=arguments.tp,
        cores=cores,
        python=arguments.python,
        extra=tuple(arguments.extra),
    )
