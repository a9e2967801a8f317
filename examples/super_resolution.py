"""Super-resolution by a plain 3x3 network that trains as its multi-branch twin with edge detectors (ECBSR) would.

    python examples/super_resolution.py [STEPS] [PICTURE.png]

On the left of a photograph of scikit-learn's; then the right is doubled in size. The twin trains beside it in float64.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

import repopt


def enlarge(x: Tensor, convs: nn.Sequential, branches: dict[str, repopt.HeldBranches]) -> Tensor:
    """Return images of twice the size; with branches every convolution is the sum of theirs, each by itself."""
    small = x
    for index, conv in enumerate(convs):
        x = torch.relu(x) if index else x
        if not branches:
            x = conv(x)
            continue
        held = branches[f"{index}.weight"]
        scaled = ((held.scales[b.scale].view(-1, 1, 1), b, held.kernels[b.kernel]) for b in held.block.branches)
        outputs = (s * F.conv2d(x, b.embed(kernel, held.block.target), padding=1) for s, b, kernel in scaled)
        x = sum(outputs, conv.bias.view(-1, 1, 1))
    return F.interpolate(small, scale_factor=2, mode="bicubic") + F.pixel_shuffle(x, 2)


def main(steps: int = 600, picture: str = "", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Return the PSNR (dB) on the right part, and in float64 how far the twin's kernels are."""
    torch.manual_seed(0)
    photo = torch.tensor(load_sample_images().images[0][:426].mean(2) / 255, dtype=dtype).view(1, 1, 426, 640)
    halved = {"scale_factor": 0.5, "mode": "bicubic", "antialias": True}
    parts = [(F.interpolate(part, **halved), part) for part in photo.split([400, 240], 3)]
    convs = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 16), (16, 16), (16, 16), (16, 4)))
    plain = nn.Sequential(*convs).to(dtype)
    repopt.declare(plain, "edge", names="*")
    branches = repopt.hold_branches(plain, keep_weights=True)
    other, twin = copy.deepcopy((plain, branches))
    of_twin = [*(c.bias for c in other), *(p for held in twin.values() for p in held.trained().values())]
    ways = [(plain, {}, repopt.build_optimizer("adam", plain, branches=branches, lr=5e-3))]
    ways += [(other, twin, torch.optim.Adam(of_twin, lr=5e-3))] if dtype == torch.float64 else []
    for _ in range(steps):
        at = [(int(torch.randint(213 - 24, ())), int(torch.randint(200 - 24, ()))) for _ in range(16)]
        small = torch.cat([parts[0][0][..., r : r + 24, c : c + 24] for r, c in at])
        large = torch.cat([parts[0][1][..., 2 * r : 2 * r + 48, 2 * c : 2 * c + 48] for r, c in at])
        for network, held, optimizer in ways:
            optimizer.zero_grad()
            F.mse_loss(enlarge(small, network, held), large).backward()
            optimizer.step()
    small, truth = parts[1]
    shown = [F.interpolate(small, scale_factor=2, mode="bicubic"), enlarge(small, plain, {}).detach(), truth]
    if picture:
        save_image(make_grid(torch.cat(shown)[..., 150:330, 30:210].clamp(0, 1)), picture)
    bicubic, network = (float(-10 * F.mse_loss(x.clamp(0, 1), truth).log10()) for x in shown[:2])
    found = {"bicubic": bicubic, "network": network}
    if len(ways) > 1:
        kernels = ((held.merged().detach(), twin[name].merged().detach()) for name, held in branches.items())
        found["apart"] = max(float((a - b).norm() / b.norm()) for a, b in kernels)
    return found


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:2]), *sys.argv[2:]), main(30, dtype=torch.float64))
