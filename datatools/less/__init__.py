"""LESS: from features to one score per row."""
