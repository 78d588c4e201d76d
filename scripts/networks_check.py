"""Fuse networks of timm, torchvision and MONAI, and compare them with their stock versions in float64.

python scripts/networks_check.py --json FILE --markdown FILE   (a package that is not installed is skipped)
"""

import argparse
import copy
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bn_ext

# The largest accepted difference between fused and stock, in multiples of the effect of one rounding per input value.
# Fusing rounds in another order at each of up to 226 batch norms, and the network amplifies roundings by up to 1e6.
ROUNDINGS = 100
STEPS, BATCH, SIZE = 3, 4, 64

OURS = (bn_ext.BatchNorm1d, bn_ext.BatchNorm2d, bn_ext.BatchNorm3d)
Make = Callable[[], nn.Module]


@dataclass
class Row:
    """The result for one network. Differences are fractions of the largest of the compared values."""

    package: str
    network: str
    norms: int
    converted: int
    fused: int
    outputs: float
    gradients: float
    state: float
    one_rounding: float
    """The largest of the three between two stock networks whose inputs differ by one rounding per value."""

    def is_close(self) -> bool:
        """Whether roundings explain all differences."""
        return max(self.outputs, self.gradients, self.state) <= ROUNDINGS * self.one_rounding


def of_timm() -> Iterator[tuple[str, Make]]:
    """Yield twenty networks, from most families that have batch norms."""
    timm = import_module("timm")
    names = (
        *("efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "densenet121", "repvgg_a0", "resnet18"),
        *("mobilenetv2_050", "ghostnet_050", "cs3darknet_s", "rexnet_100", "dla34", "hrnet_w18_small", "dpn48b"),
        *("ese_vovnet19b_dw", "skresnet18", "mobileone_s0", "fastvit_t8", "mobilenetv4_conv_small", "resnest14d"),
    )
    for name in names:
        yield name, lambda name=name: timm.create_model(name, num_classes=10)
    dropping = {"drop_rate": 0.2, "drop_path_rate": 0.2}
    last = "tf_efficientnetv2_b0"
    yield f"{last}, drop_path_rate=0.2", lambda: timm.create_model(last, num_classes=10, **dropping)


def of_torchvision() -> Iterator[tuple[str, Make]]:
    """Yield eight classifiers."""
    models = import_module("torchvision").models
    for name in (
        *("resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"),
        *("regnet_y_400mf", "mnasnet0_5"),
    ):
        yield name, lambda name=name: getattr(models, name)(num_classes=10)


def of_monai() -> Iterator[tuple[str, Make]]:
    """Yield six networks with batch norms, which are not MONAI's default; networks with dropout train with it."""
    nets = import_module("monai.networks.nets")
    images = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
    unet = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2, "norm": "batch"}
    basic, sizes = {"features": (8, 8, 16, 32, 64, 8), "norm": "batch"}, {"kernel_size": [3] * 3, "strides": [1, 2, 2]}
    yield "UNet, act=relu", lambda: nets.UNet(**images, **unet, act="relu")
    yield "UNet, act=prelu", lambda: nets.UNet(**images, **unet)
    yield "BasicUNet", lambda: nets.BasicUNet(**images, **basic)
    yield "BasicUNet, dropout=0.1", lambda: nets.BasicUNet(**images, **basic, dropout=0.1)
    yield "DynUNet", lambda: nets.DynUNet(**images, **sizes, upsample_kernel_size=[2, 2], norm_name="batch")
    yield "AttentionUnet", lambda: nets.AttentionUnet(**images, channels=(8, 16, 32), strides=(2, 2))


PACKAGES = {"timm": of_timm, "torchvision": of_torchvision, "monai": of_monai}


