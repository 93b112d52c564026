"""Gradient features: their extraction, projection and storage."""
