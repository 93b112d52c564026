"""Specs of rules that share a learning rate or a moment within a block."""

import torch

from tests.optim.spec import (
    LEFT,
    RIGHT,
    OptimSpec,
    identity,
    rms,
)
from tests.reference import (
    adam_mini,
    blockwise_adam,
    sgd_sai,
)

BLOCKS = (
    OptimSpec(
        name="adam_mini",
        inputs=(
            {},
            {"blocks": "row", "betas": (0.9, 0.95), "eps": 1e-6},
            {"blocks": "element"},
            {"blocks": 1, "betas": (0.8, 0.99)},
        ),
        errors=(
            ({"betas": (1.0, 0.9)}, "betas"),
            ({"eps": -1e-8}, "eps"),
            ({"blocks": "head"}, "blocks"),
            ({"blocks": 0}, "blocks"),
            ({"blocks": True}, "blocks"),
        ),
        reference=adam_mini,
        oracle=lambda params, lr: (
            adam_mini.PublishedAdamMini(params, lr=lr, weight_decay=0.1),
            {"blocks": "row"},
        ),
        limits=(
            ("betas 0 is normalised SGD", {"betas": (0.0, 0.0), "eps": 0.0}, lambda g: g / rms(g)),
            ("of each row", {"betas": (0.0, 0.0), "eps": 0.0, "blocks": "row"}, lambda g: g / rms(g, 1)),
            ("or signSGD", {"betas": (0.0, 0.0), "eps": 0.0, "blocks": "element"}, torch.sign),
        ),
        symmetries=(
            ("scale, at eps 0", {"eps": 0.0}, lambda g: 1024 * g, identity),
            ("rotations", {}, lambda g: LEFT @ g @ RIGHT, lambda d: LEFT @ d @ RIGHT),
            ("rotations of rows", {"blocks": "row"}, lambda g: g @ RIGHT, lambda d: d @ RIGHT),
        ),
        lr=0.05,
        descent=((0.1, 300), (0.05, 1000)),
        temporaries=4,
        state_bytes=4,
    ),
    OptimSpec(
        name="blockwise_adam",
        inputs=({}, {"betas": (0.9, 0.95), "eps": 1e-6}),
        errors=(
            ({"betas": (0.9, 1.0)}, "betas"),
            ({"eps": -1e-8}, "eps"),
            ({"block": "model"}, "block"),
        ),
        reference=blockwise_adam,
        oracle=lambda params, lr: (
            blockwise_adam.PublishedAdaSGD(params, lr=lr, weight_decay=0.1),
            {"block": "group"},
        ),
        limits=(("betas 0 is normalised SGD", {"betas": (0.0, 0.0), "eps": 0.0}, lambda g: g / rms(g)),),
        symmetries=(
            ("scale, at eps 0", {"eps": 0.0}, lambda g: 1024 * g, identity),
            ("rotations", {}, lambda g: LEFT @ g @ RIGHT, lambda d: LEFT @ d @ RIGHT),
        ),
        lr=0.05,
        descent=((0.1, 300), (0.05, 1000)),
        temporaries=4,
        state_bytes=4,
    ),
    OptimSpec(
        name="sgd_sai",
        inputs=({}, {"momentum": 0.8, "eps": 1e-4}, {"momentum": 0.0}),
        errors=(
            ({"momentum": 1.0}, "momentum"),
            ({"momentum": "0.9"}, "momentum"),
            ({"eps": -1e-8}, "eps"),
        ),
        reference=sgd_sai,
        oracle=lambda params, lr: (
            sgd_sai.PublishedSGDSaI(params, lr=lr, momentum=0.8, weight_decay=0.1),
            {"momentum": 0.8},
        ),
        limits=(
            ("momentum 0 is SGD times a ratio", {"momentum": 0.0, "eps": 0.0}, lambda g: g * g.norm() / g.std()),
            ("a huge eps is SGD times the norm", {"eps": 1e12}, lambda g: g * g.norm() / 1e12),
        ),
        symmetries=(
            ("scale, at eps 0", {"eps": 0.0}, lambda g: 1024 * g, lambda d: 1024 * d),
            ("sign", {}, torch.neg, torch.neg),
            ("another order of entries", {}, lambda g: g[[2, 0, 3, 1]], lambda d: d[[2, 0, 3, 1]]),
        ),
        lr=0.05,
        descent=((0.02, 300), (0.01, 1000)),
        temporaries=4,
        state_bytes=4,
    ),
)
