"""Numbers and texts for readers, in the report, the terminal and error messages.

Texts of data rows are untrusted until they are shown: `visible` (for strings) and `marked` (for HTML) let no character
hide or move others. This module imports neither numpy nor torch.
"""

import math
import unicodedata

from markupsafe import Markup, escape

NBSP = "\u00a0"  # between a number and its unit


def visible(text: str, keep: str = "") -> str:
    r"""Write each character that is invisible or that moves others as its code, such as <U+202E>.

    These are controls (also newline and tab, unless in `keep`), bidirectional and other format characters, line and
    paragraph separators, and halves of surrogate pairs. Joiners between letters or symbols beyond ASCII stay, because
    they shape emoji and Persian, as do the Arabic number signs, which are format characters only by name.

    Args:
        text: The text.
        keep: Characters that stay as they are.

    Example:
        >>> visible("a\tb")
        'a<U+0009>b'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"<U+{ord(c):04X}>" if _hidden(text, i) and c not in keep else c for i, c in enumerate(text))


def _hidden(text: str, i: int) -> bool:
    c = text[i]
    category = unicodedata.category(c)
    if category not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return False
    if c in "\u200c\u200d":
        around = text[i - 1 : i] + text[i + 1 : i + 2]
        return len(around) < 2 or any(unicodedata.category(a)[0] not in "LMS" or a.isascii() for a in around)
    return not ("\u0600" <= c <= "\u0605" or c in "\u06dd\u070f\u08e2")


def marked(value: object) -> object:
    """Return what a template prints for a value: strings escaped, hidden characters as small badges, Markup unchanged.

    Args:
        value: The value.
    """
    if value is None:
        return ""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    if visible(value, "\n\t") == value:
        return escape(value)
    badge = Markup('<span class="u">&lt;U+{:04X}&gt;</span>')
    return Markup("").join(
        badge.format(ord(c)) if _hidden(value, i) and c not in "\n\t" else escape(c) for i, c in enumerate(value)
    )


def breakable(text: str) -> Markup:
    """Return a name as `marked` shows it, with permission to break the line after an underscore.

    Args:
        text: The name.
    """
    return Markup(str(marked(text)).replace("_", "_<wbr>"))


def count(value: float | None) -> str:
    """Return a number with separators, such as 10,000; an en dash for None.

    Args:
        value: The number.
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def plural(value: float, word: str, many: str = "") -> str:
    """Return a number with its noun: '1 row', '2 rows'.

    Args:
        value: The number.
        word: The noun in the singular.
        many: The noun in the plural; by default with an s.
    """
    return f"{count(value)} {word if value == 1 else many or word + 's'}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as a percentage, such as '5.3 %'. A share above 0 is never shown as 0.

    Args:
        value: The share, from 0 to 1.
        digits: Digits after the decimal point.
    """
    if value is None or not math.isfinite(value):
        return "–"
    least = 10.0**-digits
    if 0 < value * 100 < least / 2:
        return f"<{NBSP}{least:.{digits}f}{NBSP}%"
    text = f"{value * 100:.{digits}f}" if value else "0"
    return f"{'100' if value == 1 else text}{NBSP}%"


def duration(seconds: float | None) -> str:
    """Return a duration as text: 0.4 s, 48 s, 12 min 4 s, 3 h 12 min, 2 d 5 h.

    Args:
        seconds: The duration.
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f}{NBSP}s"
    whole = round(seconds)
    for size, big, small, word in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size}{NBSP}{big}" + (f"{NBSP}{rest}{NBSP}{word}" if rest else "")
    return f"{whole}{NBSP}s"


def size(value: float | None) -> str:
    """Return a size such as 38.2 MB, in powers of 1000.

    Args:
        value: The size in bytes.
    """
    if value is None or not math.isfinite(value):
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f}{NBSP}{unit}" if unit == "B" or value >= 99.5 else f"{value:.1f}{NBSP}{unit}"
        value /= 1000
    return f"{value:.1f}{NBSP}TB"


def signed(value: float | None, digits: int = 4) -> str:
    """Return a number with its sign, such as +0.0312, with a true minus sign.

    Args:
        value: The number.
        digits: Digits after the decimal point.
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:+.{digits}f}".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with a given number of significant digits and a true minus sign; an en dash for a missing value.

    Args:
        value: The number.
        digits: Significant digits.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -5 < exponent < 6:
        return minus(f"{value:,.{max(0, digits - 1 - exponent)}f}")
    mantissa = f"{value / 10.0**exponent:.{digits - 1}f}"
    return minus(f"{mantissa}e{exponent}")


def minus(text: str) -> str:
    """Replace the hyphen of a formatted number with a true minus sign; "-0.00" loses its sign.

    Args:
        text: The formatted number.
    """
    return text.lstrip("-") if text.startswith("-") and not text.strip("-0.,") else text.replace("-", "−")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error; if it ends with a colon, the next line is added.

    Args:
        error: The error.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    return told if len(told) <= 500 else told[:499] + "…"


def named(error: BaseException) -> str:
    """Return `first_line`, with the type of the error if the text alone says little, as for KeyError.

    Args:
        error: The error.
    """
    told = first_line(error)
    return f"{type(error).__name__}: {told}" if " " not in told and told != type(error).__name__ else told
