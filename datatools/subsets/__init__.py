"""Subsets that stand for a whole: herding, facility location."""
