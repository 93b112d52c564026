"""From the text that a model writes to its answer: one rule per kind of answer, and when two answers are equal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

from pipelines.rows.formats.contents import REASONING_TAG
from pipelines.settings.metrics import REGEX

_GROUPED = r"\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)"  # 1,234,567 and 12,34,567, but neither 3,4 nor 1,2345
_NUMBER = re.compile(  # a minus behind a number or a word is no sign: 5-3, 2024-05-06
    rf"(?:(?<![\w.)\]])[-+−][$€£¥]?)?(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?"
)
_LETTER = r"[A-Z]"
_SAID = re.compile(rf"answer(?:\s+is|\s*:)?\s*:?\s*\**\(?({_LETTER})\)?(?![\w'])", re.IGNORECASE)
_ALONE = re.compile(rf"\s*\**\(?({_LETTER})\)?(?:[).:,]|\*|\s|$)")
_BRACKETS = re.compile(rf"\(({_LETTER})\)")
_WORD = re.compile(r"\s*[AI]\s+(?!(?:because|since|as|is|and|but)\b)[a-z]")  # an article or a pronoun
_ANSWER_IS = re.compile(r"answer(?:\s+is|\s*:)\s*:?\s*(.+)", re.IGNORECASE)
_BOXED = "\\boxed{"
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")


def after_reasoning(text: str) -> str:
    r"""Return what follows the reasoning of a text (`</think>`, `[/THINK]`, ...); "" if its reasoning never ends.

    Args:
        text: The text.

    Example:
        >>> after_reasoning("<think>3 or 4?</think>\n4"), after_reasoning("<think>3 or"), after_reasoning("4")
        ('\n4', '', '4')
    """
    tags = list(REASONING_TAG.finditer(text))
    if closed := [tag for tag in tags if tag["close"]]:
        return text[closed[-1].end() :]
    return "" if tags and not text[: tags[0].start()].strip() else text


def boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} of a text, with fractions as a/b; None if there is none.

    Args:
        text: The text.

    Example:
        >>> boxed(r"so \boxed{\frac{1}{2}} and no more"), boxed("none")
        ('1/2', None)
    """
    _, found, rest = text.rpartition(_BOXED)
    depth = 1
    for place, character in enumerate(rest if found else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return _without_latex(rest[:place])
    return None


def _without_latex(text: str) -> str:
    return _TEXT.sub(r"\1", _FRACTION.sub(r"\1/\2", text)) if "\\" in text else text


def number(text: str) -> str | None:
    r"""Return the number after the last '####', else the last number of the text.

    Args:
        text: The text.

    Example:
        >>> number("3 + 4 = 7\n#### 7"), number("It costs $1,200."), number("from 3-5"), number("none")
        ('7', '1200', '5', None)
    """
    _, mark, after = text.rpartition("####")
    found = _NUMBER.findall(after) if mark else []
    found = found[:1] or _NUMBER.findall(text)[-1:]
    return re.sub(r"[,$€£¥]", "", found[0]).replace("−", "-").lstrip("+") if found else None


def letter(text: str) -> str | None:
    """Return the letter of an option: after "answer is", else at the start, else the last one in brackets.

    "A" or "I" at the start of a sentence counts only if no letter in brackets follows.

    Args:
        text: The text.

    Example:
        >>> letter("(B) because (A) is wrong"), letter("So the answer is (C)."), letter("maybe")
        ('B', 'C', None)
    """
    said = [found for found in _SAID.findall(text) if found.isupper()]
    if said:
        return str(said[-1])
    alone, brackets = _ALONE.match(text), _BRACKETS.findall(text)
    if alone is not None and not (brackets and _WORD.match(text)):
        return alone.group(1)
    return str(brackets[-1]) if brackets else None


def line(text: str) -> str | None:
    r"""Return the first line that is not blank.

    Args:
        text: The text.

    Example:
        >>> line("\n Paris \nand more")
        'Paris'
    """
    return next((part.strip() for part in text.splitlines() if part.strip()), None)


def last_line(text: str) -> str | None:
    r"""Return what follows "answer is" or "answer:" in the last line that is not blank, else that line.

    Args:
        text: The text.

    Example:
        >>> last_line("We count.\nSo the answer is valid."), last_line("a\nb")
        ('valid.', 'b')
    """
    found = next((part.strip() for part in reversed(text.splitlines()) if part.strip()), None)
    said = _ANSWER_IS.findall(found) if found else []
    return said[-1] if said else found


def whole(text: str) -> str | None:
    """Return the whole text; None if it is blank.

    Args:
        text: The text.
    """
    return text.strip() or None


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "number": number,
    "letter": letter,
    "line": line,
    "last-line": last_line,
    "whole": whole,
}
"""Rule -> text to answer, None where the text has none."""


