"""The clock of a step's stages."""

from __future__ import annotations

import pytest

from megatron_scope import metrics
from megatron_scope.metrics import StageClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StageClock:
    """One that has seen `score` from 10 to 12 and from 20 to 26, and `rollout` from 12 to 20."""
    times = iter([10.0, 12.0, 12.0, 20.0, 20.0, 26.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(times))
    clock = StageClock()
    for name in ("score", "rollout", "score"):
        with clock.stage(name):
            pass
    return clock


def test_the_spans_of_a_stage_add_up(clock):
    assert clock.seconds == {"score": 8.0, "rollout": 8.0}


@pytest.mark.parametrize(
    ("moment_s", "share"), [(9.0, 0.0), (11.0, 0.125), (15.0, 0.25), (22.0, 0.5), (26.0, 1.0), (99.0, 1.0)]
)
def test_the_share_of_a_stage_before_a_moment(clock, moment_s, share):
    assert clock.share_before("score", moment_s) == share
