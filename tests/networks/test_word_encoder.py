"""WordEncoder: fixed vectors for words. EncodedStream: a stream's captions as their states."""

import json
import subprocess
import sys

import pytest
import torch

from ratiograph.core.types import Batch, Condition
from ratiograph.data.captions import pack
from ratiograph.networks.guidance import NoCaption
from ratiograph.networks.word_encoder import EncodedStream, WordEncoder


def test_words_have_one_vector_wherever_they_stand():
    encoder = WordEncoder(width=16, length=4)
    text = encoder.encode(["a red seven", "seven", "A  Red digit"]).text
    assert text.shape == (3, 4, 16)
    assert torch.equal(text[0, 2], text[1, 0])
    assert torch.equal(text[0, :2], text[2, :2])
    assert not torch.equal(text[0, 2], text[2, 2])
    assert text[0, 3].eq(0).all()
    assert text[1, 1:].eq(0).all()


def test_the_same_in_another_process():
    code = "from ratiograph.networks.word_encoder import *\n"
    code += "print(WordEncoder(width=3).encode(['blue']).text[0, 0].tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == WordEncoder(width=3).encode(["blue"]).text[0, 0].tolist()


def test_vectors_are_standard_normal_and_unrelated():
    vectors = WordEncoder(width=64, length=1).encode([f"word{k}" for k in range(500)]).text[:, 0]
    assert abs(float(vectors.mean())) < 0.02
    assert abs(float(vectors.std()) - 1) < 0.02
    cosines = torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(vectors, dim=1).T
    assert float((cosines - torch.eye(500)).abs().max()) < 0.6


def test_the_empty_prompt_is_what_guidance_takes_for_no_caption():
    encoder = WordEncoder()
    told = encoder.encode(["a red seven", "a two"])
    assert torch.equal(NoCaption()(told).text, encoder.encode(["", "  "]).text)


def test_long_captions_are_cut():
    encoder = WordEncoder(length=3)
    assert torch.equal(encoder.encode(["a b c d e"]).text, encoder.encode(["a b c"]).text)


class Captions:
    """A stream of one batch, over and over."""

    urls = "shards.tar"

    def __init__(self, condition):
        self.condition = condition

    def batches(self, batch_size, seed, start=0, rank=0, ranks=1):
        while True:
            yield Batch(torch.full((2, 1), float(seed + start + rank + ranks)), self.condition)

    def describe(self):
        return "captions"


def test_an_encoded_stream_adds_states_and_keeps_the_rest():
    captions = ["a red seven", "a two"]
    stream = EncodedStream(stream=Captions(Condition(caption=pack(captions))), encoder=WordEncoder())
    batch = next(stream.batches(2, 10, 20, 1, 3))
    assert batch.images.tolist() == [[34.0], [34.0]]
    assert torch.equal(batch.condition.caption, pack(captions))
    assert torch.equal(batch.condition.text, WordEncoder().encode(captions).text)
    assert stream.describe() == "captions, encoded by WordEncoder"
    assert stream.urls == "shards.tar"


def test_a_stream_without_captions_is_refused():
    stream = EncodedStream(stream=Captions(Condition(labels=torch.zeros(2))), encoder=WordEncoder())
    with pytest.raises(ValueError, match="CaptionedStream"):
        next(stream.batches(2, 0))
