"""Specs of rules whose state is compressed: codes of 8 bits, signs, and low ranks."""

import torch

from optim import AdamW8bitRule, AdamWRule, LowRank, SGDRule, SophiaGRule
from tests.optim.spec import (
    MATRICES,
    RIGHT,
    OptimSpec,
    identity,
    own_signs,
    peer,
)
from tests.reference import (
    adamw_8bit,
    apollo,
    fira,
    galore,
    lion,
    lion_8bit,
    muon,
    muon_8bit,
    onebit_adam,
)

COMPRESSED = (
    OptimSpec(
        name="onebit_adam",
        inputs=({}, {"betas": (0.8, 0.5), "eps": 1e-6, "freeze_step": 5}),
        errors=(
            ({"betas": (1.0, 0.9)}, "betas"),
            ({"eps": -1e-8}, "eps"),
            ({"freeze_step": -1}, "freeze_step"),
            ({"freeze_step": 2.5}, "freeze_step"),
        ),
        reference=onebit_adam,
        oracle=lambda params, lr: (
            onebit_adam.PublishedOneBitAdam(params, lr=lr, weight_decay=0.1, freeze_step=4),
            {"freeze_step": 4},
        ),
        limits=(("betas 0 and eps 0 is signSGD", {"betas": (0.0, 0.0), "eps": 0.0}, torch.sign),),
        symmetries=(
            ("scale, at eps 0", {"eps": 0.0}, lambda g: 1024 * g, identity),
            ("sign", {}, torch.neg, torch.neg),
        ),
        lr=0.05,
        descent=((0.1, 400), (0.05, 1500)),
        temporaries=5,
        state_bytes=8,
    ),
    OptimSpec(
        name="adamw_8bit",
        inputs=(
            {"min_size": 0, "block_size": 4},
            {"min_size": 0, "block_size": 5, "betas": (0.9, 0.95), "eps": 1e-6, "code": "linear"},
            {"min_size": 6, "block_size": 2, "floor": False},
        ),
        errors=(
            ({"betas": (1.0, 0.9)}, "betas"),
            ({"code": "log"}, "code"),
            ({"block_size": 0}, "block_size"),
            ({"min_size": -1}, "min_size"),
            ({"floor": 1}, "floor"),
            ({"stochastic": "no"}, "stochastic"),
            ({"seed": -1}, "seed"),
            ({"inner": "adamw"}, "inner"),
            ({"inner": SophiaGRule()}, "curvature"),
            ({"inner": AdamW8bitRule()}, "quantised"),
        ),
        reference=adamw_8bit,
        oracle=lambda params, lr: (  # these are too small for codes
            torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=False),
            {"betas": (0.9, 0.95)},
        ),
        limits=(("betas 0 and eps 0 is signSGD", {"betas": (0.0, 0.0), "eps": 0.0, "min_size": 0}, torch.sign),),
        symmetries=(
            ("scale, at eps 0", {"eps": 0.0, "min_size": 0}, lambda g: 1024 * g, identity),
            ("sign, of linear codes", {"min_size": 0, "code": "linear"}, torch.neg, torch.neg),
        ),
        lr=0.05,
        descent=((0.1, 300), (0.05, 1000)),
        temporaries=9,
        state_bytes=4,
    ),
    OptimSpec(
        name="lion_8bit",
        inputs=(
            {"min_size": 0, "block_size": 4},
            {"min_size": 0, "block_size": 3, "betas": (0.95, 0.98), "code": "linear"},
        ),
        errors=(({"betas": (0.9, 1.0)}, "betas"), ({"block_size": 2.5}, "block_size")),
        reference=lion_8bit,
        oracle=lambda params, lr: (  # these are too small for codes
            lion.GoogleLion(params, lr=lr, betas=(0.95, 0.98), weight_decay=0.1),
            {"betas": (0.95, 0.98)},
        ),
        limits=(("betas 0 is signSGD", {"betas": (0.0, 0.0), "min_size": 0}, torch.sign),),
        symmetries=(
            ("scale", {"min_size": 0}, lambda g: 1024 * g, identity),
            ("sign, of linear codes", {"min_size": 0, "code": "linear"}, torch.neg, torch.neg),
        ),
        lr=0.02,
        descent=((0.05, 300), (0.02, 1000)),
        temporaries=7,
        state_bytes=2,
    ),
    OptimSpec(
        name="muon_8bit",
        inputs=(
            {"ns_dtype": "param", "min_size": 0, "block_size": 4},
            {"ns_dtype": "param", "min_size": 0, "nesterov": True, "block_size": 5, "momentum": 0.9},
        ),
        errors=(({"momentum": 1.0}, "momentum"), ({"code": "dynamik"}, "code")),
        reference=muon_8bit,
        oracle=lambda params, lr: (  # these are too small for codes
            torch.optim.Muon(params, lr=lr, weight_decay=0.1),
            {
                "momentum_form": "ema",
                "scale": "original",
                "ns_form": "torch",
                "nesterov": True,
                "ns_dtype": "bfloat16",
            },
        ),
        limits=(
            (
                "momentum 0 orthogonalises the gradient",
                {"ns_dtype": "param", "momentum": 0.0, "scale": "none", "min_size": 0},
                lambda g: torch.as_tensor(muon.orthogonalised(g.numpy())),
            ),
        ),
        symmetries=(
            ("scale, at eps 0", {"ns_dtype": "param", "ns_eps": 0.0, "min_size": 0}, lambda g: 1024 * g, identity),
            ("sign", {"ns_dtype": "param", "min_size": 0}, torch.neg, torch.neg),
        ),
        shapes=MATRICES,
        odd_shapes=((1, 1), (3, 1), (1, 31), (31, 33), (0, 3), (3, 0), (2, 3, 2, 2), (1, 1, 1), (65, 2)),
        min_ndim=2,
        lr=0.02,
        descent=((0.1, 800), (0.05, 1500)),
        temporaries=7,
        state_bytes=2,
    ),
    *(
        OptimSpec(
            name=name,
            inputs=(
                {"rank": 2, "update_proj_gap": 4, "scale": 1.0},
                {"rank": 2, "proj_type": "reverse_std", "betas": (0.8, 0.95), "limiter_reset": False},
                {
                    "rank": 2,
                    "proj_type": "left",
                    "scale_type": "tensor",
                    "limiter": 1.2,
                    "exact_residual": True,
                    "scale_front": True,
                    "scale": 2.0,
                    "update_proj_gap": 50,
                },
            ),
            errors=(
                ({"betas": (1.0, 0.9)}, "betas"),
                ({"rank": 0}, "rank"),
                ({"update_proj_gap": 0}, "update_proj_gap"),
                ({"proj_type": "full"}, "proj_type"),
                ({"projection": "gauss"}, "projection"),
                ({"form": "galore"}, "form"),
                ({"scale": -1.0}, "scale"),
                ({"scale_type": "row"}, "scale_type"),
                ({"limiter": 0.5}, "limiter"),
                ({"limiter_reset": 1}, "limiter_reset"),
                ({"inner": SGDRule(momentum=0.9)}, "correct_bias"),
                ({"inner": AdamWRule()}, "correct_bias"),
                ({"inner": LowRank()}, "inner"),
            ),
            reference=reference,
            oracle=lambda params, lr, name=name: (  # it decays after the update: the same step, with other numbers
                peer(
                    {"galore": "GaLore", "fira": "Fira", "apollo": "APOLLO"}[name],
                    [
                        {
                            "params": params,
                            "rank": 2,
                            "update_proj_gap": 1000,
                            "scale": 0.25,
                            "projection_type": "std",
                        }
                    ],
                    lr=lr / (1 - 0.1 * lr),
                    weight_decay=0.1 - 0.01 * lr,
                ),
                {"rank": 2, "update_proj_gap": 1000, "limiter_reset": False},
            ),
            limits=limits,
            symmetries=(  # random bases do not turn with the gradient
                ("sign", {"rank": 2}, torch.neg, torch.neg),
                ("rotations of the side that is projected", {"rank": 2}, lambda g: g @ RIGHT, lambda d: d @ RIGHT),
            )[: 1 if name == "apollo" else 2],
            shapes=MATRICES,
            odd_shapes=((1, 1), (3, 1), (1, 31), (31, 33), (0, 3), (3, 0), (2, 3, 2, 2), (1, 1, 1), (65, 2)),
            min_ndim=2,
            lr=0.02,
            descent=((0.2, 800), (0.2 if name == "apollo" else 0.1, 800)),
            temporaries=5 if name == "fira" else 4,
            state_bytes=state_bytes,
        )
        for name, reference, state_bytes, limits in (
            (
                "galore",
                galore,
                88 / 12,
                (
                    (
                        "at full rank, betas 0: signSGD in the gradient's own coordinates",
                        {"betas": (0.0, 0.0), "eps": 0.0, "scale": 1.0},
                        own_signs,
                    ),
                ),
            ),
            (
                "fira",
                fira,
                88 / 12,
                (
                    (
                        "exact and at full rank, betas 0: signSGD in the gradient's own coordinates",
                        {"betas": (0.0, 0.0), "eps": 0.0, "scale": 1.0, "exact_residual": True},
                        own_signs,
                    ),
                ),
            ),
            (
                "apollo",
                apollo,
                64 / 12,
                (("a huge eps is SGD over it", {"betas": (0.0, 0.0), "eps": 1e8}, lambda g: g / 1e8),),
            ),
        )
    ),
)
