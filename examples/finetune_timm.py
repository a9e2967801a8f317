"""Fine-tune a RepOpt network as timm's scripts do: from its registry, with its schedule and its average.

    python examples/finetune_timm.py [CHECKPOINT]

CHECKPOINT holds the weights of RepOpt-VGG-nano for other classes. Fine-tuning starts from weights, so nothing is
initialized by the scales. Whether multiplied gradients help then was not measured (docs/caveats.md): the rule is plain.
"""

import sys

import timm
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

import repopt


def main(checkpoint: str | None = None, classes: int = 5, steps: int = 4) -> float:
    """Return the last loss on images of noise."""
    torch.manual_seed(0)
    model = timm.create_model("repopt_vgg_nano", num_classes=1000)
    if checkpoint is not None:
        repopt.load_weights(model, repopt.checkpoint.state_dict_of(repopt.checkpoint.read(checkpoint)))
    model.reset_classifier(classes)
    optimizer = repopt.build_optimizer("sgd", model, lr=0.01, momentum=0.9, weight_decay=1e-4)
    schedule, average = CosineLRScheduler(optimizer, t_initial=steps), ModelEmaV3(model, decay=0.99)
    for step in range(steps):
        images, labels = torch.randn(4, 3, 64, 64), torch.randint(classes, (4,))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        schedule.step(step + 1)
    fused = timm.utils.reparameterize_model(average.module.eval())
    assert fused(images).shape == (4, classes)
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main(*sys.argv[1:]):.3f}")
