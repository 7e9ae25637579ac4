"""Whether a server is one to draw rollouts from: its software, and the model that it was started with."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from megatron_scope.errors import DataError, RolloutError
from megatron_scope.rollout.client import ServerClient
from megatron_scope.rollout.wire import one_line

# The versions of SGLang that are let in: from the first on, which is the tested one, below the second.
ACCEPTED_SGLANG = ((0, 5, 23), (0, 6))
EMBEDDED = "megatron_scope "
# What a checkpoint's tensors depend on; SGLang ends when it loads weights of other shapes.
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "tie_word_embeddings",
)


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What every server must be. `model` is the student's config.json, None where any model will do."""

    model: dict[str, Any] | None = None
    any_sglang_version: bool = False

    @classmethod
    def of_model(cls, folder: Path, *, any_sglang_version: bool) -> Expectation:
        """Servers of the model in a Hugging Face folder; DataError where it has no readable config.json."""
        return cls(_read_config(folder), any_sglang_version)


async def check_identity(client: ServerClient, expected: Expectation) -> None:
    """RolloutError where the server is no SGLang of an accepted version or serves another model.

    Another architecture's weights are taken by SGLang without a word, and those of another shape end it.
    """
    model, server = await client.model_info(), await client.server_info()
    if model.get("is_generation") is not True:
        raise RolloutError(
            f"{client.url}: serves {model.get('model_path')!r}, which generates nothing; start the server "
            "with the student's model"
        )
    if not expected.any_sglang_version:
        _check_version(client.url, server.get("version"))
    if expected.model is None:
        return
    differing = _differences(expected.model, model, server)
    if differing:
        raise RolloutError(
            f"{client.url}: serves another model, {model.get('model_path')!r} ({', '.join(differing)}); "
            "start the server with the student's model, or mend rollout.servers"
        )


def _check_version(url: str, version: Any) -> None:
    if isinstance(version, str) and version.startswith(EMBEDDED):
        return
    first, below = (".".join(map(str, bound)) for bound in ACCEPTED_SGLANG)
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    if match is None or not ACCEPTED_SGLANG[0] <= tuple(map(int, match.groups())) < ACCEPTED_SGLANG[1]:
        raise RolloutError(
            f"{url}: version is {one_line(version)!r}; expected SGLang from {first} to below {below} "
            f"({first} is tested): serve with one of these, or set rollout.any_sglang_version=true"
        )


def _differences(expected: dict[str, Any], model: dict[str, Any], server: dict[str, Any]) -> list[str]:
    """In which of the settings that both sides tell the server's model is not the expected one."""
    served = {key: model.get(key) for key in ("model_type", "architectures")}
    served["vocab_size"] = server.get("vocab_size")
    served |= _shape_on_disk(model.get("model_path"))
    return [
        f"{key} {value}, expected {expected[key]}"
        for key, value in served.items()
        if value is not None and expected.get(key) is not None and value != expected[key]
    ]


def _shape_on_disk(model_path: Any) -> dict[str, Any]:
    """The shape of the served model where its folder can be read from here; SGLang's protocol tells none."""
    try:
        config = _read_config(Path(str(model_path)))
    except DataError:
        return {}
    return {key: config[key] for key in SHAPE_KEYS if key in config}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} holds no JSON object")
    return config
