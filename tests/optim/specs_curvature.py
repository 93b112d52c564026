"""Specs of rules that measure curvature."""

import torch

from tests.optim.spec import (
    LEFT,
    RIGHT,
    OptimSpec,
    identity,
)
from tests.reference import (
    adahessian,
    sophia_g,
    sophia_h,
)

CURVATURE = (
    OptimSpec(
        name="adahessian",
        inputs=(
            {},
            {"betas": (0.9, 0.98), "eps": 1e-3, "hessian_power": 0.5, "refresh_every": 2},
            {"variant": "image"},
            {"spatial_average_block_size": (5, 2, -1, 8)},
        ),
        errors=(
            ({"betas": (1.0, 0.9)}, "betas"),
            ({"eps": -1.0}, "eps"),
            ({"hessian_power": 2.0}, "hessian_power"),
            ({"hessian_power": -1.0}, "hessian_power"),
            ({"variant": "fairseq"}, "variant"),
            ({"spatial_average_block_size": (2, 2)}, "spatial_average_block_size"),
            ({"spatial_average_block_size": 5}, "spatial_average_block_size = 5"),
            ({"spatial_average_block_size": (0, 1, 1, 1)}, "spatial_average_block_size"),
            ({"refresh_every": 0}, "refresh_every"),
            ({"refresh_every": 1.5}, "refresh_every"),
        ),
        reference=adahessian,
        oracle=lambda params, lr: (
            adahessian.PublishedAdaHessian(params, lr=lr, weight_decay=0.1),
            {"variant": "image"},
        ),
        limits=(("betas 0, without curvature, is the gradient", {"betas": (0.0, 0.0)}, identity),),
        symmetries=(
            ("scale, without curvature", {}, lambda g: 1024 * g, lambda d: 1024 * d),
            ("rotations, without curvature", {}, lambda g: LEFT @ g @ RIGHT, lambda d: LEFT @ d @ RIGHT),
        ),
        lr=0.05,
        descent=((0.03, 400), (0.01, 1500)),
        temporaries=5,
        state_bytes=8,
    ),
    OptimSpec(
        name="sophia_g",
        inputs=({}, {"betas": (0.9, 0.95), "rho": 0.1, "eps": 1e-12, "refresh_every": 3}),
        errors=(
            ({"betas": (0.9, 1.0)}, "betas"),
            ({"rho": -0.1}, "rho"),
            ({"eps": 0.0}, "eps"),
            ({"refresh_every": True}, "refresh_every"),
        ),
        reference=sophia_g,
        oracle=lambda params, lr: (sophia_g.PublishedSophiaG(params, lr=lr, weight_decay=0.1), {}),
        limits=(("betas 0, without curvature, is signSGD", {"betas": (0.0, 0.0)}, torch.sign),),
        symmetries=(
            ("scale, without curvature", {}, lambda g: 1024 * g, identity),
            ("sign", {}, torch.neg, torch.neg),
        ),
        lr=0.02,
        descent=((0.05, 300), (0.02, 1000)),
        temporaries=4,
        state_bytes=8,
    ),
    OptimSpec(
        name="sophia_h",
        inputs=({}, {"betas": (0.9, 0.95), "gamma": 0.05, "eps": 1e-8, "refresh_every": 4}),
        errors=(
            ({"betas": (0.9, -1.0)}, "betas"),
            ({"gamma": -0.1}, "gamma"),
            ({"eps": 0.0}, "eps"),
            ({"refresh_every": -1}, "refresh_every"),
        ),
        reference=sophia_h,
        oracle=lambda params, lr: (
            sophia_h.OtherSophiaH(params, lr=lr / 0.01, p=0.01, eps=1e-14, weight_decay=0.01 * 0.1),
            {"gamma": 0.01},
        ),
        limits=(("betas 0, without curvature, is signSGD", {"betas": (0.0, 0.0)}, torch.sign),),
        symmetries=(
            ("scale, without curvature", {}, lambda g: 1024 * g, identity),
            ("sign", {}, torch.neg, torch.neg),
        ),
        lr=0.02,
        descent=((0.05, 300), (0.02, 1000)),
        temporaries=4,
        state_bytes=8,
    ),
)
