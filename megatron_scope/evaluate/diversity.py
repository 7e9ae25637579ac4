"""How different the correct responses to one problem are: distinct-n and self-BLEU, by those parts of nltk
that need no corpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

NGRAMS = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Diversity:
    """Means over the `num_problems` problems that have at least `num_responses` correct responses (NaN where
    none has).

    `distinct_responses` is the share of different texts, `distinct_n[n]` the share of different n-grams among
    all n-grams of a problem's responses (arXiv:1510.03055; problems whose responses are all shorter than n
    are left out), both in (0, 1]; `self_bleu` in [0, 1] is the mean BLEU-4 of a response against the others
    (arXiv:1802.01886), low where they differ.
    """

    num_problems: int
    num_responses: int
    distinct_responses: float
    distinct_n: dict[int, float]
    self_bleu: float


def diversity(correct_texts: Sequence[Sequence[str]], *, num_responses: int, max_tokens: int) -> Diversity:
    """The diversity of correct responses, `correct_texts[p]` being those of problem p in the order sampled.

    More responses repeat each other more, so models of unequal accuracy compare only at an equal number: the
    first `num_responses` of each problem count, problems with fewer are left out. Responses are cut to their
    first `max_tokens` words and signs. Raises ValueError for num_responses < 2 or max_tokens < 1.
    """
    if num_responses < 2:
        raise ValueError(f"num_responses is {num_responses}, expected 2 or more")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
    texts_of = [texts[:num_responses] for texts in correct_texts if len(texts) >= num_responses]
    tokens_of = [[_tokens(text, max_tokens) for text in texts] for texts in texts_of]

    def mean(values: list[float]) -> float:
        known = [value for value in values if not np.isnan(value)]
        return float(np.mean(known)) if known else float("nan")

    return Diversity(
        num_problems=len(texts_of),
        num_responses=num_responses,
        distinct_responses=mean([len(set(texts)) / num_responses for texts in texts_of]),
        distinct_n={n: mean([distinct_n(responses, n) for responses in tokens_of]) for n in NGRAMS},
        self_bleu=mean([self_bleu(responses) for responses in tokens_of]),
    )


def distinct_n(responses: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of tokenised responses together; NaN where there is none."""
    from nltk.util import ngrams

    found = [ngram for tokens in responses for ngram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else float("nan")


def self_bleu(responses: Sequence[Sequence[str]]) -> float:
    """The mean BLEU-4 of each tokenised response with the others as references.

    An order without a match counts as 0.1 matches (nltk's smoothing method 1), and a response of fewer than
    four tokens is scored on the orders that it has, so that equal responses give 1 at any length.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1
    scores = [
        sentence_bleu(
            [*responses[:i], *responses[i + 1 :]], tokens, smoothing_function=smoothing, auto_reweigh=True
        )
        for i, tokens in enumerate(responses)
    ]
    return float(np.mean(scores))


def _tokens(text: str, max_tokens: int) -> list[str]:
    """Words, numbers and runs of signs."""
    from nltk.tokenize import wordpunct_tokenize

    return wordpunct_tokenize(text)[:max_tokens]
