"""Coreset methods, one per file: subsets of rows that approximate all of them."""
