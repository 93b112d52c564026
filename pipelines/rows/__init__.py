"""Rows: files, formats, chat templates, tokens, duplicates."""
