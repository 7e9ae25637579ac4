"""Decisions about two answers that need no computer algebra: equal as written, or both plain numbers.

Like the extraction this runs without a time limit: patterns match whole short strings, and numbers are
bounded.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from megatron_scope.verify.extraction import EQUALS, last_side, leading_number, word_set

# Beyond these a "number" is left to the time-limited worker: 1e999999999 would fill the memory.
MAX_NUMBER_CHARS = 400
MAX_EXPONENT = 400
# A decimal equals another number if it is that number rounded, and states at least so many digits and places.
MIN_ROUNDED_DIGITS = 6

SPACES = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\s+")
DELIMITER_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z.])")
FRACTION_STYLE = re.compile(r"\\[dtc]frac(?![A-Za-z])")
BARE_NUMERATOR = re.compile(r"\\frac ?(\d) ?(?=[\d{])")
BARE_DENOMINATOR = re.compile(r"(\\frac ?\{[^{}]*\}) ?(\d)")
# math-verify drops the mark: y' would be y.
PRIMES = re.compile(r"(?<=[A-Za-z0-9)}])('+)(?![A-Za-z'])")
BARE_PRIME = re.compile(r"\^ ?\\prime(?![A-Za-z])")
# Not before a digit or letter: x^{2}3 would become x^23.
ONE_SCRIPT = re.compile(r"([\^_]) ?\{ ?(\w|\\circ) ?\}(?! ?\w)")
TEXT_COMMAND = r"\\(?:text(?:normal|rm|bf|it)?|mathrm|mbox)"
WHOLE_TEXT = re.compile(rf"{TEXT_COMMAND} ?\{{([^{{}}\\]*)\}}")
TRAILING_UNIT = re.compile(
    rf"(?P<body>.*[\d}})])(?:\^\\circ)? ?{TEXT_COMMAND} ?\{{(?P<unit>[^{{}}\\\d]*)\}}(?P<power>\^[23])?",
    re.DOTALL,
)
TRAILING_WORD = re.compile(r"(?P<body>.*[\d})]) ?(?P<unit>[A-Za-z]{2,})(?P<power>\^[23])?", re.DOTALL)
CLOSED_DOLLARS = re.compile(r"\$\$?([^$]+)\$\$?")
FREE_SPACE = re.compile(r"(?<![A-Za-z0-9.,]) | (?![A-Za-z0-9.])")
LIST_SPACE = re.compile(r", (?!\d{3}(?!\d))")
TRUTH = {"yes": True, "true": True, "no": False, "false": False}
TEXT_ANYWHERE = re.compile(rf"{TEXT_COMMAND}|\\operatorname")
BRACKETED_LIST = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
COMMAND = re.compile(r"\\[A-Za-z]+")
VARIABLE = re.compile(r"[A-DF-HJ-Za-df-hj-z]")
# Longer than a product of variables is likely to be.
WORDS = re.compile(r"(?:[A-Za-z]+[ -])?[A-Za-z]{4,}(?:[ -][A-Za-z]+)*")
# Of the left side of an equation: what may stand beside one name, as in f^{-1}(x), a_{n+1} or P(X > 1).
NAME_DETAIL = re.compile(r"\([^()]*\)|_\{[^{}]*\}|_\w|\^\{(?:-1|(?:\\prime)+)\}")
NUMERIC_COMMAND = re.compile(r"\\(?:frac|sqrt|cdot|times|div|pi)(?![A-Za-z])")
OPERATION = re.compile(r"[-+*/^|\d]|\\(?:frac|sqrt|cdot|times)(?![A-Za-z])")
# An order, a triangle or an angle by its points; to the library a product, whose letters commute.
POINTS = re.compile(r"(?:\\(?:angle|triangle) ?)?[A-Z]{3,}")
ABBREVIATION = re.compile(r"\b[A-Za-z](?:\.[A-Za-z])+\b")  # "a.m."
PRICE = re.compile(r"(-?)\\?\$(\d[\d,]*(?:\.\d+)?|\.\d+)")
DOTS = re.compile(r"\\[lc]dots(?![A-Za-z])")
# Of entries without brackets of their own; the library takes a set for a tuple and a tuple for a set.
_ENTRIES = r"(?P<entries>(?:[^()\[\]\\]|\\[A-Za-z])*)"
SET = re.compile(rf"\\\{{{_ENTRIES}\\\}}")
TUPLE = re.compile(rf"\({_ENTRIES}\)")

# Spellings of one unit; two answers in different units of this table are never equal.
UNITS = {
    spelling: name
    for name, spellings in {
        "degree": "degree degrees deg",
        "radian": "radian radians rad",
        "second": "second seconds sec secs s",
        "minute": "minute minutes min mins",
        "hour": "hour hours hr hrs h",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years yr yrs",
        "millimetre": "mm millimeter millimeters millimetre millimetres",
        "centimetre": "cm centimeter centimeters centimetre centimetres",
        "metre": "m meter meters metre metres",
        "kilometre": "km kilometer kilometers kilometre kilometres",
        "inch": "inch inches",
        "foot": "foot feet ft",
        "yard": "yard yards yd",
        "mile": "mile miles",
        "milligram": "mg milligram milligrams",
        "gram": "g gram grams",
        "kilogram": "kg kilogram kilograms",
        "pound": "pound pounds lb lbs",
        "ounce": "ounce ounces oz",
        "millilitre": "ml milliliter milliliters millilitre millilitres",
        "litre": "l liter liters litre litres",
        "gallon": "gallon gallons gal",
        "cent": "cent cents",
        "dollar": "dollar dollars usd",
        "metre a second": "m/s",
        "kilometre an hour": "km/h kmh kph",
        "mile an hour": "mph",
    }.items()
    for spelling in spellings.split()
}
# Symbols whose case matters, as units inside \text{...} or \mathrm{...} only: "5Pa" may be a product.
SYMBOLS = word_set("nm ns ms") | {
    prefix + symbol
    for symbol in ("J", "N", "Pa", "V", "W", "A", "Hz", "eV", "mol", "T", "Wb", "cal", "erg")
    for prefix in ("", "p", "n", "\u03bc", "m", "k", "M", "G")
}
SQUARE_OR_CUBIC = re.compile(r"(?:(?P<square>sq|square)|cu|cubic) (?P<unit>.+)")
# Words beside a number of which one excludes the others of its line.
EXCLUSIVE_WORDS = tuple(
    {spelling: group[0] for group in (names.split("=") for names in line.split()) for spelling in group}
    for line in (
        "am pm",
        "north=n south=s east=e west=w",
        "increase=increased decrease=decreased",
        "more less=fewer",
        "celsius=c fahrenheit=f kelvin=k",
        "above below",
    )
)
KNOWN_UNITS = SYMBOLS | {*UNITS.values(), "percent"}
# Text after a number that is more than a unit: it changes the value or states a condition.
NO_UNITS = word_set(
    """and or if for when where unless otherwise except mod modulo hundred thousand million billion trillion
    dozen percent percentage base times squared cubed half halves third thirds quarter quarters tenths
    hundredths is even odd prime not all any"""
)


@dataclasses.dataclass(frozen=True)
class PlainNumber:
    """A rational as written: of a decimal, `places` digits follow the point and `digits` are significant."""

    value: Fraction
    percent: bool = False
    base: int | None = None
    places: int | None = None
    digits: int = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two answers made ready for computer algebra, and whether they are equal where that is already known."""

    gold: str
    got: str
    equal: bool | None


