"""Numbers and texts as a reader sees them, in the report, the terminal and error messages.

Texts of data rows are hostile until shown: `visible` (a string) and `marked` (HTML) let no character hide or move
others. Light to import: no numpy, no torch.
"""

import math
import unicodedata

from markupsafe import Markup, escape

NBSP = "\u00a0"  # between a number and its unit


def visible(text: str, keep: str = "") -> str:
    r"""`text` with each character that is not seen, or that moves others, written as <U+202E>.

    Such are controls (newline and tab too, unless in `keep`), bidi and other format characters, line and paragraph
    separators, and halves of surrogate pairs. Joiners between letters or symbols beyond ASCII stay (they shape emoji
    and Persian), as do the Arabic number signs, which are format characters only by name.
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
    """What the template prints for `value`: strings escaped, hidden characters as small badges; Markup as it is."""
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
    """A name as `marked` shows it, with leave to break the line after an underscore."""
    return Markup(str(marked(text)).replace("_", "_<wbr>"))


def count(value: float | None) -> str:
    """10,000; an en dash for None."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def plural(value: float, word: str, many: str = "") -> str:
    """'1 row', '2 rows'."""
    return f"{count(value)} {word if value == 1 else many or word + 's'}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share 0..1 as '5.3 %'; what is above 0 is never shown as 0."""
    if value is None or not math.isfinite(value):
        return "–"
    least = 10.0**-digits
    if 0 < value * 100 < least / 2:
        return f"<{NBSP}{least:.{digits}f}{NBSP}%"
    text = f"{value * 100:.{digits}f}" if value else "0"
    return f"{'100' if value == 1 else text}{NBSP}%"


def duration(seconds: float | None) -> str:
    """0.4 s, 48 s, 12 min 4 s, 3 h 12 min, 2 d 5 h."""
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
    """38.2 MB, in powers of 1000."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f}{NBSP}{unit}" if unit == "B" or value >= 99.5 else f"{value:.1f}{NBSP}{unit}"
        value /= 1000
    return f"{value:.1f}{NBSP}TB"


def signed(value: float | None, digits: int = 4) -> str:
    """+0.0312, with a true minus sign."""
    return "–" if value is None or not math.isfinite(value) else f"{value:+.{digits}f}".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """`value` with that many significant digits, a true minus sign, and an en dash for what is not a number."""
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
    """`text` with a true minus sign; none on "-0.00", whose digits show no sign."""
    return text.lstrip("-") if text.startswith("-") and not text.strip("-0.,") else text.replace("-", "−")


def first_line(error: BaseException) -> str:
    """What an error of another library says first, for a message of one line; what a colon announces belongs to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    return told if len(told) <= 500 else told[:499] + "…"


def named(error: BaseException) -> str:
    """`first_line`, with the error's kind where the text alone says little: KeyError's is only a key."""
    told = first_line(error)
    return f"{type(error).__name__}: {told}" if " " not in told and told != type(error).__name__ else told
