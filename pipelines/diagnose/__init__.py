"""Diagnoses of a training set-up."""
