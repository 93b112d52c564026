"""The experiment on double descent: reference numbers, and the closed form against explicit descent."""

import numpy as np
import pytest
import torch

from optim import SGD, AdamW
from optim.diagnostics import double_descent as dd


@pytest.mark.golden
def test_against_golden(reference):
    stored = reference("double_descent")
    data = dd.Regression(*(torch.tensor(stored[k]) for k in ("X", "y", "X_test", "y_test", "V")))
    assert tuple(stored["widths"]) == dd.WIDTHS and tuple(stored["gd_steps"]) == dd.STEPS
    peak = np.isin(stored["widths"], (36, 40, 44))
    for variant in dd.VARIANTS:
        found = dd.experiment(data, variant=variant)
        for key, values in found.items():
            got, want = np.array(values), stored[f"{variant}/{key}"]
            np.testing.assert_allclose(got[~peak], want[~peak], rtol=1e-4, atol=1e-6, err_msg=f"{variant}/{key}")
            np.testing.assert_allclose(got[peak], want[peak], rtol=1e-2, atol=1e-6, err_msg=f"{variant}/{key}")


@pytest.fixture(scope="module")
def data():
    return dd.make_data()


@pytest.mark.parametrize("variant", dd.VARIANTS)
@pytest.mark.parametrize("width", [10, 40, 120])
def test_the_closed_form_is_explicit_descent(data, variant, width):
    f, _ = dd.features(data, width, variant)
    solved = dd.Solved(f, data.y, dd.start_of(f.shape[1], variant, f))
    theta, lr = solved.start.clone(), len(f) / float(torch.linalg.matrix_norm(f, 2)) ** 2
    for _ in range(1000):
        theta -= lr * f.T @ (f @ theta - data.y) / len(f)
    torch.testing.assert_close(solved.after(1000), theta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [10, 80, 320])
def test_the_minimum_is_that_of_lstsq(data, width):
    f, _ = dd.features(data, width)
    want = torch.linalg.lstsq(f, data.y[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(dd.Solved(f, data.y, torch.zeros(width).double()).minimum(), want, rtol=1e-7, atol=1e-8)


def test_the_peak_comes_with_the_steps(data):
    """The claim: the error's peak at P = n is that of the minimum, and grows with how near descent gets to it."""
    found = dd.experiment(data, widths=(10, 40, 320))
    error = np.array(found["gd_test_mse"])
    assert found["condition_number"][1] > 100 * max(found["condition_number"][0], found["condition_number"][2])
    assert found["min_norm_test_mse"][1] > 2 * max(found["min_norm_test_mse"][0], found["min_norm_test_mse"][2])
    assert error[1, 0] < 1.5 * error[0, 0], "no peak after 100 steps"
    assert (np.diff(error[1]) > 0).all() and (np.diff(np.array(found["gd_train_mse"])[1]) < 0).all()


def test_real_optimizers_descend(data):
    """Full-batch SGD at the closed form's rate is the closed form; batches and Adam get somewhere, reproducibly."""
    f, f_test = dd.features(data, 20)
    lr = len(f) / float(torch.linalg.matrix_norm(f, 2)) ** 2
    train, test = dd.descend(data, 20, lambda named: SGD(named, lr=lr), steps=200)
    theta = dd.Solved(f, data.y, torch.zeros(20).double()).after(200)
    assert train == pytest.approx(float((f @ theta - data.y).square().mean()), rel=1e-9)
    assert test == pytest.approx(float((f_test @ theta - data.y_test).square().mean()), rel=1e-9)
    runs = [dd.descend(data, 20, lambda named: AdamW(named, lr=0.05), steps=200, batch=8, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2] and runs[0][0] < float(data.y.square().mean())


@pytest.mark.parametrize("batch", [None, 8])
def test_both_layers_train_as_a_network_does(data, batch):
    """Against torch's own network and gradients; and the features that move fit what fixed ones cannot."""
    train, test = dd.descend(data, 20, lambda named: SGD(named, lr=0.5), steps=30, batch=batch, both_layers=True)
    network = torch.nn.Sequential(torch.nn.Linear(10, 20, bias=False), torch.nn.ReLU(),
                                  torch.nn.Linear(20, 1, bias=False)).double()  # fmt: skip
    network[0].weight.data, network[2].weight.data = data.v[:20].clone(), torch.zeros(1, 20).double()
    order, theirs = dd._order(40, batch or 40, 0), torch.optim.SGD(network.parameters(), lr=0.5)

    def error(x, y):
        return (network(x / 10**0.5)[:, 0] / 20**0.5 - y).square().mean()

    for _ in range(30):
        rows = next(order)
        theirs.zero_grad()
        (0.5 * error(data.x[rows], data.y[rows])).backward()
        theirs.step()
    assert train == pytest.approx(error(data.x, data.y).item(), rel=1e-9)
    assert test == pytest.approx(error(data.x_test, data.y_test).item(), rel=1e-9)
    fixed, _ = dd.descend(data, 20, lambda named: SGD(named, lr=0.5), steps=30, batch=batch)
    assert train < 0.99 * fixed


def test_data_and_refusals(data):
    again, other = dd.make_data(), dd.make_data(seed=1)
    assert torch.equal(data.x, again.x) and not torch.equal(data.x, other.x)
    f, _ = dd.features(data, 30, "standardised")
    assert f.shape == (40, 31) and torch.allclose(f[:, :30].mean(0), torch.zeros(30).double(), atol=1e-12)
    with pytest.raises(ValueError, match="width = 321"):
        dd.features(data, 321)
    with pytest.raises(ValueError, match="variant = 'other'"):
        dd.features(data, 5, "other")
    with pytest.raises(ValueError, match="standardised features are fixed"):
        dd.descend(data, 5, lambda named: SGD(named), steps=1, variant="standardised", both_layers=True)
