"""The weigh stage with numbers worked out by hand, and the diagnostics of its weights."""

import dataclasses
import math

import numpy as np
import pytest

from megatron_scope.config import parse_config
from megatron_scope.config.needs import needs_teacher, teacher_reads
from megatron_scope.config.schema import Aggregation, ObjectiveConfig, ObjectiveName
from megatron_scope.objective import build_objective
from megatron_scope.objective.diagnostics import mean_perplexity, one_sided_share, path_spread
from megatron_scope.objective.losses import likelihood_loss
from megatron_scope.objective.objectives import group_advantages
from megatron_scope.records import ResponseTable

NAN = math.nan


def table(group, correct, num_tokens, update=None):
    tokens, group = np.array(num_tokens, dtype=np.int64), np.array(group, dtype=np.int64)
    update = np.zeros_like(group) if update is None else np.array(update, dtype=np.int64)
    return ResponseTable(group, update, np.array(correct, dtype=bool), tokens, tokens + 3)


def of_ppl(values):
    """Mean log-probs from perplexities; None was not scored."""
    return np.array([NAN if value is None else -math.log(value) for value in values])


# A mixed group, all correct, all incorrect, and a group of one; ids have gaps.
TABLE = table(
    group=[0, 0, 0, 0, 2, 2, 5, 5, 5, 9],
    correct=[True, False, True, False, True, True, False, False, False, False],
    num_tokens=[2, 4, 5, 1, 10, 8, 3, 2, 6, 9],
)
STUDENT = of_ppl([2, None, 6, None, 1, 3, None, None, None, None])
TEACHER = of_ppl([None, 2, None, 6, None, None, 4, 4, 2, 30])
WEIGHTS = [0.25, 0.75, 0.75, 0.25, 0.25, 0.75, 0.25, 0.25, 0.5, 1.0]


def weigh(given=TABLE, student=STUDENT, teacher=TEACHER, **settings):
    return build_objective(ObjectiveConfig(**settings)).weigh(given, student, teacher)


def exactly(values):
    return pytest.approx(values, rel=1e-13, abs=0.0)


# ---- scope


def test_weights_of_each_prompts_sets():
    weights = weigh().weights
    assert weights.dtype == np.float64 and weights.tolist() == exactly(WEIGHTS)


def test_a_mixed_group_carries_two_and_a_one_sided_group_one():
    weights = weigh().weights
    totals = {int(group): weights[TABLE.group == group].sum() for group in np.unique(TABLE.group)}
    assert totals == exactly({0: 2.0, 2: 1.0, 5: 1.0, 9: 1.0})


def test_sequence_sum_divides_by_the_number_of_prompts_only():
    coefficients = weigh().coefficients
    assert coefficients.likelihood.tolist() == exactly([1 / 16, 0, 3 / 16, 0, 1 / 16, 3 / 16, 0, 0, 0, 0])
    assert coefficients.distill.tolist() == exactly(
        [0, 3 / 16, 0, 1 / 16, 0, 0, 1 / 16, 1 / 16, 1 / 8, 1 / 4]
    )


def test_sequence_mean_also_divides_by_the_responses_length():
    coefficients = weigh(aggregation=Aggregation.SEQUENCE_MEAN).coefficients
    assert coefficients.likelihood.tolist() == exactly([1 / 32, 0, 3 / 80, 0, 1 / 160, 3 / 128, 0, 0, 0, 0])
    assert coefficients.distill.tolist() == exactly(
        [0, 3 / 64, 0, 1 / 16, 0, 0, 1 / 48, 1 / 32, 1 / 48, 1 / 36]
    )


def test_token_mean_divides_by_correct_tokens_on_one_path_and_by_all_tokens_on_the_other():
    coefficients = weigh(aggregation=Aggregation.TOKEN_MEAN).coefficients
    assert coefficients.likelihood.tolist() == exactly(  # 25 correct tokens
        [0.01, 0, 0.03, 0, 0.01, 0.03, 0, 0, 0, 0]
    )
    assert coefficients.distill.tolist() == exactly(  # 50 tokens
        [0, 0.015, 0, 0.005, 0, 0, 0.005, 0.005, 0.01, 0.02]
    )


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("correct", [True, False])
def test_a_step_of_one_kind_has_one_path(aggregation, correct):
    given = table([0, 0, 1], [correct] * 3, [4, 2, 3])
    ppl = of_ppl([2, 6, 5])
    none = np.full(3, NAN)
    weighed = weigh(given, ppl if correct else none, none if correct else ppl, aggregation=aggregation)
    likelihood, distill = weighed.coefficients.likelihood, weighed.coefficients.distill
    used, unused = (likelihood, distill) if correct else (distill, likelihood)
    assert weighed.weights.tolist() == exactly([0.25, 0.75, 1.0] if correct else [0.75, 0.25, 1.0])
    assert (used > 0).all() and not unused.any()