def extract(rule: str, text: str) -> str | None:
    r"""Return the answer in a text, after its reasoning; None if it has none.

    Args:
        rule: A rule of `EXTRACTORS`, or `regex:PATTERN`, which returns its first group or, without groups, its match.
            A rule of `EXTRACTORS` other than `whole` reads the last `\boxed{...}` alone, if it has an answer.
        text: The text.
    """
    text = after_reasoning(text)
    if rule.startswith(REGEX):
        found = re.search(rule.removeprefix(REGEX), text, re.MULTILINE)
        return None if found is None else found.group(1 if found.re.groups else 0)
    inside = None if rule == "whole" else boxed(text)
    return (EXTRACTORS[rule](inside) if inside is not None else None) or EXTRACTORS[rule](text)


def normalised(text: str) -> str:
    """Return text as it is compared: compatibility forms unified, no case, single spaces, no punctuation around it.

    Args:
        text: The text.

    Example:
        >>> normalised(' "The  Cat." ')
        'the cat'
    """
    plain = " ".join(unicodedata.normalize("NFKC", _without_latex(text)).casefold().split())
    return plain.strip("\"'`*.,;:!?()[]{}$ ") or plain


def equal(answer: str | None, gold: str) -> bool:
    """Return whether an answer is the gold one: the same number, or, if one of them is none, equal when normalised.

    Args:
        answer: The answer; None if there is none.
        gold: The gold answer.

    Example:
        >>> equal("1,200.0", "$1200"), equal("(B)", "b"), equal(None, "a")
        (True, True, False)
    """
    if answer is None:
        return False
    ours, theirs = value_of(answer), value_of(gold)
    if ours is not None and theirs is not None:
        return ours == theirs
    return normalised(answer) == normalised(gold)


def value_of(text: str) -> Decimal | None:
    """Return the number that a text is, with a currency, a percent sign or thousands separators; else None.

    Args:
        text: The text.

    Example:
        >>> value_of("$1,200"), value_of("5 %"), value_of("5 apples") is None
        (Decimal('1200'), Decimal('5'), True)
    """
    plain = _without_latex(text).strip().strip("$€£¥ ").removesuffix("%").strip().rstrip(".").replace("−", "-")
    plain = re.sub(r"^([-+])\s*[$€£¥]", r"\1", plain)
    if grouped := re.match(rf"[-+]?{_GROUPED}", plain):
        plain = grouped[0].replace(",", "") + plain[grouped.end() :]
    over, slash, under = plain.partition("/")
    try:
        value = Decimal(over)
        if slash:
            value = value / Decimal(under)
    except (InvalidOperation, ArithmeticError):
        return None
    return value if value.is_finite() else None


def rule_for(gold: str, turn: str) -> tuple[str, bool]:
    r"""The rule for one row: the first that finds the gold answer in the row's own answer turn.

    Args:
        gold: The gold answer.
        turn: What the answer turn of the row says.

    Returns:
        The rule, and whether any rule finds it; without one, rules cannot judge this row well.

    Example:
        >>> rule_for("7", "3 + 4 = 7\n#### 7"), rule_for("(A)", "(A)"), rule_for("valid", "So the answer is valid.")
        (('number', True), ('letter', True), ('last-line', True))
    """
    rules = [*(["number"] if value_of(gold) is not None else []), "line", "last-line", "whole"]
    if re.fullmatch(rf"\(?{_LETTER}\)?\.?", gold.strip()):
        rules.insert(0, "letter")
    for rule in rules:
        if equal(extract(rule, turn), gold):
            return rule, True
    return rules[0], False
