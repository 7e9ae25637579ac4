"""Parameters of a pipeline stage beside their Hugging Face tensors, read in both directions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scope.convert.families.base import Family, Rule
from megatron_scope.convert.layouts import Layout, Size, Vocabulary
from megatron_scope.convert.shape import ModelShape
from megatron_scope.errors import DataError

TIED_SOURCE = "model.embed_tokens.weight"
# Megatron's checkpoints name norms as parts of the linear layers that Transformer Engine fuses them with.
_NORMS = {
    "decoder.layers.input_layernorm.": "decoder.layers.self_attention.linear_qkv.layer_norm_",
    "decoder.layers.pre_mlp_layernorm.": "decoder.layers.mlp.linear_fc1.layer_norm_",
}
_CHECKPOINT_NAMES = {**_NORMS, ".experts.local_experts.": ".experts.experts."}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter by its name in this stage and its Hugging Face tensors; a `copy` is held elsewhere too and
    not exported.

    A checkpoint keeps it under `key` at `place` of the leading axes `stack`: (layer,) of (layers,), or
    (layer, expert) of (layers, experts).
    """

    parameter: str
    hf: tuple[str, ...]
    hf_sizes: tuple[Size, ...]
    layout: Layout
    key: str
    place: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    expert: int | None = None  # global number of the expert that it belongs to; experts are not split
    copy: bool = False

    def whole_size(self, shape: ModelShape) -> Size:
        """The parameter's size at tensor-parallel size 1."""
        return _whole_size(self.layout, self.hf_sizes, shape)


@functools.lru_cache(maxsize=4096)  # the experts of a large model ask tens of thousands of times
def _whole_size(layout: Layout, hf_sizes: tuple[Size, ...], shape: ModelShape) -> Size:
    sources = [torch.empty(size, device="meta") for size in hf_sizes]
    return tuple(layout.shard(sources, shape, 0, 1).shape)


def stage_entries(
    family: Family,
    shape: ModelShape,
    padded_vocab: int,
    layers: range,
    *,
    first: bool,
    last: bool,
    experts: range | None = None,
) -> list[Entry]:
    """Entries of the stage that holds the global `layers`, the embedding if `first`, the output table if
    `last`; of each layer's experts the global `experts` (None: all).
    """
    if experts is None:
        experts = range(shape.mixture.num_experts if shape.mixture else 0)
    entries = []
    for rule in family.rules(shape):
        if rule.per_layer:
            for local, layer in enumerate(layers):
                entries += _layer_entries(rule, shape, local, layer, experts)
        elif rule.table is not None:
            entries += _table_entries(rule, shape, padded_vocab, first=first, last=last)
        elif last:
            assert rule.layout is not None
            entries.append(_entry(rule, shape, rule.layout, rule.megatron))
    return entries


def model_entries(family: Family, shape: ModelShape, padded_vocab: int) -> list[Entry]:
    """Entries of the whole model: each parameter once."""
    return stage_entries(family, shape, padded_vocab, range(shape.num_layers), first=True, last=True)


def _layer_entries(rule: Rule, shape: ModelShape, local: int, layer: int, experts: range) -> list[Entry]:
    assert rule.layout is not None
    if not rule.per_expert:
        parameter = rule.megatron.format(layer=local)
        return [_entry(rule, shape, rule.layout, parameter, place=(layer,), stack=(shape.num_layers,))]
    assert shape.mixture is not None
    return [
        _entry(
            rule,
            shape,
            rule.layout,
            rule.megatron.format(layer=local, expert=local_expert),
            place=(layer, expert),
            stack=(shape.num_layers, shape.mixture.num_experts),
            expert=expert,
        )
        for local_expert, expert in enumerate(experts)
    ]


def _table_entries(
    rule: Rule, shape: ModelShape, padded_vocab: int, *, first: bool, last: bool
) -> list[Entry]:
    entry = _entry(rule, shape, Vocabulary(padded_vocab), rule.megatron)
    if rule.table == "embedding":
        return [entry] if first else []
    if not last:
        return []
    if not shape.tied_embeddings:
        return [entry]
    # A tied output table is the embedding itself, of which a last stage that is not the first keeps a copy.
    embedding = "embedding.word_embeddings.weight"
    return [] if first else [dataclasses.replace(entry, hf=(TIED_SOURCE,), key=embedding, copy=True)]


def _entry(rule: Rule, shape: ModelShape, layout: Layout, parameter: str, **place: Any) -> Entry:
    """An entry of a rule; `place` are Entry's fields of the same names."""
    numbers = dict(zip(("layer", "expert"), place.get("place", ()), strict=False))
    sizes = tuple(tuple(shape.dims[name] for name in names.split()) for names in rule.hf.values())
    return Entry(
        parameter,
        tuple(name.format(**numbers) for name in rule.hf),
        sizes,
        layout,
        checkpoint_key(rule.megatron),
        **place,
    )


def reading_order(entry: Entry) -> tuple[int, ...]:
    """Sorts entries as files have them: the embedding, layer by layer, what comes after the layers."""
    if entry.place:
        return (1, *entry.place)
    return (0,) if entry.key.startswith("embedding.") else (2,)


def checkpoint_key(parameter: str) -> str:
    """The name under which Megatron's checkpoints stack a parameter of all layers (and experts)."""
    key = parameter.replace("{layer}.", "").replace("{expert}.", "")
    for ours, theirs in _CHECKPOINT_NAMES.items():
        key = key.replace(ours, theirs)
    return key


