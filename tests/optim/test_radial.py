"""The radial projection: by rows, of the whole tensor, or not at all."""

import torch

from optim.radial import remove_radial


def test_remove_radial_by_rows_then_whole_then_not_at_all():
    param = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    update = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    rows_orthogonal = torch.tensor([[-4.0, 3.0, 7.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    whole_orthogonal = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -12.5]], dtype=torch.float64)  # <g, p> = 25 - 25

    tangent, removed = remove_radial(update, rows_orthogonal, param, delta=0.1, eps=0.0)
    assert removed and torch.allclose((tangent * param).sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    tangent, removed = remove_radial(update, whole_orthogonal, param, delta=0.1, eps=0.0)
    assert removed and abs((tangent * param).sum()) < 1e-12 and (tangent * param).sum(1).abs().min() > 1
    for delta, grad in ((0.0, rows_orthogonal), (0.1, param)):
        tangent, removed = remove_radial(update, grad, param, delta=delta, eps=1e-8)
        assert not removed and torch.equal(tangent, update)
    for shape in ((), (3,), (0, 3), (2, 0)):
        u = torch.ones(shape)
        tangent, removed = remove_radial(u, torch.zeros(shape), u, delta=1.0, eps=1e-8)
        assert not removed and torch.equal(tangent, u)


def test_remove_radial_threshold_falls_with_the_row_length():
    param = torch.zeros(1, 4, dtype=torch.float64)
    param[0, 0] = 1.0
    for cosine, delta, expected in ((0.24, 0.5, True), (0.26, 0.5, False)):  # the limit is delta / sqrt(4)
        grad = torch.tensor([[cosine, (1 - cosine**2) ** 0.5, 0.0, 0.0]], dtype=torch.float64)
        _, removed = remove_radial(torch.ones_like(param), grad, param, delta=delta, eps=0.0)
        assert bool(removed) is expected
