"""Rules between settings that need no file, no GPU and no rank; a broken one is reported before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from megatron_scope.config.needs import (
    corrects_engine,
    draws_responses,
    needs_states_anew,
    needs_teacher,
    teacher_is_served,
)
from megatron_scope.config.schema import (
    Config,
    Divergence,
    Engine,
    ModelConfig,
    ObjectiveName,
    Preset,
    Schedule,
)
from megatron_scope.errors import ConfigError

Command = Literal["train", "evaluate", "launch"]


_POSITIVE_COUNTS = (
    "run.steps",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.expert",
    "data.max_prompt_tokens",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.max_new_tokens",
    "rollout.max_concurrent_requests",
    "teacher.request_tokens",
    "teacher.max_concurrent_requests",
    "verify.workers",
    "train.micro_batch_tokens",
    "train.updates_per_batch",
    "checkpoint.keep",
    "evaluate.max_new_tokens",
    "evaluate.bootstrap_resamples",
    "evaluate.diversity_tokens",
)
_GROUPS = ("evaluate.diversity_responses",)
_CAPS = ("rollout.correction_cap",)
_COUNTS = ("run.seed", "train.path_gradients_every", "optimizer.warmup_steps", "checkpoint.every")
_POSITIVE = (
    "rollout.temperature",
    "rollout.request_timeout_s",
    "rollout.start_timeout_s",
    "rollout.health_interval_s",
    "rollout.health_timeout_s",
    "verify.timeout_s",
    "objective.tau",
    "objective.student_temperature",
    "objective.teacher_temperature",
    "optimizer.lr",
    "optimizer.eps",
    "teacher.hidden_states_gb",
    "teacher.start_timeout_s",
    "teacher.request_timeout_s",
    "evaluate.temperature",
    "sync.timeout_s",
    "sync.bucket_mb",
)
_NOT_NEGATIVE = (
    "teacher.canary_tolerance",
    "objective.kl_coefficient",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
)
_FINITE = ("objective.student_exponent", "objective.teacher_exponent")
_TOP_P = ("rollout.top_p", "evaluate.top_p")
_TOP_K = ("rollout.top_k", "evaluate.top_k")
_PORTS = ("sync.master_port",)
_BETAS = ("optimizer.beta1", "optimizer.beta2")


def check_config(config: Config, *, world_size: int | None = None, command: Command = "train") -> None:
    """Raises ConfigError, in one line, for the first rule that the config breaks; needs no file and no rank.

    `world_size` is the number of ranks where it is known; `command` says which settings are required.
    """
    _check_ranges(config)
    if command == "launch":  # a server needs a model and lengths, not a run
        return
    _check_parallel(config, world_size)
    _check_prompts(config)
    _check_optimizer(config)
    if command == "train":
        _check_train(config)
    else:
        _check_evaluate(config)


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _require(config: Config, keys: tuple[str, ...], holds: Callable[[Any], bool], rule: str) -> None:
    for key in keys:
        value = _get(config, key)
        if not holds(value):
            raise ConfigError(f"{key} is {value}: it must be {rule}")


def _check_ranges(config: Config) -> None:
    _require(config, _POSITIVE_COUNTS, lambda v: v >= 1, "1 or more")
    _require(config, _COUNTS, lambda v: v >= 0, "0 or more")
    _require(config, _POSITIVE, lambda v: math.isfinite(v) and v > 0, "finite and above 0")
    _require(config, _NOT_NEGATIVE, lambda v: math.isfinite(v) and v >= 0, "finite and 0 or more")
    _require(config, _FINITE, math.isfinite, "finite")
    _require(config, _TOP_P, lambda v: 0 < v <= 1, "above 0 and at most 1 (1 turns it off)")
    _require(config, _TOP_K, lambda v: v == -1 or v >= 1, "1 or more, or -1 to turn it off")
    _require(config, _BETAS, lambda v: 0 <= v < 1, "at least 0 and below 1")
    _require(config, _GROUPS, lambda v: v >= 2, "2 or more")
    _require(config, _CAPS, lambda v: math.isfinite(v) and v >= 1, "finite and 1 or more")
    _require(config, _PORTS, lambda v: 0 <= v <= 65535, "from 0 to 65535 (0 takes a free one)")
    for token_id in config.data.stop_token_ids or ():
        if token_id < 0:
            raise ConfigError(f"data.stop_token_ids has {token_id}: token ids are 0 or more")
    if (config.teacher.stop_token_id or 0) < 0:
        raise ConfigError(f"teacher.stop_token_id is {config.teacher.stop_token_id}: token ids are 0 or more")


def _check_parallel(config: Config, world_size: int | None) -> None:
    parallel = config.parallel
    if parallel.context > 1:
        raise ConfigError(
            f"parallel.context is {parallel.context}: it needs Transformer Engine's attention, which is not "
            "supported yet; set parallel.context=1"
        )
    _check_pipeline_layers("student", config.student, parallel.pipeline)
    _check_pipeline_layers("teacher", config.teacher, parallel.pipeline)
    ranks = parallel.tensor * parallel.pipeline
    if world_size is not None and world_size % ranks:
        above = (world_size // ranks + 1) * ranks
        raise ConfigError(
            f"there are {world_size} ranks: parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline} needs a multiple of {ranks}; start {above} ranks "
            "or change parallel.tensor and parallel.pipeline"
        )
    # Experts are whole on a rank and spread over all ranks of a pipeline stage.
    if world_size is not None and (world_size // parallel.pipeline) % parallel.expert:
        raise ConfigError(
            f"parallel.expert is {parallel.expert}: it must divide the "
            f"{world_size // parallel.pipeline} ranks of a pipeline stage ({world_size} / "
            f"parallel.pipeline={parallel.pipeline}); use a smaller one or start more ranks"
        )


def _check_pipeline_layers(section: str, model: ModelConfig, stages: int) -> None:
    layers = model.pipeline_layers
    if layers is None:
        return
    key = f"{section}.pipeline_layers is {list(layers)}"
    if len(layers) != stages:
        raise ConfigError(
            f"{key}: it must have {stages} entries, one for each pipeline stage (parallel.pipeline={stages})"
        )
    if min(layers) < 0 or sum(layers) == 0:
        raise ConfigError(f"{key}: each entry must be 0 or more, and one above 0")


def _check_prompts(config: Config) -> None:
    data = config.data
    if data.prompt_template is None:
        return
    fields = data.prompt_template.count("{prompt}")
    if fields != 1:
        raise ConfigError(
            f"data.prompt_template has {fields} {{prompt}} fields: it must have exactly one, where "
            "the problem goes; all other braces stand as they are"
        )
    if data.system_prompt is not None:
        raise ConfigError(
            "data.system_prompt and data.prompt_template are both set: a template is the whole prompt; "
            "write the system prompt into the template, or set one of the two to null"
        )
    if data.chat_template_kwargs:
        raise ConfigError(
            "data.chat_template_kwargs and data.prompt_template are both set: the template replaces the chat "
            "template; remove one of the two"
        )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.schedule != Schedule.CONSTANT and optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr is {optimizer.min_lr}: a {optimizer.schedule} schedule ends there, "
            f"so it must be at most optimizer.lr={optimizer.lr}"
        )


def _check_train(config: Config) -> None:
    _needed(config, "run.output_dir", "the run needs a folder; set run.output_dir=runs/NAME")
    if not config.student.megatron:
        _needed(
            config,
            "student.hf",
            "there is nothing to train; set student.hf to a Hugging Face model folder, or student.megatron "
            "to a checkpoint",
        )
    _check_objective(config)
    _check_parity(config)
    if not draws_responses(config):
        _needed(config, "data.train", "set data.train to a JSON-lines file of {prompt, response} rows")
        return
    if teacher_is_served(config):
        _check_served_teacher(config)
    elif needs_teacher(config) and not config.teacher.megatron:
        _needed(
            config,
            "teacher.hf",
            "the teacher scores incorrect responses; set teacher.hf to a Hugging Face model folder, "
            "teacher.megatron to a checkpoint, or teacher.server to the URLs of SGLang servers",
        )
    _check_engine(config)
    if config.rollout.engine == Engine.REPLAY:
        return
    _needed(config, "data.train", "set data.train to a JSON-lines file of {id, prompt, answer, task} rows")
    _check_group(config)


def _check_objective(config: Config) -> None:
    objective = config.objective
    if objective.preset == Preset.OFFICIAL and objective.name != ObjectiveName.SCOPE:
        raise ConfigError(
            f"objective.preset is official with objective.name={objective.name}: it is the authors' variant "
            "of SCOPE; use objective.name=scope or objective.preset=paper"
        )
    if objective.kl_coefficient > 0 and objective.name != ObjectiveName.GRPO:
        raise ConfigError(
            f"objective.kl_coefficient is {objective.kl_coefficient} with objective.name={objective.name}: "
            "only grpo has a term towards the initial student; set objective.kl_coefficient=0"
        )
    if objective.divergence != Divergence.SAMPLED and not needs_teacher(config):
        raise ConfigError(
            f"objective.divergence is {objective.divergence} with objective.name={objective.name}, which has "
            "no teacher; set objective.divergence=sampled"
        )
    if objective.divergence != Divergence.SAMPLED and config.teacher.stop_token_id is not None:
        raise ConfigError(
            f"teacher.stop_token_id is {config.teacher.stop_token_id} with objective.divergence="
            f"{objective.divergence}, which compares whole distributions; use objective.divergence=sampled"
        )
    clip = objective.ratio_clip
    if clip is None:
        return
    if not clip > 0:
        raise ConfigError(f"objective.ratio_clip is {clip}: it must be above 0; null turns clipping off")
    if not draws_responses(config):
        raise ConfigError(
            f"objective.ratio_clip is {clip} with objective.name={objective.name}, which has no ratio; set "
            "objective.ratio_clip=null"
        )


def _check_parity(config: Config) -> None:
    """What may be asked about the engine's log-probs, and about when they are compared and scored."""
    rollout, objective = config.rollout, config.objective
    limit = rollout.logprob_gap_limit
    if limit is not None and not limit > 0:
        raise ConfigError(f"rollout.logprob_gap_limit is {limit}: it must be above 0; null sets no limit")
    if rollout.overlap_scoring and needs_states_anew(config):
        raise ConfigError(
            "rollout.overlap_scoring is true with teacher.hidden_states_overflow=recompute, which is decided "
            "for a step as a whole; set teacher.hidden_states_overflow=file, or rollout.overlap_scoring=null"
        )
    if not draws_responses(config):
        for key, asked, off in (
            ("rollout.correction", corrects_engine(config), "none"),
            ("rollout.logprob_gap_limit", limit is not None, "null"),
        ):
            if asked:
                raise ConfigError(
                    f"{key} is {_get(config, key)} with objective.name={objective.name}, whose responses no "
                    f"engine drew; set {key}={off}"
                )
    exact = objective.name == ObjectiveName.OPD and objective.divergence != Divergence.SAMPLED
    if corrects_engine(config) and exact:
        raise ConfigError(
            f"rollout.correction is {rollout.correction} with objective.name=opd and objective.divergence="
            f"{objective.divergence}, which does not depend on the token drawn: nothing is left to correct; "
            "set rollout.correction=none"
        )


