"""What the ranks of a pool are asked to do; each function runs on every rank and returns picklable
results.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import types
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from megatron_scope.config import parse_config
from megatron_scope.config.schema import ParallelConfig, Precision
from megatron_scope.environment import place
from megatron_scope.errors import ScopeError


@contextlib.contextmanager
def layout(parallel: ParallelConfig) -> Iterator[Any]:
    """A world with Megatron's groups for one layout; left afterwards, since each gloo group keeps threads."""
    from megatron_scope.backend import setup

    ranks = setup.initialize(parallel)
    try:
        yield ranks
        dist.barrier(group=ranks.world_group)
    finally:
        setup.shutdown()


def frozen_stage(hf: str, ranks: Any) -> Any:
    """This rank's part of a model that is not trained, in float32."""
    from megatron_scope.backend.model import build
    from megatron_scope.config.schema import TrainConfig
    from megatron_scope.convert.hf_folder import HfFolder
    from megatron_scope.convert.shape import padded_vocab_size

    source = HfFolder(hf)
    return build(
        source,
        ranks,
        TrainConfig(precision=Precision.FLOAT32),
        padded_vocab=padded_vocab_size(source.shape.vocab_rows, ranks.tensor_size),
        vocab_size=source.shape.vocab_rows,
        sequence_parallel=False,
        pipeline_layers=None,
        trainable=False,
    )


def train(settings: dict[str, Any], resume: bool = False) -> list[dict[str, Any]]:
    """Trains as the config says and returns the rows of metrics.jsonl."""
    from megatron_scope.trainer import Trainer

    config = parse_config(settings, "test")
    with layout(config.parallel) as ranks:
        trainer = Trainer(config, ranks, resume=resume)
        trainer.run()
        return trainer.folder.read_metrics()


def error_of_training(settings: dict[str, Any]) -> tuple[str, str]:
    """The kind and the message of the error that training ends in on this rank."""
    try:
        train(settings)
    except ScopeError as error:
        return type(error).__name__, str(error)
    return "", "no error"


def error_of_broken_training(settings: dict[str, Any], fault: str, rank: int) -> tuple[str, str]:
    """The same with one of FAULTS on one rank."""
    with contextlib.ExitStack() as stack:
        if place().rank == rank:
            stack.enter_context(FAULTS[fault]())
        return error_of_training(settings)


def _unreachable_store() -> Any:
    from megatron_scope.backend import rendezvous

    connect = rendezvous.connect
    return unittest.mock.patch.object(rendezvous, "connect", lambda host, port: connect(host, 1))


def _dead_controller() -> Any:
    """From the moment on that the servers are to be told of weights by broadcast."""
    from megatron_scope.controller.process import ControllerProcess

    begin = ControllerProcess.begin

    def kill_first(process: ControllerProcess, method: str, *args: Any) -> Any:
        if method == "broadcast":
            process._process.kill()
            process._process.join()
        return begin(process, method, *args)

    return unittest.mock.patch.object(ControllerProcess, "begin", kill_first)


def _no_memory_for_buckets() -> Any:
    """From the second on."""
    from megatron_scope.backend import broadcast

    num_buckets = itertools.count()

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(num_buckets) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return torch.empty(*args, **kwargs)

    limited = types.SimpleNamespace(empty=allocate, uint8=torch.uint8)
    return unittest.mock.patch.object(broadcast, "torch", limited)


FAULTS = {
    "unreachable store": _unreachable_store,
    "dead controller": _dead_controller,
    "no memory for buckets": _no_memory_for_buckets,
}


def num_threads() -> int:
    """Threads of this rank once Python's collector has let go of what it can: each gloo group keeps some."""
    gc.collect()
    return psutil.Process().num_threads()


def token_logprobs(settings: dict[str, Any]) -> dict[str, dict[int, np.ndarray]]:
    """Both models' log-probs of every response token of the first replayed step, by canonical index."""
    from megatron_scope.trainer import Trainer

    config = parse_config(settings, "test")
    with layout(config.parallel) as ranks, contextlib.ExitStack() as stack:
        trainer = Trainer(config, ranks, resume=False)
        stack.callback(trainer.student.release)
        if ranks.rank == 0:
            trainer._start_controller(stack)
        arriving = trainer.roll_out(1)
        while not arriving.is_complete:
            arriving.next_part()
        batch = arriving.finish()
        models = {"student": trainer.student.stage, "teacher": trainer.scorer.teacher}
        scores = {
            name: trainer.scorer.token_logprobs(stage, batch.responses, [1.0])[0].by_response
            for name, stage in models.items()
        }
        return scores if ranks.speaks_for_scores else {name: {} for name in models}


def response_logprobs(
    hf: str, sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], temperature: float
) -> list[np.ndarray]:
    """A model's log-probs of each (prompt ids, response ids), as a step's score stage has them."""
    from megatron_scope.backend.scoring import score
    from megatron_scope.data.batching import pack
    from megatron_scope.records import Response

    with layout(ParallelConfig()) as ranks:
        stage = frozen_stage(hf, ranks)
        responses = [
            Response(
                index=index,
                correct=True,
                stopped=False,
                prompt_ids=np.array(prompt),
                output_ids=np.array(response),
                engine_logprobs=np.zeros(len(response), dtype=np.float32),
            )
            for index, (prompt, response) in enumerate(sequences)
        ]
        (scores,) = score(stage, pack(responses, micro_batch_tokens=512), ranks, [temperature])
        return [scores.by_response[index] for index in range(len(responses))]


