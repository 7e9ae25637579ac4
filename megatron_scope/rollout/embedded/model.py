"""The language model of the embedded server: loading, prefill, slot-wise decoding and weight updates.

B slots, P prompt tokens, L positions of a slot, V vocabulary entries.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging as transformers_logging

from megatron_scope.errors import DataError
from megatron_scope.rollout.embedded.options import DTypeName, LoadFormat, require_model_folder

# Decoder-only families that cache plain keys and values per position.
SUPPORTED_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
# What a checkpoint's config.json must share with the served model's: a difference here changes the function.
FUNCTION_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "moe_intermediate_size",
)
WeightSource = str | Mapping[str, torch.Tensor]  # a folder, or tensors by their names in such a folder
SCORE_LOGITS = 2**22  # logits held at once while scoring a prompt
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError)


class WeightsError(Exception):
    """What was given are not weights of the served model, or they did not come; the old ones stay."""


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A prompt read alone: keys and values [1, heads, P, head_dim] per layer, the last float32 logits [V].

    `input_logprobs` float32 [P-1-start], in nats at temperature 1, are those of tokens start+1..P-1, or None.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logits: np.ndarray
    input_logprobs: np.ndarray | None


class SlotCache(Cache):
    """Keys and values of B independent slots of L positions; each row is written at a position of its own."""

    def __init__(self, shapes: list[tuple[int, int]], slots: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.slots, self.length = slots, length
        self.keys = [torch.zeros(slots, heads, length, dim, dtype=dtype) for heads, dim in shapes]
        self.values = [torch.zeros(slots, heads, length, dim, dtype=dtype) for heads, dim in shapes]
        self._rows = torch.arange(slots)
        self._positions = torch.zeros(slots, dtype=torch.int64)

    def seek(self, positions: torch.Tensor) -> None:
        """Sets the position [B] at which each row's next token is written."""
        self._positions = positions

    def fill(self, slot: int, prefill: Prefill) -> None:
        """Gives `slot` the prompt's keys and values, and zeroes where its last user's remain."""
        num_tokens = prefill.keys[0].shape[2]
        for own, given in zip(self.keys + self.values, prefill.keys + prefill.values, strict=True):
            own[slot, :, :num_tokens] = given[0]
            own[slot, :, num_tokens:] = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one token [B, heads, 1, head_dim] per row and returns the whole [B, heads, L, head_dim]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._rows, :, self._positions] = key_states[:, :, 0]
        values[self._rows, :, self._positions] = value_states[:, :, 0]
        return keys, values


