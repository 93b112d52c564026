"""Texts of rows in a form in which repeated rows are equal."""

import hashlib
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from pipelines.rows.row import Row

_LONG_ANSWER = 20  # characters


def content_of(row: Row) -> bytes:
    """Return 16 bytes that are equal for rows whose turns are equal in their normal form.

    Args:
        row: The row.
    """
    return xxhash.xxh3_128_digest("\0".join(normal_turn(role, text) for role, text in row.turns).encode())


def opening_of(row: Row) -> int:
    """Return a number that is equal for conversations with the same first turn, system prompts apart.

    Rows that repeat each other, or each other's beginning, have equal openings.

    Args:
        row: The row.
    """
    first = next((turn for turn in row.turns if turn[0] not in _SYSTEM), ("", ""))
    return xxhash.xxh3_64_intdigest(normal_turn(*first).encode())


_SYSTEM = ("system", "developer")


def normal_turn(role: str, text: str) -> str:
    """Return a turn after Unicode normalisation (NFKC), with each run of white space as one space.

    Args:
        role: The role.
        text: The text.
    """
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)  # which leaves ASCII as it is
    return f"{role}\0{' '.join(text.split())}"


class Beginning(NamedTuple):
    """A conversation up to one of its answers, as digests with and without its system prompts."""

    full: str
    bare: str
    long: bool
    """Whether the answer is so long that no other system prompt would lead to it by chance."""


def beginnings(row: Row) -> list[Beginning]:
    """Return the conversation up to each of its answers.

    Args:
        row: The row.
    """
    found: list[Beginning] = []
    full, bare = (hashlib.blake2b(digest_size=16) for _ in range(2))
    for role, text in row.turns:
        turn = f"{normal_turn(role, text)}\0".encode()
        full.update(turn)
        if role not in _SYSTEM:
            bare.update(turn)
        if role == "assistant":
            found.append(Beginning(full.hexdigest(), bare.hexdigest(), len(text) >= _LONG_ANSWER))
    return found


def beginnings_of_other(row: Row) -> Iterator[str]:
    """Yield what `beginning_of_test` may yield for a test row that this row contains.

    Args:
        row: The other row.
    """
    for beginning in beginnings(row):
        yield beginning.full
        yield f"bare {beginning.bare}"


def beginning_of_test(row: Row) -> Iterator[str]:
    """Yield identifiers of the conversation. A short answer under another system prompt answers another question.

    Args:
        row: The test row.
    """
    for full, bare, long in beginnings(row)[-1:]:
        yield full
        yield bare  # equal to a conversation without a system prompt
        if full == bare or long:
            yield f"bare {bare}"
