"""Parquet, Arrow and CSV files, row by row."""