def compare(answer: str, extracted: str) -> Comparison:
    """Compare `extracted` with the ground truth `answer` as far as text and plain numbers go.

    Equal: the same text after rewrites that keep the value, or equal numbers. Unequal: two plain numbers
    (integers, decimals, fractions, percentages) or words that differ, a number and a word, a set and a tuple,
    known units that differ, and an equation such as x + y = 1 and its right side alone.
    """
    gold, got = normalised(answer), normalised(extracted)
    if EQUALS.search(got) and not EQUALS.search(gold):
        got = normalised(last_side(got))
    if gold == got:
        return Comparison(gold, got, True)
    if EQUALS.search(gold) and not EQUALS.search(got) and not names_its_right_side(gold):
        return Comparison(gold, got, False)
    gold, gold_unit = split_unit(gold)
    got, got_unit = split_unit(got)
    # Only in a response: there "12 apples" is prose, in a ground truth it could be a product.
    got = leading_number(got) or got
    if units_differ(_or_percent(gold_unit, gold), _or_percent(got_unit, got)):
        return Comparison(gold, got, False)
    return Comparison(gold, got, gold == got or _as_words_or_numbers(gold, got))


def _as_words_or_numbers(gold: str, got: str) -> bool | None:
    if POINTS.fullmatch(gold) and POINTS.fullmatch(got):
        return gold == got
    if {_bracket(gold), _bracket(got)} == {SET, TUPLE}:
        return False
    gold_truth, got_truth = TRUTH.get(gold.lower()), TRUTH.get(got.lower())
    if gold_truth is not None and got_truth is not None:
        return gold_truth == got_truth
    gold_number, got_number = plain_number(gold), plain_number(got)
    if gold_number is not None and got_number is not None:
        return same_number(gold_number, got_number)
    gold_is_word = gold_truth is not None or WORDS.fullmatch(gold) is not None
    got_is_word = got_truth is not None or WORDS.fullmatch(got) is not None
    if gold_is_word and got_is_word:
        return gold.lower() == got.lower()
    if (gold_is_word and got_number is not None) or (got_is_word and gold_number is not None):
        return False
    if (gold_number is not None and is_no_number(got)) or (got_number is not None and is_no_number(gold)):
        return False
    return None


