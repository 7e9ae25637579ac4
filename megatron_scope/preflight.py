"""What can be known before any rank starts: that the models fit each other, the layout and the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_scope.config.needs import draws_responses, needs_teacher
from megatron_scope.config.schema import Config, DataConfig, Engine, ModelConfig
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.mapping import check_names
from megatron_scope.convert.shape import check_layout, padded_vocab_size, spread_layers
from megatron_scope.data.tokenizer import (
    check_same_tokens,
    check_template,
    load_tokenizer,
    stop_token_ids,
)
from megatron_scope.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids that count in every statistic, and the table size that both models are built at (DESIGN: one
    vocabulary).
    """

    size: int
    padded_rows: int


def vocabulary(config: Config) -> Vocabulary:
    """V = the smaller table of student and teacher; both are padded from the larger one."""
    rows = [HfFolder(str(config.student.hf)).shape.vocab_rows]
    if needs_teacher(config):
        rows.append(HfFolder(str(config.teacher.hf)).shape.vocab_rows)
    return Vocabulary(min(rows), padded_vocab_size(max(rows), config.parallel.tensor))


def max_positions(config: Config) -> int:
    """The longest sequence, in tokens, that every model of the run has positions for."""
    models = [config.student, *([config.teacher] if needs_teacher(config) else [])]
    return min(HfFolder(str(model.hf)).shape.max_positions for model in models)


def check_files(config: Config) -> None:
    """ConfigError or DataError for models, tokenizers, layouts and data files that cannot work together."""
    _check_model(config, config.student)
    tokenizer = load_tokenizer(str(config.student.hf))
    size = vocabulary(config).size
    if needs_teacher(config):
        _check_model(config, config.teacher)
        teacher_tokenizer = load_tokenizer(str(config.teacher.hf))
        check_same_tokens(tokenizer, teacher_tokenizer, str(config.student.hf), str(config.teacher.hf))
    if len(tokenizer) > size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens but the smaller model table only {size} rows; "
            "use models of one family"
        )
    if (config.teacher.stop_token_id or 0) >= size:
        raise ConfigError(
            f"teacher.stop_token_id is {config.teacher.stop_token_id}, but student and teacher share only "
            f"{size} ids; give the id of the teacher's end token"
        )
    replayed = draws_responses(config) and config.rollout.engine is Engine.REPLAY
    key, source = ("rollout.file", config.rollout.file) if replayed else ("data.train", config.data.train)
    if not Path(str(source)).expanduser().exists():
        raise DataError(f"{key} is {source}, which does not exist; expected a JSON-lines file")
    _check_outside_run(
        config, {"student.hf": config.student.hf, "teacher.hf": config.teacher.hf, key: source}
    )
    if not replayed:
        check_template(config.data, tokenizer, str(config.student.hf))
        _check_lengths(config)


def warnings_of(config: Config) -> list[str]:
    """What will run but probably not as meant, one line each; call it after `check_files`."""
    if not needs_teacher(config) or config.teacher.stop_token_id is not None:
        return []
    folders = str(config.student.hf), str(config.teacher.hf)
    student, teacher = (load_tokenizer(folder) for folder in folders)
    ours = stop_token_ids(config.data, folders[0], student)
    theirs = stop_token_ids(DataConfig(), folders[1], teacher)
    strange = [token_id for token_id in ours if token_id not in theirs]
    if not strange or not theirs:
        return []
    end = student.convert_ids_to_tokens(strange[0])
    return [
        f"responses may end in {end!r} (id {strange[0]}), but the teacher's end in "
        f"{teacher.convert_ids_to_tokens(theirs[0])!r}: it would teach the student not to stop. Set "
        f"teacher.stop_token_id={theirs[0]}, and watch stop_log_ratio in metrics.jsonl"
    ]


def _check_outside_run(config: Config, inputs: dict[str, str | None]) -> None:
    """A run that starts over moves what an earlier one left in its folder; its own inputs must not be
    there.
    """
    folder = Path(str(config.run.output_dir)).expanduser().resolve()
    for key, value in inputs.items():
        if value is not None and Path(value).expanduser().resolve().is_relative_to(folder):
            raise ConfigError(
                f"{key} is {value}, inside run.output_dir={config.run.output_dir}; write the new run to "
                "another folder"
            )


def _check_model(config: Config, model: ModelConfig) -> HfFolder:
    folder = HfFolder(str(model.hf))
    check_names(folder)
    stages = model.pipeline_layers or spread_layers(folder.shape.num_layers, config.parallel.pipeline)
    check_layout(folder.shape, config.parallel.tensor, stages, str(folder.path))
    folder.close()
    return folder


def _check_lengths(config: Config) -> None:
    if not draws_responses(config):
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > max_positions(config):
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_new_tokens is {longest}, but the models have "
            f"{max_positions(config)} positions at most; lower one of them"
        )