def _check_served_teacher(config: Config) -> None:
    objective, teacher = config.objective, config.teacher
    servers = teacher.server or ()
    _check_urls(
        [("teacher.server", url) for url in servers],
        twice="teacher.server names a server twice; list each one once",
    )
    if objective.divergence != Divergence.SAMPLED:
        raise ConfigError(
            f"objective.divergence is {objective.divergence} with teacher.server: an exact divergence needs "
            "the teacher's hidden states, which a server does not give; set objective.divergence=sampled, "
            "or give the teacher as teacher.hf or teacher.megatron instead"
        )
    if objective.teacher_temperature != 1.0:
        raise ConfigError(
            f"objective.teacher_temperature is {objective.teacher_temperature} with teacher.server: a server "
            "scores at temperature 1; set objective.teacher_temperature=1"
        )
    if teacher.megatron is not None:
        raise ConfigError(
            "teacher.server and teacher.megatron are both set: a served teacher needs no checkpoint; remove "
            "one of the two"
        )
    if teacher.pipeline_layers is not None:
        raise ConfigError(
            f"teacher.pipeline_layers is {list(teacher.pipeline_layers)} with teacher.server: a served "
            "teacher has no layers on the ranks; set teacher.pipeline_layers=null"
        )
    rollout = config.rollout
    students = {url.rstrip("/") for url in (*rollout.servers, *filter(None, [rollout.router]))}
    shared = [url for url in servers if url.rstrip("/") in students]
    if shared and config.rollout.engine == Engine.SGLANG:
        raise ConfigError(
            f"{shared[0]} is in both teacher.server and rollout.servers or rollout.router: the student's "
            "weights are loaded into the latter; serve the teacher on servers of its own"
        )