def names_its_right_side(equation: str) -> bool:
    """Whether the left side is one name or only numbers, so that the right side alone says the same."""
    side = NAME_DETAIL.sub("", EQUALS.split(equation, maxsplit=1)[0])
    return not OPERATION.search(side) or not re.search(r"[A-Za-z]", NUMERIC_COMMAND.sub(" ", side))


def is_no_number(text: str) -> bool:
    """Whether `text` is a tuple or interval, or holds a variable other than the constants e and i.

    Left to computer algebra: equations, text and units, and letters that are LaTeX commands.
    """
    if EQUALS.search(text) or TEXT_ANYWHERE.search(text):
        return False
    return BRACKETED_LIST.fullmatch(text) is not None or VARIABLE.search(COMMAND.sub(" ", text)) is not None


def normalised(text: str) -> str:
    """`text` in one of several equivalent spellings; texts of different value keep different spellings.

    Spaces go only where they separate nothing ("1 2" stays, "100, 200" does not become the number "100,200"),
    and \\text{...} only around the whole.
    """
    text = _without_period(text.strip()).replace("\u2212", "-").replace("\u00b0", r"^\circ")
    text = text.replace(r"\displaystyle", " ").replace(r"\!", "").replace(r"\%", "%")
    text = text.replace("{,}", ",").replace("{:}", ":")
    text = DOTS.sub(r"\\dots", text).replace(r"\varnothing", r"\emptyset")
    text = PRIMES.sub(lambda primes: "^{" + r"\prime" * len(primes[1]) + "}", text)
    text = BARE_PRIME.sub(r"^{\\prime}", text)
    text = _without_delimiters(text)
    text = DELIMITER_SIZE.sub("", text)
    text = FRACTION_STYLE.sub(r"\\frac", text)
    text = SPACES.sub(" ", text)
    text = ONE_SCRIPT.sub(r"\1\2", text)
    text = BARE_DENOMINATOR.sub(r"\1{\2}", BARE_NUMERATOR.sub(r"\\frac{\1}", text))
    text = LIST_SPACE.sub(",", FREE_SPACE.sub("", text)).strip()
    text = _without_period(text)
    whole = WHOLE_TEXT.fullmatch(text)
    return whole[1].strip() if whole else text


