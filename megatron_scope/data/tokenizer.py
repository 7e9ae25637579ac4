"""The tokenizer of a model folder, and what it says of prompts and stop tokens."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from megatron_scope.config.schema import DataConfig
from megatron_scope.errors import ConfigError, DataError

# Arguments of transformers' apply_chat_template that it hands on to the template, and its names for the chat.
_TEMPLATE_VARIABLES = frozenset({"tools", "documents"})
_MESSAGES = frozenset({"messages", "conversations"})


def load_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer of a model folder; DataError when it has none."""
    from transformers import AutoTokenizer

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; expected a Hugging Face model folder with a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot read
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{path} has no tokenizer that transformers can load ({reason})") from None


def check_same_tokens(student: Any, teacher: Any, student_folder: str, teacher_folder: str) -> None:
    """ConfigError unless both tokenizers map the same tokens to the same ids: token-level distillation
    compares ids.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    token = differing[0]
    raise ConfigError(
        f"the tokenizers of {student_folder} and {teacher_folder} differ in {len(differing)} tokens, for "
        f"example {token!r}: "
        f"id {ours.get(token)} and {theirs.get(token)}; student and teacher must share one vocabulary"
    )


def stop_token_ids(config: DataConfig, folder: str, tokenizer: Any) -> tuple[int, ...]:
    """`data.stop_token_ids`, or the end tokens of generation_config.json, config.json or the tokenizer, first
    one found.
    """
    if config.stop_token_ids is not None:
        return config.stop_token_ids
    for name in ("generation_config.json", "config.json"):
        path = Path(folder).expanduser() / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def encode_prompt(config: DataConfig, tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt: `data.prompt_template` filled in, or the tokenizer's chat template up to the
    answer.

    A chat template writes its own start token; a prompt template gets the tokenizer's, once. Raises DataError
    when the chat template does not take the prompt.
    """
    if config.prompt_template is not None:
        assert isinstance(prompt, str)  # checked row by row when the file was read
        return _encode_text(tokenizer, config.prompt_template.replace("{prompt}", prompt))
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if config.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise DataError(
                f"the prompt {str(prompt)[:80]!r} has a system message of its own beside data.system_prompt; "
                "remove one of the two"
            )
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **config.chat_template_kwargs,
        )
    except Exception as error:  # whatever a template's own code raises
        raise DataError(
            f"the chat template does not take the prompt {str(prompt)[:80]!r} "
            f"({' '.join(str(error).split())}); mend the row, data.system_prompt or data.chat_template_kwargs"
        ) from error


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that a response follows: what the tokenizer puts before every text comes once, what it
    puts after it (an end token) not at all.
    """
    whole = tokenizer(text).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids if whole else []
    starts = (start for start in range(len(whole) + 1) if whole[start : start + len(ids)] == ids)
    before = whole[: next(starts, 0)]
    return ids if ids[: len(before)] == before else [*before, *ids]


def check_template(config: DataConfig, tokenizer: Any, folder: str) -> None:
    """ConfigError when neither a prompt template nor a chat template is at hand, or when one of
    `data.chat_template_kwargs` would not reach the template.
    """
    if config.prompt_template is None and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {folder} has no chat template; set data.prompt_template, for example "
            f"'{{prompt}}'"
        )
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    taken = {argument.name for argument in arguments if argument.kind is not argument.VAR_KEYWORD}
    for name in config.chat_template_kwargs:
        if name in (taken - _TEMPLATE_VARIABLES) | _MESSAGES:
            raise ConfigError(
                f"data.chat_template_kwargs has {name}, which is set here or by transformers and would not "
                "reach the template; give variables of the template only, as in {enable_thinking: false}"
            )
