"""Selectors, with the input (`Candidates`, `Budget`) and the output (`Selection`) that they share."""