def test_only_prompts_that_are_present_count():
    """Prompts 1, 3, 4, 6, 7, 8 lost all their responses; dropping prompt 9 too makes B three."""
    kept = TABLE.group != 9
    part = ResponseTable(*(getattr(TABLE, field.name)[kept] for field in dataclasses.fields(TABLE)))
    coefficients = weigh(part, STUDENT[kept], TEACHER[kept]).coefficients
    assert coefficients.likelihood.tolist() == exactly([1 / 12, 0, 1 / 4, 0, 1 / 12, 1 / 4, 0, 0, 0])
    assert coefficients.distill.sum() == exactly(2 / 3)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_the_order_of_responses_does_not_matter(aggregation):
    order = np.random.default_rng(3).permutation(len(TABLE))
    shuffled = ResponseTable(*(getattr(TABLE, field.name)[order] for field in dataclasses.fields(TABLE)))
    whole = weigh(aggregation=aggregation)
    part = weigh(shuffled, STUDENT[order], TEACHER[order], aggregation=aggregation)
    np.testing.assert_allclose(part.weights, whole.weights[order], rtol=1e-14)
    np.testing.assert_allclose(part.coefficients.likelihood, whole.coefficients.likelihood[order], rtol=1e-14)
    np.testing.assert_allclose(part.coefficients.distill, whole.coefficients.distill[order], rtol=1e-14)


@pytest.mark.parametrize(
    ("settings", "mixed_group"),
    [
        ({"tau": 0.5}, [0.1, 0.9, 0.9, 0.1]),
        ({"student_exponent": -1.0}, [0.75, 0.75, 0.25, 0.25]),
        ({"teacher_exponent": 1.0}, [0.25, 0.25, 0.75, 0.75]),
        ({"student_exponent": 0.0, "teacher_exponent": 0.0}, [0.5] * 4),
    ],
)
def test_tau_and_exponents_come_from_the_config(settings, mixed_group):
    assert weigh(**settings).weights[:4].tolist() == exactly(mixed_group)


def test_the_student_scores_correct_responses_and_the_teacher_incorrect_ones_only():
    objective = build_objective(ObjectiveConfig())
    assert objective.student_scored(TABLE.correct).tolist() == TABLE.correct.tolist()
    assert objective.teacher_scored(TABLE.correct).tolist() == (~TABLE.correct).tolist()
    assert not objective.reference_scored(TABLE.correct).any()


def test_a_missing_score_is_an_error_and_never_a_weight():
    missing = STUDENT.copy()
    missing[2] = NAN
    with pytest.raises(ValueError, match=r"student_mean_logprob\[2\] is nan"):
        weigh(student=missing)


def test_each_update_has_its_own_denominators():
    """Prompts 0 and 2 in one update, 5 and 9 in the next: B is two in both, weights are as ever."""
    split = dataclasses.replace(TABLE, update=np.array([0] * 6 + [1] * 4))
    weighed = weigh(split)
    assert weighed.weights.tolist() == exactly(WEIGHTS)
    assert (weighed.coefficients.likelihood + weighed.coefficients.distill).tolist() == exactly(
        [weight / 2 for weight in WEIGHTS]
    )
    by_token = weigh(split, aggregation=Aggregation.TOKEN_MEAN).coefficients
    assert by_token.likelihood[:6].tolist() == exactly([0.01, 0, 0.03, 0, 0.01, 0.03])  # 25 correct tokens
    assert by_token.distill[[1, 3]].tolist() == exactly([0.75 / 30, 0.25 / 30])  # 30 tokens
    assert by_token.distill[6:].tolist() == exactly([0.0125, 0.0125, 0.025, 0.05])  # 20 tokens


# ---- the official preset


def official(**objective):
    settings = {"objective": {"preset": "official", **objective}, "rollout": {"temperature": 0.6}}
    return parse_config(settings, "test").objective


