"""Drawing tokens: the distribution, its restrictions, and rows that do not see each other."""

from __future__ import annotations

import numpy as np

from megatron_scope.rollout.embedded.sampling import draw, uniforms


def test_restrictions_keep_the_support_and_the_reported_logprobs() -> None:
    rng = np.random.default_rng(0)
    logits = np.repeat(rng.normal(size=(1, 20)).astype(np.float32) * 2, 4000, 0)
    probs = np.exp(logits[0].astype(float))
    probs /= probs.sum()
    order = np.argsort(-probs)
    rows = len(logits)
    for top_p, top_k, support in ((0.5, -1, None), (1.0, 3, 3), (0.9, 2, 2), (1.0, -1, 20)):
        drawn = draw(
            logits,
            temperature=np.ones(rows),
            top_p=np.full(rows, top_p),
            top_k=np.full(rows, top_k),
            uniform=rng.random(rows),
        )
        size = support or int(np.searchsorted(np.cumsum(probs[order]), top_p) + 1)
        assert set(drawn.ids) <= set(order[:size])
        assert len(set(drawn.ids)) == min(size, len(set(drawn.ids))) and drawn.finite.all()
        np.testing.assert_allclose(drawn.logprobs, np.log(probs[drawn.ids]), atol=1e-12)
        restricted = probs[order[:size]] / probs[order[:size]].sum()
        share = np.array([(drawn.ids == token).mean() for token in order[:size]])
        np.testing.assert_allclose(share, restricted, atol=0.04)


def test_a_draw_never_takes_an_impossible_token() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, 1.0, -np.inf]], dtype=np.float32)
    for uniform in (0.0, 1.0 - 2.0**-53):
        drawn = draw(
            logits,
            temperature=np.ones(1),
            top_p=np.ones(1),
            top_k=np.array([-1]),
            uniform=np.array([uniform]),
        )
        assert drawn.ids[0] == (1 if uniform == 0.0 else 3) and drawn.finite.all()


def test_draws_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    rng = np.random.default_rng(1)
    for vocab in (3, 16, 17, 1001):
        logits = rng.normal(size=(64, vocab)).astype(np.float32)
        settings = {
            "temperature": rng.choice([0.0, 0.6, 1.0], 64),
            "top_p": rng.choice([1.0, 0.7], 64),
            "top_k": rng.choice([-1, 2], 64),
            "uniform": rng.random(64),
        }
        whole = draw(logits, **settings)
        for row in range(64):
            one = draw(
                logits[row : row + 1], **{name: value[row : row + 1] for name, value in settings.items()}
            )
            assert one.ids[0] == whole.ids[row] and one.logprobs[0] == whole.logprobs[row]


def test_uniforms_repeat_by_seed_and_sample() -> None:
    assert (uniforms(7, 0, 5) == uniforms(7, 0, 9)[:5]).all()
    assert not (uniforms(7, 0, 5) == uniforms(7, 1, 5)).any()
    assert not (uniforms(None, 0, 5) == uniforms(None, 0, 5)).any()
