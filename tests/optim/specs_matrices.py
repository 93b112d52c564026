"""Specs of rules for matrices."""

import torch

from tests.optim.spec import (
    LEFT,
    MATRIX,
    RIGHT,
    OptimSpec,
    identity,
    peer,
    rms,
)
from tests.reference import (
    conda,
    muon,
    normuon,
    root,
    scale,
    sinkgd,
    swan,
)

MATRIX_RULES = (
    OptimSpec(
        name="muon",
        inputs=(
            {"ns_dtype": "param"},
            {"ns_dtype": "param", "momentum_form": "ema", "scale": "original", "ns_form": "torch", "ns_steps": 6},
            {
                "ns_dtype": "param",
                "nesterov": False,
                "scale": "spectral_norm",
                "cautious_decay": True,
                "ns_coefficients": "polar_express",
                "ns_eps": 1e-8,
            },
            {
                "ns_dtype": "param",
                "scale": "none",
                "conv_scale": "kernel",
                "ns_steps": 3,
                "ns_coefficients": ((3.0, -4.0, 2.0), (2.0, -1.5, 0.5)),
            },
        ),
        errors=(
            ({"momentum": 1.0}, "momentum"),
            ({"ns_steps": 0}, "ns_steps"),
            ({"ns_steps": 100}, "ns_steps"),
            ({"ns_eps": -1.0}, "ns_eps"),
            ({"scale": "rms"}, "scale"),
            ({"ns_coefficients": "keler_jordan"}, "ns_coefficients"),
            ({"ns_coefficients": ((1.0, 2.0),)}, "ns_coefficients"),
            ({"ns_dtype": "int8"}, "ns_dtype"),
            ({"nesterov": 1}, "nesterov"),
        ),
        reference=muon,
        oracle=lambda params, lr: (
            torch.optim.Muon(params, lr=lr, weight_decay=0.1),
            {"momentum_form": "ema", "scale": "original", "ns_form": "torch", "ns_dtype": "bfloat16"},
        ),
        limits=(
            (
                "momentum 0 orthogonalises the gradient",
                {"ns_dtype": "param", "momentum": 0.0, "scale": "none"},
                lambda g: torch.as_tensor(muon.orthogonalised(g.numpy())),
            ),
            (
                "one step of (1, 0, 0) is normalised SGD",
                {
                    "ns_dtype": "param",
                    "momentum": 0.0,
                    "scale": "none",
                    "ns_steps": 1,
                    "ns_eps": 0.0,
                    "ns_coefficients": ((1.0, 0.0, 0.0),),
                },
                lambda g: g / g.norm(),
            ),
        ),
        symmetries=(
            ("scale, at eps 0", {"ns_dtype": "param", "ns_eps": 0.0}, lambda g: 1024 * g, identity),
            ("rotations", {"ns_dtype": "param"}, lambda g: LEFT @ g @ RIGHT, lambda d: LEFT @ d @ RIGHT),
            ("transposition", {"ns_dtype": "param"}, lambda g: g.T, lambda d: d.T),
        ),
        **MATRIX,
        lr=0.02,
        descent=((0.1, 800), (0.05, 1500)),
        temporaries=8,
        state_bytes=4,
    ),
    OptimSpec(
        name="normuon",
        inputs=(
            {"ns_dtype": "param"},
            {
                "ns_dtype": "param",
                "nesterov": False,
                "update_scale": "match_rms",
                "row_eps": 1e-8,
                "beta2": 0.9,
            },
            {
                "ns_dtype": "param",
                "momentum_form": "heavy_ball",
                "nesterov": False,
                "scale": "spectral_norm",
                "cautious_decay": True,
                "ns_coefficients": "polar_express",
                "ns_eps": 1e-8,
                "row_eps": 1e-8,
            },
        ),
        errors=(
            ({"momentum": 1.0}, "NorMuonRule: momentum"),
            ({"beta2": 1.0}, "beta2"),
            ({"row_eps": -1.0}, "row_eps"),
            ({"rms": 0.0}, "rms"),
            ({"update_scale": "rms"}, "update_scale"),
            ({"scale": "rms"}, "NorMuonRule: scale"),
        ),
        reference=normuon,
        oracle=lambda params, lr: (
            normuon.PublishedNorMuon(params, lr=lr, weight_decay=0.1),
            {"ns_dtype": "param"},
        ),
        limits=(
            (
                "momentum 0 and beta2 0 bring the rows of the orthogonalised gradient to one size",
                {"momentum": 0.0, "beta2": 0.0, "row_eps": 0.0, "update_scale": "match_rms", "rms": 1.0},
                lambda g: (lambda o: o / rms(o, 1))(torch.as_tensor(muon.orthogonalised(g.numpy()))),
            ),
        ),
        symmetries=(
            ("scale, at eps 0", {"ns_eps": 0.0}, lambda g: 1024 * g, identity),
            ("rotations of rows", {}, lambda g: g @ RIGHT, lambda d: d @ RIGHT),
        ),
        **MATRIX,
        lr=0.1,
        descent=((0.5, 250), (0.2, 500)),
        temporaries=8,
        state_bytes=4 + 4 / 3,  # and 4 a row
    ),
    OptimSpec(
        name="root",
        inputs=(
            {},
            {"quantile": 0.5, "nesterov": False, "ns_steps": 6},
            {
                "quantile": None,
                "threshold": 0.7,
                "shape_coefficients": (((4, 3), (3.1943, -3.8221, 1.5322)), ((4, 12), (2.9794, -3.6674, 1.6207))),
            },
        ),
        errors=(
            ({"momentum": 1.0}, "ROOTRule: momentum"),
            ({"quantile": 0.0}, "quantile"),
            ({"quantile": 1.5}, "quantile"),
            ({"quantile": None}, "threshold"),
            ({"threshold": 1.0}, "quantile"),
            ({"quantile": None, "threshold": -1.0}, "threshold"),
            ({"shape_coefficients": ((4, 3), (1.0, 2.0))}, "shape_coefficients"),
        ),
        reference=root,
        oracle=lambda params, lr: (root.PublishedROOT(params, lr=lr, weight_decay=0.1), {}),
        limits=(
            (
                "quantile 1 is Muon",
                {"quantile": 1.0, "momentum": 0.0, "scale": "none"},
                lambda g: torch.as_tensor(muon.orthogonalised(g.numpy())),
            ),
            (
                "threshold 0 leaves nothing",
                {"quantile": None, "threshold": 0.0},
                torch.zeros_like,
            ),
        ),
        symmetries=(
            ("sign", {}, torch.neg, torch.neg),
            ("transposition", {}, lambda g: g.T, lambda d: d.T),
            ("columns in another order", {}, lambda g: g[:, [2, 0, 1]], lambda d: d[:, [2, 0, 1]]),
        ),
        **MATRIX,
        lr=0.02,
        descent=((0.2, 250), (0.1, 500)),
        temporaries=10,
        state_bytes=4,
    ),
    OptimSpec(
        name="conda",
        inputs=({}, {"betas": (0.9, 0.99), "update_proj_gap": 7, "scale": 0.5}),
        errors=(
            ({"betas": (1.0, 0.9)}, "betas"),
            ({"eps": -1e-8}, "eps"),
            ({"scale": -1.0}, "scale"),
            ({"update_proj_gap": 0}, "update_proj_gap"),
            ({"update_proj_gap": 2.5}, "update_proj_gap"),
            ({"num_heads": 2}, "num_heads"),
        ),
        reference=conda,
        oracle=lambda params, lr: (  # it decays after the update: the same step, with other numbers
            peer("Conda", params, lr=lr / (1 - 0.1 * lr), weight_decay=0.1 - 0.01 * lr, betas=(0.9, 0.99)),
            {"betas": (0.9, 0.99)},
        ),
        limits=(
            ("a huge eps is SGD", {"betas": (0.0, 0.9), "eps": 1e12, "scale": 1e12}, lambda g: g * 0.1**0.5),
            (
                "betas 0 is signSGD among the gradient's singular vectors",
                {"betas": (0.0, 0.0), "eps": 0.0},
                lambda g: (lambda v: (g @ v).sign() @ v.T)(torch.linalg.svd(g, full_matrices=False)[2].T),
            ),
        ),
        symmetries=(
            ("scale, at eps 0", {"eps": 0.0}, lambda g: 1024 * g, identity),
            ("rotations of rows", {}, lambda g: g @ RIGHT, lambda d: d @ RIGHT),
        ),
        **MATRIX,
        lr=0.05,
        descent=((0.3, 400), (0.1, 1200)),
        temporaries=10,
        state_bytes=8 + 4 * 9 / 12,  # and the basis [3, 3]
    ),
    OptimSpec(
        name="swan",
        inputs=(
            {"center": False, "beta": 0.5, "steps": 14},
            {"center": False, "alpha": 0.2},
            {"center": True, "steps": 8},
        ),
        errors=(
            ({"alpha": -1.0}, "alpha"),
            ({"steps": -1}, "steps"),
            ({"beta": 1.0}, "beta"),
            ({"center": "no"}, "center"),
        ),
        reference=swan,
        oracle=lambda params, lr: (
            swan.WrittenOut(params, lr=lr, weight_decay=0.1, steps=14, beta=0.5),
            {"center": False, "beta": 0.5, "steps": 14},
        ),
        limits=(
            ("no steps are rows of one size", {"center": False, "alpha": 1.0, "steps": 0}, lambda g: g / rms(g, 1)),
            (
                "many steps orthogonalise",
                {"center": False, "alpha": 1.0, "steps": 60, "beta": 0.5},
                lambda g: torch.as_tensor(sinkgd.normalised((g / rms(g, 1)).numpy(), "spectral")),
            ),
        ),
        symmetries=(
            ("scale", {"center": False}, lambda g: 1024 * g, identity),
            ("rotations of rows", {"center": False}, lambda g: g @ RIGHT, lambda d: d @ RIGHT),
        ),
        **MATRIX,
        lr=1.0,
        descent=((3.0, 300), (2.0, 1000)),
        temporaries=9,
        state_bytes=0,
    ),
    OptimSpec(
        name="sinkgd",
        inputs=(
            {},
            {"alpha": 0.2, "rounds": 2, "norms": ("column", "row")},
            {"rounds": 3, "norms": ("row", "spectral")},
        ),
        errors=(
            ({"alpha": -1.0}, "alpha"),
            ({"rounds": 1.5}, "rounds"),
            ({"norms": ()}, "norms"),
            ({"norms": "row"}, "norms"),
            ({"norms": ("rows",)}, "norms"),
        ),
        reference=sinkgd,
        oracle=lambda params, lr: (sinkgd.ByScales(params, lr=lr, weight_decay=0.1), {}),
        limits=(
            ("one round of rows", {"alpha": 1.0, "rounds": 1, "norms": ("row",)}, lambda g: g / rms(g, 1)),
            ("signSGD", {"alpha": 1.0, "rounds": 1, "norms": ("sign",)}, torch.sign),
            ("no round is the gradient", {"alpha": 1.0, "rounds": 0}, identity),
        ),
        symmetries=(
            ("scale", {}, lambda g: 1024 * g, identity),
            ("sizes of rows", {}, lambda g: g * torch.tensor([[1.0], [2.0], [8.0], [0.5]]), identity),
            ("columns in another order", {}, lambda g: g[:, [2, 0, 1]], lambda d: d[:, [2, 0, 1]]),
        ),
        **MATRIX,
        lr=1.0,
        descent=((3.0, 250), (2.0, 500)),
        temporaries=5,
        state_bytes=0,
    ),
    OptimSpec(
        name="scale",
        inputs=({}, {"momentum": 0.9}, {"normaliser": "l2"}, {"momentum": 0.5, "axis": "outputs"}),
        errors=(
            ({"momentum": 1.0}, "momentum"),
            ({"axis": "rows"}, "axis"),
            ({"normaliser": "max"}, "normaliser"),
        ),
        reference=scale,
        oracle=lambda params, lr: (
            scale.PublishedSCALE(params, lr=lr, weight_decay=0.1, momentum=0.9),
            {"momentum": 0.9},
        ),
        limits=(
            ("rows of rms 1", {}, lambda g: g / rms(g, 1)),
            ("or of norm 1", {"normaliser": "l2"}, lambda g: g / g.norm(dim=1, keepdim=True)),
            ("or columns", {"axis": "outputs"}, lambda g: g / rms(g, 0)),
        ),
        symmetries=(
            ("scale", {"momentum": 0.9}, lambda g: 1024 * g, identity),
            ("rotations of rows", {"momentum": 0.9}, lambda g: g @ RIGHT, lambda d: d @ RIGHT),
        ),
        **MATRIX,
        lr=0.05,
        descent=((0.2, 250), (0.1, 500)),
        temporaries=4,
        state_bytes=0,
    ),
)