def split_unit(text: str) -> tuple[str, str | None]:
    """(`text` without a unit that follows its number, the unit by its name in UNITS or as written, or None).

    Single letters are units only inside \\text{...} or \\mathrm{...}: "3m" is three times m.
    """
    if (price := PRICE.fullmatch(text)) is not None:
        return price[1] + price[2], "dollar"
    text = re.sub(r"^(-?)\\?\$(?=[\d.])", r"\1", text)
    angle = text.removesuffix(r"^\circ")
    if angle != text:
        return angle, "degree"
    match = TRAILING_UNIT.fullmatch(text)
    if match is not None:
        unit = re.sub(r"[~.\s]+", " ", ABBREVIATION.sub(lambda dots: dots[0].replace(".", ""), match["unit"]))
        unit = unit.strip()
        words = unit.lower().split()
        if len(words) > 3 or NO_UNITS.intersection(words):
            return text, None
        return match["body"].strip(), _named(unit, match["power"]) if unit else None
    match = TRAILING_WORD.fullmatch(text)
    if match is not None and match["unit"].lower() in UNITS:
        return match["body"].strip(), _named(match["unit"], match["power"])
    return text, None


def units_differ(gold_unit: str | None, unit: str | None) -> bool:
    """Whether both units are known and not the same, or say contrary things of the number (am, pm).

    No unit, or an unknown one, may stand for any.
    """
    if gold_unit is None or unit is None:
        return False
    if all(one.partition("^")[0] in KNOWN_UNITS for one in (gold_unit, unit)):
        return gold_unit != unit
    for meanings in EXCLUSIVE_WORDS:
        gold_meaning = {meanings[word] for word in gold_unit.split() if word in meanings}
        meaning = {meanings[word] for word in unit.split() if word in meanings}
        if gold_meaning and meaning and gold_meaning != meaning:
            return True
    return False


def plain_number(text: str) -> PlainNumber | None:
    """The integer, decimal, fraction, mixed number, power-of-ten product or percentage that `text` is."""
    text = text.strip()
    if not text or len(text) > MAX_NUMBER_CHARS:
        return None
    percent = text.endswith("%")
    text = text.removesuffix("%").rstrip()
    sign = -1 if text.startswith("-") else 1
    text = text.removeprefix("-" if sign < 0 else "+").lstrip()
    for pattern, number_of in NUMBER_FORMS:
        match = pattern.fullmatch(text)
        if match is not None:
            number = number_of(match)
            if number is None:
                return None
            return dataclasses.replace(number, value=sign * number.value, percent=percent)
    return None


def same_number(gold: PlainNumber, got: PlainNumber) -> bool:
    """Equal values; a percentage also equals its bare number; a long decimal equals what it is a rounding of.

    Numerals in two stated bases are equal only as written; one without a base takes the other's.
    """
    if gold.base is not None and got.base is not None and gold.base != got.base:
        return False
    if gold.percent == got.percent:
        return _close(gold, got)
    percentage, other = (gold, got) if gold.percent else (got, gold)
    places = None if percentage.places is None else percentage.places + 2
    share = dataclasses.replace(percentage, value=percentage.value / 100, places=places)
    return _close(percentage, other) or _close(share, other)


def _close(a: PlainNumber, b: PlainNumber) -> bool:
    if a.value == b.value:
        return True
    for decimal in (a, b):
        if decimal.places is None or min(decimal.places, decimal.digits) < MIN_ROUNDED_DIGITS:
            continue
        if abs(a.value - b.value) * 2 * Fraction(10) ** decimal.places <= 1:
            return True
    return False


def _without_period(text: str) -> str:
    if text.endswith(".") and not text.endswith(("..", r"\right.", r"\left.")):
        return text[:-1].rstrip()
    return text


def _without_delimiters(text: str) -> str:
    if (dollars := CLOSED_DOLLARS.fullmatch(text)) is not None:
        return dollars[1].strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        inner = text.removeprefix(opening).removesuffix(closing)
        if len(inner) == len(text) - 4 and opening not in inner:
            return inner.strip()
    return text


def _bracket(text: str) -> re.Pattern[str] | None:
    """SET or TUPLE, whichever `text` is with two entries or more."""
    for pattern in (SET, TUPLE):
        if (match := pattern.fullmatch(text)) is not None and "," in match["entries"]:
            return pattern
    return None