def test_the_official_preset_on_a_mixed_group_by_hand():
    """Student perplexities 2 and 6: reversed, weights 3/4 and 1/4, times the set's size. Teacher's 2 and 6:
    as in the paper. 7 correct tokens, 12 in all.
    """
    mixed = table([4, 4, 4, 4], [True, False, True, False], [2, 4, 5, 1])
    settings = official()
    weighed = build_objective(settings).weigh(mixed, of_ppl([2, None, 6, None]), of_ppl([None, 2, None, 6]))
    assert weighed.weights.tolist() == exactly([1.5, 1.5, 0.5, 0.5])
    assert weighed.coefficients.likelihood.tolist() == exactly([1.5 / 7, 0, 0.5 / 7, 0])
    assert weighed.coefficients.distill.tolist() == exactly([0, 1.5 / 12, 0, 0.5 / 12])
    assert (settings.student_temperature, settings.teacher_temperature) == (0.6, 1.0)


def test_the_paper_preset_on_the_same_group_by_hand():
    mixed = table([4, 4, 4, 4], [True, False, True, False], [2, 4, 5, 1])
    settings = parse_config({"rollout": {"temperature": 0.6}}, "test").objective
    weighed = build_objective(settings).weigh(mixed, of_ppl([2, None, 6, None]), of_ppl([None, 2, None, 6]))
    assert weighed.weights.tolist() == exactly([0.25, 0.75, 0.75, 0.25])
    assert weighed.coefficients.likelihood.tolist() == exactly([0.25, 0, 0.75, 0])
    assert weighed.coefficients.distill.tolist() == exactly([0, 0.75, 0, 0.25])
    assert (settings.student_temperature, settings.teacher_temperature) == (1.0, 1.0)


# ---- opd


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_sum", [1 / 16] * 4 + [1 / 8] * 2 + [1 / 12] * 3 + [1 / 4]),  # 1 / (B N)
        ("sequence_mean", [1 / 32, 1 / 64, 1 / 80, 1 / 16, 1 / 80, 1 / 64, 1 / 36, 1 / 24, 1 / 72, 1 / 36]),
        ("token_mean", [1 / 50] * 10),
    ],
)
def test_opd_counts_all_responses_of_a_prompt_alike(aggregation, expected):
    objective = build_objective(ObjectiveConfig(name=ObjectiveName.OPD, aggregation=Aggregation(aggregation)))
    coefficients = objective.weigh(TABLE, np.full(10, NAN), TEACHER).coefficients
    assert coefficients.distill.tolist() == exactly(expected)
    assert not coefficients.likelihood.any() and not coefficients.advantage.any()
    assert objective.teacher_scored(TABLE.correct).all() and not objective.student_scored(TABLE.correct).any()


# ---- grpo


def test_grpo_standardises_rewards_within_a_group():
    """Rewards 1, 0, 1, 0: mean 1/2, standard deviation with n - 1: sqrt(1/3)."""
    half = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert group_advantages(TABLE).tolist() == exactly([half, -half, half, -half] + [0.0] * 6)
    one_of_four = table([7, 7, 7, 7], [False, True, False, False], [1, 1, 1, 1])
    std = 0.5  # sqrt((3 * 0.25^2 + 0.75^2) / 3)
    assert group_advantages(one_of_four).tolist() == exactly(
        [value / (std + 1e-6) for value in (-0.25, 0.75, -0.25, -0.25)]
    )


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.02])
def test_grpo_is_a_global_token_mean_of_advantages_and_of_the_kl(kl_coefficient):
    settings = parse_config(
        {"objective": {"name": "grpo", "kl_coefficient": kl_coefficient}}, "test"
    ).objective
    assert (settings.aggregation, settings.ratio_clip) == (Aggregation.TOKEN_MEAN, 0.2)
    objective = build_objective(settings)
    none = np.full(10, NAN)
    weighed = objective.weigh(TABLE, none, none)
    assert weighed.weights.tolist() == group_advantages(TABLE).tolist()
    assert weighed.coefficients.advantage.tolist() == exactly((group_advantages(TABLE) / 50).tolist())
    assert weighed.coefficients.reference_kl.tolist() == exactly([kl_coefficient / 50] * 10)
    assert objective.reference_scored(TABLE.correct).all() == (kl_coefficient > 0)
    assert (
        not objective.student_scored(TABLE.correct).any()
        and not objective.teacher_scored(TABLE.correct).any()
    )


