"""What an unknown word probably means."""

import difflib
from collections.abc import Iterable
from os.path import commonprefix


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown word: the nearest known one in any case, or all of them."""
    by_lower = {name.lower(): name for name in sorted(known)}
    word = word.lower()
    close = difflib.get_close_matches(word, by_lower, n=3)
    if not close:
        return f"; known: {', '.join(by_lower.values())}"

    def nearness(name: str) -> tuple[float, int, str]:  # of "nadam" and "adamw", "adam" more likely means the second
        return difflib.SequenceMatcher(None, name, word).ratio(), len(commonprefix([name, word])), name

    return f"; did you mean {by_lower[max(close, key=nearness)]!r}?"
