"""Where a turn ends in a rendered text: through its end-of-turn token, not into the header of the next turn."""

import os.path
import re
from itertools import pairwise
from typing import Any

_CONTROL_WORDS = re.compile("think|tool|function|reason", re.IGNORECASE)  # in added tokens that close no turn


class TurnEnds:
    """Finds the end of a turn by the added tokens of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, added)) or "(?!)")
        ends = [text for text in added if not _CONTROL_WORDS.search(text)]
        self._end = re.compile("|".join(map(re.escape, ends)) or "(?!)")

    def of_answer(self, closing: str, following: str) -> str:
        """The end-of-turn text that `following` starts with: through its first special token, with those that adjoin;
        without one, all of `closing` but the white space at its end.
        """
        common = os.path.commonprefix([closing, following])
        found = self._token.search(common)
        if found:
            end = found.end()
            while more := self._token.match(common, end):
                end = more.end()
            return common[:end]
        whole = closing.rstrip()
        return whole if following.startswith(whole) else ""

    def of_call(self, closing: str, following: str) -> int:
        """How far a turn continues after its last name of a tool, or its reasoning: through the token after which only
        such tokens follow. What stands in between may contain tokens as well (those of a call).
        """
        common = os.path.commonprefix([closing, following])
        cut = next(
            (token.start() for token in self._token.finditer(following) if token.start() < len(common) < token.end()),
            len(common),
        )
        common = common[:cut]
        tokens = list(self._end.finditer(common))
        if not tokens:  # a part of what closes the turn is none of it
            return len(common.rstrip() if common == closing else common[: _last_word(common)])
        first = len(tokens) - 1
        if common[tokens[first].end() :].strip():
            return len(common.rstrip())
        while first and not common[tokens[first - 1].end() : tokens[first].start()].strip():
            first -= 1
        end = tokens[first].end()
        for before, after in pairwise(tokens[first:]):
            if before.end() != after.start():
                break
            end = after.end()
        return end


def _last_word(text: str) -> int:
    """The place after the last character that is a letter, a digit or a closing bracket."""
    return next((k + 1 for k in range(len(text) - 1, -1, -1) if text[k].isalnum() or text[k] in "_}])>"), 0)
