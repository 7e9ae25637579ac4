"""The command line: one short function a command. Exit code 0 on success, 2 on wrong use or config, 1 on any
other failure.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_scope import __version__
from megatron_scope.environment import place
from megatron_scope.errors import ConfigError, ScopeError
from megatron_scope.launch import end_with_launcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors that a user can act on are one line on stderr."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(argv)
        return options.run(options)
    except ScopeError as error:
        if _reports(error):
            print(f"megatron-scope: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (
        OSError
    ) as error:  # a full disk, a folder without permission: the path and reason are in the message
        print(f"megatron-scope: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    """Overrides may stand before and after options, which argparse alone does not allow; words after `--` are
    another program's.
    """
    parser = _parser()
    end = argv.index("--") if "--" in argv else len(argv)
    options, rest = parser.parse_known_args(argv[:end])
    options.extra = argv[end + 1 :]
    if options.extra and options.run is not _launch:
        parser.error(f"unrecognized arguments: {' '.join(argv[end:])}")
    if rest:
        if not hasattr(options, "overrides") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = [*options.overrides, *rest]
    options.argv = argv
    return options


def _reports(error: ScopeError) -> bool:
    """Of an error that all ranks have, rank 0 alone speaks."""
    return not error.on_every_rank or place().rank == 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megatron-scope",
        description="SCOPE (arXiv:2604.10688) on Megatron-core: on-policy distillation, CPU to cluster.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_convert(commands)
    _add_evaluate(commands)
    _add_verify(commands)
    _add_serve(commands)
    _add_launch(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's"
    )


# ---- train


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "train a student as CONFIG.yaml says")
    _add_config(parser)
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="local ranks to start (default 1)")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default) goes on from the newest checkpoint; never sets an earlier run aside",
    )


def _train(options: argparse.Namespace) -> int:
    from megatron_scope.config import load_config
    from megatron_scope.config.check import check_config

    if options.nproc < 1:
        raise ConfigError(f"--nproc is {options.nproc}; expected 1 or more")
    launched = place().launched
    world_size = place().world_size if launched else options.nproc
    if launched and options.nproc not in (1, world_size):
        raise ConfigError(
            f"--nproc is {options.nproc} but a launcher started {world_size} ranks; leave --nproc out under "
            "torchrun or srun"
        )
    config = load_config(options.config, options.overrides)
    check_config(config, world_size=world_size)
    if not launched and options.nproc > 1:
        from megatron_scope.launch import run_local_ranks
        from megatron_scope.preflight import check_files

        check_files(config)
        return run_local_ranks(options.argv, options.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _end_as_after_ctrl_c()
    end_with_launcher()
    from megatron_scope.backend import setup

    setup.prepare()
    from megatron_scope.trainer import train

    train(config, resume=options.resume == "auto")
    return 0


# ---- convert

DTYPES = ("float32", "bfloat16", "float16")


def _add_convert(commands: Any) -> None:
    parser = _command(commands, "convert", None, "Hugging Face checkpoints to Megatron's and back")
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    to_megatron = _command(
        kinds, "to-megatron", _to_megatron, "a Hugging Face folder to a torch_dist checkpoint, streamed"
    )
    to_megatron.add_argument("--hf", required=True, metavar="HF_DIR")
    to_megatron.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    _add_layout(to_megatron, "the layout whose ranks read whole blocks; any other loads it too")
    _add_dtype(to_megatron)
    to_hf = _command(kinds, "to-hf", _to_hf, "a torch_dist checkpoint to a Hugging Face folder, streamed")
    _add_megatron(to_hf)
    to_hf.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    to_hf.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="size of a weight file (default 5)"
    )
    _add_dtype(to_hf)
    check = _command(
        kinds, "check", _check_conversion, "prove that a checkpoint and a Hugging Face folder are one model"
    )
    check.add_argument("--hf", required=True, metavar="HF_DIR")
    check.add_argument("--megatron", required=True, metavar="DIR")
    _add_layout(check, "the layout that the checkpoint's logits are computed at")
    check.add_argument(
        "--logits",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare the logits of random tokens: auto (default) where the model fits in memory",
    )
    check.add_argument("--output", metavar="FILE", help="write the certificate here as JSON")
    logits = _command(kinds, "logits", _logits, "a checkpoint's logits of given token ids")
    _add_megatron(logits)
    logits.add_argument("--tokens", required=True, metavar="T.npy", help="integers [sequences, length]")
    logits.add_argument(
        "--out", required=True, metavar="L.npy", help="float32 [sequences, length, vocabulary]"
    )
    _add_layout(logits, "the layout to compute at, under torchrun where it is not 1")


def _add_layout(parser: argparse.ArgumentParser, purpose: str) -> None:
    group = parser.add_argument_group("layout", purpose)
    for name, kind in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        group.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{kind}-parallel size (default 1)"
        )


def _add_megatron(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--megatron", required=True, metavar="DIR", help="of training or of to-megatron, at any layout"
    )
    parser.add_argument(
        "--like", metavar="HF_DIR", help="take config and tokenizer from here, not from the checkpoint"
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: as they are stored)")


def _layout(options: argparse.Namespace) -> Any:
    from megatron_scope.convert.shape import FileLayout

    for name in ("tp", "pp", "ep"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; expected 1 or more")
    return FileLayout(options.tp, options.pp, options.ep)


def _dtype(options: argparse.Namespace) -> Any:
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def _to_megatron(options: argparse.Namespace) -> int:
    from megatron_scope.convert.to_megatron import to_megatron

    _end_as_after_ctrl_c()
    done = to_megatron(options.hf, options.out, _layout(options), _dtype(options))
    print(f"{done}: {options.out}")
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    from megatron_scope.convert.to_hf import to_hf

    if not 0 < options.max_shard_gb < math.inf:
        raise ConfigError(f"--max-shard-gb is {options.max_shard_gb}; expected finite and above 0")
    _end_as_after_ctrl_c()
    max_shard_bytes = int(options.max_shard_gb * 1e9)
    done = to_hf(options.megatron, options.out, options.like, _dtype(options), max_shard_bytes)
    print(f"{done}: {options.out}")
    return 0


def _check_conversion(options: argparse.Namespace) -> int:
    from megatron_scope.certificate import CheckOptions, check, describe

    layout = _layout(options)
    _end_as_after_ctrl_c()
    certificate = check(CheckOptions(options.hf, options.megatron, layout, options.logits, options.output))
    print(describe(certificate))
    return 0 if certificate["equal"] else 1


def _logits(options: argparse.Namespace) -> int:
    from megatron_scope.backend import setup

    layout = _layout(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    end_with_launcher()
    setup.prepare()
    from megatron_scope.certificate import write_checkpoint_logits

    write_checkpoint_logits(options.megatron, options.like, options.tokens, options.out, layout)
    return 0


def _end_as_after_ctrl_c() -> None:
    """A terminated command cleans up as an interrupted one does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