def checkpoint_logits(megatron: str, parallel: dict[str, int], tokens: np.ndarray, out: str) -> None:
    """`convert logits` at a layout."""
    from megatron_scope.backend.logits import write_logits
    from megatron_scope.convert.megatron_folder import MegatronFolder

    with layout(ParallelConfig(**parallel)) as ranks:
        write_logits(MegatronFolder(megatron), ranks, tokens, Path(out))


def load_with_megatron(hf: str, megatron: str, parallel: dict[str, Any]) -> list[str]:
    """The parameters of this rank in which a checkpoint that Megatron itself loads, into a wiped model,
    differs from its Hugging Face folder.
    """
    from megatron.core import dist_checkpointing

    with layout(ParallelConfig(**parallel)) as ranks:
        stage = frozen_stage(hf, ranks)
        expected = {name: value.clone() for name, value in stage.module.named_parameters()}
        for value in stage.module.parameters():
            value.fill_(float("nan"))
        stage.module.load_state_dict(
            dist_checkpointing.load(stage.module.sharded_state_dict(), megatron)  # pyright: ignore
        )
        found = dict(stage.module.named_parameters())
        return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def differences_from_mbridge(hf: str) -> tuple[int, list[str]]:
    """How many parameters mbridge maps, and which of them it fills from other tensors or with other
    numbers.
    """
    from mbridge.core.bridge import _MODEL_REGISTRY  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig

    from megatron_scope.convert.hf_folder import HfFolder
    from megatron_scope.convert.mapping import model_entries

    source = HfFolder(hf)
    config = AutoConfig.from_pretrained(hf)
    # Its mapping alone: its constructor wants Transformer Engine.
    bridge: Any = object.__new__(_MODEL_REGISTRY[config.model_type])
    bridge.hf_config, bridge.dtype, bridge.make_vocab_size_divisible_by = config, None, None
    entries = model_entries(source.family, source.shape, source.shape.vocab_rows)
    differing = []
    for entry in entries:
        name = _name_in_mbridge(entry, source.shape.mixture is not None)
        theirs = bridge._weight_to_mcore_format(name, [source.slice(tensor)[:] for tensor in entry.hf])
        same_names = tuple(bridge._weight_name_mapping_mcore_to_hf(name)) == entry.hf
        if not same_names or not torch.equal(theirs, source.shard(entry, 0, 1)):
            differing.append(name)
    return len(entries), differing


def _name_in_mbridge(entry: Any, has_experts: bool) -> str:
    """Transformer Engine's name of a parameter: norms within dense linear layers, experts grouped."""
    if not entry.place:
        return entry.key
    key = entry.key.replace("decoder.layers.", f"decoder.layers.{entry.place[0]}.")
    if has_experts:
        key = key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    return key if entry.expert is None else f"{key.replace('experts.experts', 'experts')}{entry.expert}"


