"""Training rows drawn in a seeded order, from a cursor that a checkpoint can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from megatron_scope.config.schema import DataConfig
from megatron_scope.data.jsonl import read_rows
from megatron_scope.data.tokenizer import encode_prompt
from megatron_scope.errors import DataError
from megatron_scope.records import Prompt

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Example:
    """A given response to learn from (sft, kd): the prompt and the response's token ids."""

    prompt: Prompt
    output_ids: tuple[int, ...]


@dataclasses.dataclass
class Cursor:
    """How far a file of `num_rows` rows has been read; `skipped` counts rows left out so far because their
    prompt is too long.
    """

    num_rows: int

    epoch: int = 0
    position: int = 0
    skipped: int = 0


class Drawer(Generic[Item]):
    """Draws rows without replacement within an epoch, each epoch in its own seeded order.

    An epoch's rest that does not fill a draw is left out, so one draw never holds a row twice. Rows whose
    prompt is over `data.max_prompt_tokens` are skipped and counted.
    """

    def __init__(self, source: str, rows: list[Any], encode: Any, config: DataConfig, seed: int) -> None:
        self._source = source
        self._rows = rows
        self._encode = encode
        self._config = config
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None
        self.cursor = Cursor(num_rows=len(rows))

    def go_to(self, cursor: Cursor) -> None:
        """Goes on from a cursor of the same file; DataError when the file has another number of rows now."""
        if cursor.num_rows != len(self._rows):
            raise DataError(
                f"{self._source} has {len(self._rows)} rows, but {cursor.num_rows} when the checkpoint "
                "was written; "
                "give the same file, or start over with --resume never"
            )
        self.cursor = cursor

    def draw(self, count: int) -> list[Item]:
        """The next `count` encoded rows; DataError when a whole epoch does not hold that many usable ones."""
        if count > len(self._rows):
            raise DataError(self._too_few(count, len(self._rows), ""))
        drawn: list[Item] = []
        started_at_zero = self.cursor.position == 0
        while len(drawn) < count:
            if self.cursor.position == len(self._rows):
                if started_at_zero:
                    limit = self._config.max_prompt_tokens
                    raise DataError(
                        self._too_few(count, len(drawn), f" within data.max_prompt_tokens={limit}")
                    )
                self.cursor.epoch, self.cursor.position = self.cursor.epoch + 1, 0
                drawn, started_at_zero = [], True
            row = self._rows[self._epoch_order()[self.cursor.position]]
            self.cursor.position += 1
            item, num_prompt_tokens = self._encode(row)
            if num_prompt_tokens > self._config.max_prompt_tokens:
                self.cursor.skipped += 1
            else:
                drawn.append(item)
        return drawn

    def peek(self, count: int) -> list[Item]:
        """What `draw` will give next, at most as many as there are rows."""
        before = dataclasses.replace(self.cursor)
        try:
            return self.draw(min(count, len(self._rows)))
        finally:
            self.cursor = before

    def _epoch_order(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.cursor.epoch:
            order = np.arange(len(self._rows))
            if self._config.shuffle:
                order = np.random.default_rng([self._seed, self.cursor.epoch]).permutation(order)
            self._order = (self.cursor.epoch, order)
        return self._order[1]

    def _too_few(self, count: int, found: int, limit: str) -> str:
        return (
            f"{self._source} holds {found} usable rows{limit}, fewer than the "
            f"rollout.prompts_per_step={count} of one step; "
            "lower it or give more data"
        )


def prompt_drawer(config: DataConfig, tokenizer: Any, tasks: Sequence[str], seed: int) -> Drawer[Prompt]:
    """Draws prompts from rows {id, prompt, answer, task}; DataError names the line of a row that is not one
    or whose task is none of `tasks`.
    """
    source = str(config.train)

    def encode(row: dict[str, Any]) -> tuple[Prompt, int]:
        prompt = _encoded(config, tokenizer, row)
        return prompt, len(prompt.token_ids)

    return Drawer(source, _prompt_rows(config, source, tasks), encode, config, seed)


def load_prompts(config: DataConfig, tokenizer: Any, tasks: Sequence[str], path: str) -> list[Prompt]:
    """All prompts of a file, in its order; DataError when one is over `data.max_prompt_tokens`: none may be
    left out.
    """
    prompts = [_encoded(config, tokenizer, row) for row in _prompt_rows(config, path, tasks)]
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if len(longest.token_ids) > config.max_prompt_tokens:
        raise DataError(
            f"{path}: prompt {longest.id} has {len(longest.token_ids)} tokens, over data.max_prompt_tokens="
            f"{config.max_prompt_tokens}; raise it"
        )
    return prompts


def example_drawer(
    config: DataConfig, tokenizer: Any, stop_ids: tuple[int, ...], seed: int
) -> Drawer[Example]:
    """Draws (prompt, response) examples from rows {prompt, response}.

    `prompt_ids` in the place of a prompt and `output_ids` in that of a response, as `evaluate --responses`
    writes them, are taken as they are. A response given as text gets a stop token if it does not end in one.
    """
    source = str(config.train)
    rows = []
    for line, row in read_rows(source):
        if not _has_token_ids(source, line, row, "prompt_ids"):
            _check_prompt(config, source, line, row)
        if not _has_token_ids(source, line, row, "output_ids"):
            _check_text(source, line, row, "response")
        rows.append({**row, "id": _example_id(line, row)})
    _check_rows(source, [row["id"] for row in rows])

    def encode(row: dict[str, Any]) -> tuple[Example, int]:
        ids = tuple(row.get("prompt_ids") or _prompt_ids(config, tokenizer, row))
        output = row.get("output_ids")
        if output is None:
            output = tokenizer(row["response"], add_special_tokens=False).input_ids
            if stop_ids and (not output or output[-1] not in stop_ids):
                output = [*output, stop_ids[0]]
        return Example(Prompt(row["id"], ids, "", ""), tuple(output)), len(ids)

    return Drawer(source, rows, encode, config, seed)


def _example_id(line: int, row: dict[str, Any]) -> str:
    """The row's id, with its sample where a problem has several responses, or its line."""
    if row.get("id") is None:
        return str(line)
    return str(row["id"]) if row.get("sample") is None else f"{row['id']}/{row['sample']}"


def _has_token_ids(source: str, line: int, row: dict[str, Any], key: str) -> bool:
    ids = row.get(key)
    if ids is not None and not (
        ids and isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    ):
        raise DataError(f"{source}:{line}: {key} is {str(ids)[:60]}; expected a list of token ids")
    return ids is not None


def _prompt_rows(config: DataConfig, source: str, tasks: Sequence[str]) -> list[dict[str, Any]]:
    rows = [_prompt_row(config, source, tasks, line, row) for line, row in read_rows(source)]
    _check_rows(source, [row["id"] for row in rows])
    return rows


def _encoded(config: DataConfig, tokenizer: Any, row: dict[str, Any]) -> Prompt:
    return Prompt(row["id"], _prompt_ids(config, tokenizer, row), row["answer"], row["task"])


def _prompt_ids(config: DataConfig, tokenizer: Any, row: dict[str, Any]) -> tuple[int, ...]:
    ids = tuple(encode_prompt(config, tokenizer, row["prompt"]))
    if not ids:
        raise DataError(
            f"prompt {row['id']} becomes no token at all; the first response token needs one before it: "
            "mend the prompt or data.prompt_template"
        )
    return ids


def _prompt_row(
    config: DataConfig, source: str, tasks: Sequence[str], line: int, row: dict[str, Any]
) -> dict[str, Any]:
    _check_prompt(config, source, line, row)
    for key in ("id", "answer"):
        if not isinstance(row.get(key), str | int | float) or isinstance(row.get(key), bool):
            raise DataError(f"{source}:{line}: {key} is {row.get(key)!r}; expected text or a number")
    _check_text(source, line, row, "task")
    if row["task"] not in tasks:
        raise DataError(f"{source}:{line}: task is {row['task']!r}; known: {', '.join(tasks)}")
    return {"id": str(row["id"]), "prompt": row["prompt"], "answer": str(row["answer"]), "task": row["task"]}


def _check_prompt(config: DataConfig, source: str, line: int, row: dict[str, Any]) -> None:
    prompt = row.get("prompt")
    is_chat = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    )
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise DataError(
            f"{source}:{line}: prompt is {prompt!r}; expected text or a list of {{role, content}} messages"
        )
    if isinstance(prompt, list) and config.prompt_template is not None:
        raise DataError(
            f"{source}:{line}: prompt is a list of messages, which data.prompt_template cannot take; "
            "leave it unset"
        )


def _check_text(source: str, line: int, row: dict[str, Any], key: str) -> None:
    if not isinstance(row.get(key), str):
        raise DataError(f"{source}:{line}: {key} is {row.get(key)!r}; expected text")


def _check_rows(source: str, ids: list[str]) -> None:
    if not ids:
        raise DataError(f"{source} is empty; expected JSON lines, one row each")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise DataError(f"{source} holds the id {twice!r} twice; ids must be unique")