# ---- sft and kd


@pytest.mark.parametrize("name", ["sft", "kd"])
def test_given_responses_count_token_by_token_and_need_no_score(name):
    objective = build_objective(parse_config({"objective": {"name": name}}, "test").objective)
    given = table([0, 1, 2], [True] * 3, [2, 5, 3])
    none = np.full(3, NAN)
    weighed = objective.weigh(given, none, none)
    assert weighed.weights.tolist() == [1.0, 1.0, 1.0]
    assert weighed.coefficients.likelihood.tolist() == exactly([0.1, 0.1, 0.1])
    assert weighed.coefficients.distill.tolist() == [0.0, 0.0, 0.0]
    for mask in (objective.student_scored, objective.teacher_scored, objective.reference_scored):
        scored = mask(given.correct)
        assert scored.dtype == bool and scored.shape == (3,) and not scored.any()
    assert objective.token_loss is likelihood_loss


# ---- diagnostics


@pytest.mark.parametrize("name", list(ObjectiveName))
def test_a_served_teacher_is_asked_for_the_responses_that_the_objective_scores(name):
    """The controller decides response by response what the objective decides over the step's table."""
    config = parse_config({"objective": {"name": name}}, "test")
    correct = np.array([True, False])
    expected = build_objective(config.objective).teacher_scored(correct)
    assert [teacher_reads(config, correct=bool(verdict)) for verdict in correct] == expected.tolist()
    assert expected.any() == needs_teacher(config)


def test_path_spread_averages_over_the_sets_of_a_path():
    weights = np.array(WEIGHTS)
    entropy_of_a_quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    correct = path_spread(TABLE, weights, correct=True)  # two sets of {1/4, 3/4}
    assert correct.entropy == exactly(entropy_of_a_quarter)
    assert correct.effective_sample_size == exactly(1.6)
    incorrect = path_spread(TABLE, weights, correct=False)  # {3/4, 1/4}, {1/4, 1/4, 1/2}, {1}
    assert incorrect.entropy == exactly((entropy_of_a_quarter + 1.5 * math.log(2) + 0.0) / 3)
    assert incorrect.effective_sample_size == exactly((1.6 + 8 / 3 + 1.0) / 3)


def test_path_spread_does_not_depend_on_the_scale_of_the_weights():
    once, twice = (path_spread(TABLE, factor * np.array(WEIGHTS), correct=False) for factor in (1.0, 2.0))
    assert dataclasses.astuple(twice) == exactly(dataclasses.astuple(once))


def test_path_spread_of_a_weight_that_is_zero_is_finite():
    spread = path_spread(table([0, 0], [True, True], [1, 1]), np.array([1.0, 0.0]), correct=True)
    assert (spread.entropy, spread.effective_sample_size) == (0.0, 1.0)


def test_path_spread_of_signed_advantages_is_nan():
    spread = path_spread(table([0, 0], [True, False], [1, 1]), np.array([0.7, -0.7]), correct=True)
    assert math.isnan(spread.entropy) and math.isnan(spread.effective_sample_size)


def test_path_spread_leaves_out_sets_without_weight():
    given = table([0, 0, 1, 1], [True] * 4, [1] * 4)
    spread = path_spread(given, np.array([0.0, 0.0, 0.5, 0.5]), correct=True)
    assert spread.effective_sample_size == exactly(2.0)


def test_path_spread_of_an_empty_path_is_nan():
    spread = path_spread(table([0, 0], [True, True], [1, 1]), np.array([0.5, 0.5]), correct=False)
    assert math.isnan(spread.entropy) and math.isnan(spread.effective_sample_size)


def test_mean_perplexity_leaves_out_what_was_not_scored():
    assert mean_perplexity(of_ppl([2, None, 6, None])) == exactly(4.0)
    assert math.isnan(mean_perplexity(of_ppl([None, None])))
    assert math.isnan(mean_perplexity(np.zeros(0)))


def test_a_group_of_one_counts_as_one_sided():
    assert one_sided_share(TABLE) == exactly(0.75)
    assert one_sided_share(table([3, 1, 3, 1], [True, False, False, True], [1] * 4)) == 0.0
    assert one_sided_share(table([7], [True], [1])) == 1.0
