"""The text side of the embedded server: a folder's tokenizer, if it has one (imports transformers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from megatron_scope.errors import DataError


def load_tokenizer(folder: str) -> tuple[Callable[[Sequence[int], bool], str], frozenset[int]]:
    """(decode(ids, skip_special_tokens) -> text, end-of-text ids); no tokenizer: empty text, no ids."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return (lambda ids, skip_special_tokens: ""), frozenset()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: cannot load the tokenizer: {' '.join(str(error).split())}; mend or remove it"
        ) from error

    def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    eos = tokenizer.eos_token_id
    return decode, frozenset() if eos is None else frozenset((eos,))
