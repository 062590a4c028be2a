r"""Reading a number out of text: strictly where it is the right answer, and as the last word where a policy writes it.

What cannot be read for certain is no number: a fraction, a range, a product or a sum, a list, an exponent, a number
that is denied ("not 5") or scaled ("5 million"). Paying such a response would teach the policy to write it.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from numbers import Number
from typing import Any

MAX_CHARACTERS = 200
"""Of a number; longer ones are no answer and would cost time."""
# Commas count as part of a number only where they part thousands.
_DIGITS = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?|(?<![\w.])\.[0-9]+"
)
# "-$1,234.50", "42 %", "90°", "3."
_PLAIN = re.compile(rf"([-+]?)\s?[$€£]?([-+]?)({_DIGITS})\s?[%°]?\.?")
# "90^\circ", "90^{\circ}"
_DEGREES = re.compile(r"\s*\^\s*(?:\\circ\b|\{\s*\\circ\s*\})")
_NUMBER = re.compile(_DIGITS)
# "\boxed{", "\boxed {"
_BOXED = re.compile(r"\\boxed\s*\{")
# What stands directly before the sign or the first digit of a number that is part of something else.
_OPERAND_BEFORE = re.compile(
    r"(?:[*/^\u00d7·÷√±+<≤≥∓]|\^\s*\{|[<>]=|(?<![-=])(?<!</\w)(?<!\w)>|[0-9][,:.'\u2019]|[0-9][ \t]+"
    r"|[0-9]\s*(?:,|;|-|\u2013|\bor\b|\band\b|\bto\b|&|\||x)\s*"
    # "x = 3 or x = 5"
    r"|[0-9]\W{0,3}\bor\b[^0-9.,;:!?\n]{0,12}"
    r"|\bor\b|\b(?:(?:more|less|greater|fewer) than|minus|negative|times|plus|(?:divided|multiplied) by|mod|out of)\b"
    # "\times 5", "\sqrt[3]{5", "\log_{2} 5", "\pmod{5"
    r"|\\(?:times|cdot|div|pm|leq?|geq?|lt|gt|sqrt|log|ln|pi|[pb]?mod)(?![A-Za-z])"
    r"(?:\[[^\[\]]*\]|_(?:\w|\{[^{}]*\}))?\s*[({]?"
    # "\frac{3}{5", "\frac{\sqrt{3}}{5"
    r"|\\(?:[cdt]?frac|[dt]?binom)\s*(?:\{?[^{}]*\}?|\{(?:[^{}]|\{[^{}]*\})*\}\s*)\{?"
    r"|[({\[]\s*[-+]?[0-9.]+\s*,)\s*$",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|except|unlike|without|(?:rather|other) than|instead of)\b"
    r"|n['\u2019]t\b|≠|!=|\\neq?\b)"
    r"[^0-9.;,:!?\n]{0,30}$",
    re.IGNORECASE,
)
_OPERAND_AFTER = re.compile(
    r"\s*(?:\\(?:text|mathrm|mbox)\{\s*)?(?:[*/^\u00d7·÷√π∞²³½¼¾+]|,[0-9]|\.[0-9]|:\s*[0-9]|[-\u2013]\s*[A-Za-z]\b(?!\w)|<[^/A-Za-z|]|[≤≥]|or\b"
    r"|\\(?:times|cdot|div|pm|sqrt|frac|pi|leq?|geq?|infty)\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|quarters?)\b)",
    re.IGNORECASE,
)
# "5x2", "5x", "5k", "5th", "5(x + 1)"
_DIRECTLY_AFTER = re.compile(r"(?:x[0-9]|(?:[abijknpqrtuvwxyzKMB]|st|nd|rd|th)\b|\(\s*[A-Za-z0-9]|[{\[_])")
_DENIED_AFTER = re.compile(
    r"\W{0,4}\s*(?:which\s+)?(?:is|was|would be)\s*"
    r"(?:n['\u2019]t|not|(?:an?\s+|the\s+)?(?:wrong|incorrect|false|impossible))\b"
    r"|\s*\((?:wrong|incorrect|false)\b",
    re.IGNORECASE,
)
# Letters in front make a name or, behind a caret, a unit's exponent: cm^2, H2O, x_1.
_PART_OF_A_NAME = re.compile(r"(?:[^\W\d]|_\{?|[A-Za-z]\s*\^\s*\{?-?|\\(?:text|mathrm)\{[^{}]*\}\s*\^\s*\{?-?)$")

# "2. Divide by 3.", "- 3) Add."
_LIST_ITEM = re.compile(r"^[ \t>*#-]*([0-9]{1,3})[.)][ \t]", re.MULTILINE)
"""The number of an item in a list, at the beginning of a line."""
_MAX_FORMULA = 1000
"""Characters of a formula that is looked at."""
# Dollar signs are formulas' only where no space is inside and no digit behind: "$5 and $6" are prices.
_MATH = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\$])\$(?![\s$])([^$\n]*?)(?<![\s\\])\$(?![\d$])|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
# "So the answer is: " in front of "x + 1"
_ANSWER_IS = re.compile(r"^.*\banswer\b\W*(?:is|:|=)?\W*?(?=[-+.\w\\({\[≠])", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox)\{([^{}]*)\}")
# Three letters in a row, or a short word: math-verify would read a product of letters.
_MISREAD = re.compile(r"(?:hundred|thousand|million|billion|trillion|dozen)s?\b|\d\s+\d|\d[eE][-+]?\d|\d{4}-\d\d?-\d")
"""Mixed numbers, exponents and dates: math-verify reads 1 1/2 as 1, and subtracts."""
_PROSE = re.compile(r"[^\W\d_]{3,}|\b(?:no|is|if|to|of|at|it|we|by|do|so|be|as)\b", re.IGNORECASE)


def answer_text(response: str, prompt: str = "") -> str:
    """Return what a response says behind its thoughts (`behind_thought`)."""
    from remax_lightning.data.conversations import behind_thought  # here, since it loads much

    return behind_thought(response, prompt)


def right_answer_text(value: Any) -> str | None:
    """Return a right answer as text; None for what is no text, no number and no message of the assistant."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = value[-1].get("content")  # a response with a thought or a call of a tool is a message in the row
    return str(value) if isinstance(value, str | Number) and not isinstance(value, bool | complex) else None


