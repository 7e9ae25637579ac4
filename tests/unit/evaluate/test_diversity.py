"""Diversity of correct responses: by hand, at an equal number of responses, and with a limit on each."""

import itertools
import math

import pytest

from megatron_scope.evaluate.diversity import NGRAMS, distinct_n, diversity, self_bleu

LONG = 10_000


def of(*problems, num_responses=2, max_tokens=LONG):
    return diversity(problems, num_responses=num_responses, max_tokens=max_tokens)


# ---- distinct-n and self-BLEU of tokens


def test_distinct_n_is_the_share_of_different_ngrams_of_all_responses_together():
    responses = [["a", "b", "a"], ["a", "b"]]  # a b a a b; ab ba ab; aba
    assert [distinct_n(responses, n) for n in (1, 2, 3)] == [2 / 5, 2 / 3, 1.0]


def test_ngrams_do_not_reach_from_one_response_into_the_next():
    assert distinct_n([["a", "b"], ["c", "d"], ["b", "c"]], 2) == 1.0
    assert distinct_n([["a", "b"], ["b", "a"]], 2) == 1.0


def test_distinct_n_of_responses_shorter_than_n_is_not_a_number():
    assert math.isnan(distinct_n([["a", "b"], ["a"]], 3))


def test_self_bleu_of_two_responses_by_hand():
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples match; the one quadruple does not and counts as 0.1.
    assert self_bleu([list("abcd"), list("abce")]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** (1 / 4))


def test_self_bleu_of_unequal_lengths_by_hand():
    # The short one, of words and pairs only, matches entirely but for its brevity: exp(1 - 4/2).
    short = math.exp(-1)
    long = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 4)
    assert self_bleu([list("ab"), list("abcd")]) == pytest.approx((short + long) / 2)


def test_a_response_is_compared_with_all_others_at_once():
    # All words of abcd and two of its pairs are in either other, which share two words and a pair with it.
    others = [list("abxx"), list("yycd")]
    first = (4 / 4 * 2 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 4)
    rest = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 4)
    assert self_bleu([list("abcd"), *others]) == pytest.approx((first + 2 * rest) / 3)


@pytest.mark.parametrize("length", range(1, 7))
def test_self_bleu_of_equal_responses_is_one_at_any_length(length):
    assert self_bleu([list("abcdef"[:length])] * 3) == pytest.approx(1.0)


def test_self_bleu_of_responses_without_a_common_word_is_zero():
    assert self_bleu([list("abcd"), list("efgh"), list("ijkl")]) == 0.0


# ---- the diversity of a benchmark


def test_words_numbers_and_runs_of_signs_are_what_is_compared():
    # Eight tokens each: 9458, = and $ are in both, as is the pair (9458, =).
    found = of(["9458=358=88=6$", "9458=988=76=3$"])
    assert found.distinct_n[1] == 9 / 16
    assert found.distinct_n[2] == 13 / 14


def test_every_measure_is_a_mean_over_problems():
    equal, unequal = ["a b c d", "a b c d"], ["a b c d", "e f g h"]
    found = of(equal, unequal)
    assert found.num_problems == 2
    assert found.distinct_responses == (1 / 2 + 1) / 2
    assert found.distinct_n == dict.fromkeys(NGRAMS, (1 / 2 + 1) / 2)
    assert found.self_bleu == pytest.approx((1 + 0) / 2)


def test_problems_with_fewer_correct_responses_are_left_out_and_counted_so():
    full = ["a b c d", "a b e f", "a g h i"]
    assert of(full, full[:2], [], num_responses=3) == of(full, num_responses=3)
    assert of(full, full[:2], [], num_responses=3).num_problems == 1


def test_only_the_first_responses_count_so_that_an_accurate_model_is_not_called_repetitive():
    few = ["a b c d", "a b e f"]
    assert of([*few, *few, "a b c d"]) == of(few)


def test_where_no_problem_has_enough_correct_responses_nothing_is_claimed():
    found = of(["a"], [])
    assert found.num_problems == 0
    values = [found.distinct_responses, found.self_bleu, *found.distinct_n.values()]
    assert all(math.isnan(value) for value in values)


def test_a_problem_of_short_responses_counts_only_for_the_ngrams_that_it_has():
    found = of(["a b", "a b"], ["a b c d", "e f g h"])
    assert found.num_problems == 2
    assert found.distinct_n == {1: 3 / 4, 2: 3 / 4, 3: 1.0, 4: 1.0}


def test_tokens_beyond_the_limit_do_not_count():
    cut = of(["a b c d x y", "a b c d z"], max_tokens=4)
    whole = of(["a b c d", "a b c d"])
    assert (cut.distinct_n, cut.self_bleu) == (whole.distinct_n, whole.self_bleu)
    assert cut.distinct_responses == 1.0  # different texts all the same


def test_a_repeated_response_lowers_distinctness_and_raises_self_bleu():
    three, two, one = ["a b c d", "a e f g", "h i j k"], ["a b c d", "a e f g"] * 2, ["a b c d"] * 3
    measured = [of(texts[:3], num_responses=3) for texts in (three, two, one)]
    for more, fewer in itertools.pairwise(measured):
        assert more.distinct_responses > fewer.distinct_responses
        assert all(more.distinct_n[n] > fewer.distinct_n[n] for n in NGRAMS)
        assert more.self_bleu < fewer.self_bleu


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_responses": 1}, "num_responses is 1, expected 2 or more"),
        ({"max_tokens": 0}, "max_tokens is 0, expected 1 or more"),
    ],
)
def test_settings_that_compare_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        of(["a", "b"], **settings)
