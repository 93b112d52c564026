"""The span of the target's gradients, against dense singular value decompositions in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import DataError, TargetSpan, gram_matrix, span_coefficients


def gradients(m, seed, double=False):
    """Gradients of two parameters; the last one is a sum of the others."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    found = {
        "w": torch.randn(m, 4, 3, generator=generator, dtype=dtype),
        "b": torch.randn(m, 5, generator=generator, dtype=dtype),
    }
    if m > 2:
        for grad in found.values():
            grad[-1] = grad[:-1].sum(0)
    return found


def flat(grads):
    return torch.cat([grad.flatten(1) for grad in grads.values()], 1).double()


@given(st.integers(1, 9), st.integers(0, 2**31), st.none() | st.integers(1, 4))
def test_equals_a_dense_decomposition(m, seed, rank):
    """Singular values, the projection on the span, and cosines within it."""
    target, pool = gradients(m, seed, double=True), gradients(6, seed + 1)
    combined, singular = span_coefficients(gram_matrix(target), rank)
    _, s, vh = torch.linalg.svd(flat(target), full_matrices=False)
    k = min(m if m < 3 else m - 1, rank or m)
    assert combined.shape == (m, k)
    torch.testing.assert_close(singular, s[:k], rtol=1e-6, atol=1e-9)
    basis = flat(target).T @ combined  # [d, k]
    torch.testing.assert_close(basis @ basis.T, vh[:k].T @ vh[:k], rtol=0, atol=1e-5)

    span = TargetSpan.spanned(target, combined, {})
    ours, theirs = span.project(pool).double(), flat(pool) @ vh[:k].T
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-4, atol=1e-4)
    wanted = span.project(target).double()
    cosine = torch.nn.functional.cosine_similarity
    dense = (flat(target) @ vh[:k].T)[None]
    torch.testing.assert_close(
        cosine(ours[:, None], wanted[None], dim=2), cosine(theirs[:, None], dense, dim=2), rtol=0, atol=1e-4
    )
    if rank is None:  # nothing of the target is lost
        torch.testing.assert_close(ours @ wanted.T, flat(pool) @ flat(target).T, rtol=1e-4, atol=1e-3)


def test_worked_example():
    """Two orthogonal target gradients of lengths 3 and 2: their directions are the basis."""
    target = {"w": torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])}
    combined, singular = span_coefficients(gram_matrix(target))
    torch.testing.assert_close(combined, torch.tensor([[1 / 3, 0], [0, 1 / 2]], dtype=torch.float64))
    assert singular.tolist() == [3.0, 2.0]
    span = TargetSpan.spanned(target, combined, {"target": "x"})
    assert span.project({"w": torch.tensor([[6.0, -4.0, 100.0]])}).tolist() == [[6.0, -4.0]]
    assert span.metadata() == {"name": "target-span", "dim": 2, "target": "x"}
    assert span_coefficients(gram_matrix(target), rank=1)[1].tolist() == [3.0]


def test_gradients_without_a_direction_are_refused():
    for gram in (torch.zeros(2, 2), torch.full((1, 1), float("nan"))):
        with pytest.raises(DataError, match="target gradients are all zero, or one is not finite"):
            span_coefficients(gram)