def plain_number(text: str) -> Fraction | None:
    """Return the number that `text` is as a whole, exactly; None where it is anything else.

    Signs, thousands parted by commas, a currency sign before and a percent sign, degree sign or full stop after are
    read, as are the marks that LaTeX puts around a number; white space around it is ignored.
    """
    text = _DEGREES.sub("°", _normal(text)).strip()
    if (boxed := _boxed(text)) is not None and text.startswith("\\boxed") and text.endswith("}"):
        text = boxed[1]
    if len(text) > MAX_CHARACTERS or (match := _PLAIN.fullmatch(text.strip())) is None:
        return None
    if match[1] and match[2]:
        return None
    return _value(match[3], negative="-" in (match[1], match[2]))


def final_number(text: str) -> Fraction | None:
    r"""Return the number that a response gives as its answer; None where it gives none, or none for certain.

    It is the last number of the last `\boxed{...}`, else of what follows the last `####`, else of the whole text.
    """
    text, before, after = _DEGREES.sub("°", _normal(text)), "", ""
    if (boxed := _boxed(text)) is not None:
        before, text, after = boxed
    elif "####" in text:
        text = text.rpartition("####")[2]
    if _DENIED_BEFORE.search(before[-80:]) or (boxed is not None and _OPERAND_AFTER.match(after[:40])):
        return None
    # "1. Add. 2. Divide." on two lines: the numbers of the items are no answers, one that stands alone may be.
    items = {item.start(1): int(item[1]) for item in _LIST_ITEM.finditer(text)}
    counted = {place for place, number in items.items() if number - 1 in items.values() or number + 1 in items.values()}
    for match in reversed(list(_NUMBER.finditer(text))):
        if match.start() in counted:
            continue
        # Only the neighborhood is looked at, so that a long text costs no more than a short one.
        left, right = text[max(0, match.start() - 80) : match.start()], text[match.end() : match.end() + 80]
        if _PART_OF_A_NAME.search(left):
            continue
        return _standing_alone(left, match[0], right)
    return None


