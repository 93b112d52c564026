"""How well does one transformer layer approximate a continuous map of sequences, by width, heads and optimizer?

One attention layer and a position-wise ReLU network are enough to approximate any continuous map from sequences to
sequences on a compact set, if the layer is wide enough. The theorem says that good weights exist, not that training
finds them. Here the map sorts six numbers between -1 and 1 and bends them: y_i = sin(3 sort(x)_i). The error is that
on sequences that training has not seen.

Run: python examples/approximation.py (some minutes; it writes approximation.html)
"""

import math
from pathlib import Path

import page
import torch
from torch import Tensor, nn

import optim

LENGTH = 6
NEEDS_MORE = {"sophia_g": "samples labels of a cross-entropy", "onebit_adam": "needs several processes"}
"""Optimizers that this loss or a single process cannot run, with the reason."""


class OneLayer(nn.Module):
    """x + attention(x), then h + ReLU network(h), between two linear maps; positions are learned."""

    def __init__(self, width: int, heads: int, inner: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Linear(1, inner), nn.Embedding(LENGTH, inner)
        self.query, self.key, self.value = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.mix = nn.Linear(inner, inner, bias=False)
        self.up, self.down, self.head = nn.Linear(inner, width), nn.Linear(width, inner), nn.Linear(inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, LENGTH] -> [b, LENGTH]."""
        h = self.embed(x[..., None]) + self.place(torch.arange(LENGTH))
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        h = h + self.mix((weights @ v).transpose(1, 2).flatten(2))
        h = h + self.down(torch.relu(self.up(h)))
        return self.head(h)[..., 0]


def truth(x: Tensor) -> Tensor:
    """The map: sorted along the sequence, then bent; continuous in every number."""
    return torch.sin(3 * x.sort(-1).values)


def sequences(count: int, seed: int) -> Tensor:
    """Numbers between -1 and 1 [count, LENGTH]."""
    return 2 * torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(seed)) - 1


def fitted(name: str, lr: float, width: int, heads: int, steps: int, seed: int = 0) -> tuple[float, nn.Module]:
    """The root of the mean squared error on unseen sequences after training; infinite if training diverged."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = OneLayer(width, heads)
    optimizer = optim.create(name, module, lr=lr, **({"momentum": 0.9} if name in ("sgd", "sgdp") else {}))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.schedule("cosine", total_steps=steps))
    every = sequences(64 * steps, 1 + seed).split(64)

    def loss(x: Tensor) -> Tensor:
        return (module(x) - truth(x)).square().mean()

    for x in every:
        optimizer.zero_grad()
        value = loss(x)
        if not value.isfinite():
            return math.inf, module
        value.backward()
        optim.curvature.refresh(optimizer, lambda x=x: loss(x))
        optimizer.step()
        schedule.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # schedule-free: the averaged weights
    with torch.no_grad():
        error = float(loss(sequences(2_000, 0)).sqrt())
    return error if math.isfinite(error) else math.inf, module


def tuned(name: str, steps: int, width: int = 32, heads: int = 2, tries: int = 5) -> tuple[float, float]:
    """The smallest error over learning rates a factor of three apart, searched from 0.01 both ways; and that rate."""
    found = {rate: fitted(name, rate, width, heads, steps)[0] for rate in (0.01 / 3, 0.01, 0.03)}
    while len(found) < tries:
        best = min(found, key=lambda rate: found[rate])
        if best == max(found):
            rate = best * 3
        elif best == min(found):
            rate = best / 3
        else:
            break
        found[rate] = fitted(name, rate, width, heads, steps)[0]
    best = min(found, key=lambda rate: found[rate])
    return found[best], best


def main(
    out: Path = Path("approximation.html"), steps: int = 400, widths: tuple[int, ...] = (2, 8, 32, 128),
    heads: tuple[int, ...] = (1, 2, 4), names: tuple[str, ...] = tuple(optim.OPTIMIZERS),
) -> None:  # fmt: skip
    """Train everything and write the page."""
    by_size = {
        f"{h} head{'s' * (h > 1)}": [min(fitted("adamw", lr, w, h, steps)[0] for lr in (0.003, 0.01)) for w in widths]
        for h in heads
    }
    for name, errors in by_size.items():
        print(name, [round(error, 3) for error in errors])
    results, left = {}, {}
    for name in names:
        if name in NEEDS_MORE:
            left[name] = NEEDS_MORE[name]
            continue
        results[name] = tuned(name, steps)
        print(f"{name}: {results[name][0]:.4f} at {results[name][1]:.2g}", flush=True)
    ranked = sorted(results, key=lambda name: results[name][0])
    best, rate = ranked[0], results[ranked[0]][1]
    _, module = fitted(best, rate, 32, 2, steps)
    inputs = sequences(2_000, 0)
    with torch.no_grad():
        constant = float((truth(inputs) - truth(inputs).mean(0)).square().mean().sqrt())
        line = torch.linspace(-1, 1, 41)
        along = sequences(1, 5).repeat(41, 1)
        along[:, 0] = line
        shown = {"truth": truth(along)[:, 3].tolist(), best: module(along)[:, 3].tolist()}
    print(f"best: {best}; a constant for each place has error {constant:.3f}")
    page.write(out, "One transformer layer as an approximator", {
        "By width and heads": [
            page.paragraph(
                f"Root mean squared error on 2,000 unseen sequences after {steps} steps of AdamW, the better of two "
                f"learning rates. A constant for each place has {constant:.3f}. One seed: small differences are noise."
            ),
            page.lines("Error", by_size, [math.log2(w) for w in widths], "log2 of the width of the ReLU network"),
        ],
        "By optimizer": [
            page.paragraph(
                f"Width 32, two heads, {steps} steps, no weight decay; for each optimizer the best of three to five "
                f"learning rates, a factor of three apart, by the same error; for some, the best may lie beyond. "
                f"{best} fits best."
            ),
            page.bars("Error, smallest first", {name: [min(results[name][0], 9.99)] for name in ranked}),
            page.table(["optimizer", "error", "learning rate"],
                       [[name, f"{results[name][0]:.4f}", f"{results[name][1]:.2g}"] for name in ranked]),
            *(page.paragraph(f"{name} is not here: it {why}.") for name, why in left.items()),
        ],
        "What was learned": [
            page.paragraph(f"The fourth output while the first input moves from -1 to 1, by {best}."),
            page.lines("Output", shown, line.tolist(), "first input"),
            page.pictures("All outputs along the way, truth and network:", {
                "truth": truth(along).T.repeat_interleave(4, 0), best: module(along).detach().T.repeat_interleave(4, 0),
            }),
        ],
    })  # fmt: skip
    print("wrote", out)


if __name__ == "__main__":
    page.run(main)
