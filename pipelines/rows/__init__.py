"""Rows: files, formats, chat templates, tokens and duplicates."""
