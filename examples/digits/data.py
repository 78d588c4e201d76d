"""The data of the demo: scikit-learn's handwritten digits, as mini-batches and as a test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TEST_IMAGES = 450
BRIGHTEST_PIXEL = 16.0


@dataclass(frozen=True)
class Digits:
    """Images of digits, 8 x 8 pixels from 0 (paper) to 1 (ink), split for training and testing."""

    train_images: Tensor  # (N, 1, 8, 8), float32
    train_labels: Tensor  # (N,), int64, range [0, 10)
    test_images: Tensor  # (M, 1, 8, 8), float32
    test_labels: Tensor  # (M,), int64, range [0, 10)


def load(device: torch.device) -> Digits:
    """Load the 1797 images that come with scikit-learn, each digit equally frequent in both parts.

    The split does not depend on the seed of the demo, so accuracies of two runs are of the same
    test images. Reads a file of the installed package, never the network.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=TEST_IMAGES, stratify=labels, random_state=0)
    train_pixels, test_pixels, train_labels, test_labels = parts

    def to_images(flat: object) -> Tensor:
        images = torch.as_tensor(flat, dtype=torch.float32) / BRIGHTEST_PIXEL
        return images.view(-1, 1, 8, 8).to(device)

    def to_labels(flat: object) -> Tensor:
        return torch.as_tensor(flat, dtype=torch.int64).to(device)

    return Digits(
        to_images(train_pixels), to_labels(train_labels),
        to_images(test_pixels), to_labels(test_labels),
    )  # fmt: skip


def batches(digits: Digits, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` mini-batches (images, labels), the training set shuffled anew for each pass.

    The order depends on `seed` alone, so networks which must see the same batches get the same
    seed. A last batch that would be smaller is left out: BN's statistics come from whole batches.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(digits.train_labels)
    done = 0
    while done < steps:
        order = torch.randperm(count, generator=generator).to(digits.train_labels.device)
        for start in range(0, count - batch_size + 1, batch_size):
            if done == steps:
                return
            chosen = order[start : start + batch_size]
            yield digits.train_images[chosen], digits.train_labels[chosen]
            done += 1


@torch.no_grad()
def measure_accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of test images that `model` names correctly, in percent.

    The model is in evaluation mode meanwhile.
    """
    was_training = model.training
    model.eval()
    correct = model(digits.test_images).argmax(dim=1) == digits.test_labels
    model.train(was_training)
    return float(100.0 * correct.double().mean())


def all_finite(model: nn.Module) -> bool:
    """Tell whether every weight and every running statistic of `model` is finite."""
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())
