import torch
from hypothesis import given
from hypothesis import strategies as st

from ratiograph.core.types import Condition
from ratiograph.data.captions import LENGTH, pack, unpack


@given(st.lists(st.text(max_size=200), max_size=4))
def test_captions_survive(captions):
    kept = [caption.replace("\0", "") for caption in captions]
    assert unpack(pack(captions)) == kept


def test_a_long_caption_is_cut_at_a_whole_character():
    (cut,) = unpack(pack(["é" * 10_000 + "x"]))
    assert cut == "é" * (LENGTH // 2)
    (cut,) = unpack(pack(["x" + "é" * 10_000]))
    assert cut == "x" + "é" * ((LENGTH - 1) // 2)


def test_a_caption_stays_on_the_cpu():
    condition = Condition(labels=torch.tensor([1]), caption=pack(["a red seven"])).to(torch.device("meta"))
    assert condition.labels.is_meta
    assert unpack(condition.join(condition.map(lambda part: part)).caption) == 2 * ["a red seven"]