def vocab_parallel_stats(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    columns: list[int],
    vocab_size: int,
    upstream: list[torch.Tensor],
    temperature: float,
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """distill_stats on shards of the given widths; returns the outputs and this rank's shard of the
    gradient.
    """
    from megatron_scope.kernels.vocab_parallel import distill_stats

    with layout(ParallelConfig(tensor=len(columns))) as ranks:
        start = sum(columns[: ranks.tensor_rank])
        shard = slice(start, start + columns[ranks.tensor_rank])
        mine = student[:, shard].clone().requires_grad_()
        stats = distill_stats(
            mine,
            None if teacher is None else teacher[:, shard].clone(),
            targets,
            group=ranks.tensor_group,
            vocab_start=start,
            vocab_size=vocab_size,
            temperature=temperature,
        )
        outputs = [value for value in stats if value is not None and value.requires_grad]
        torch.autograd.backward(
            outputs, [grad.to(value) for grad, value in zip(upstream, outputs, strict=True)]
        )
        assert mine.grad is not None
        return [None if value is None else value.detach() for value in stats], mine.grad


def vocab_parallel_collectives(columns: list[int]) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives that distill_stats makes forward and backward, with and without tokens."""
    from megatron_scope.kernels.vocab_parallel import distill_stats

    with layout(ParallelConfig(tensor=len(columns))) as ranks:
        student, teacher = torch.randn(2, 5, columns[ranks.tensor_rank])
        student.requires_grad_()
        with counted_collectives() as counts:
            stats = distill_stats(
                student,
                teacher,
                torch.zeros(5, dtype=torch.long),
                group=ranks.tensor_group,
                vocab_start=sum(columns[: ranks.tensor_rank]),
            )
            forward = dict(counts)
            counts.clear()
            (stats.logprob + stats.reverse_kl + stats.forward_kl + stats.entropy).sum().backward()
        return forward, dict(counts)


def error_of_a_group_without_this_rank() -> str:
    """What every rank but the first is told when it passes a group of the first alone."""
    from megatron_scope.kernels.vocab_parallel import distill_stats

    with layout(ParallelConfig(tensor=2)) as ranks:
        group = dist.new_group([0])
        if ranks.rank == 0:
            return ""
        try:
            distill_stats(torch.zeros(1, 4), None, torch.zeros(1, dtype=torch.long), group=group)
        except ValueError as error:
            return str(error)
        return "no error"


def saved_gradients(path: str) -> dict[str, torch.Tensor]:
    """The gradient that run.dump_gradients wrote."""
    from safetensors.torch import load_file

    return load_file(Path(path))


def look_at_the_hosted_process(folder: str) -> dict[str, Any]:
    """What torch and transformers say in a process that hosts Megatron."""
    from transformers import AutoModelForCausalLM

    from megatron_scope.backend import cpu
    from megatron_scope.convert.hf_folder import HfFolder
    from tests.helpers.models import save_llama

    zeros = torch.zeros
    cpu.host()
    with torch.device("meta"):
        on_meta = torch.arange(3)
    save_llama(Path(folder) / "llama")
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "llama")
    frequencies = HfFolder(Path(folder) / "llama").shape.inverse_frequencies()
    return {
        "zeros on cuda": torch.zeros([], device="cuda").device.type,
        "type": torch.zeros(1).type(),
        "type of an integer": torch.zeros(1, dtype=torch.long).type(),
        "arange on meta": on_meta.device.type,
        "rotary frequencies of a model read by transformers": torch.equal(
            model.model.rotary_emb.inv_freq, frequencies
        ),
        "hosting twice changes nothing": zeros is torch.zeros,
    }


def jensen_shannon(
    student: torch.Tensor,
    teacher: torch.Tensor,
    columns: list[int],
    vocab_size: int,
    settings: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """jensen_shannon on shards of the given widths, and this rank's shard of the gradient of its sum."""
    from megatron_scope.kernels import vocab_parallel

    with layout(ParallelConfig(tensor=len(columns))) as ranks:
        start = sum(columns[: ranks.tensor_rank])
        shard = slice(start, start + columns[ranks.tensor_rank])
        mine = student[:, shard].clone().requires_grad_()
        jsd = vocab_parallel.jensen_shannon(
            mine,
            teacher[:, shard].clone(),
            group=ranks.tensor_group,
            vocab_start=start,
            vocab_size=vocab_size,
            **settings,
        )
        jsd.sum().backward()
        assert mine.grad is not None
        return jsd.detach(), mine.grad


def fused_loss(
    inputs: tuple[torch.Tensor | None, ...],
    coefficients: Any,
    rows: list[int],
    settings: dict[str, Any],
    sequence: dict[str, list[int]] | None = None,
) -> dict[str, Any]:
    """distill_loss with output tables sharded into the given numbers of rows; `sequence` says how many rows
    of each model's hidden states the ranks hold. Returns loss, statistics, this rank's gradients and the
    number of each collective that the forward and the backward pass made.
    """
    from megatron_scope.kernels.fused_linear import distill_loss

    student_hidden, student_weight, teacher_hidden, teacher_weight, targets = inputs
    assert student_hidden is not None and student_weight is not None
    with layout(ParallelConfig(tensor=len(rows))) as ranks:

        def part(whole: torch.Tensor | None, counts: list[int] | None) -> torch.Tensor | None:
            if whole is None or counts is None:
                return whole
            start = sum(counts[: ranks.tensor_rank])
            return whole[start : start + counts[ranks.tensor_rank]].clone()

        sequence = sequence or {}
        hidden = part(student_hidden, sequence.get("student"))
        weight = part(student_weight, rows)
        assert hidden is not None and weight is not None
        hidden.requires_grad_()
        weight.requires_grad_()
        with counted_collectives() as counts:
            loss, stats = distill_loss(
                hidden,
                weight,
                part(teacher_hidden, sequence.get("teacher")),
                part(teacher_weight, rows),
                targets,
                coefficients,
                group=ranks.tensor_group,
                vocab_start=sum(rows[: ranks.tensor_rank]),
                sequence_parallel=bool(sequence),
                **settings,
            )
            forward = dict(counts)
            counts.clear()
            loss.backward()
        return {
            "loss": loss.detach(),
            "stats": tuple(stats[:6]),
            "hidden_grad": hidden.grad,
            "weight_grad": weight.grad,
            "forward": forward,
            "backward": dict(counts),
        }


@contextlib.contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """How often each collective of torch.distributed that the kernels use is called."""
    names = ("all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter", "reduce_scatter_tensor")
    counts: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            collective = getattr(dist, name)

            def counted(*args: Any, _name: str = name, _collective: Any = collective, **kwargs: Any) -> Any:
                counts[_name] = counts.get(_name, 0) + 1
                return _collective(*args, **kwargs)

            stack.enter_context(unittest.mock.patch.object(dist, name, counted))
        yield counts
