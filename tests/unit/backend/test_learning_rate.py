"""The learning rate of each step by hand."""

import pytest

from megatron_scope.backend.learning_rate import learning_rate
from megatron_scope.config.schema import OptimizerConfig, Schedule


def rates(num_steps, **settings):
    config = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def close(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


def test_a_constant_schedule_is_the_default():
    assert rates(3) == [1.0, 1.0, 1.0]
    assert learning_rate(OptimizerConfig(), 99, 100) == 5e-5


def test_linear_falls_by_the_same_amount_each_step():
    assert rates(5, schedule=Schedule.LINEAR) == close([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(5, schedule=Schedule.LINEAR, min_lr=0.5) == close([1.0, 0.9, 0.8, 0.7, 0.6])


def test_cosine_is_half_way_down_in_the_middle():
    config = {"schedule": Schedule.COSINE, "min_lr": 0.2}
    values = rates(6, **config)
    assert values[0] == 1.0 and values[3] == close(0.6)
    assert values[2] == close(0.2 + 0.8 * 0.75) and values[4] == close(0.2 + 0.8 * 0.25)


@pytest.mark.parametrize("schedule", [Schedule.LINEAR, Schedule.COSINE])
def test_schedules_fall_from_lr_towards_min_lr(schedule):
    values = rates(50, schedule=schedule, min_lr=0.1)
    assert values[0] == 1.0 and values == sorted(values, reverse=True) and len(set(values)) == 50
    config = OptimizerConfig(lr=1.0, schedule=schedule, min_lr=0.1)
    assert learning_rate(config, 50, 50) == close(0.1)  # one step after the last


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warm_up_rises_to_lr_and_the_schedule_starts_there(schedule):
    values = rates(10, schedule=schedule, warmup_steps=4)
    assert values[:5] == close([0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[4:] == close(rates(6, schedule=schedule))


def test_warm_up_starts_above_zero_whatever_min_lr():
    assert rates(4, warmup_steps=1, min_lr=0.5) == [1.0] * 4
    assert rates(3, warmup_steps=10, min_lr=0.5, schedule=Schedule.COSINE) == close([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
def test_a_single_step_has_a_finite_positive_rate(schedule, warmup_steps):
    (rate,) = rates(1, schedule=schedule, warmup_steps=warmup_steps)
    assert 0 < rate <= 1
