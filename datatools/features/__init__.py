"""Gradient features: extracted, projected, and stored."""