def gold_formula(text: str) -> str | None:
    r"""Return the formula that a right answer is, as LaTeX without dollar signs; None where it is prose, or nothing.

    A worked solution has it in its `\boxed{...}` or after `####`; with several boxes that differ it has none for
    certain.
    """
    if (boxed := _boxed(text)) is not None:
        before = _boxed(boxed[0])
        if before is not None and "".join(before[1].split()) != "".join(boxed[1].split()):
            return None
        text = boxed[1]
    return _formula(text.rpartition("####")[2])


def final_formula(text: str) -> str | None:
    r"""Return the formula that a response gives as its answer, as LaTeX without dollar signs; None where it gives none.

    It is the last `\boxed{...}`, else what follows the last `####`, else the last formula between dollar signs or
    `\(...\)`, else the last line, without words such as "the answer is" before it, else the last number.
    """
    before, after = "", ""
    if (boxed := _boxed(text)) is not None:
        before, text, after = boxed
    elif "####" in text:
        text = text.rpartition("####")[2]
    elif (segments := list(_MATH.finditer(text))) and (last := segments[-1]):
        before, text, after = text[: last.start()], next(filter(None, last.groups())), text[last.end() :]
    else:
        lines = text.strip().splitlines() or [""]
        text = _ANSWER_IS.sub("", lines[-1])
        if _formula(text) is None:
            number = final_number(text)
            return None if number is None else str(number)
    is_denied = _DENIED_BEFORE.search(_normal(before[-80:])) or _DENIED_BEFORE.match(text.strip()[:4])
    if is_denied or _OPERAND_AFTER.match(_normal(after[:40])) or _DENIED_AFTER.match(after[:40]):
        return None
    return _formula(text)


def voted_answer(text: str) -> Fraction | str | None:
    """Return the answer that a response votes for, so that equal answers are equal: a number, a formula, else a line.

    That is `final_formula`, a number where it is one, a formula without its spaces; of a response without a formula the
    last line in small letters; None for a blank one, and for a thought that is not closed.
    """
    text = answer_text(text)
    formula = final_formula(text)
    if formula is None:
        lines = text.strip().casefold().splitlines()
        return lines[-1].strip(" .") if lines else None
    number = plain_number(formula)
    return "".join(formula.split()) if number is None else number


def words_of(formula: str) -> str | None:
    r"""Return the words of an answer that is only `\text{...}`, in small letters, without brackets; None for others."""
    match = _TEXT.fullmatch(formula.strip())
    return match[1].strip(" ().").casefold() if match else None


def score_of_plain_text(gold: str, response: str) -> float | None:
    """Return 1.0 or 0.0 where right answer and response are words or plain numbers, None where math-verify decides."""
    # ---- Words: the same ones, whatever their case ----
    answer, expected = final_formula(response), plain_number(gold)
    # \text{odd}; one letter, as in \text{B}, may be a formula, too
    if (words := words_of(gold)) is not None and len(words) > 1:
        boxed = _boxed(response)  # \boxed{Evelyn}, without \text
        given = boxed[1].strip(" ().").casefold() if boxed else None
        return float(words in (given, words_of(answer) if answer is not None else None))
    # ---- Bases of numbers, which math-verify leaves out ----
    if answer is not None and None not in (bases := (_base(gold), _base(answer))) and len(set(bases)) > 1:
        return 0.0
    # ---- A number on one side only ----
    if expected is None or answer is None:
        # Prose may still end with a number: "so it is 5 apples".
        return None if expected is None else float(final_number(response) == expected)
    # A percent sign is not read here: whether 50\% equals 0.5 is left to math-verify.
    number = plain_number(answer)
    if number == expected:
        return 1.0
    return None if number is None or "%" in gold + answer else 0.0


def _base(formula: str) -> str | None:
    # "2516_8", "2516_{8}" -> "8"
    match = re.fullmatch(r"\s*[0-9A-Fa-f.]+\s*_\s*\{?\s*(\d+)\s*\}?\s*", formula)
    return match[1] if match else None


def num_parts(formula: str) -> int:
    """Return how many values a formula lists: those between commas outside of brackets, and inside of a set's.

    A thousands separator is no comma of a list: plain numbers are read before.
    """
    # "\{1, 2\}" -> 2, "1, 2" -> 2, "(1, 2)" -> 1
    text = re.sub(r"\\left|\\right|\\[,;: ]", "", formula).replace("\\{", "{").replace("\\}", "}").strip()
    inside, depth = text[1:-1] if text[:1] + text[-1:] == "{}" else text, 0
    parts = 1
    for character in inside:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        parts += depth <= 0 and character in ",;"
    return parts


