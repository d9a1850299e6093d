"""Training of the digit classifier whose features the evaluation of digits uses.

Loss: cross-entropy of the class label given an image moved by a small random rotation, scaling and shift.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratiograph.core.domains import Fraction, NonNegative
from ratiograph.core.files import write_atomically
from ratiograph.core.randomness import uniform
from ratiograph.core.types import Batch
from ratiograph.data.stream import load_all
from ratiograph.networks.architectures.classifier import DigitClassifier, classify_all
from ratiograph.training.experiment import Task
from ratiograph.training.optim import EMA, Adam

__all__ = ["ClassifierEvaluator", "ClassifierTraining", "RandomAffine"]

BACKGROUND = -1.0  # black, which is what lies outside a digit's image


class RandomAffine:
    """Moves every image by its own random similarity transform, each parameter uniform in +- its bound.

    Args:
        rotation: degrees.
        scaling: relative change of size.
        shift: pixels, in each direction.
    """

    def __init__(self, *, rotation: NonNegative = 12.0, scaling: Fraction = 0.12, shift: NonNegative = 2.0):
        self.rotation, self.scaling, self.shift = rotation, scaling, shift

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images [B, C, H, W] -> moved images of the same shape; the background is black (-1)."""
        u = torch.stack([uniform((len(images),), generator) for _ in range(4)]) * 2 - 1
        angle = u[0] * math.radians(self.rotation)
        zoom = 1 / (1 + u[1] * self.scaling)  # the grid says where each output pixel is read
        x, y = u[2] * 2 * self.shift / images.shape[3], u[3] * 2 * self.shift / images.shape[2]
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        matrices = torch.stack([torch.stack([cos, -sin, x], -1), torch.stack([sin, cos, y], -1)], 1)
        grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
        return functional.grid_sample(images - BACKGROUND, grid, align_corners=False) + BACKGROUND


class ClassifierTraining(Task):
    """Trains the digit classifier.

    Args:
        classifier: the network to train.
        augmentation: applied to every training image.
        optimizer: recipe of the optimiser.
        ema: recipe of the average, which is the resulting classifier.
    """

    def __init__(self, *, classifier: DigitClassifier, augmentation: RandomAffine, optimizer: Adam, ema: EMA):
        super().__init__()
        self.classifier, self.augmentation = classifier, augmentation
        self.optimizer, self.ema = optimizer, ema

    @property
    def known_classes(self) -> int:
        return self.classifier.classes

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        self.to(device).train()
        self.device_type, self.autocast_dtype = device.type, autocast_dtype
        self.average = self.ema.copy_of(self.classifier)
        self.optimizers = {"classifier": self.optimizer.build(self.classifier.parameters())}

    def trained(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier, "classifier_average": self.average}

    def weights(self) -> dict[str, nn.Module]:
        return {"mnist_classifier": self.average}

    def step(self, batch: Batch, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        images, labels = self.augmentation(batch.images, generator), batch.condition.labels
        with torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            logits = self.classifier(images)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        updater = self.optimizers["classifier"]
        norm = updater.step()
        self.ema.update(self.average, self.classifier, batch_size, updater.updates * batch_size)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {
            "loss/cross_entropy": loss.detach(),
            "accuracy/training": accuracy,
            "gradient/classifier": norm,
        }


class ClassifierEvaluator:
    """Evaluates a ``ClassifierTraining`` on digits that it was not trained on.

    Args:
        held_out: shards or embedded data set of the held-out digits; must not overlap with the training data.
    """

    def __init__(self, *, held_out: str = "mnist-heldout"):
        self.held_out = held_out

    def measure(self, name: str, classifier: DigitClassifier) -> dict:
        """Accuracy and mean cross-entropy (nats) on the held-out digits, as a row of ``evaluation.json``."""
        images, labels = load_all(self.held_out, resolution=28)
        _, logits = classify_all(classifier, images)
        return {
            "name": name,
            "evaluations": 1,
            "samples": len(labels),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "cross_entropy": functional.cross_entropy(logits, labels).item(),
        }

    def before(self, task: ClassifierTraining, device: torch.device, seed: int) -> list[dict]:
        return [self.measure("before training", task.average)]

    def during(self, task: ClassifierTraining, device: torch.device, seed: int) -> dict[str, float]:
        row = self.measure("", task.average)
        return {"accuracy": row["accuracy"], "cross_entropy": row["cross_entropy"]}

    def after(
        self, task: ClassifierTraining, device: torch.device, seed: int, before: list[dict], workdir: str
    ) -> dict:
        """The document of ``evaluation.json``; also writes the accuracy into WORKDIR/mnist_classifier.json."""
        row = self.measure("trained", task.average)
        record = {
            "held_out": self.held_out,
            "samples": row["samples"],
            "accuracy": row["accuracy"],
            "cross_entropy_nats": row["cross_entropy"],
            "training_steps": task.optimizers["classifier"].updates,
            "parameters": sum(p.numel() for p in task.average.parameters()),
        }
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(Path(workdir) / "mnist_classifier.json", text.encode())
        return {
            "title": "Digit classifier",
            "rows": [*before, row],
            "metrics": {
                "accuracy": {"label": "held-out accuracy", "better": "higher"},
                "cross_entropy": {"label": "held-out cross-entropy (nats)", "better": "lower"},
            },
            "notes": [f"Held out: {row['samples']:,} digits, '{self.held_out}', which training never sees."],
        }