def check(package: str, name: str, make: Make) -> Row:
    """Train and evaluate a network fused and stock, with the same weights, images and random numbers."""
    torch.manual_seed(0)
    stock = make().double()
    for module in stock.modules():
        if is_norm(module) and module.affine:  # an initial weight of 0 would hide the layers before it
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    fused, rounded = copy.deepcopy(stock), copy.deepcopy(stock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that are not converted: the table counts them
        bn_ext.convert(fused)
        converted = sum(isinstance(module, OURS) for module in fused.modules())
        fused, report = bn_ext.fuse(fused, report=True)
    norms = sum(is_norm(module) for module in stock.modules())
    assert len(report.rows) == norms
    images = torch.randn(STEPS + 1, BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    expected = results_of(stock, images)
    found = differences(results_of(fused, images), expected)
    sensitive = differences(results_of(rounded, torch.nextafter(images, 9 * torch.randn_like(images).sign())), expected)
    return Row(package, name, norms, converted, len(report.fused), **found, one_rounding=max(sensitive.values()))


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm of any class."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def results_of(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """Return outputs and gradients of the training steps and a pass in evaluation, and the final state."""
    # Small steps: large ones with random weights would amplify roundings, of stock too, by 1e8 and more.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    outputs, gradients = [], []
    for step, batch in enumerate(images):
        torch.manual_seed(step)  # dropout, drop path
        model.train(step < STEPS)
        leaf = batch.clone().requires_grad_()
        found = [value for value in tree_leaves(model(leaf)) if isinstance(value, Tensor)]
        outputs += [value.detach().clone() for value in found]
        optimizer.zero_grad()
        sum((value * weights_like(value)).sum() for value in found).backward()
        gradients += [leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        if model.training:
            optimizer.step()
    return {"outputs": outputs, "gradients": gradients, "state": list(model.state_dict().values())}


def weights_like(value: Tensor) -> Tensor:
    """Return the weights of a loss that depends on each value differently; its gradients are of the order of 1."""
    return torch.arange(value.numel(), dtype=value.dtype).cos().view_as(value) / value.numel() ** 0.5


def differences(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> dict[str, float]:
    """Return the largest difference in each list as a fraction of its largest value; infinite for NaN."""
    found = {}
    for name, values in expected.items():
        scale = max(float(value.double().abs().max()) for value in values if value.numel())
        pairs = zip(actual[name], values, strict=True)
        found[name] = max(float((a.double() - e.double()).abs().max()) / scale for a, e in pairs if e.numel())
    return {name: value if value == value else float("inf") for name, value in found.items()}


def markdown(rows: list[Row], versions: dict[str, str]) -> str:
    """Return the page with the table."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return PAGE.format(versions=named, **globals()) + "".join(f"{line_of(row)}\n" for row in rows)


def line_of(row: Row) -> str:
    """Return a row of the table."""
    numbers = (f"{value:.1e}" for value in (row.outputs, row.gradients, row.state, row.one_rounding))
    cells = (f"{row.package}: {row.network}", row.norms, row.converted, row.fused, *numbers)
    return f"| {' | '.join(map(str, cells))} |"


PAGE = """# Networks of timm, torchvision and MONAI

Each network is fused with `bn_ext.fuse` and compared with its stock twin in float64: {STEPS} training steps and one
pass in evaluation, with random weights and batches of {BATCH} images of {SIZE} x {SIZE}. Each difference is a fraction
of the largest compared value: of the outputs, of all gradients (including those in evaluation), or of the state after
the steps. *One rounding* shows how much the network amplifies a rounding: it is the largest of these three differences
between two stock networks, one of whose inputs differs by one rounding per value. The script fails if a difference
exceeds {ROUNDINGS} times this number. A *fused* batch norm computes more than the normalisation, in training or in
evaluation; `bn_ext.fuse(model, report=True)` gives the reason for each batch norm that does not.

Generated by `python scripts/networks_check.py --markdown docs/networks.md` with
{versions}.

| network | batch norms | converted | fused | outputs | gradients | state | one rounding |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


def main() -> None:
    """Check all networks of the installed packages; exit with 1 if one differs by more than roundings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the table to, as JSON")
    parser.add_argument("--markdown", type=Path, help="file to write the page to")
    parser.add_argument("--only", default="", help="text in the names of networks to check, such as `timm: resnet18`")
    options = parser.parse_args()
    rows: list[Row] = []
    versions = {"Python": platform.python_version(), "torch": str(torch.__version__)}
    for package, networks in PACKAGES.items():
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"{package} is not installed: its networks are skipped")
            continue
        for name, make in networks():
            if options.only in f"{package}: {name}":
                rows.append(check(package, name, make))
                print(line_of(rows[-1]), flush=True)
    if options.json:
        found = {"versions": versions, "roundings": ROUNDINGS, "networks": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows, versions))
    failed = [f"{row.package}: {row.network}" for row in rows if not row.is_close()]
    if failed:
        sys.exit(f"networks_check: some differ from stock by more than {ROUNDINGS} roundings: {'; '.join(failed)}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks of this size gain nothing from more
    main()