def _formula(text: str) -> str | None:
    """Return `text` in the LaTeX that math-verify reads, None where it is prose."""
    # ---- Without its delimiters: "$x + 1$." -> "x + 1" ----
    text = text.strip().removesuffix(".").strip()
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start + end):
            text = text.removeprefix(start).removesuffix(end).strip().removesuffix(".")
    # ---- In the spelling that math-verify reads: "\dfrac" -> "\frac", "2**3" -> "2^3" ----
    text = _normal(re.sub(r"\\[dtc]frac", r"\\frac", text.replace("$", " "))).replace("**", "^").strip()
    if re.search(r"[eE]", text) and (number := plain_number(text)) is not None:  # math-verify reads 1e-9 as e - 9
        text = format(Decimal(number.numerator) / Decimal(number.denominator), "f")
    # "5%" would begin a comment in LaTeX
    text = text.replace("%", "\\%").replace("≠", "\\neq ").replace("π", "\\pi ").replace("∞", "\\infty ")
    # "2 or 3" -> "2 , 3"
    text = re.sub(r"\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", text)
    # "√2" -> "\sqrt{2}", "√(x + 1)" -> "sqrt(x + 1)"
    text = re.sub(r"√\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}", text).replace("√", "sqrt")
    # "sqrt(2)" -> "\sqrt{2}"
    text = re.sub(r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|log|ln|exp|pi|infty)(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    # ---- Words outside of commands make it prose ----
    bare = re.sub(r"\\(?:begin|end)\{\w+\*?\}|\\(?:text\w*|mathrm|mbox|operatorname)\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    if not text or len(text) > _MAX_FORMULA or _MISREAD.search(text) or _PROSE.search(bare):
        return None
    return text


def _standing_alone(left: str, digits: str, right: str) -> Fraction | None:
    """Return the value of a number, None where what stands around it makes it part of something else."""
    left = re.sub(r"[$€£]\s?$", "", left)
    sign = re.search(r"[-+]$", left)
    outer = re.sub(r"[$€£]\s?$", "", left[: sign.start()]) if sign else left
    # After an operand a sign subtracts, and with a space behind it, it may be a bullet or a dash.
    if sign and re.search(r"(?:[\w)\]}%!]|(?:[0-9)\]}]|(?<![\w])[B-HJ-Zb-z])\s+)$", outer):
        return None
    if re.search(r"(?:^|\s)[-\u2013]\s+$", outer) or _OPERAND_BEFORE.search(outer) or _DENIED_BEFORE.search(outer):
        return None
    if _DIRECTLY_AFTER.match(right) or _OPERAND_AFTER.match(right) or _DENIED_AFTER.match(right):
        return None
    if len(digits) > MAX_CHARACTERS:
        return None
    return _value(digits, negative=sign is not None and sign[0] == "-")


def _boxed(text: str) -> tuple[str, str, str] | None:
    r"""Return what stands before, in and after the last `\boxed{...}`; None without one."""
    start = None
    # the last one counts
    for start in _BOXED.finditer(text):  # noqa: B007
        pass
    if start is None:
        return None
    # To the brace that closes it, or to the end of the text: "\boxed{\frac{1}{2}}" -> "\frac{1}{2}"
    depth = 1
    for i in range(start.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[: start.start()], text[start.end() : i], text[i + 1 :]
    return text[: start.start()], text[start.end() :], ""


def _normal(text: str) -> str:
    """Return `text` with one spelling for minus, percent and currency signs, without marks of emphasis and LaTeX's."""
    text = re.sub(r"[\u2212\uFF0D\uFE63]", "-", text)
    text = re.sub(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ",", text)  # 5\,000
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").replace("\\!", "")
    text = re.sub(r"\\[,;: ]|[\u00a0\u202f\u2009]", " ", text)
    # **5** is emphasis, 2**3 is a power.
    text = re.sub(r"(?<![\w)*])\*{1,3}(?=[^\s*])|(?<=[^\s*])\*{1,3}(?![\w(*])|`", "", text)
    return re.sub(r"\$([^$\n]*?)\$", r" \1 ", text)


def _value(digits: str, *, negative: bool) -> Fraction:
    value = Fraction(Decimal(digits.replace(",", "")))
    return -value if negative else value