def _check_group(config: Config) -> None:
    """What a step must hold for its weights and its updates."""
    rollout, updates = config.rollout, config.train.updates_per_batch
    if config.objective.name != ObjectiveName.OPD and rollout.samples_per_prompt < 2:
        what = "GRPO's advantages" if config.objective.name == ObjectiveName.GRPO else "SCOPE weights"
        raise ConfigError(
            f"rollout.samples_per_prompt is {rollout.samples_per_prompt}: {what} need a group; use 4 or more "
            "(the paper takes 8), or objective.name=opd"
        )
    if updates > rollout.prompts_per_step:
        raise ConfigError(
            f"train.updates_per_batch is {updates} but rollout.prompts_per_step={rollout.prompts_per_step}: "
            "each update needs a prompt; lower it"
        )


def _check_evaluate(config: Config) -> None:
    if config.student.megatron:
        raise ConfigError(
            f"student.megatron is {config.student.megatron}: an evaluation serves a Hugging Face folder; "
            "write one with megatron-scope convert to-hf, and give it with --model or as student.hf"
        )
    _needed(
        config, "student.hf", "there is nothing to evaluate; set student.hf to a Hugging Face model folder"
    )
    if config.rollout.engine == Engine.REPLAY:
        raise ConfigError(
            "rollout.engine is replay: an evaluation draws new responses; set rollout.engine=embedded, "
            "or sglang with rollout.servers"
        )
    _check_engine(config)