def _or_percent(unit: str | None, text: str) -> str | None:
    return "percent" if unit is None and text.endswith("%") else unit


def _named(unit: str, power: str | None) -> str:
    """The unit by its name in UNITS or SYMBOLS, else in lower case, with the power that words may state."""
    words = SQUARE_OR_CUBIC.fullmatch(unit.lower())
    if words is not None and words["unit"] in UNITS and power is None:
        return UNITS[words["unit"]] + ("^2" if words["square"] else "^3")
    return (unit if unit in SYMBOLS else UNITS.get(unit.lower(), unit.lower())) + (power or "")


def _integer(digits: str) -> int:
    return int(digits.replace(",", "").replace(" ", ""))


def _decimal(match: re.Match[str]) -> PlainNumber | None:
    exponent = int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    whole, decimals = match["whole"] or "", match["decimals"] or ""
    digits = whole.replace(",", "").replace(" ", "") + decimals
    value = Fraction(int(digits)) * Fraction(10) ** (exponent - len(decimals))
    places = len(decimals) - exponent if match["decimals"] else None
    return PlainNumber(value, places=places, digits=len(digits.lstrip("0")))


def _fraction(match: re.Match[str]) -> PlainNumber | None:
    numerator, denominator = _integer(match["numerator"]), _integer(match["denominator"])
    if denominator == 0:
        return None
    return PlainNumber(_integer(match["mixed"] or "0") + Fraction(numerator, denominator))


def _signed_fraction(match: re.Match[str]) -> PlainNumber | None:
    denominator = _integer(match["denominator"])
    return PlainNumber(Fraction(_integer(match["numerator"]), denominator)) if denominator else None


def _repeating(match: re.Match[str]) -> PlainNumber:
    whole, decimals, repeated = match["whole"] or "0", match["decimals"], match["repeated"]
    tail = Fraction(int(repeated), 10 ** len(decimals) * (10 ** len(repeated) - 1))
    return PlainNumber(Fraction(int(whole + decimals), 10 ** len(decimals)) + tail)


def _in_base(match: re.Match[str]) -> PlainNumber:
    return PlainNumber(Fraction(int(match["numeral"])), base=int(match["base"]))


_DIGITS = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_POWER_OF_TEN = r" ?(?:\\times|\\cdot|\*|x|\u00d7) ?10\^(?:\{ ?(?P<exponent>[-+]?\d+) ?\}|(?P<power>-?\d))"
NUMBER_FORMS = (
    (re.compile(rf"(?P<whole>{_DIGITS})?(?:\.(?P<decimals>\d+))?(?P<exponent>)(?P<power>)(?<=\d)"), _decimal),
    (re.compile(rf"(?P<whole>{_DIGITS})\.(?P<decimals>)(?P<exponent>)(?P<power>)"), _decimal),
    (
        re.compile(
            r"(?P<whole>\d+)?(?:\.(?P<decimals>\d+))?(?<=\d)[eE](?P<exponent>[-+]?\d{1,6})(?P<power>)"
        ),
        _decimal,
    ),
    (re.compile(rf"(?P<whole>\d+)?(?:\.(?P<decimals>\d+))?(?<=\d){_POWER_OF_TEN}"), _decimal),
    (re.compile(r"(?:(?P<mixed>\d+) )?(?P<numerator>\d+)/(?P<denominator>\d+)"), _fraction),
    (re.compile(r"(?P<mixed>\d+)? ?\\frac\{(?P<numerator>\d+)\}\{(?P<denominator>\d+)\}"), _fraction),
    (re.compile(r"\\frac\{(?P<numerator>-\d+)\}\{(?P<denominator>\d+)\}"), _signed_fraction),
    (re.compile(r"(?P<whole>\d+)?\.(?P<decimals>\d*)\\overline ?\{(?P<repeated>\d+)\}"), _repeating),
    (re.compile(r"(?P<numeral>\d+)_\{?(?P<base>\d{1,2})\}?"), _in_base),
)