def checkpoint_spellings(entry: Entry) -> Iterator[tuple[str, int]]:
    """The names a checkpoint may have for a parameter, each with the number of `place` axes that are in it:
    norms as parts of the next layer or by their own names, layers stacked or by their numbers.
    """
    plain = entry.key
    for own, fused in _NORMS.items():
        plain = plain.replace(fused, own)
    for key in (entry.key, plain):
        yield key, 0
        if entry.place:
            yield key.replace("decoder.layers.", f"decoder.layers.{entry.place[0]}."), 1


class ModelSource(Protocol):
    """Where a model's weights come from: a Hugging Face folder or a Megatron checkpoint."""

    path: Path
    companions: Path  # a folder with config.json, tokenizer and what else goes with the weights
    family: Family
    shape: ModelShape

    def check(self) -> None:
        """DataError when a tensor is missing, unknown or of a size that config.json contradicts."""
        ...

    def close(self) -> None:
        """Lets go of open files."""
        ...

    def shard(self, entry: Entry, rank: int, size: int) -> Tensor:
        """A rank's part of a parameter at a tensor-parallel size, in the stored dtype; DataError when it is
        not there.
        """
        ...


@torch.no_grad()
def load_stage(
    parameters: Mapping[str, Tensor],
    entries: Iterable[Entry],
    source: ModelSource,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Fills a stage's parameters in place, reading only this rank's slices; DataError on a shape that does
    not fit.
    """
    left = set(parameters)
    for entry in entries:
        target = parameters[entry.parameter]
        place = (tensor_rank, tensor_size) if entry.expert is None else (0, 1)
        value = source.shard(entry, *place)
        if value.shape != target.shape:
            raise DataError(
                f"{source.path}: {', '.join(entry.hf)} give a shard of shape {tuple(value.shape)} but the "
                "model has "
                f"{tuple(target.shape)}; config.json and the weights disagree"
            )
        target.copy_(value)
        left.discard(entry.parameter)
    if left:
        raise DataError(f"{source.family.architecture}: no rule for the parameters {sorted(left)}")


@dataclasses.dataclass(frozen=True)
class Peers:
    """A process group that holds the parts of a parameter, and this rank's place in it."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor (of one size and dtype) in rank order on the first rank, [] elsewhere."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor, parts, group=self.group, group_dst=0)
        return parts or []


@torch.no_grad()
def export_stage(
    entries: Sequence[Sequence[Entry]],
    local: Callable[[str], Tensor],
    shape: ModelShape,
    tensor: Peers | None,
    expert: Peers | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields this stage's (Hugging Face name, tensor) on the first rank, one parameter at a time and in the
    order of `exported_tensors`.

    `entries` are those of each expert rank, in order (one list for a dense model); `local` gives a
    parameter's shard (or its gradient's) by name. `tensor` and `expert` are the groups that hold the first
    rank's shards and experts, None for a rank outside of them. A tensor may be the parameter itself: copy
    what must outlive the next one or the next update. A collective: every rank of both groups must run it to
    the end; all but the first yield nothing.
    """
    for number, entry in enumerate(entries[expert.rank if expert else 0]):
        peers = tensor if entry.expert is None else expert
        if entry.copy or peers is None:
            continue
        # Nothing of a parameter is kept here while the next one is gathered.
        yield from _whole(entries, number, peers.gather(local(entry.parameter).detach().contiguous()), shape)


def _whole(
    entries: Sequence[Sequence[Entry]], number: int, parts: list[Tensor], shape: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of the first rank's entry `number`; none without parts."""
    if parts:
        for whose, shards in _joined(entries, number, parts):
            yield from zip(whose.hf, whose.layout.join(shards, shape), strict=True)


def _joined(
    entries: Sequence[Sequence[Entry]], number: int, parts: Sequence[Any]
) -> Iterator[tuple[Entry, Sequence[Any]]]:
    """What the parts of the first rank's entry `number` are put together to: one parameter of all shards, or
    one expert of each rank.
    """
    entry = entries[0][number]
    if entry.expert is None:
        yield entry, parts
    else:
        yield from ((entries[rank][number], [part]) for rank, part in enumerate(parts))


def largest_in_hand(entries: Sequence[Sequence[Entry]], shape: ModelShape, tensor_size: int) -> int:
    """The most numbers that `export_stage` holds at a time on the first rank beside its own shards: the parts
    of a parameter, where it has to gather them, and what they are put together to.
    """
    counts = [0]
    for entry in entries[0]:
        num_parts = tensor_size if entry.expert is None else len(entries)
        num_whole = 1 if entry.expert is None else num_parts  # an expert of each rank
        if not entry.copy:
            copies = 1 if num_parts == 1 else 2
            counts.append(copies * num_whole * math.prod(entry.whole_size(shape)))
    return max(counts)


def exported_tensors(entries: Sequence[Sequence[Entry]]) -> Iterator[tuple[str, Size]]:
    """The (Hugging Face name, size) of what `export_stage` yields, in its order; needs no other rank."""
    for number, entry in enumerate(entries[0]):
        if entry.copy:
            continue
        for whose, _ in _joined(entries, number, entries):
            yield from zip(whose.hf, whose.hf_sizes, strict=True)
