"""Whether the final answer of a response equals the ground truth answer of a mathematics problem."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_scope.records import Verdict
from megatron_scope.verify.exact import TEXT_COMMAND, compare, plain_number
from megatron_scope.verify.extraction import extract_answer

# No answer of the known data sets has 300 characters; far longer ones only cost memory and time.
MAX_ANSWER_CHARS = 4096
MAX_SHOWN_CHARS = 200
# math-verify's own figures: decimals to which floats are rounded, and digits of a numeric comparison.
FLOAT_PLACES = 6
NUMERIC_DIGITS = 15
MAX_EXTRA_DIGITS = 1000
# What the library's parser misreads, and what is therefore equal only as text: "1 2" (it adds or multiplies),
# the gcd or lcm of letters (it computes them, gcd(m, n) = 1), ratios of three (a:b:c is a/b/c to it), dots
# ("1, \dots, 9" is "1, 9" to it), transposes (A^T is A), derivatives (all of them zero) and cross products
# (a x b is b x a).
MISREAD = re.compile(
    r"(?<![\w^.])\d[\d.]*\s+\d|\\gcd|\\lcm|lcm\b|:[^:]*:|\\dots|\^\{? ?(?:T(?![A-Za-z])|\\top)"
    r"|\\partial|\\frac ?\{d[^{}]{0,8}\}\{d[a-z](?:\^\d)?\}"
    r"|\\(?:vec|overrightarrow|mathbf|boldsymbol|bm)(?![A-Za-z])[^,=]*\\times"
)
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d{1,3})(?![\w.^])")
# No variables: commands, and text in words.
NO_LETTERS = re.compile(rf"{TEXT_COMMAND} ?\{{[^{{}}]*\}}|\\[A-Za-z]+")


def verify_math(response: str, answer: str) -> Verdict:
    """Judge one response against the ground truth answer, in this process and without a time limit.

    A response that states no answer is incorrect with `extracted=None` and no error. `error` is set where the
    answer could not be judged: an empty ground truth, an answer of over 4096 characters, a failure of
    math-verify. Long simplifications can take for ever: `VerifierPool` adds the limit.
    """
    judged = judge_at_once(response, answer)
    return judged if isinstance(judged, Verdict) else judge_with_library(judged, answer)


def judge_at_once(response: str, answer: str) -> Verdict | str:
    """The verdict where text and plain numbers decide, else the extracted answer that needs the library."""
    extracted = extract_answer(response)
    if not answer.strip():
        return Verdict(False, _shown(extracted), "the ground truth answer is empty")
    if extracted is None:
        return Verdict(False)
    for name, text in (("ground truth", answer), ("extracted", extracted)):
        if len(text) > MAX_ANSWER_CHARS:
            error = f"the {name} answer has {len(text)} characters, at most {MAX_ANSWER_CHARS} are compared"
            return Verdict(False, _shown(extracted), error)
    comparison = compare(answer, extracted)
    return extracted if comparison.equal is None else Verdict(comparison.equal, extracted)


def judge_with_library(extracted: str, answer: str) -> Verdict:
    """The verdict of math-verify on two answers that `judge_at_once` leaves open; may take very long."""
    comparison = compare(answer, extracted)
    try:
        return Verdict(_equal_formulas(comparison.gold, comparison.got), extracted)
    except Exception as error:
        # Only the type and a short text: printing what sympy failed on can itself hang.
        reason = str(error.args[0])[:MAX_SHOWN_CHARS] if error.args and isinstance(error.args[0], str) else ""
        return Verdict(False, extracted, f"math-verify failed: {type(error).__name__}: {reason}".rstrip(": "))


def _equal_formulas(gold: str, got: str) -> bool:
    # Imported here: 0.3 s and 60 MB that a process which only matches text does not need.
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    if MISREAD.search(gold) or MISREAD.search(got) or _has_one_letter_in_two_cases(gold, got):
        return False
    # The answer is extracted already: the library must read all of it, and not pick a number from a text that
    # it cannot parse. Units are ours too, since the library takes the "t" of "3t" for one.
    config = LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    )
    parsed = [
        parse(rf"\boxed{{{_formula(text)}}}", [config], parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
        for text in (gold, got)
    ]
    extra = _extra_digits(parsed[0] + parsed[1])
    return verify(
        parsed[0],
        parsed[1],
        float_rounding=FLOAT_PLACES + extra,
        numeric_precision=NUMERIC_DIGITS + extra,
        timeout_seconds=None,
        raise_on_error=True,
    )


def _has_one_letter_in_two_cases(*texts: str) -> bool:
    """Whether a and A both occur: to the library, which reads all in lower case, they are one variable."""
    letters = {letter for text in texts for letter in NO_LETTERS.sub(" ", text) if letter.isalpha()}
    return any(letter.swapcase() in letters for letter in letters if letter.swapcase() != letter)


def _formula(text: str) -> str:
    """`text` with numbers rewritten that the parser misreads: 3e8 (as three e eight) and 0.\\overline{3}."""
    number = plain_number(text)
    if number is not None and r"\overline" in text:
        sign = "-" if number.value < 0 else ""
        fraction = rf"{sign}\frac{{{abs(number.value.numerator)}}}{{{number.value.denominator}}}"
        return fraction + (r"\%" if number.percent else "")
    return SCIENTIFIC.sub(r"(\1 \\times 10^{\2})", text)


def _extra_digits(parsed: list[Any]) -> int:
    """Zeros after the point of the smallest number in the answers.

    The library's tolerances are absolute and made for numbers around one: 1e-20 and 1e-30 would be equal.
    """
    sizes = [abs(number.evalf(5)) for value in parsed for number in _numbers(value)]
    # A Float is mantissa x 2^exponent; in floating point 1e-400 would already be zero.
    exponents = [size._mpf_[2] + size._mpf_[3] for size in sizes if size.is_Float and size > 0]
    return min(max(0, math.ceil(-min(exponents, default=0) * math.log10(2))), MAX_EXTRA_DIGITS)


def _numbers(value: Any) -> Iterator[Any]:
    """The largest parts of a parsed answer (formula, list, matrix) that are numbers."""
    if getattr(value, "is_number", False):
        yield value
    elif not isinstance(value, str):
        for part in value.flat() if hasattr(value, "flat") else value.args:
            yield from _numbers(part)


def _shown(extracted: str | None) -> str | None:
    if extracted is None or len(extracted) <= MAX_ANSWER_CHARS:
        return extracted
    return extracted[:MAX_SHOWN_CHARS] + "..."
