"""What `benchmarks/convert.py` runs in processes of their own: making a folder, and the others' conversions.

python benchmarks/convert_child.py make FOLDER < plan.json
python benchmarks/convert_child.py transformers HF_FOLDER OUT
python benchmarks/convert_child.py mbridge HF_FOLDER OUT
python benchmarks/convert_child.py bare < names of modules
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

BLOCK_VALUES = 1 << 24  # bfloat16 values of the one random block that all tensors are cut from
CHARACTERS = "0123456789=+$ abcdefghijklmnopqrstuvwxyz"

Tensors = list[tuple[str, tuple[int, ...]]]


def shards(tensors: Tensors, max_bytes: int) -> list[Tensors]:
    """Consecutive tensors in shards of at most `max_bytes` (one tensor at least), as bfloat16."""
    found: list[Tensors] = [[]]
    size = 0
    for name, shape in tensors:
        num_bytes = 2 * math.prod(shape)
        if found[-1] and size + num_bytes > max_bytes:
            found.append([])
            size = 0
        found[-1].append((name, shape))
        size += num_bytes
    return found


def random_block(num_values: int) -> bytearray:
    """Finite bfloat16 values near a model's, std 0.02: the upper halves of float32 ones."""
    import numpy

    values = numpy.random.default_rng(0).standard_normal(num_values, dtype=numpy.float32)
    values *= 0.02
    return bytearray((values.view(numpy.uint32) >> 16).astype("<u2").tobytes())


def pieces(block: bytearray, offset: int, num_bytes: int) -> Iterator[memoryview]:
    """`num_bytes` of the endless repetition of `block`, from `offset` on, without copying."""
    view = memoryview(block)
    while num_bytes:
        offset %= len(block)
        piece = view[offset : offset + num_bytes]
        yield piece
        offset += len(piece)
        num_bytes -= len(piece)


def write_shard(file: BinaryIO, tensors: Tensors, block: bytearray, offset: int) -> int:
    """Writes one safetensors file; returns where in the block the next tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for _, shape in tensors:
        num_bytes = 2 * math.prod(shape)
        for piece in pieces(block, offset, num_bytes):
            file.write(piece)
        # An odd step, so that tensors of one shape do not hold the same values.
        offset += num_bytes + 2 * 7919
    return offset


def make(folder: Path, plan: dict[str, Any], block_values: int = BLOCK_VALUES) -> None:
    """A Hugging Face folder: config, weights of the plan's shapes and a tokenizer of one token a character.

    `plan` has `config` (what config.json holds), `tensors` ([name, shape] pairs) and `max_shard_bytes`.
    Memory stays at the block's size and a little.
    """
    folder.mkdir(parents=True)
    block = random_block(block_values)
    parts = shards([(name, tuple(shape)) for name, shape in plan["tensors"]], plan["max_shard_bytes"])
    weight_map: dict[str, str] = {}
    offset = 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with open(folder / name, "wb") as file:
            offset = write_shard(file, part, block, offset)
            file.flush()
            os.fsync(file.fileno())
        weight_map.update(dict.fromkeys((tensor for tensor, _ in part), name))
    total = sum(2 * math.prod(shape) for _, shape in plan["tensors"])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(plan["config"], indent=2), encoding="utf-8")
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "$", "pad_token": "$", "unk_token": " ", "bos_token": " "}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def by_transformers(hf: Path, out: Path) -> None:
    """Load and save as its documentation shows, in the folder's own dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(hf, dtype="auto").save_pretrained(out)
    AutoTokenizer.from_pretrained(hf).save_pretrained(out)


def by_mbridge(hf: Path, out: Path) -> None:
    """mbridge fills a Megatron-core model from the folder; Megatron's `dist_checkpointing` saves it.

    Three things are lent to it, none of which does less work: Megatron hosted on a CPU; the layers of
    Megatron's own spec, for those it asks for are Transformer Engine's; and `rope_theta` where it looks for
    it, which transformers 5 moved. The model's random initialisation is switched off in its favour.
    """
    from megatron_scope.backend.setup import initialize, shutdown
    from megatron_scope.config.schema import ParallelConfig

    initialize(ParallelConfig())  # hosts Megatron: nothing of it is imported before
    import torch
    from mbridge.models import LLaMABridge  # pyright: ignore[reportMissingImports]
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from transformers import AutoConfig

    class LocalBridge(LLaMABridge):
        _OTHER_MAPPING: ClassVar = {
            "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
        }
        _MLP_MAPPING: ClassVar = {
            **LLaMABridge._MLP_MAPPING,
            "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
        }

        def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
            del vp_stage
            self.has_vp_stage = False
            return get_gpt_layer_local_spec(normalization="RMSNorm")

    config = AutoConfig.from_pretrained(hf)
    config.rope_theta = config.rope_parameters["rope_theta"]
    bridge = LocalBridge(config, dtype=torch.bfloat16)
    bridge.set_extra_args(
        use_cpu_initialization=True, perform_initialization=False, masked_softmax_fusion=False
    )
    models = bridge.get_model()
    with torch.no_grad():
        bridge.load_weights(models, str(hf))
    out.mkdir()
    dist_checkpointing.save({"model": models[0].sharded_state_dict()}, str(out))
    shutdown()


def bare(names: list[str]) -> None:
    """Imports the modules and does nothing."""
    if "megatron_scope.backend.cpu" in names:
        from megatron_scope.backend.setup import prepare

        prepare()  # Megatron is importable after it only
    for name in names:
        with contextlib.suppress(ImportError):  # some exist only inside the program that was watched
            importlib.import_module(name)


def main() -> None:
    task, *folders = sys.argv[1:]
    if task == "bare":
        bare(sys.stdin.read().split())
    elif task == "make":
        make(Path(folders[0]), json.load(sys.stdin))
    else:
        {"transformers": by_transformers, "mbridge": by_mbridge}[task](*map(Path, folders))


if __name__ == "__main__":
    main()
