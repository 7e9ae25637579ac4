"""What the objective of a config asks for."""

from __future__ import annotations

from megatron_scope.config.schema import Config, Correction, Divergence, Engine, ObjectiveName, Overflow


def draws_responses(config: Config) -> bool:
    """Whether the student's own responses are learnt from, rather than responses given in `data.train`."""
    return config.objective.name not in (ObjectiveName.SFT, ObjectiveName.KD)


def needs_teacher(config: Config) -> bool:
    """Whether the objective asks a teacher at all."""
    return config.objective.name in (ObjectiveName.SCOPE, ObjectiveName.OPD)


def needs_reference(config: Config) -> bool:
    """Whether the student as it was before training is kept as a third model."""
    return config.objective.name is ObjectiveName.GRPO and config.objective.kl_coefficient > 0


def needs_old_logprobs(config: Config) -> bool:
    """Whether pi_old must be kept: after a step's first update the student is not what it was (Eq. 1)."""
    return draws_responses(config) and config.train.updates_per_batch > 1


def overlaps_scoring(config: Config) -> bool:
    """Whether responses are scored while others are still being generated: rollout.overlap_scoring, or by
    itself with real servers. Not where the teacher's hidden states are made anew if a whole step's do not
    fit: that is decided before the first is scored.
    """
    if needs_states_anew(config):
        return False
    asked = config.rollout.overlap_scoring
    return config.rollout.engine is Engine.SGLANG if asked is None else asked


def probes_servers(config: Config) -> bool:
    """Whether what the rollout servers draw is compared with the trainer whenever weights are published."""
    return draws_responses(config) and config.rollout.engine is Engine.SGLANG


def needs_states_anew(config: Config) -> bool:
    """Whether the teacher may read a step's responses again in the update."""
    exact = config.objective.divergence is not Divergence.SAMPLED
    return needs_teacher(config) and exact and config.teacher.hidden_states_overflow is Overflow.RECOMPUTE


def corrects_engine(config: Config) -> bool:
    """Whether the loss is corrected for the gap between the engine that drew the responses and the
    trainer.
    """
    return config.rollout.correction is Correction.TRUNCATED_IMPORTANCE


def needs_engine_logprobs(config: Config) -> bool:
    """Whether every response token must come with the log-prob of the engine that drew it."""
    return corrects_engine(config) or config.rollout.logprob_gap_limit is not None
