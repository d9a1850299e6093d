"""Models of the hub whose licence was not accepted: whoever asks for one says in one line how to be let in."""

from types import SimpleNamespace

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import huggingface_hub

from ratiograph.networks.architectures.stable_diffusion_unets import SD15UNet, UNetFromFolder
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.rewards.image_rewards import path_of
from ratiograph.networks.teachers.stable_diffusion import StableDiffusion
from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder

NAME = "hf://owner/name"
ASKING = {
    "U-Net": lambda: StableDiffusion.locate(weights=NAME, network=SD15UNet),
    "U-Net's configuration": lambda: UNetFromFolder(folder=NAME),
    "autoencoder": lambda: Autoencoder.locate(weights=NAME),
    "text encoder": lambda: SD15CaptionEncoder(weights=NAME).load(),
    "text encoders": lambda: SDXLCaptionEncoder.locate(weights=NAME),
    "reward": lambda: path_of(NAME, "CLIPReward.weights", "`hf download owner/name --local-dir FOLDER`", ("*.json",)),
}


@pytest.mark.parametrize("asked", list(ASKING))
def test_says_how_to_be_let_in(asked, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def gated(name, **arguments):
        assert name == "owner/name"
        raise huggingface_hub.errors.GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(ValueError, match=r"^hf://owner/name is gated: accept its licence at ") as caught:
        ASKING[asked]()
    message = str(caught.value)
    assert "https://huggingface.co/owner/name, run `hf auth login`, then" in message
    assert "hf download owner/name" in message
    assert "\n" not in message
