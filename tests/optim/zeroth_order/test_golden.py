"""Zeroth-order methods against the published code and the papers, from recorded directions."""

import numpy as np
import pytest
import torch
from torch import nn

from optim import AdamWRule, Optimizer, SGDRule
from optim.zeroth_order import ZerothOrder
from tests.conftest import golden_folder
from tests.optim import golden
from tests.optim.golden import arrays

pytestmark = pytest.mark.golden

ZEROTH = [name for name, test in golden.HELD_ELSEWHERE.items() if test.startswith("tests/optim/zeroth_order/")]


class Z(nn.Module):
    """Problem Z, as the golden folder's README has it."""

    def __init__(self, inputs, dtype):
        super().__init__()
        (hidden, width), outputs = inputs["init/l1.weight"].shape, len(inputs["init/l2.bias"])
        self.l1, self.layer_norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
        self.l2 = nn.Linear(hidden, outputs)
        self.to(dtype)
        start = {k.removeprefix("init/"): torch.tensor(v, dtype=dtype) for k, v in inputs.items() if "/" in k}
        self.load_state_dict(start)
        self.x, self.y = (torch.tensor(inputs[k], dtype=dtype) for k in "XY")

    def loss(self):
        return 0.5 * (self.l2(self.layer_norm(torch.tanh(self.l1(self.x)))) - self.y).square().sum(1).mean()


def pytest_generate_tests(metafunc):
    found = golden.of_kind(golden_folder(metafunc.config), *ZEROTH)
    metafunc.parametrize("case", found or [None], ids=lambda c: c.id if c else "none")


def settings_of(entry, stored):
    """Arguments of the source; the recorded directions with their masked entries spoiled, so that the mask must act."""
    h, at = entry["hyper_parameters"], {"step": 0}
    spoiled = {k: v for k, v in stored.items() if k.startswith("zeroed/")}

    def noise(name, shape, seed, query):
        z = stored[f"z/{name}"][at["step"]]
        z = torch.tensor(z[query] if z.ndim > len(shape) else z)
        return z + 100 * torch.tensor(spoiled[f"zeroed/{name}"][at["step"]]) if spoiled else z

    def mask(name, shape, seed, query):
        return torch.tensor(spoiled[f"zeroed/{name}"][at["step"]])

    found = {
        "estimator": "forward" if entry["optimizer"] == "forward_grad" else
        {"two_side": "two-sided", "one_side": "one-sided"}[h["perturbation"]],
        "eps": h.get("zo_eps", 1e-3), "q": h.get("q", 1), "noise_fn": noise, "mask_fn": mask,
        "conserve": entry["optimizer"] == "zo_sgd_conserve", "sparsity": h.get("sparsity", 0.0),
        "sign": {"sign(projected_grad)*z": "scalar", "sign(projected_grad*z)": "elementwise"}.get(h.get("sign")),
    }  # fmt: skip
    if "blocks" in h:
        found["blocks"] = lambda name: name.split(".")[0] if name.split(".")[0] in h["blocks"] else None
    if "fo_parameters" in h:
        found["first_order"] = lambda name: name in h["fo_parameters"]
    return found, at


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_trajectory(case, dtype, golden_dir, record_property):
    """In the dtype of the case to its tolerance, and in float32 to that of the float32 case."""
    if case is None:
        pytest.skip(f"no zeroth-order cases in {golden_dir}")
    entry = case.entry
    if entry["param_dtype"] == "float32" and dtype == torch.float64:
        pytest.skip("a float32 case")
    if str(dtype).endswith(entry["param_dtype"]):
        record_property("golden", case.id)
    stored, h = arrays(case.folder / entry["file"]), entry["hyper_parameters"]
    model = Z(arrays(golden.input_file(case)), dtype)
    settings, at = settings_of(entry, stored)
    source = ZerothOrder(model.named_parameters(), module=model, **settings)
    rule = AdamWRule() if entry["optimizer"] == "zo_adam" else SGDRule(momentum=h.get("momentum", 0.0))
    fo = set(h.get("fo_parameters", []))
    lrs = {name: h["lr_fo"] if name in fo else h.get("lr", h.get("lr_zo")) for name, _ in model.named_parameters()}
    optimizer = Optimizer([{"params": [(n, p)], "lr": lrs[n]} for n, p in model.named_parameters()], rule, lr=0.0)
    tolerance = entry["tolerance"] if dtype == torch.float64 else {"rtol": 5e-3, "atol": 5e-4}
    for t in range(len(stored["projected_grad"])):
        at["step"] = t
        returned = source.step(optimizer, model.loss)
        losses = stored.get("forward_losses", np.zeros((99, 0)))[t]
        if losses.size:
            want = losses[~np.isnan(losses)].tolist()
            if settings["estimator"] == "one-sided":  # the published code evaluates f(p) anew for every direction
                assert want[1::2] == pytest.approx([want[1]] * settings["q"], rel=1e-6)
                want = [*want[:2], *want[2::2]]
            assert source.last.losses == pytest.approx(want, rel=tolerance["rtol"], abs=tolerance["atol"]), f"step {t}"
            assert returned == source.last.losses[0]
        if not np.isnan(stored["projected_grad"][t]) and h.get("q", 1) == 1:  # forward gradients record none
            rel = 1e-5 if dtype == torch.float64 else 0.05
            assert source.last.projected_grad[-1] == pytest.approx(stored["projected_grad"][t], rel=rel, abs=2e-3)
        for name, p in model.named_parameters():
            want = torch.tensor(stored[f"param/{name}"][t + 1])
            torch.testing.assert_close(
                p.detach().double(),
                want,
                **tolerance,
                msg=lambda m, t=t, name=name: f"{entry['case']}, step {t}, {name}\n{m}",
            )
