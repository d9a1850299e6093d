"""What a text-to-image model's own files say of its network: what it predicts, its noising process, its configuration.

Notation: the *scheduler file* is ``scheduler/scheduler_config.json`` beside the U-Net in diffusers' format. A bare
``.safetensors`` file has none; it is taken to be Stable Diffusion's. Where gin says something else than the files, that
is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.files import expanded
from ratiograph.core.foreign import shown
from ratiograph.networks.weights.pipeline_files import config_of, scheduler_of

__all__ = ["EpsilonPrediction", "Prediction", "SamplePrediction", "VPrediction", "check_network", "facts_of"]

SAME = 1e-5
"""Relative difference of two betas by rounding to float32 alone."""


class Prediction:
    """Base class: what the network's output F means.

    ``name`` is diffusers' word for it. The order of operations is that of its schedulers, so that the results are too.
    """

    name: str

    def denoised(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """mu of F = ``output`` [B, ...] at the native x' = ``x`` [B, ...], with alpha' and sigma' [B, 1, ...]."""
        raise NotImplementedError


class EpsilonPrediction(Prediction):
    """F is the noise: mu = (x' - sigma' F) / alpha' (Ho et al. 2020; SD 1.x and SDXL base)."""

    name = "epsilon"

    def denoised(self, x, output, alpha, sigma):
        return (x - sigma * output) / alpha


class VPrediction(Prediction):
    """F is alpha' noise - sigma' x0: mu = alpha' x' - sigma' F (Salimans & Ho 2022; SD 2.x at 768)."""

    name = "v_prediction"

    def denoised(self, x, output, alpha, sigma):
        return alpha * x - sigma * output


class SamplePrediction(Prediction):
    """F is x0 itself: mu = F."""

    name = "sample"

    def denoised(self, x, output, alpha, sigma):
        return output


# --- the scheduler file -----------------------------------------------------------------------------------------------


def facts_of(
    weights: str | None, prediction: Prediction | None, process: ScaledLinearDDPM | None
) -> tuple[Prediction, ScaledLinearDDPM]:
    """What the network predicts and its process: as given, else as the scheduler file says, else Stable Diffusion's.

    Args:
        weights: source of the U-Net, see `pipeline_files`.
        prediction: of gin, or None.
        process: of gin, or None.

    Raises:
        ValueError: the given ones are others than the file's, or the file's are not supported.
    """
    found = scheduler_of(weights)
    if found is None:
        there = weights is not None and (expanded(weights).exists() or config_of(weights, "unet") is not None)
        if there and prediction is None:
            warnings.warn(
                f"{shown(weights)} has no scheduler/scheduler_config.json beside it: its network is taken to predict "
                "the noise under Stable Diffusion's betas. Bind StableDiffusion.prediction if it does not",
                stacklevel=2,
            )
        return prediction or EpsilonPrediction(), process or ScaledLinearDDPM()
    path, said = found
    own_prediction, own_process = _prediction(path, said), _process(path, said)
    if prediction is not None and prediction.name != own_prediction.name:
        raise ValueError(
            f"StableDiffusion.prediction is @{type(prediction).__name__}() ({prediction.name}), and {shown(path)} says "
            f"prediction_type {own_prediction.name}: leave the line out"
        )
    if process is not None and str(process) != str(own_process):
        raise ValueError(
            f"StableDiffusion.process has {process}, and {shown(path)} says {own_process}: leave the line out"
        )
    return own_prediction, own_process


def _prediction(path: Path, said: Mapping[str, object]) -> Prediction:
    known = {kind.name: kind for kind in (EpsilonPrediction, VPrediction, SamplePrediction)}
    name = said.get("prediction_type", EpsilonPrediction.name)
    if name not in [*known]:
        raise ValueError(f"{shown(path)} says prediction_type {shown(name)}: only {', '.join(known)} can be run")
    return known[name]()


def _process(path: Path, said: Mapping[str, object]) -> ScaledLinearDDPM:
    if said.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"{shown(path)} says rescale_betas_zero_snr: at its last step x_t has no signal, sigma / alpha is "
            "infinite, and no denoiser or student here is defined. Take a model without it"
        )
    steps, betas = said.get("num_train_timesteps", 1000), said.get("trained_betas")
    numbers = [steps, *(said.get(name) for name in ("beta_start", "beta_end"))] if betas is None else betas
    if not isinstance(numbers, list) or len(numbers) < 2 or not all(isinstance(n, int | float) for n in numbers):
        raise ValueError(f"{shown(path)} states no num_train_timesteps, beta_start and beta_end: copy it again")
    if betas is not None:
        process = _built(path, len(betas), betas[0], betas[-1])
        same = all(abs(own - beta) < SAME * beta for own, beta in zip(process.betas.tolist(), betas, strict=True))
        if not same:
            raise ValueError(
                f"{shown(path)} says trained_betas whose roots are not evenly spaced: only scaled_linear, Stable "
                "Diffusion's, can be run"
            )
        return process
    if said.get("beta_schedule") != "scaled_linear":
        raise ValueError(
            f"{shown(path)} says beta_schedule {shown(said.get('beta_schedule'))}: only scaled_linear, Stable "
            "Diffusion's, can be run"
        )
    return _built(path, *numbers)


def _built(path: Path, steps: int, beta_start: float, beta_end: float) -> ScaledLinearDDPM:
    try:
        return ScaledLinearDDPM(steps=steps, beta_start=beta_start, beta_end=beta_end)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{shown(path)} says {shown(steps)} steps with betas from {beta_start} to {beta_end}: {error}"
        ) from error


# --- the U-Net's configuration ----------------------------------------------------------------------------------------


def check_network(network: nn.Module, weights: str | None) -> None:
    """Compares the configuration of a U-Net with the ``config.json`` beside its weights, if there is one.

    Shapes of tensors do not show all of it: latents' sizes, heads of attention, groups of normalisations.

    Raises:
        ValueError: they differ; names both values.
    """
    config = config_of(weights, "unet")
    if config is None:
        return
    own = network.unet.config
    for name, theirs in config.items():
        if name in own and not name.startswith("_") and not _same(own[name], theirs):
            raise ValueError(
                f"{type(network).__name__} has {name}={shown(_plain(own[name]))}, and the U-Net's config.json at "
                f"{shown(weights)} says {shown(_plain(theirs))}: set it so, or bind StableDiffusion.network (of a "
                "LoRA: LoRA.network) to @UNetFromFolder()"
            )


def _plain(value: object) -> object:
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def _same(here: object, there: object) -> bool:
    """Whether two values of a configuration mean the same; diffusers takes one number for the same at every level."""
    here, there = _plain(here) or None, _plain(there) or None
    if isinstance(here, list) != isinstance(there, list):
        many, one = (here, there) if isinstance(here, list) else (there, here)
        return all(value == one for value in many)
    return here == there
