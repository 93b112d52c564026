"""Lines of JSON, read so that every broken line has a number, an offset and a reason, and no line can stop a job.

A line ends at a newline (byte 10) and nowhere else: U+2028, U+0085 and a lone carriage return are text. A byte-order
mark at the start of the file belongs to the file, not to its first line.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, NoReturn

from datatools import DataError

_BOM = b"\xef\xbb\xbf"
_NOT_TEXT = {  # first bytes of files that are not JSONL
    b"\xff\xfe": "UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "compressed by gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; let its name end in .zst",
    b"\xfd7zXZ\x00": "compressed by xz; let its name end in .xz",
    b"BZh": "compressed by bzip2; let its name end in .bz2",
    b"PK\x03\x04": "a zip archive, which is not supported; unpack it first",
    b"PAR1": "a Parquet table; let its name end in .parquet",
    b"FEA1": "a Feather table of version 1, which is not supported; write it again with a current pyarrow or pandas",
    b"ARROW1": "an Arrow table; let its name end in .arrow",
    b"\xff\xff\xff\xff": "an Arrow table; let its name end in .arrow",
}
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# strings match as a whole, so that brackets inside them do not count; possessive, so linear on any bytes
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one input. Beyond them, a line is bad or a file is refused; the message names the limit."""

    line_bytes: int = 16 << 20
    """The longest line, in bytes."""
    depth: int = 64
    """The deepest nesting of arrays and objects."""
    values: int = 1_000_000
    """The most commas and brackets outside strings in a line; a parsed value takes up to 30 times its bytes."""
    unpacked_bytes: int = 1 << 38
    """The most bytes that a compressed file may unpack to."""
    unpacked_ratio: int = 200
    """The most unpacked bytes per packed byte, checked beyond `ratio_from` bytes. Text has a ratio of 3 to 20."""
    ratio_from: int = 64 << 20
    """The bytes that any file may unpack to, however small it is."""
    batch_bytes: int = 2 << 30
    """The most memory, in bytes, that a batch of a table (Parquet, Arrow) may take beyond twice the file's size."""


class Malformed(Exception):
    """A line or a row that cannot be used: `reason` is a short code, and `detail` describes the fault."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:  # for other processes that index the same input
        return type(self), (self.reason, self.detail)


class Line(NamedTuple):
    """One physical line.

    Attributes:
        number: The number of the line, counted from 1.
        offset: The offset of its first byte.
        length: Its length in bytes, without the newline.
        raw: Its bytes; None if it was longer than the limit and was not kept.
    """

    number: int
    offset: int
    length: int
    raw: bytes | None


def read_lines(
    file: BinaryIO,
    name: str,
    limits: Limits,
    digest: Any = None,
    *,
    start: int = 0,
    end: int | None = None,
    number: int = 1,
) -> Iterator[Line]:
    """Yield the lines of a file in order, blank ones included; memory is limited to one line.

    Args:
        file: The file, at the byte `start`.
        name: The name of the file, for messages.
        limits: The length up to which a line is kept.
        digest: An object whose `update` gets every byte that is read.
        start: The offset of the first line.
        end: The offset from which on no line begins that is wanted; by default the end of the file.
        number: The number of the first line.

    Raises:
        DataError: The file is UTF-16, compressed, or a table, or its first object takes several lines.
    """
    offset, number, opens = start, number - 1, False
    piece = file.readline(limits.line_bytes + 1) if end is None or offset < end else b""
    if not start:
        refuse_other_kinds(piece, name)
    while piece:
        if digest is not None:
            digest.update(piece)
        number += 1
        skip = len(_BOM) if number == 1 and piece.startswith(_BOM) else 0
        length = len(piece)
        raw: bytes | None = piece[skip:]
        while not piece.endswith(b"\n"):  # over the limit, or the file's last line
            if length - skip > limits.line_bytes:
                raw = None
            piece = file.readline(1 << 20)
            if not piece:
                break
            if digest is not None:
                digest.update(piece)
            length += len(piece)
            if raw is not None:
                raw += piece
        ended = int(piece.endswith(b"\n"))
        if raw is not None and ended:
            raw = raw[:-1]
        if raw is not None and len(raw) > limits.line_bytes:
            raw = None
        if number == 2 and opens and raw is not None and raw.lstrip().startswith(b'"'):
            raise DataError(
                f"{name} has a JSON object over several lines, and a row is one line; convert it (jq -c . FILE, or "
                "jq -c '.data[]' FILE if the rows are in a field `data`)"
            )
        opens = number == 1 and raw is not None and raw.strip() == b"{"
        yield Line(number, offset + skip, length - skip - ended, raw)
        offset += length
        piece = file.readline(limits.line_bytes + 1) if end is None or offset < end else b""


def refuse_other_kinds(beginning: bytes, name: str) -> None:
    """Refuse a file of text that is something else by its first bytes.

    Args:
        beginning: The first bytes, at least 8 if the file has so many.
        name: The name of the file.

    Raises:
        DataError: The file is UTF-16, compressed, or a table.
    """
    for magic, what in _NOT_TEXT.items():
        if beginning.startswith(magic):
            raise DataError(f"{name} is {what}")


def is_blank(raw: bytes) -> bool:
    """Return whether a line has only spaces, tabs and carriage returns.

    Args:
        raw: The bytes of the line.
    """
    return not raw.strip(b" \t\r\f\v")


def parse_object(raw: bytes | None, limits: Limits) -> dict[str, Any]:
    """Return the JSON object on a line.

    Args:
        raw: The bytes of the line; None if it was too long.
        limits: The limits of one row.

    Raises:
        Malformed: The line has no valid object. No other error is raised, whatever the bytes are.
    """
    if raw is None:
        raise Malformed("line_too_long", f"more than {limits.line_bytes} bytes (limit line_bytes)")
    if b"\x00" in raw:
        raise Malformed("nul_byte", f"a zero byte at byte {raw.index(0)} of the line, perhaps left by a crash")
    _check_size(raw, limits)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("invalid_utf8", f"byte 0x{raw[error.start]:02x} at byte {error.start} of the line") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        _explain(text, error)
    if not isinstance(value, dict):
        raise Malformed("not_an_object", f"{json_type(value)} where an object {{...}} was expected")
    if _SURROGATE_ESCAPE.search(raw):
        _check_surrogates(value)
    return value


def parse_inside(text: str) -> Any:
    """Return the JSON value in a string of a row, under the rules for rows.

    Args:
        text: The string.

    Raises:
        Malformed: The value breaks a rule.
        ValueError: The string is not JSON.
    """
    _check_size(text.encode("utf-8"), Limits())
    value = _DECODER.decode(text)
    _check_surrogates(value)
    return value


def json_type(value: Any) -> str:
    """Return the JSON name of a value's type, with its article.

    Args:
        value: A parsed JSON value.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def shown(text: str, width: int = 60) -> str:
    """Return a text for a message: on one line, with control characters escaped, cut to a width.

    Args:
        text: The text.
        width: The maximum number of characters.
    """
    text = text if len(text) <= width else text[: width - 3] + "..."
    return ascii(text) if not text.isprintable() else repr(text)


