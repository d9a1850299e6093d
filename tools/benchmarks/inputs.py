"""Random numbers in place of files: weights, images, latents and captions, of the shapes that a graph needs.

Notation: B samples; ``text`` [B, 77, E], 77 words as CLIP's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ratiograph.core.types import Batch, Condition
from ratiograph.data.latents import LatentStream, write_latents
from ratiograph.networks.guidance import EmptyPrompt, Guided, NoCaption
from ratiograph.tasks.distillation import Distillation
from ratiograph.training.experiment import Experiment

__all__ = ["drawn", "filled", "made_up_batch", "made_up_condition", "made_up_latents", "randomised", "without_files"]

WORDS = 77


def without_files(task: nn.Module) -> nn.Module:
    """The task with nothing to load: networks keep the weights they were built with, the empty prompt is zeros."""
    for module in task.modules():
        for name in ("weights", "encoder_weights"):
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
        if isinstance(module, Guided) and isinstance(module.unconditional, EmptyPrompt):
            module.unconditional = NoCaption()  # the same pass
    task.warm_start = None
    return task


@torch.no_grad()
def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with random numbers in every parameter that is zero, so that no layer is idle."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


def drawn(task: nn.Module) -> nn.Module:
    """The task with random weights in networks that have none yet; those that several share are drawn once."""
    known: set[int] = set()
    for network in [module for module in task.modules() if getattr(module, "filled", True) is False]:
        frozen = {id(parameter) for parameter in network.parameters() if not parameter.requires_grad}
        if not frozen or not frozen <= known:
            network.draw()
        network.filled = True
        known |= frozen
    return task


def randomised(task: Distillation, seed: int = 0) -> Distillation:
    """The task without any file: random weights everywhere, none of them zero, and nothing to load."""
    return filled(drawn(without_files(task)), seed)


def made_up_condition(network: nn.Module, samples: int, generator: torch.Generator) -> Condition:
    """A random condition for ``network``, on the CPU: labels, or text states with SDXL's pooled caption and sizes."""
    if getattr(network, "classes", 0):
        return Condition(torch.randint(network.classes, (samples,), generator=generator))
    width = getattr(network, "text_width", None)
    if width is None:
        return Condition()
    text = torch.randn(samples, WORDS, width, generator=generator)
    if not getattr(network, "sized", False):
        return Condition(text=text)
    unet = network.unet.config
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    sizes = torch.full((samples, 6), 8.0 * network.shape[-1])
    return Condition(text=text, pooled=torch.randn(samples, pooled, generator=generator), sizes=sizes)


def made_up_batch(network: nn.Module, samples: int, generator: torch.Generator) -> Batch:
    """Random images or latents in [-1, 1] with a condition for ``network``; on the CPU."""
    images = torch.randn(samples, *network.shape, generator=generator).clamp(-1, 1)
    return Batch(images, made_up_condition(network, samples, generator))


def made_up_latents(experiment: Experiment, folder: Path, samples: int) -> list[Path]:
    """Writes shards of ``samples`` random latents of the run's own shapes, and lets its stream read them.

    Args:
        experiment: a run of latents.
        folder: where.
        samples: N; shards of at most 1,000.

    Raises:
        ValueError: the run does not read latents.
    """
    stream = experiment.data
    if not isinstance(stream, LatentStream):
        raise ValueError(f"only shards of latents can be made up, and this run reads a {type(stream).__name__}")
    network = experiment.task.student.denoiser.network
    batch = made_up_batch(network, samples, torch.Generator().manual_seed(0))
    parts = {"latent": batch.images, **batch.condition.parts()}
    shards = -(-samples // 1000)
    paths = write_latents(folder, "latents", parts, shards)
    stream.urls = "::".join(map(str, paths))
    return paths
