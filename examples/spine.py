"""IVD-Net on phantoms of the spine: which volumes are wrong, which help a new scanner, which of a batch, which order.

The network is that of Dolz, Desrosiers & Ben Ayed 2018 (arXiv 1811.08305): an encoder for each MRI modality, dense
connections within and across the encoders, inception blocks with dilated convolutions of two scales, and the decoder of
a UNet. It differs in size (three levels, few channels, so that it trains on a CPU) and in its norm: groups instead of
batches, because the gradient of a volume must not depend on other volumes.

A phantom has five discs (ellipsoids) between vertebrae in four modalities with their own contrast and noise. Some
volumes lack a modality, some have wrong labels, and three scanners differ in contrast, brightness and noise.

Run: python examples/spine.py (it writes spine.html; --help lists the sizes)
"""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import page
import torch
from torch import Tensor, nn
from torch.nn import functional

import optim
from datatools import PROJECTORS, batch_rows, order
from datatools.subsets.herding import herding
from optim import SGDRule, UpdateMap, create

SIZE, SLICES, DISCS, MM = 32, 2, 5, 4.0
"""Pixels of a side, slices of a volume, discs, and millimetres of a pixel."""
WIDTH, LEVELS = 2, 3
"""Channels of the first level, and levels of the network; the paper has more of both."""
CONTRAST = torch.tensor([[0.30, 0.75, 0.55], [0.25, 0.35, 0.80], [0.15, 0.90, 0.35], [0.35, 0.20, 0.70]])
"""Modality -> brightness of soft tissue, disc and vertebra: in-phase, opposed-phase, water, fat."""


def block(inner: int, outer: int, kernel: tuple[int, int] = (3, 3), dilation: int = 1) -> nn.Sequential:
    """A convolution that keeps the size, its norm and its activation."""
    conv = nn.Conv2d(inner, outer, kernel, padding="same", dilation=dilation)
    return nn.Sequential(conv, nn.GroupNorm(1, outer), nn.ReLU())


