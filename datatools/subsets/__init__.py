"""Coreset methods, one per file: subsets of rows that stand for all of them."""
