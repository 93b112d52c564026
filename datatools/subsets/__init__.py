"""Subsets that stand for a whole: herding, matching pursuit, facility location."""
