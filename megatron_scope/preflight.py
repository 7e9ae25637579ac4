"""What can be known before any rank starts: that the models fit each other, the layout and the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_scope.config.needs import draws_responses, holds_teacher, teacher_is_served
from megatron_scope.config.schema import Config, DataConfig, Engine, ModelConfig
from megatron_scope.convert.hf_folder import read_json
from megatron_scope.convert.shape import check_layout, check_trainable, padded_vocab_size, spread_layers
from megatron_scope.convert.sources import open_model
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
    """V = the smaller table of student and teacher; both are padded from the larger one.

    A served teacher's table is known from the config.json of teacher.hf; without that V is the student's.
    """
    rows = [open_model(model).shape.vocab_rows for model in _models(config)]
    size = min(rows + _of_served_teacher(config, "vocab_size"))
    return Vocabulary(size, padded_vocab_size(max(rows), config.parallel.tensor))


def max_positions(config: Config) -> int:
    """The longest sequence, in tokens, that every model of the run has positions for."""
    positions = [open_model(model).shape.max_positions for model in _models(config)]
    return min(positions + _of_served_teacher(config, "max_position_embeddings"))


def _models(config: Config) -> list[ModelConfig]:
    """Those that the ranks hold."""
    return [config.student, config.teacher] if holds_teacher(config) else [config.student]


def _of_served_teacher(config: Config, key: str) -> list[int]:
    """A number in the config.json of a served teacher, if it is there; the ranks need not know its family."""
    if not teacher_is_served(config) or config.teacher.hf is None:
        return []
    value = read_json(Path(config.teacher.hf).expanduser() / "config.json").get(key)
    return [value] if isinstance(value, int) else []


def check_files(config: Config) -> None:
    """ConfigError or DataError for models, tokenizers, layouts and data files that cannot work together."""
    _check_model(config, config.student)
    folder, teacher_folder = config.student.companions, config.teacher.companions
    tokenizer = load_tokenizer(folder)
    size = vocabulary(config).size
    if holds_teacher(config):
        _check_model(config, config.teacher)
    if _teacher_has_files(config):
        check_same_tokens(tokenizer, load_tokenizer(teacher_folder), folder, teacher_folder)
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
        config,
        {
            "student.hf": config.student.hf,
            "student.megatron": config.student.megatron,
            "teacher.hf": config.teacher.hf,
            "teacher.megatron": config.teacher.megatron,
            key: source,
        },
    )
    if not replayed:
        check_template(config.data, tokenizer, folder)
        _check_lengths(config)


def warnings_of(config: Config) -> list[str]:
    """What will run but probably not as meant, one line each; call it after `check_files`."""
    if not _teacher_has_files(config) or config.teacher.stop_token_id is not None:
        return []
    folders = config.student.companions, config.teacher.companions
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


def _teacher_has_files(config: Config) -> bool:
    """A served teacher may come without; then its tokenizer is checked on its servers."""
    return holds_teacher(config) or (teacher_is_served(config) and config.teacher.hf is not None)


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


def _check_model(config: Config, model: ModelConfig) -> None:
    source = open_model(model)
    source.check()
    parallel = config.parallel
    stages = model.pipeline_layers or spread_layers(source.shape.num_layers, parallel.pipeline)
    # A dense model beside a mixture does without the experts' ranks.
    expert = parallel.expert if source.shape.mixture or not _has_mixture(config) else 1
    check_layout(source.shape, parallel.tensor, stages, str(source.path), expert)
    if model is config.student:
        check_trainable(source.shape, parallel.tensor, parallel.sequence, stages, str(source.path))
    source.close()


def _has_mixture(config: Config) -> bool:
    return any(open_model(model).shape.mixture for model in _models(config))


def _check_lengths(config: Config) -> None:
    if not draws_responses(config):
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > max_positions(config):
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_new_tokens is {longest}, but the models have "
            f"{max_positions(config)} positions at most; lower one of them"
        )
