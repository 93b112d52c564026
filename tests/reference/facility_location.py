"""Greedy facility location, written as its definition: plain Python, no tensor, no shortcut."""

from itertools import combinations


def value(similarity, rows):
    """F(S) = sum over i of the largest similarity to a member of S."""
    return sum(max(line[j] for j in rows) for line in similarity)


def greedy(similarity, k):
    """Add the row with the largest F, the lowest index on ties."""
    chosen = []
    for _ in range(k):
        rest = [j for j in range(len(similarity)) if j not in chosen]
        chosen.append(max(rest, key=lambda j: (value(similarity, [*chosen, j]), -j)))
    return chosen


def best(similarity, k):
    """The set of k rows with the largest F, over all of them."""
    return max(combinations(range(len(similarity)), k), key=lambda rows: value(similarity, rows))
