"""Conversations rendered by chat templates, and the spans that the assistant wrote."""
