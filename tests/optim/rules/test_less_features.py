"""The gradient features of LESS are settings of `AdamWRule`: worked examples with numbers from outside this code."""

from dataclasses import replace

import pytest
import torch

from optim import AdamWRule, SGDRule, UpdateMap

CODE = AdamWRule(eps=0.0, eps_root=1e-8, bias_correction=False)
NO_CORRECTION = AdamWRule(bias_correction=False)
PAPER = AdamWRule()

A = {
    "g": [0.02, -0.005, 0, 1e-4],
    "m": [0.01, 0.002, -0.003, 0],
    "v": [4e-4, 1e-6, 9e-8, 0],
    "new m": [0.011, 0.0013, -0.0027, 0.00001],
    "new v": [0.0004, 1.024e-06, 8.991e-08, 1e-11],
    "code": [0.5499931251, 1.2784480437, -8.5419944452, 0.0999500375],
    "no correction": [0.5499997250, 1.2846626043, -9.0042030875, 3.1523091833],
    "paper": [0.1744686875, 0.4075180841, -2.8563409371, 1.0021193460],
    "step": 105,
}
B = {
    "g": [2e-6, -1e-6, 5e-7, 3e-6],
    "m": [-3.368e-7, -2.6961e-7, 3.3326e-8, 6.73e-8],
    "v": [7.553e-13, 2.1739e-13, 4.8634e-15, 8.363e-14],
    "new m": [-1.03120e-07, -3.42649e-07, 7.99934e-08, 3.60570e-07],
    "new v": [7.5854470e-13, 2.1817261e-13, 5.1085366e-15, 9.2546370e-14],
    "code": [-0.0010311609, -0.0034264526, 0.0007999338, 0.0036056833],
    "no correction": [-0.1170561535, -0.7182069467, 0.9818270006, 1.1475287536],
    "step": 0,
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def feature(case, rule):
    state = {"step": torch.tensor(float(case["step"])), "exp_avg": tensor(case["m"]), "exp_avg_sq": tensor(case["v"])}
    update_map = UpdateMap({"p": rule}, {"p": state}, {"p": torch.zeros(4, dtype=torch.float64)})
    one = update_map({"p": tensor(case["g"])})["p"]
    both = update_map.per_sample({"p": torch.stack([tensor(case["g"]), torch.zeros(4, dtype=torch.float64)])})["p"]
    torch.testing.assert_close(both[0], one)
    return one


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("case", [A, B], ids="AB")
@pytest.mark.parametrize(("name", "rule"), [("code", CODE), ("no correction", NO_CORRECTION), ("paper", PAPER)])
def test_worked_examples(case, name, rule):
    if name not in case:
        pytest.skip("the example gives no number for this form")
    torch.testing.assert_close(feature(case, rule), tensor(case[name]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", [A, B], ids="AB")
def test_moments(case):
    state = {"step": torch.zeros(()), "exp_avg": tensor(case["m"]), "exp_avg_sq": tensor(case["v"])}
    _, new = PAPER.update(tensor(case["g"]), state, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(new["exp_avg"], tensor(case["new m"]), rtol=1e-6, atol=1e-13)
    torch.testing.assert_close(new["exp_avg_sq"], tensor(case["new v"]), rtol=1e-6, atol=1e-20)


def test_norms_and_cosines():
    assert float(feature(A, CODE).norm()) == pytest.approx(8.6552054251, rel=1e-9)
    assert float(feature(A, NO_CORRECTION).norm()) == pytest.approx(9.6418662164, rel=1e-9)
    assert cosine(feature(A, CODE), feature(A, NO_CORRECTION)) == pytest.approx(0.9487307784, abs=1e-9)
    assert cosine(feature(B, CODE), tensor(B["new m"])) == pytest.approx(1.0, abs=1e-9)
    assert cosine(feature(B, NO_CORRECTION), tensor(B["new m"])) == pytest.approx(0.8705229500, abs=1e-6)
    assert cosine(feature(B, CODE), feature(B, NO_CORRECTION)) == pytest.approx(0.8705245900, abs=1e-6)


def test_preconditioner_only_is_a_setting():
    """g / (sqrt(v^) + eps) is the rule at b1 = 0; the momentum that all examples share is gone."""
    rule = replace(PAPER, betas=(0.0, 0.999))
    g, v = tensor(A["g"]), tensor(A["new v"])
    want = g / ((v / (1 - 0.999**106)).sqrt() + 1e-8)
    torch.testing.assert_close(feature(A, rule), want, rtol=1e-9, atol=0)


def test_target_side_is_the_gradient():
    assert torch.equal(feature(A, SGDRule()), tensor(A["g"]))
