"""Which part of a response is its final answer.

Everything here runs in the controller without a time limit, so every pattern is linear in the length of the
response or looks at a bounded window of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def word_set(words: str) -> frozenset[str]:
    """The words of a text, for tables that read better as one."""
    return frozenset(words.split())


# Markers worth trying, from the end: "the answer is" a thousand times over must not cost more.
MAX_MARKERS = 20
# A phrase after a marker, and the tail in which an unmarked answer is looked for.
MAX_PHRASE_CHARS = 2000
MAX_TAIL_CHARS = 4000
# A response without line break below this length and without prose is taken as the answer itself.
MAX_BARE_ANSWER_CHARS = 200

BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_MATHS_SPACE = r"(?:\s|\$|\\[()\[\],;!]|\\quad)*"
BOX_CONNECTOR = re.compile(
    rf"{_MATHS_SPACE}(?:[,;&]|,?\s*(?:and|or)\b|\\text\{{\s*(?:and|or)\s*\}}){_MATHS_SPACE}"
)
# The colon and the equals sign also in full width.
ANSWER_MARKER = re.compile(
    r"""(?: \banswers?\b[*_"']*
            (?: \s*[:=\uff1a\uff1d]                               # Answer: 5
              | [^.\n:]{0,80}?\s(?:is|are|equals|=)(?![A-Za-z]) # the answer to the question is 5
            )
          | \u7b54\u6848[*_]*\s*[\u662f\u4e3a\u70ba:=\uff1a\uff1d]    # both in Chinese
        )[\s:\uff1a*_]*""",
    re.IGNORECASE | re.VERBOSE,
)
ANSWER_HEADING = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]*)?[*_]{0,3}(?:the[ \t]+)?(?:final[ \t]+)?answers?[*_]{0,3}[ \t]*\n[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
HASH_MARKER = re.compile(r"(?<!#)####(?!#)[ \t]*(?=\S)")
SENTENCE_END = re.compile(r"[.;](?=\s|[\"'*]|$)|[\n\u3002\uff1b]")
MATHS = re.compile(
    r"(?<!\\)\$\$(?P<display>.+?)(?<!\\)\$\$"
    r"|(?<!\\)\$(?P<inline>(?:\\.|[^$\\\n])+)\$"
    r"|\\\[(?P<bracket>.+?)\\\]"
    r"|\\\((?P<parenthesis>.+?)\\\)"
    # Outside of formulas a fraction that stands alone; beside an operator, a number or a variable it is a
    # part of something.
    r"|(?<![^\s=:])(?<![-+*/^<>\d]\s)(?P<fraction>-?\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})"
    r"(?=[\s.,;:!?*%]|$)(?!\s*[-+*/^\\])(?!\s*[A-Za-z](?![A-Za-z]))",
    re.DOTALL,
)
MATHS_CONNECTOR = re.compile(r"\s*(?:,?\s*(?:and|or)\b|,)\s*")
PERCENT = re.compile(r"\s*(?:\\?%|[Pp]er\s?cent\b)")
# An equality, not \le=, <=, >=, != or :=.
EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)")
# A word before something that is no operator: "ax + b" is none.
PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:and|or)\b)[A-Za-z]{2,}[,:]?\s+[^\s+*/=<>^-]")
# What is not the answer begins here: "42, not 43", "42 (see part 3)", "42, because 6 * 7 = 42".
ASIDE = re.compile(
    r",?\s+(?:(?:not|rather\s+than|instead\s+of|because|since)\b|\((?=\s*[A-Za-z]{2})(?!\s*(?:mod|base|if|for|when|"
    r"where|unless|or|and|in)\b))"
)
# Before a number that is no answer, "at least 43", "the answer is not 43", or a part of one: "sqrt 43".
QUALIFIER = re.compile(
    r"(?:\b(?:not|cannot|never|than|at\s+least|at\s+most|under|over|below|above|between\s+\S+\s+and|sqrt|log|ln|sin|cos|"
    r"tan|mod|modulo|root\s+of)|n't)(?:\s+be)?\s+[$(]?$",
    re.IGNORECASE,
)
MAX_QUALIFIER_CHARS = 40
# In a sentence that a number opens, what announces that the answer comes later: "5 + 6, which is 11".
RESULT_WORD = re.compile(r"[=?]|\b(?:which|total(?:ing)?|altogether|giving|making)\b")
YES_NO = re.compile(r"(?:yes|no|true|false)\b(?=\s*(?:[,.;:!*]|$|because\b|since\b))", re.IGNORECASE)

_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_EXPRESSION = rf"[-+\u2212]?{_NUMBER}(?:\s*(?:\*\*|[-+*/^\u00d7\u00f7])\s*[-+]?{_NUMBER})*"
_CURRENCY = r"(?:\\?\$|[\u20ac\u00a3\u00a5\u20b9])\s?"
# A number that stands alone: not the 2 of "x2", "f(2)" or "{2}", the 5 of "x + 5" or "x*5", the 3 of "3 + x".
LAST_EXPRESSION = re.compile(
    rf"(?<![^\s=(\[$\u20ac\u00a3\u00a5\u20b9:*~\u2248,\"'])(?<![-+/^<>\u2264\u2265]\s)(?<!\*[ \t])"
    rf"(?<![<>!]=)(?<![<>!]=\s)(?<!\w\()(?<![\w)]\*)(?P<value>{_EXPRESSION}%?)(?![\w^(\[{{\\}}])(?!\s*[-+*/^=<>]\s*[A-Za-z(\\])"
)
LEADING_EXPRESSION = re.compile(rf"(?:{_CURRENCY})?(?P<value>{_EXPRESSION})(?P<percent>{PERCENT.pattern})?")
NUMBER_LINE = re.compile(r"[^A-Za-z\n]*\d[^A-Za-z\n]*")
LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
WORDS_AFTER_NUMBER = re.compile(r"\s+[A-Za-z][A-Za-z'-]+(?:[\s/]+[A-Za-z][A-Za-z'-]*)*[\s.,!*]*")

# Words after a number that change its value, so that it cannot be cut off there.
VALUE_WORDS = word_set(
    """pi sqrt sin cos tan log ln exp mod modulo times over plus minus divided multiplied squared cubed
    factorial hundred hundreds thousand thousands million millions billion billions trillion trillions dozen
    dozens score pair pairs half halves third thirds quarter quarters tenth tenths hundredth hundredths and or
    to by if for when where unless otherwise except not infinity alpha beta gamma delta theta lambda omega
    root roots base bit choose"""
)
# Two letters after a number may be a product ("2 xy"), but for these.
SHORT_UNITS = word_set("mm cm km kg mg ml ft lb oz hr am pm of in")
# "The answer is correct" gives no answer.
NO_ANSWERS = word_set(
    """correct incorrect right wrong unique given known unknown clear obvious simple simply easy the a an this
    that it not as in of to for found below above therefore thus then now indeed"""
)


def extract_answer(response: str) -> str | None:
    """The final answer that a response states, as written there, or None where it states none.

    In this order: the last complete \\boxed{...} (several ones joined by "and", "or" or commas count as one
    list); the last "#### x", "answer is x" or "Answer: x"; without such a marker the last formula or number
    of the text, and of a chain of equalities ("9458=358=88=6") what follows the last "=". Text before
    "</think>" is left out if anything follows it.
    """
    text = _final_part(response)
    if "boxed" in text or "fbox" in text:
        answer, text = _boxed(text)
        if answer is not None:
            return answer
    return _marked(text) or _unmarked(text) or None


def last_side(text: str) -> str:
    """What follows the last "=" of a chain of equalities; all of a text without "=" or of a list."""
    if "," in text or ";" in text:
        return text
    return EQUALS.split(text)[-1].strip() or text


def leading_number(text: str) -> str | None:
    """The number or expression that opens `text` if only units or prose follow ("18 dollars per day")."""
    match = LEADING_EXPRESSION.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    if rest.strip(" .,*"):
        words = re.findall(r"[a-z]+", rest.lower())
        if not WORDS_AFTER_NUMBER.fullmatch(rest) or VALUE_WORDS.intersection(words):
            return None
        if len(words[0]) < 3 and words[0] not in SHORT_UNITS:
            return None
    return match["value"] + ("%" if match["percent"] else "")


def _final_part(response: str) -> str:
    before, mark, after = response.rpartition("</think>")
    return after if after.strip() or not mark else before


def _boxed(text: str) -> tuple[str | None, str]:
    """(content of the last complete box or list of boxes, text up to the first box that is never closed)."""
    boxes: list[tuple[int, int, str]] = []
    open_braces: list[
        tuple[int, int] | None
    ] = []  # (start, content start) of a box, None for any other brace
    for token in BOX_TOKEN.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                boxes.append((box[0], token.end(), text[box[1] : token.start()].strip()))
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append((token.start(), token.end()))
    unclosed = [brace[0] for brace in open_braces if brace is not None]
    before_unclosed = text[: unclosed[0]] if unclosed else text

    # Of nested boxes the inner one is the answer; it starts last.
    boxes = sorted(box for box in boxes if box[2])
    if not boxes:
        return None, before_unclosed
    start, _, content = boxes[-1]
    answers = [content]
    for earlier_start, earlier_end, earlier in reversed(boxes[:-1]):
        between = text[earlier_end:start]
        if earlier_end > start or len(between) > 60 or not BOX_CONNECTOR.fullmatch(between):
            break
        if earlier not in answers:
            answers.append(earlier)
        start = earlier_start
    return ", ".join(reversed(answers)), before_unclosed


def _marked(text: str) -> str | None:
    """The answer after the last marker that one follows."""
    marks = [(match.end(), _hash_answer) for match in HASH_MARKER.finditer(text)]
    marks += [(match.end(), _phrase_answer) for match in ANSWER_MARKER.finditer(text)]
    marks += [(match.end(), _phrase_answer) for match in ANSWER_HEADING.finditer(text)]
    for end, answer_of in sorted(marks, key=lambda mark: mark[0], reverse=True)[:MAX_MARKERS]:
        answer = answer_of(text[end : end + MAX_PHRASE_CHARS])
        if answer:
            return answer
    return None


def _hash_answer(phrase: str) -> str | None:
    """A GSM8K answer line; a Markdown heading of the fourth level looks the same but holds words.

    A line of words counts where nothing follows it.
    """
    first, _, rest = phrase.partition("\n")
    line = _unwrapped(_without_end_token(first))
    number = leading_number(line.rstrip("."))
    if number is not None:
        return number
    return line if not rest.strip() or NUMBER_LINE.fullmatch(LATEX_COMMAND.sub("", line)) else None


def _phrase_answer(phrase: str) -> str | None:
    formulas = list(_formulas(phrase))
    if formulas and formulas[0]["fraction"] is None and not phrase[: formulas[0].start()].strip(" *_"):
        return _joined(phrase, formulas)
    end = SENTENCE_END.search(phrase)
    sentence = _unwrapped(_without_end_token(phrase[: end.start()] if end else phrase))
    inside = [formula for formula in formulas if end is None or formula.start() < end.start()]
    # Formulas without their signs, "(\frac{1}{2}, 3)", are the answer as a whole.
    is_bare = all(formula["fraction"] is not None for formula in inside) and not PROSE.search(sentence)
    if inside and not is_bare:
        return _joined(phrase, inside[-1:])
    number = _opening_number(sentence)
    if number is not None:
        return number
    if yes_no := YES_NO.match(sentence):
        return yes_no[0]
    if "\\" not in sentence and PROSE.search(sentence) and re.search(r"\d", sentence):
        # "42 apples and 43 pears" is no answer in one number.
        is_whole = LEADING_EXPRESSION.match(sentence) and not RESULT_WORD.search(sentence)
        return sentence if is_whole else _plain_answer(sentence)
    if re.search(r"[\d\\=+^]", sentence):
        return _short_chain(sentence)
    sentence = ASIDE.split(sentence, maxsplit=1)[0]
    words = sentence.split()
    if len(words) == 1 and len(sentence) == 1:
        return sentence  # a choice: "A" is no article here
    return sentence if 0 < len(words) <= 4 and words[0].lower() not in NO_ANSWERS else None


def _unmarked(text: str) -> str | None:
    if len(text) > MAX_TAIL_CHARS:
        # From a whole line on: a cut inside of $...$ would pair the dollar signs wrongly.
        tail = text[-MAX_TAIL_CHARS:]
        text = tail.partition("\n")[2] or tail
    text = _without_end_token(text).rstrip().rstrip(".")
    bare = _bare_answer(text)
    if bare is not None:
        return bare
    formulas = list(_formulas(text))
    plain_start = formulas[-1].end() if formulas else 0
    plain = _plain_answer(text[plain_start:])
    if plain is not None:
        return plain
    return last_side(_content(formulas[-1])) if formulas else None


def _bare_answer(text: str) -> str | None:
    """The whole response where it is nothing but an answer: "3t + 1", "(B)", "Yes, because it is compact"."""
    bare = text.strip(" \t\r\n*_")
    if yes_no := YES_NO.match(bare):
        return yes_no[0]
    if not bare or "\n" in bare or len(bare) > MAX_BARE_ANSWER_CHARS or re.search(r"\$|\\[(\[]", bare):
        return None
    if EQUALS.search(bare) or re.search(r":\s|[A-Za-z]:", bare) or PROSE.search(bare):
        return None
    return leading_number(bare) or bare


def _plain_answer(text: str) -> str | None:
    """The last number, or what follows the last "=" if that number belongs to it.

    None without a number, and where words before the last one deny or limit it ("not 43", "at least 43").
    """
    numbers = list(LAST_EXPRESSION.finditer(text))
    equals = list(EQUALS.finditer(text))
    if equals:
        side = text[equals[-1].end() :].strip()
        end = SENTENCE_END.search(side)
        side = (side[: end.start()] if end else side).strip(" *_$")
        is_last = end is None or not LAST_EXPRESSION.search(text, equals[-1].end() + end.end())
        if side and is_last:
            number = _opening_number(side)
            if number is not None:
                return number
            if not PROSE.search(side):
                return side
    if not numbers:
        return None
    start = numbers[-1].start()
    is_qualified = QUALIFIER.search(text[max(0, start - MAX_QUALIFIER_CHARS) : start])
    return None if is_qualified else numbers[-1]["value"]


def _opening_number(text: str) -> str | None:
    """As `leading_number`, and an aside may follow ("42 dollars, not 43")."""
    return leading_number(ASIDE.split(text, maxsplit=1)[0])


def _formulas(text: str) -> Sequence[re.Match[str]]:
    """The formulas in $...$, $$...$$, \\(...\\), \\[...\\]; not text between two prices ("$5 or $6")."""
    found = []
    position = 0
    while (match := MATHS.search(text, position)) is not None:
        if match["inline"] is not None and "\\" not in match["inline"] and PROSE.search(match["inline"]):
            position = match.start() + 1
        else:
            found.append(match)
            position = match.end()
    return found


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def _joined(text: str, formulas: Sequence[re.Match[str]]) -> str:
    """The first formula and those listed after it ("$1$, $2$ and $3$"), with a percent sign that follows."""
    answers = [_content(formulas[0])]
    end = formulas[0].end()
    for formula in formulas[1:]:
        if not MATHS_CONNECTOR.fullmatch(text[end : formula.start()]):
            break
        answers.append(_content(formula))
        end = formula.end()
    percent = r"\%" if PERCENT.match(text, end) else ""
    return _short_chain(", ".join(answers)) + percent


def _short_chain(text: str) -> str:
    """A chain of equalities cut to its last side; an equation in letters stays whole: it may be an answer."""
    sides = EQUALS.split(text)
    return text if len(sides) == 2 and re.search(r"[A-Za-z]", sides[0]) else last_side(text)


def _unwrapped(sentence: str) -> str:
    """A sentence without the Markdown and quotation marks around it; a prime or star of a formula stays."""
    text = sentence.strip()
    for mark in ("**", "__", "`", '"', "*", "_", "'"):
        # What opens before the marker of the answer closes here: these go without their other end.
        may_be_alone = mark in ("**", "__", "`", '"')
        if text.endswith(mark) and (may_be_alone or text.startswith(mark)):
            text = text.removesuffix(mark).rstrip()
        text = text.removeprefix(mark).lstrip()
    return text


def _without_end_token(text: str) -> str:
    """Drop one "$" at the end that opens no formula: some models are taught to end with it."""
    stripped = text.rstrip()
    if stripped.endswith("$") and len(re.findall(r"(?<!\\)\$", stripped)) % 2 == 1:
        return stripped[:-1]
    return text