class Inception(nn.Module):
    """Branches of size 1, 3 and 5 and of dilations 2 and 4 between two convolutions, with a residual connection.

    In the encoders, each branch is a pair of asymmetric convolutions: first along one dimension, then along the other.
    """

    def __init__(self, inner: int, outer: int, asymmetric: bool) -> None:
        super().__init__()
        self.first, self.last = block(inner, outer), block(outer, outer)
        self.branches = nn.ModuleList()
        for size, dilation in ((1, 1), (3, 1), (5, 1), (3, 2), (3, 4)):
            shapes = [(size, 1), (1, size)] if asymmetric else [(size, size)]
            self.branches.append(nn.Sequential(*(block(outer, outer, shape, dilation) for shape in shapes)))
        self.mix = block(5 * outer, outer, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[n, inner, h, w] -> [n, outer, h, w]."""
        x = self.first(x)
        return self.last(x + self.mix(torch.cat([branch(x) for branch in self.branches], 1)))


class IVDNet(nn.Module):
    """An encoder for each of four modalities, each of which sees what all of them have computed so far."""

    def __init__(self, width: int, levels: int, modalities: int = 4) -> None:
        super().__init__()
        self.modalities, seen = modalities, 1
        self.encoders, self.up, self.decoders = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            made = width * 2**level
            self.encoders.append(nn.ModuleList(Inception(seen, made, True) for _ in range(modalities)))
            seen = (0 if level == 0 else seen) + modalities * made
        self.bridge = Inception(seen, width * 2**levels, True)
        for level in reversed(range(levels)):
            made = width * 2**level
            up = nn.ConvTranspose2d(2 * made, made, 3, stride=2, padding=1, output_padding=1)
            self.up.append(nn.Sequential(up, nn.GroupNorm(1, made), nn.ReLU()))
            self.decoders.append(Inception(made, made, False))
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, volume: Tensor) -> Tensor:
        """Modalities [b, slices, modalities, h, w] -> the logit of being disc [b, slices, h, w]."""
        x = volume.flatten(0, 1)
        inputs, kept = [x[:, m : m + 1] for m in range(self.modalities)], []
        for level, paths in enumerate(self.encoders):
            found = [path(one) for path, one in zip(paths, inputs, strict=True)]
            kept.append(found)
            pooled = [functional.max_pool2d(one, 2) for one in found]
            turned = [torch.cat(pooled[m:] + pooled[:m], 1) for m in range(self.modalities)]  # each has its own order
            if level:
                older = [functional.interpolate(one, scale_factor=0.5) for one in inputs]
                turned = [torch.cat(both, 1) for both in zip(turned, older, strict=True)]
            inputs = turned
        x = self.bridge(inputs[0])
        for up, decoder, skips in zip(self.up, self.decoders, reversed(kept), strict=True):
            x = decoder(torch.stack([up(x), *skips]).mean(0))
        return self.head(x).view(*volume.shape[:2], *volume.shape[-2:])


def phantoms(count: int, seed: int, scanner: int | None = None, wrong: float = 0.0) -> dict[str, Tensor]:
    """Volumes with their discs: image, mask (maybe wrong), truth (number of the disc, 0 for none), wrong, scanner."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    images, truths, masks, wrongs, scanners = [], [], [], [], []
    for _ in range(count):
        where = int(torch.randint(3, (), generator=draw)) if scanner is None else scanner
        top, gap, bend = uniform(3, 5), uniform(5.2, 5.8), uniform(-2, 2)
        middle, wide, high = uniform(14, 18), uniform(4.5, 6), uniform(1.2, 1.7)
        image, truth = torch.empty(SLICES, 4, SIZE, SIZE), torch.zeros(SLICES, SIZE, SIZE, dtype=torch.int64)
        for s in range(SLICES):
            shrink = 1 - 0.15 * s
            spine = middle + bend * torch.sin(3 * y / SIZE)
            tissue = ((x - spine).abs() < wide * shrink).long() * 2
            for d in range(DISCS):
                place = top + gap * d
                inside = ((x - spine) / (wide * shrink)) ** 2 + ((y - place) / (high * shrink)) ** 2 < 1
                truth[s][inside], tissue[inside] = d + 1, 1
            image[s] = CONTRAST[:, tissue]
        gain, bias, noise = ((1.0, 0.0, 0.05), (0.6, 0.3, 0.10), (-0.8, 0.9, 0.08))[where]  # the third inverts
        image = gain * image + bias + noise * torch.randn(image.shape, generator=draw)
        if uniform(0, 1) < 0.2:
            image[:, int(torch.randint(4, (), generator=draw))] = 0  # a missing modality
        mask = (truth > 0).float()
        bad = uniform(0, 1) < wrong
        if bad:  # discs where vertebrae are, or every second disc left out
            mask = mask.roll(3, 1) if uniform(0, 1) < 0.5 else mask * (truth % 2 == 0)
        images.append(image), truths.append(truth), masks.append(mask), wrongs.append(bad), scanners.append(where)
    return {
        "image": torch.stack(images), "mask": torch.stack(masks), "truth": torch.stack(truths),
        "wrong": torch.tensor(wrongs), "scanner": torch.tensor(scanners),
    }  # fmt: skip


def losses(module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy plus one minus a soft Dice, for each volume [b]."""
    return _losses(module(batch["image"]), batch["mask"])


def _losses(logits: Tensor, mask: Tensor) -> Tensor:
    entropy = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).mean(1)
    p, t = logits.sigmoid().flatten(1), mask.flatten(1)
    return entropy + 1 - (2 * (p * t).sum(1) + 1) / ((p + t).sum(1) + 1)


def of(rows: dict[str, Tensor], index: Tensor | list[int]) -> dict[str, Tensor]:
    """Some volumes of a batch."""
    return {name: tensor[index] for name, tensor in rows.items()}


def trained(rows: dict[str, Tensor], steps: int, seed: int, pick=None, size: int = 4):
    """A network trained on random batches; `pick` may reduce a batch of three times the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = IVDNet(WIDTH, LEVELS).eval()
    optimizer = create("adamw", list(module.named_parameters()), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.schedule("cosine", total_steps=steps))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = of(rows, torch.randint(len(rows["mask"]), (size if pick is None else 3 * size,), generator=draw))
        batch = batch if pick is None else of(batch, pick(module, batch, size))
        losses(module, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return module, optimizer


@torch.no_grad()
def measured(module, rows: dict[str, Tensor]) -> tuple[list[float], float]:
    """Mean Dice of each disc, and the mean distance of its centre in mm; a disc that was not found is 10 mm off.

    A voxel that is predicted to be disc belongs to the nearest disc by height.
    """
    predicted = module(rows["image"]) > 0
    heights = torch.arange(SIZE).view(1, SIZE, 1).expand(SLICES, SIZE, SIZE) + 0.5
    places = torch.arange(SIZE).view(1, 1, SIZE).expand(SLICES, SIZE, SIZE) + 0.5
    dice: list[list[float]] = [[] for _ in range(DISCS)]
    off = []
    for ours, truth in zip(predicted, rows["truth"], strict=True):
        centres = torch.stack([heights[truth == d + 1].mean() for d in range(DISCS)])
        nearest = (heights[..., None] - centres).abs().argmin(-1)
        for d in range(DISCS):
            found, right = ours & (nearest == d), truth == d + 1
            dice[d].append(float(2 * (found & right).sum() / (found.sum() + right.sum())))
            where = [torch.stack([axis[some].mean() for axis in (heights, places)]) for some in (found, right)]
            off.append(MM * float((where[0] - where[1]).norm()) if found.any() else 10.0)
    return [sum(some) / len(some) for some in dice], sum(off) / len(off)


def influence_on(target: dict[str, Tensor], rows: dict[str, Tensor], module, optimizer) -> Tensor:
    """The inner product of each volume's gradient, of all parameters, with the mean gradient of the target, scaled."""
    updates = UpdateMap.of(optimizer, rules=SGDRule())
    projector = PROJECTORS["sjlt"].of({name: p.shape for name, p in updates.params.items()}, dim=2048, seed=0)

    def features(some: dict[str, Tensor]) -> Tensor:
        parts = [of(some, list(range(i, min(i + 8, len(some["mask"]))))) for i in range(0, len(some["mask"]), 8)]
        return functional.normalize(
            torch.cat([batch_rows(module, losses, part, updates, projector)[0] for part in parts])
        )

    return features(rows) @ features(target).mean(0)


def by_herding(module, batch: dict[str, Tensor], count: int) -> Tensor:
    """The volumes whose mean gradient of the last decoder is nearest to that of the batch."""
    params = [
        (name, p) for name, p in module.named_parameters() if name.startswith(("head", f"decoders.{LEVELS - 1}.last"))
    ]
    updates = UpdateMap.of(create("sgd", params, lr=1.0))
    projector = PROJECTORS["identity"].of({name: p.shape for name, p in params}, dim=0, seed=0)
    return herding(batch_rows(module, losses, batch, updates, projector)[0], count).indices


def area(scores: Tensor, wrong: Tensor) -> float:
    """The chance that a wrong volume has a lower score than a right one (area under the ROC curve)."""
    if wrong.all() or not wrong.any():
        return 0.5
    pairs = scores[wrong][:, None] - scores[~wrong]
    return float(((pairs < 0).float() + 0.5 * (pairs == 0)).mean())


def orders(rows: dict[str, Tensor], target: dict[str, Tensor], batches: int, trials: int, seed: int, steps: int):
    """True losses on the target after random orders and the proposed one, and the correlation of the estimate."""
    module, _ = trained(rows, steps, seed)
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}

    def loss(params, batch):
        return _losses(torch.func.functional_call(module, params, (batch["image"],)), batch["mask"]).mean()

    parts = [of(rows, [4 * i + k for k in range(4)]) for i in range(batches)]
    problem = order.Problem(loss, parts, [target])
    recipe = order.Recipe.of(create("sgd", params.items(), lr=0.02), rates=[0.02] * batches)
    with tempfile.TemporaryDirectory() as scratch:
        reference = order.record(problem, recipe, range(batches), params, folder=scratch)
        surrogate = order.precompute("pairwise", reference, problem)
        best = order.search(surrogate, "local", budget=500).sequences[0]
        draw = torch.Generator().manual_seed(seed)
        random = [torch.randperm(batches, generator=draw).tolist() for _ in range(trials)]
        guessed = [float(surrogate.score(some)) for some in random]
    true = [problem.held_out_loss(order.train(problem, recipe, some, params)[0]) for some in (*random, best)]
    return true[:-1], true[-1], float(torch.corrcoef(torch.tensor([guessed, true[:-1]]))[0, 1])


def flagged(scores: Tensor, wrong: Tensor, count: int) -> tuple[float, float]:
    """Precision and recall, in per cent, of calling the `count` volumes with the lowest scores wrong."""
    caught = float(wrong[scores.argsort()[:count]].sum())
    return 100 * caught / count, 100 * caught / max(1.0, float(wrong.sum()))


@dataclass
class Results:
    """What was measured: a list has one entry for each seed."""

    discs: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    """Arm -> Dice of each disc."""
    off: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Arm -> mean distance of centres in mm."""
    found: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """Way to find wrong volumes -> precision and recall."""
    areas: list[float] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Way to choose volumes -> per cent that are right and from the target's scanner."""

    def dice(self, arm: str) -> list[float]:
        """The mean Dice over discs."""
        return [mean(one) for one in self.discs[arm]]


def mean(values: Sequence[float]) -> float:
    """The mean of numbers."""
    return sum(values) / len(values)


def spread(values: Sequence[float], places: int = 3) -> str:
    """The mean of numbers with the smallest and the largest."""
    return f"{mean(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


def compare(seed: int, volumes: int, steps: int, results: Results):
    """Train all arms on the volumes of one seed, and return the network that was trained on all of them."""
    rows = phantoms(volumes, 10 + seed, wrong=0.25)
    target, test = phantoms(volumes // 8, 20 + seed, scanner=2), phantoms(volumes // 4, 30 + seed, scanner=2)
    module, optimizer = trained(rows, steps, seed)
    shuffled = torch.randperm(volumes, generator=torch.Generator().manual_seed(seed))
    scores = influence_on(phantoms(volumes // 6, 40 + seed), rows, module, optimizer)
    results.areas.append(area(scores, rows["wrong"]))
    results.found["lowest influence"].append(flagged(scores, rows["wrong"], volumes // 4))
    results.found["random volumes"].append(flagged(shuffled.float(), rows["wrong"], volumes // 4))
    helps = influence_on(target, rows, module, optimizer).argsort(descending=True)[: volumes // 3]
    chance = shuffled[: volumes // 3]
    for name, index in (("selected", helps), ("random", chance)):
        right = (rows["scanner"][index] == 2) & ~rows["wrong"][index]
        results.shares[name].append(100 * float(right.float().mean()))
    arms = {
        "all volumes": (rows, None), "a third, selected": (of(rows, helps), None),
        "a third, random": (of(rows, chance), None), "4 of 12 by herding": (rows, by_herding),
        "4 of 12 at random": (rows, lambda module, batch, count: torch.arange(count)),
    }  # fmt: skip
    for name, (some, pick) in arms.items():
        made = module if name == "all volumes" else trained(some, steps, seed, pick)[0]
        each, distance = measured(made, test)
        results.discs[name].append(each)
        results.off[name].append(distance)
        print(f"seed {seed}, {name}: Dice {mean(each):.3f}, centres {distance:.2f} mm off", flush=True)
    return module


def main(out: Path = Path("spine.html"), volumes: int = 48, steps: int = 160, seeds: int = 3, batches: int = 6,
         trials: int = 6) -> None:  # fmt: skip
    """Run all comparisons on phantoms of the spine, and write a page."""
    results = Results()
    for seed in range(seeds):
        module = compare(seed, volumes, steps, results)
    random, proposed, correlation = orders(
        phantoms(volumes, 9 + seeds, wrong=0.25), phantoms(volumes // 8, 19 + seeds, scanner=2),
        batches, trials, seeds - 1, steps // 2,
    )  # fmt: skip
    arms = list(results.discs)
    for name in arms:
        print(f"{name}: Dice {spread(results.dice(name))}, centres {spread(results.off[name], 2)} mm off")
    for name, pairs in results.found.items():
        print(f"wrong volumes, {name}: precision {mean([p for p, _ in pairs]):.0f} %, "
              f"recall {mean([r for _, r in pairs]):.0f} %")  # fmt: skip
    print(f"wrong volumes below right ones: {spread(results.areas, 2)} (0.5 is chance)")
    for name, values in results.shares.items():
        print(f"right volumes of the target's scanner, {name}: {mean(values):.0f} %")
    print(f"loss on the target: {proposed:.4f} proposed order, {mean(random):.4f} random orders, r = {correlation:.2f}")
    shown, sample = {}, of(phantoms(1, 30, scanner=2), [0])
    for m, name in enumerate(("in-phase", "opposed-phase", "water", "fat")):
        shown[name] = sample["image"][0, 0, m]
    shown["truth"] = (sample["truth"][0, 0] > 0).float()
    with torch.no_grad():
        shown["predicted"] = module(sample["image"])[0, 0].sigmoid()
    count = sum(p.numel() for p in module.parameters())
    page.write(out, "IVD-Net on phantoms of the spine", {
        "A volume of the target scanner": [page.pictures("One slice in four modalities:", shown)],
        "Segmentation and localization": [
            page.paragraph(f"{count:,} parameters, trained on {volumes} volumes for {steps} steps of 4; a quarter of "
                           f"the labels are wrong, and only a third of the volumes come from the target scanner, on "
                           f"which everything is measured. Dots are seeds; tables have means and, in brackets, the "
                           f"smallest and the largest of {seeds} seeds."),
            page.bars("Dice on the target scanner", {name: results.dice(name) for name in arms}),
            page.table(["trained on", *(f"disc {d + 1}" for d in range(DISCS)), "all discs", "centres, mm off"],
                       [[name, *(f"{mean([one[d] for one in results.discs[name]]):.3f}" for d in range(DISCS)),
                         spread(results.dice(name)), spread(results.off[name], 2)] for name in arms]),
        ],
        "Which volumes are wrong": [
            page.paragraph(f"By the gradients of all parameters against those of {volumes // 6} clean volumes, a wrong "
                           f"volume ranks below a right one in {100 * mean(results.areas):.0f} % of pairs (chance: "
                           f"50 %). The table calls the lowest quarter of the volumes wrong."),
            page.table(["", "precision", "recall"],
                       [[name, *(spread([pair[i] for pair in pairs], 0) + " %" for i in (0, 1))]
                        for name, pairs in results.found.items()]),
        ],
        "Which volumes help another scanner": [
            page.paragraph(f"Of the selected third, {mean(results.shares['selected']):.0f} % are right and from the "
                           f"target's scanner, against {mean(results.shares['random']):.0f} % at random."),
        ],
        "In which order": [
            page.paragraph(f"One pass over {batches} batches, truly trained in each order. Estimates and true losses "
                           f"of random orders correlate by {correlation:.2f}."),
            page.bars("Loss on the target", {"random orders": random, "proposed order": [proposed]}),
        ],
    })  # fmt: skip
    print("wrote", out)


if __name__ == "__main__":
    page.run(main)