def _check_size(raw: bytes, limits: Limits) -> None:
    """Check depth and number of values before the parser builds anything, because it recurses and objects are large."""
    opening = raw.count(b"[") + raw.count(b"{")
    if opening > limits.depth:
        depth = 0
        for match in _BRACKETS.finditer(raw):
            first = match.group()[:1]
            if first in b"[{":
                depth += 1
                if depth > limits.depth:
                    raise Malformed("too_deep", f"more than {limits.depth} levels of nesting (limit depth)")
            elif first in b"]}":
                depth -= 1
    if opening + raw.count(b",") > limits.values:
        outside = _STRING.sub(b"", raw)
        if outside.count(b",") + outside.count(b"[") + outside.count(b"{") > limits.values:
            raise Malformed("too_many_values", f"more than {limits.values} values (limit values)")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and seen[key] != value:
                raise Malformed("duplicate_key", f"key {shown(key)} occurs twice with different values")
            seen[key] = value
    return result


def _constant(name: str) -> NoReturn:
    raise Malformed("nan_literal", f"{name} is not JSON; write null or leave the field out")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Malformed("number_overflow", f"{shown(text, 30)} is beyond a 64-bit float")
    return value


def _int(text: str) -> int:
    if len(text) > 4000:  # Python refuses more than 4300 digits
        raise Malformed("number_overflow", f"an integer of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int)


def _explain(text: str, error: json.JSONDecodeError) -> NoReturn:
    """Raise the reason code of a syntax error; the parser's own messages differ between Python versions."""
    at, end = error.pos, len(text.rstrip())
    where = f"at character {at} of the line"
    before = text[:at].rstrip()
    if error.msg.startswith("Extra data"):
        if text[at] == "{":
            raise Malformed("two_objects", f"a second object starts {where}")
        raise Malformed("extra_data", f"{shown(text[at:], 30)} after the object, {where}")
    if re.match(r"\s*\{\s*'", text):
        raise Malformed("python_repr", "single quotes, as in a printed Python dict; write JSON with json.dumps")
    if text[at : at + 1] == "\ufeff":
        raise Malformed("byte_order_mark", f"a byte-order mark inside the file, {where}")
    if error.msg.startswith("Invalid control character"):
        raise Malformed("control_character", f"{shown(text[at])} unescaped inside a string, {where}")
    if error.msg.startswith("Unterminated string") or at >= end or end == 0:
        raise Malformed("truncated_json", f"the line ends inside the object ({error.msg.lower()})")
    if (text[at] in "]}" and before.endswith(",")) or (
        text[at] == "," and error.msg.startswith("Illegal trailing comma")
    ):
        raise Malformed("trailing_comma", f"a comma before {text[at]!r} {where}")
    raise Malformed("invalid_json", f"{error.msg[:1].lower()}{error.msg[1:]} {where}, near {shown(text[at:], 30)}")


def _check_surrogates(value: Any) -> None:
    if isinstance(value, str):
        found = _SURROGATE.search(value)
        if found:
            raise Malformed(
                "lone_surrogate", f"an unpaired surrogate (\\u{ord(found.group()):04x}) in {shown(value, 30)}"
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key)
            _check_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item)
