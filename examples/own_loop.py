"""Train a plain network with a RepOptimizer in a loop of your own: search scales, then use them.

    python examples/own_loop.py [EPOCHS]

On scikit-learn's digits, in seconds on a CPU. The clip takes the norm of the equivalent multi-branch network.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

import repopt

SMALL = {"num_classes": 10, "in_chans": 1, "layers": (2, 2, 1, 1), "widths": (0.25, 0.25, 0.25, 0.5)}
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


def fit(model: nn.Module, optimizer: Optimizer, epochs: int, images: Tensor, labels: Tensor) -> None:
    """Train on batches of 50."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()


def main(epochs: int = 10) -> float:
    """Return the accuracy on images that were not trained on, from 0 to 1."""
    torch.manual_seed(0)
    digits = load_digits()
    images = nn.functional.interpolate(torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), size=16)
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split([1000, len(labels) - 1000])

    search = repopt.create_model("RepOpt-VGG-nano", mode="hs", **SMALL)  # several branches, whose scales are trained
    fit(search, repopt.build_optimizer("sgd", search, **SGD), epochs, images[train], labels[train])

    model = repopt.create_model("RepOpt-VGG-nano", mode="target", **SMALL)  # plain convolutions
    scales = repopt.bind(model, repopt.extract_scales(search))
    scales.initialize()  # for fresh training only
    optimizer = repopt.build_optimizer("sgd", model, scales, max_norm=5.0, **SGD)
    fit(model, optimizer, epochs, images[train], labels[train])
    with torch.no_grad():
        return (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


if __name__ == "__main__":
    print(f"accuracy {main(*map(int, sys.argv[1:])):.3f}")