class ServedModel:
    """A causal language model on the CPU, in memory of its own.

    With `load_format` "dummy" its weights are random: for a server that a trainer gives its weights.
    Loaded tensors are copied: what the loader returns is mapped from the file, at any alignment, and would
    change with it. Raises DataError where the folder holds no model that this server can run.
    """

    def __init__(self, folder: str, dtype: DTypeName, load_format: LoadFormat = "auto") -> None:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.folder = folder
        self.dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self.config = _read_config(folder)
        self._model: Any = self._load() if load_format == "auto" else self._random()
        for parameter in self._model.parameters():
            parameter.data = parameter.data.clone()
        self._model.eval()
        self.vocab_size: int = self.config.vocab_size
        self.max_positions: int = self.config.max_position_embeddings
        self.eos_ids = _ids(self.config.eos_token_id) | _ids(self._model.generation_config.eos_token_id)
        self.is_mixture = getattr(self.config, "num_experts", None) is not None
        if self.is_mixture:  # the default, grouped_mm, takes only rows of a multiple of 16 bytes
            self._model.set_experts_implementation("eager")
        self._layer_types = set(getattr(self.config, "layer_types", None) or ())
        with torch.inference_mode():
            probe = self.prefill((0,), None)
        self._kv_shapes = [(keys.shape[1], keys.shape[3]) for keys in probe.keys]

    def _load(self) -> Any:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(self.folder, **self._load_arguments())
        except LOAD_ERRORS as error:
            raise DataError(
                f"{self.folder}: cannot load the model: {_one_line(error)}; give a complete folder"
            ) from error
        model, info = loaded
        wrong = _differences(info)
        if wrong:
            raise DataError(
                f"{self.folder}: the weights do not fit config.json: {wrong}; give a complete folder"
            )
        return model

    def _random(self) -> Any:
        """The model with the weights that transformers begins a training from."""
        settings: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": "sdpa"}
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), **settings)
        if (Path(self.folder) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        return model

    def prefill(self, prompt: tuple[int, ...], logprob_start: int | None) -> Prefill:
        """Reads one prompt alone, at its exact length; scores the tokens after `logprob_start`."""
        cache = DynamicCache()
        tokens = torch.tensor([prompt])
        hidden = self._model.model(
            input_ids=tokens,
            position_ids=torch.arange(len(prompt))[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = self._model.lm_head(hidden[:, -1]).float().numpy()[0]
        scores = (
            None
            if logprob_start is None
            else self._score(hidden[0, logprob_start:-1], prompt[logprob_start + 1 :])
        )
        layers: list[Any] = cache.layers
        return Prefill([layer.keys for layer in layers], [layer.values for layer in layers], logits, scores)

    def new_cache(self, slots: int, length: int) -> SlotCache:
        """An empty cache of `slots` rows and `length` positions."""
        return SlotCache(self._kv_shapes, slots, length, self.dtype)

    def decode(self, cache: SlotCache, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Reads one token per slot (int64 [B] each) and returns float32 logits [B, V]."""
        position_B = torch.from_numpy(positions)
        cache.seek(position_B)
        hidden = self._model.model(
            input_ids=torch.from_numpy(tokens)[:, None],
            attention_mask=self._masks(position_B, cache.length),
            position_ids=position_B[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._model.lm_head(hidden[:, 0]).float().numpy()

    def rows_are_independent(self, slots: int, length: int) -> bool:
        """Whether this machine's kernels give a row the same bits at other places and beside other rows."""
        random = np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        cache = self.new_cache(slots, length)
        for part in cache.keys + cache.values:
            part.normal_(generator=generator)
        tokens, positions = random.integers(self.vocab_size, size=slots), random.integers(length, size=slots)
        expected = self.decode(cache, tokens, positions)
        for shift in {1, slots // 2}:
            moved = self.new_cache(slots, length)
            for part, own in zip(moved.keys + moved.values, cache.keys + cache.values, strict=True):
                part.copy_(own.roll(shift, 0))
            got = self.decode(moved, np.roll(tokens, shift), np.roll(positions, shift))
            if not np.array_equal(got, np.roll(expected, shift, 0)):
                return False
        return True

    def reload(self, source: WeightSource) -> None:
        """Takes the weights of `source`, all or none; WeightsError where they are not of this model."""
        where = source if isinstance(source, str) else "the weights received"
        if isinstance(source, str) and not Path(source).is_dir():
            raise WeightsError(f"{source} is not a folder on this machine")
        try:
            new = self._load_alike(source)
        except WeightsError:
            raise
        except Exception as error:  # whatever a broken folder makes the loader raise, serving goes on
            raise WeightsError(f"{where}: {_one_line(error) or type(error).__name__}") from error
        given = dict(new.named_parameters())
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(given[name].data)

    def _load_alike(self, source: WeightSource) -> Any:
        """A second model from `source`, of the same configuration, names and shapes; else WeightsError."""
        if isinstance(source, str):
            if (Path(source) / "config.json").exists():
                self._compare_config(AutoConfig.from_pretrained(source, local_files_only=True))
            where, folder, tensors = source, source, None
        else:
            where, folder, tensors = "the weights received", None, dict(source)
        settings = copy.deepcopy((self.config, self._model.generation_config))
        new, info = type(self._model).from_pretrained(
            folder,
            config=settings[0],
            generation_config=settings[1],
            state_dict=tensors,
            **self._load_arguments(),
        )
        wrong = _differences(info) or self._untied(new)
        if wrong:
            raise WeightsError(f"{where}: not weights of the served model: {wrong}")
        return new

    def _load_arguments(self) -> dict[str, Any]:
        """Mismatched shapes are let through here so that they can be reported by name."""
        return {
            "dtype": self.dtype,
            "attn_implementation": "sdpa",
            "local_files_only": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }

    def _compare_config(self, other: Any) -> None:
        ours, theirs = self.config.to_dict(), other.to_dict()
        for name in FUNCTION_FIELDS:
            if name in ours and ours[name] != theirs.get(name):
                raise WeightsError(
                    f"config.json has {name} {theirs.get(name)!r}; the served model has {ours[name]!r}"
                )

    def _untied(self, new: Any) -> str | None:
        """A checkpoint may hold an output layer of its own although the model ties it to its embedding."""
        if self._model.lm_head.weight is not self._model.model.embed_tokens.weight:
            return None
        if torch.equal(new.lm_head.weight, new.model.embed_tokens.weight):
            return None
        return "lm_head.weight differs from the embedding that it is tied to"

    def _masks(self, position_B: torch.Tensor, length: int) -> Any:
        """Boolean [B, 1, 1, L] of the positions that a row may see; one per layer type where types differ."""
        places = torch.arange(length)
        seen = places <= position_B[:, None]
        full = seen[:, None, None, :]
        window = getattr(self.config, "sliding_window", None)
        if window is None:
            return {"full_attention": full} if self._layer_types else full
        near = (seen & (places > position_B[:, None] - window))[:, None, None, :]
        return {"full_attention": full, "sliding_attention": near} if self._layer_types else near

    def _score(self, hidden: torch.Tensor, targets: tuple[int, ...]) -> np.ndarray:
        """Log-probs of `targets` [N] given the hidden states [N, d] that predict them, part by part."""
        chunk = max(1, SCORE_LOGITS // self.vocab_size)
        parts = [np.empty(0, dtype=np.float32)]
        for start in range(0, len(targets), chunk):
            logits = self._model.lm_head(hidden[start : start + chunk]).double()
            picked = logits.gather(1, torch.tensor(targets[start : start + chunk])[:, None])[:, 0]
            parts.append((picked - logits.logsumexp(1)).float().numpy())
        return np.concatenate(parts)


def _read_config(folder: str) -> Any:
    """The folder's model configuration; DataError where there is none or its family cannot be served."""
    require_model_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except LOAD_ERRORS as error:
        raise DataError(
            f"{folder}/config.json: {_one_line(error)}; give a Hugging Face model folder"
        ) from error
    if config.model_type not in SUPPORTED_FAMILIES:
        known = ", ".join(SUPPORTED_FAMILIES)
        raise DataError(
            f"{folder}: model_type {config.model_type!r} is not served here; expected one of {known}"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in BATCH_DEPENDENT_ROPE:
        raise DataError(
            f"{folder}: rope_type {rope_type!r} depends on what else runs; serve this model with SGLang"
        )
    return config


def _differences(info: dict[str, Any]) -> str | None:
    """What a load found missing, unexpected or of another shape, in one line."""
    found = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(entry) for entry in info[kind])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{kind.replace('_', ' ')} {names[0]}{more}")
    return "; ".join(found + [_one_line(error) for error in info["error_msgs"]]) or None


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset(() if value is None else [value] if isinstance(value, int) else value)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