def _check_engine(config: Config) -> None:
    rollout = config.rollout
    if rollout.engine == Engine.REPLAY:
        _needed(
            config, "rollout.file", "rollout.engine=replay reads it; set it to a RUN/rollouts file or folder"
        )
    if rollout.engine != Engine.SGLANG:
        return
    if not rollout.servers and not rollout.servers_file:
        raise ConfigError(
            "rollout.servers is empty: rollout.engine=sglang needs the servers' URLs; set "
            "rollout.servers=[http://HOST:30000] or rollout.servers_file, or rollout.engine=embedded for a "
            "small model on a CPU"
        )
    if rollout.servers and rollout.servers_file:
        raise ConfigError(
            f"rollout.servers_file is {rollout.servers_file} and rollout.servers is set too: the servers are "
            "those of one of them; set rollout.servers=[] or rollout.servers_file=null"
        )
    urls = [("rollout.servers", url) for url in rollout.servers]
    if rollout.router is not None:
        urls.append(("rollout.router", rollout.router))
    _check_urls(
        urls,
        twice="rollout.servers and rollout.router name a server twice; list each one once, and "
        "the router only as rollout.router",
    )


def _check_urls(urls: Sequence[tuple[str, str]], *, twice: str) -> None:
    """`urls` with the keys that they stand under; `twice` is said where two are the same."""
    for key, url in urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{key} has {url!r}: it must be a URL, as in http://HOST:30000")
    if len({url.rstrip("/") for _, url in urls}) != len(urls):
        raise ConfigError(twice)


def _needed(config: Config, key: str, why: str) -> None:
    if not _get(config, key):
        raise ConfigError(f"{key} is not set: {why}")
