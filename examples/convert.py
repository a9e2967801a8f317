"""Make a hyper-search and a plain network of one of timm's that is built with structural re-parameterization.

    python examples/convert.py

The plain one has no branches to fold: it is what is deployed, from the first step on.
"""

import timm
import torch
from torch import nn

import repopt


def main() -> tuple[int, float]:
    """Return the convolutions of the plain network as it is deployed, and its loss after three steps on noise."""
    torch.manual_seed(0)
    search = repopt.convert_model(timm.create_model("repghostnet_050", num_classes=4), "hs")
    # ... here it is trained, as any network is; its scales are kept by repopt.save_scales.
    scales = repopt.extract_scales(search)

    model = repopt.convert_model(timm.create_model("repghostnet_050", num_classes=4), "target")
    repopt.initialize(model, scales)
    optimizer = repopt.build_optimizer("adamw", model, scales, lr=1e-3, weight_decay=0.05)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    deployed = repopt.deploy(model.eval())
    torch.testing.assert_close(deployed(images), model(images), rtol=1e-3, atol=1e-3)
    return sum(isinstance(module, nn.Conv2d) for module in deployed.modules()), loss.item()


if __name__ == "__main__":
    print("{} convolutions, loss {:.3f}".format(*main()))
