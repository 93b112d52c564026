"""Accuracy on held-out rows: options ranked by likelihood, generated answers, and generated code run by its tests."""
