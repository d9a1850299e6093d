"""Feature extractors on FID's Inception network, by clean-fid's three protocols. Notation as in `features`."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratiograph.core.files import expanded
from ratiograph.data.embedded import cache_folder
from ratiograph.evaluation.features import FeatureExtractor, missing_weights
from ratiograph.networks.weights.weight_files import read_state, require_finite

__all__ = ["InceptionFeatures", "LegacyInceptionFeatures", "TensorFlowInceptionFeatures"]


class InceptionFeatures(FeatureExtractor):
    """The Inception network of FID (Heusel et al. 2017) on clean-fid's resizing: its mode "clean", features [B, 2048].

    The network is the TorchScript file that clean-fid itself reads. Its logits, of 1,008 outputs and without the bias,
    are those that the Inception Score is published with (Salimans et al. 2016).

    Args:
        weights: the file; by default ``weights/inception-2015-12-05.pt`` in the cache folder.
    """

    name, size, mode = "Inception-v3, clean", 2048, "clean"
    file = "inception-2015-12-05.pt"
    url = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

    def __init__(self, *, weights: str | None = None):
        self.weights = expanded(weights) if weights else cache_folder() / "weights" / self.file

    def read(self):
        if not self.weights.is_file():
            command = f"curl -L --create-dirs -o {self.weights} {self.url}"
            raise missing_weights(f"'{self.name}'", self.weights, "91 MB", command)
        from cleanfid.resize import build_resizer

        self.resize = build_resizer(self.mode)
        return self.read_network()

    def read_network(self) -> nn.Module:
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of TorchScript's end
                network = torch.jit.load(self.weights, map_location="cpu")
            self._classifier = network.output.weight.detach()
            assert network.layers is not None
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{self.weights} is not clean-fid's Inception file; fetch it again from {self.url}"
            ) from error
        require_finite(network.state_dict(), self.weights)
        return network

    def to(self, device):
        self._classifier = self._classifier.to(device)
        return super().to(device)

    def features(self, pixels):
        return self.forward(self.to_299(pixels)).flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Resized pixels [B, 3, 299, 299] in 0..255 => features."""
        return self.network.layers((pixels - 128) / 128)

    def to_299(self, pixels: Tensor) -> Tensor:
        """clean-fid's own resizing, image by image, [B, 3, H, W] => [B, 3, 299, 299]."""
        images = pixels.permute(0, 2, 3, 1).cpu().numpy()  # CHW => HWC
        parts = [torch.from_numpy(self.resize(image)) for image in images]
        return torch.stack(parts).permute(0, 3, 1, 2).to(pixels.device)

    def logits(self, features):
        return functional.linear(features.to(self._classifier.device), self._classifier)


class TensorFlowInceptionFeatures(InceptionFeatures):
    """The same file with the network's own resizing, bilinear without antialiasing: clean-fid's "legacy_tensorflow".

    EDM and the papers that follow it publish their FID by it.

    Args:
        weights: as for ``InceptionFeatures``.
    """

    name, mode = "Inception-v3, legacy_tensorflow", "legacy_tensorflow"

    def features(self, pixels):
        return self.network(pixels, return_features=True).flatten(1)


class LegacyInceptionFeatures(InceptionFeatures):
    """The same network by pytorch-fid's weights and its bilinear resizing without antialiasing: "legacy_pytorch".

    Args:
        weights: the file; by default ``weights/pt_inception-2015-12-05-6726825d.pth`` in the cache folder.
    """

    name, mode = "Inception-v3, legacy_pytorch", "legacy_pytorch"
    file = "pt_inception-2015-12-05-6726825d.pth"
    url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{file}"

    def read_network(self):
        from unittest import mock

        from cleanfid import inception_pytorch

        state = read_state(self.weights)
        # clean-fid's class would download the file; it is given the tensors instead.
        with mock.patch.object(inception_pytorch, "load_state_dict_from_url", return_value=state):
            try:
                network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
                self._classifier = state["fc.weight"].float()
            except (RuntimeError, KeyError) as error:
                raise ValueError(f"{self.weights} is not pytorch-fid's Inception file: {error}") from error
        return network

    def forward(self, pixels):
        return self.network(pixels / 255)[0]
