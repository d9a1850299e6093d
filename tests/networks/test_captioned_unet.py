"""CaptionedUNet: captions matter, can be dropped, and grey weights carry over exactly."""

import pytest
import torch

from ratiograph.core.contracts import Evaluation, Nodes
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.architectures.captioned_unet import CaptionedUNet, EDMFromGrey
from ratiograph.networks.architectures.unet import UNet
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.guidance import Guided, NoCaption
from ratiograph.networks.ratios import TeacherFeatureRatio
from ratiograph.networks.students import OneStep
from ratiograph.networks.weights.weight_files import save_weights
from ratiograph.networks.word_encoder import WordEncoder

CAPTIONS = ["a red seven", "a two", "a blue digit", ""]


def network(**arguments):
    torch.manual_seed(0)
    made = CaptionedUNet(resolution=8, channels=16, text_width=8, **arguments)
    for parameter in made.parameters():  # out and the residual branches start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def condition(captions=CAPTIONS):
    return WordEncoder(width=8, length=4).encode(captions)


def noisy(samples=4):
    torch.manual_seed(1)
    sigma = torch.rand(samples) + 0.5
    return Noisy(torch.randn(samples, 3, 8, 8), sigma, torch.ones(samples), sigma)


def test_a_caption_changes_the_output_of_its_own_sample_only():
    denoiser = EDM(network=network())
    before, after = (
        denoiser.denoise(noisy(), condition(captions))
        for captions in (CAPTIONS, ["a red seven", "a three", *CAPTIONS[2:]])
    )
    differs = (before - after).flatten(1).abs().amax(1)
    assert differs[1] > 1e-3
    assert differs[[0, 2, 3]].max() < 1e-6


def test_words_are_a_set_and_the_empty_prompt_is_no_caption():
    denoiser, x = EDM(network=network()), noisy()
    turned = ["seven red a", "two a", "digit a blue", ""]
    told = denoiser.denoise(x, condition())
    torch.testing.assert_close(told, denoiser.denoise(x, condition(turned)))
    untold = denoiser.denoise(x, Condition())
    torch.testing.assert_close(untold, denoiser.denoise(x, NoCaption()(condition())))
    torch.testing.assert_close(told[3], untold[3])
    assert (told[:3] - untold[:3]).abs().amax() > 1e-3


def test_guidance_is_the_line_through_both():
    denoiser, x = EDM(network=network()), noisy()
    guided = Guided(denoiser=denoiser, guidance_scale=3.0, unconditional=NoCaption())
    told, untold = denoiser.denoise(x, condition()), denoiser.denoise(x, Condition())
    torch.testing.assert_close(guided.denoise(x, condition()), untold + 3 * (told - untold))


def test_captions_are_dropped_in_training_only_and_as_often_as_asked():
    made = network(caption_dropout=0.25)
    many = condition(["a red seven"] * 4000)
    assert torch.equal(made._words(many, 4000), many.text.sum(1))
    dropped = made.train()._words(many, 4000).eq(0).all(1).float().mean()
    assert abs(float(dropped) - 0.25) < 0.03
    torch.testing.assert_close(network().train()._words(many, 4000), many.text.sum(1))


def test_states_of_another_width_are_refused():
    with pytest.raises(ValueError, match="set it as WordEncoder"):
        EDM(network=network()).denoise(noisy(), WordEncoder(width=9).encode(CAPTIONS))


def test_it_is_a_student_and_a_source_of_features():
    denoiser = EDM(network=network())
    student = OneStep(denoiser=denoiser)
    assert student.captioned
    assert student.noise(2, torch.Generator()).shape == (2, 3, 8, 8)
    encoding = denoiser.encode(noisy(), condition())
    assert tuple(f.shape[1] for f in encoding.features) == denoiser.feature_channels == (16, 32, 32)
    ratio = TeacherFeatureRatio(width=8)
    ratio.connect(Guided(denoiser=denoiser, guidance_scale=2.0, unconditional=NoCaption()), None)
    evaluation = Evaluation(noisy(), noisy().x_t, condition(), Nodes(denoiser, None, ratio))
    assert evaluation.log_ratio.tolist() == [0.0] * 4


def test_grey_images_are_denoised_as_the_grey_weights_do(tmp_path):
    torch.manual_seed(2)
    grey = EDM(network=UNet(resolution=8, channels=16), sigma_data=0.5).eval()
    for parameter in grey.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(tmp_path / "grey.safetensors", grey, {})
    coloured = EDMFromGrey(network=network(), sigma_data=0.5, weights=str(tmp_path / "grey.safetensors"))
    coloured.load()
    for layer in coloured.network.text_embedding.parameters():
        layer.data.zero_()
    x, c = noisy(), torch.zeros(4)
    mean = x.x_t.mean(1, keepdim=True)
    want = grey.network.decode(grey.network.encode(mean, c, Condition())).expand(-1, 3, -1, -1)
    got = coloured.network.decode(coloured.network.encode(mean.expand(-1, 3, -1, -1), c, condition()))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    coloured_input = coloured.network.decode(coloured.network.encode(x.x_t, c, condition()))
    assert (coloured_input - want).abs().amax() > 1e-2  # the channels' differences are seen
