"""What several tests of networks do."""

from torch import nn


def with_statistics(model, call):
    """The network, whose batch norms do something then, with statistics of two calls in training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.momentum = None  # the running statistics are plain averages
    for _ in range(2):
        call()
    return model
