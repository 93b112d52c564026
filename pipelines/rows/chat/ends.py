"""The end of a turn in a rendered text: after its end-of-turn token, before the header of the next turn."""

import os.path
import re
from itertools import pairwise
from typing import Any

_CONTROL_WORDS = re.compile(
    "think|tool|function|reason", re.IGNORECASE
)  # words in added tokens that do not close a turn


class TurnEnds:
    """Finds the end of a turn by the added tokens of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, added)) or "(?!)")
        ends = [text for text in added if not _CONTROL_WORDS.search(text)]
        self._end = re.compile("|".join(map(re.escape, ends)) or "(?!)")

    def of_answer(self, closing: str, following: str) -> str:
        """Return the end-of-turn text at the beginning of the text after an answer.

        It extends to the end of the first special token and of those that adjoin it. Without a special token, it is
        `closing` without the white space at its end.

        Args:
            closing: The text after the final answer of the conversation.
            following: The text after this answer.
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
        """Return how far a turn continues after its last tool name or its reasoning.

        It extends to the token after which only such tokens follow. The text in between may contain tokens too (those
        of a call).

        Args:
            closing: The text after this part when the conversation ends with the turn.
            following: The text after this part.
        """
        common = os.path.commonprefix([closing, following])
        cut = next(
            (token.start() for token in self._token.finditer(following) if token.start() < len(common) < token.end()),
            len(common),
        )
        common = common[:cut]
        tokens = list(self._end.finditer(common))
        if not tokens:  # an incomplete closing does not count
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
    """Return the position after the last character that is a letter, a digit or a closing bracket."""
    return next((k + 1 for k in range(len(text) - 1, -1, -1) if text[k].isalnum() or text[k] in "_}])>"), 0)