# ---- evaluate


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", _evaluate, "avg@k, unbiased pass@k and diversity of a model over problem files"
    )
    _add_config(parser)
    parser.add_argument(
        "--benchmarks", required=True, metavar="A,B", help="JSON-lines files {id, prompt, answer, task}"
    )
    parser.add_argument(
        "--samples", type=int, default=32, metavar="N", help="responses for each problem (default 32)"
    )
    parser.add_argument("--k", metavar="1,2,4", help="the k of pass@k (default 1,8,32, as far as N goes)")
    parser.add_argument("--model", metavar="HF_DIR", help="the model to evaluate (default student.hf)")
    parser.add_argument("--output", metavar="FILE", help="write the results here as JSON")
    parser.add_argument(
        "--responses",
        metavar="FILE",
        help="write every response here as JSON lines, which objective.name=kd can train on",
    )


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_scope.config import load_config
    from megatron_scope.config.check import check_config
    from megatron_scope.evaluator import EvaluateOptions, evaluate, parse_ks

    chosen = [f"student.hf={options.model}", "student.megatron=null"] if options.model else []
    overrides = [*options.overrides, *chosen]
    config = load_config(options.config, overrides)
    check_config(config, command="evaluate")
    evaluate(
        config,
        EvaluateOptions(
            benchmarks=tuple(options.benchmarks.split(",")),
            num_samples=options.samples,
            ks=parse_ks(options.k, options.samples),
            output=options.output,
            responses=options.responses,
        ),
    )
    return 0


# ---- verify


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands, "verify", _verify, "judge responses: adds correct, extracted and error to each row"
    )
    parser.add_argument(
        "--input", required=True, metavar="F.jsonl", help="rows {id, task, answer, response, ...}"
    )
    parser.add_argument("--output", required=True, metavar="G.jsonl")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="S", help="seconds an answer may take (default 10)"
    )


def _verify(options: argparse.Namespace) -> int:
    from megatron_scope.verify.command import verify_file

    summary = verify_file(options.input, options.output, options.workers, options.timeout)
    print(
        f"{summary.num_rows} rows, {summary.num_correct} correct, {summary.num_errors} with an error: "
        f"{options.output}"
    )
    return 0


# ---- serve


def _add_serve(commands: Any) -> None:
    from megatron_scope.rollout.embedded.options import add_serve_arguments

    add_serve_arguments(
        _command(commands, "serve", _serve, "serve a small model on the CPU with SGLang's protocol")
    )


def _serve(options: argparse.Namespace) -> int:
    from megatron_scope.rollout.embedded.options import options_from
    from megatron_scope.rollout.embedded.server import serve

    serve(options_from(options))
    return 0


# ---- launch


def _add_launch(commands: Any) -> None:
    from megatron_scope.rollout.launch import add_launch_arguments

    parser = _command(
        commands,
        "launch",
        _launch,
        "print or run the command line of SGLang that serves CONFIG.yaml's models",
    )
    _add_config(parser)
    add_launch_arguments(parser)


def _launch(options: argparse.Namespace) -> int:
    from megatron_scope.config import load_config
    from megatron_scope.config.check import check_config
    from megatron_scope.rollout.launch import launch_command, options_from

    config = load_config(options.config, options.overrides)
    check_config(config, command="launch")
    command = launch_command(config, options_from(options))
    if options.start:
        command.run()
    print(command.as_shell())
    return 0
