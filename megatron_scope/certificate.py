"""`convert check`: a certificate that a Megatron checkpoint and a Hugging Face folder are one model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from megatron_scope import __version__
from megatron_scope.config.schema import ParallelConfig
from megatron_scope.convert.certify import compare_tensors, summary
from megatron_scope.convert.files import write_json
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.megatron_folder import MegatronFolder
from megatron_scope.convert.shape import FileLayout
from megatron_scope.data.jsonl import without_nan
from megatron_scope.environment import place
from megatron_scope.errors import ConfigError, DataError, ScopeError
from megatron_scope.launch import run_local_ranks

LOGIT_LIMIT = 2e-5  # of the largest logit, or of 1 where all are smaller; both sides compute in float32
_NUM_SEQUENCES, _LENGTH = 2, 64
_LIBRARIES = ("torch", "megatron-core", "transformers", "safetensors")

WhenLogits = Literal["auto", "always", "never"]


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """What `convert check` compares; `layout` is the one that the logits are computed at."""

    hf: str
    megatron: str
    layout: FileLayout
    logits: WhenLogits = "auto"
    output: str | None = None


def check(options: CheckOptions) -> dict[str, Any]:
    """Compares both sides and returns the certificate, which it writes to `options.output`, null where a
    number is none.

    Raises DataError for sides that cannot be compared, ConfigError for an impossible layout or output.
    """
    output = None if options.output is None else Path(options.output).expanduser()
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is not a folder; make it first")
    hf, megatron = HfFolder(options.hf), _open_megatron(options)
    options.layout.check(hf.shape, str(hf.path))
    proofs = compare_tensors(hf, megatron)
    logits = _compare_logits(options, hf, megatron, {proof.megatron_dtype for proof in proofs})
    certificate = {
        "equal": all(proof.equal for proof in proofs) and logits.get("within_limit", True),
        "hf": str(hf.path),
        "megatron": str(megatron.path),
        "architecture": hf.family.architecture,
        "logits": logits,
        "tensors": summary(proofs),
        "versions": {
            "megatron_scope": __version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    }
    if output is not None:
        write_json(output, without_nan(certificate))
    return certificate


def describe(certificate: dict[str, Any]) -> str:
    """A certificate in two lines, with the first tensor that differs."""
    tensors, logits = certificate["tensors"], certificate["logits"]
    line = f"{tensors['equal']} of {tensors['compared']} tensors are equal bit for bit"
    for wrong in [each for each in tensors["each"] if not each["equal"]][:1]:
        line += f"; {wrong['name']} differs by up to {wrong['largest_difference']:.3g}"
    if "skipped" in logits:
        return f"{line}\nlogits not compared: {logits['skipped']}"
    return (
        f"{line}\nlogits differ by up to {logits['largest_difference']:.2e} (limit {logits['limit']:.2e}) at "
        f"TP {logits['tensor']} x PP {logits['pipeline']} x EP {logits['expert']}"
    )


def _open_megatron(options: CheckOptions) -> MegatronFolder:
    """With its own config where it has one, so that a wrong one is found; else with the folder's."""
    own = MegatronFolder.has_config(options.megatron)
    return MegatronFolder(options.megatron, None if own else options.hf)


def _compare_logits(
    options: CheckOptions, hf: HfFolder, megatron: MegatronFolder, dtypes: set[str]
) -> dict[str, Any]:
    if options.logits == "never":
        return {"skipped": "not asked for"}
    needed, free = 4.5 * _num_parameters(hf), psutil.virtual_memory().available
    if options.logits == "auto" and needed > free:
        return {
            "skipped": f"the model needs {needed / 1e9:.1f} GB in float32 and {free / 1e9:.1f} GB are free; "
            "--logits always tries all the same"
        }
    length = min(_LENGTH, hf.shape.max_positions)
    tokens = np.random.default_rng(0).integers(hf.shape.vocab_rows, size=(_NUM_SEQUENCES, length))
    ours, theirs = _megatron_logits(options, megatron, tokens), _transformers_logits(hf, tokens, dtypes)
    largest, scale = float(np.abs(ours - theirs).max()), max(1.0, float(np.abs(theirs).max()))
    return {
        **dataclasses.asdict(options.layout),
        "sequences": _NUM_SEQUENCES,
        "length": length,
        "dtype": "float32",
        "largest_logit": float(np.abs(theirs).max()),
        "largest_difference": largest,
        "limit": LOGIT_LIMIT * scale,
        "within_limit": largest <= LOGIT_LIMIT * scale,  # false for NaN
    }


def _num_parameters(hf: HfFolder) -> int:
    return sum(math.prod(hf.slice(name).get_shape()) for name in hf.file_of)


def _megatron_logits(options: CheckOptions, megatron: MegatronFolder, tokens: np.ndarray) -> np.ndarray:
    layout = options.layout
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(given, tokens)
        arguments = [
            *("convert", "logits", "--megatron", str(megatron.path), "--like", str(megatron.companions)),
            *("--tokens", str(given), "--out", str(made)),
            *("--tp", str(layout.tensor), "--pp", str(layout.pipeline), "--ep", str(layout.expert)),
        ]
        if run_local_ranks(arguments, layout.num_ranks):
            raise ScopeError(f"the logits of {megatron.path} could not be computed; the reason stands above")
        return np.load(made)


def _transformers_logits(hf: HfFolder, tokens: np.ndarray, dtypes: set[str]) -> np.ndarray:
    """Float32 logits of the numbers that the checkpoint was given: cast to its dtype, where it has one.

    DataError where transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = getattr(torch, dtypes.pop()) if len(dtypes) == 1 else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(hf.path, dtype=dtype, local_files_only=True)
    except Exception as error:  # transformers raises of many kinds
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{hf.path}: transformers cannot load it ({reason}); mend it, or pass --logits never"
        ) from None
    model = loaded.float()
    if hf.shape.mixture:
        model.set_experts_implementation("eager")  # the default one wants sizes that are multiples of four
    with torch.inference_mode():
        return np.stack([model(torch.from_numpy(row)[None]).logits[0].numpy() for row in tokens])


def write_checkpoint_logits(
    megatron: str, like: str | None, tokens: str, out: str, layout: FileLayout
) -> None:
    """`convert logits` on this rank: a checkpoint's logits of the ids in one NumPy file into another.

    Raises ConfigError or DataError for a layout or ids that do not fit.
    """
    source = MegatronFolder(megatron, like)
    source.check()
    shape, world_size = source.shape, place().world_size
    layout.check(shape, str(source.path))
    needed = layout.num_ranks
    if world_size != needed:
        raise ConfigError(
            f"there are {world_size} ranks; --tp {layout.tensor} --pp {layout.pipeline} --ep {layout.expert} "
            f"needs {needed}: start them with torchrun --nproc-per-node {needed} -m megatron_scope ..."
        )
    from megatron_scope.backend import setup
    from megatron_scope.backend.logits import write_logits

    ranks = setup.initialize(
        ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, expert=layout.expert)
    )
    write_logits(source, ranks, _read_tokens(tokens), Path(out).expanduser())
    setup.shutdown()


def _read_tokens(path: str) -> np.ndarray:
    try:
        tokens = np.load(Path(path).expanduser(), allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, EOFError):
        tokens = None
    if not isinstance(tokens, np.ndarray):
        raise DataError(f"{path} is not a NumPy file of one array; expected one written by numpy.save")
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise DataError(
            f"{path} holds {tokens.dtype} {tokens.shape}; expected token ids as integers [sequences, length]"
        )
    return tokens
