"""Errors of rows that cannot be encoded."""

from pipelines.rows.jsonl import Malformed


class RowError(Malformed):
    """A row that cannot be encoded: `reason` (too_long, no_supervised_token, template_refuses, ...) and `detail`."""


class TooSlow(RowError):
    """The template exceeded its time limit, and would exceed it again."""
