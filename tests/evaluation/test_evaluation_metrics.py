"""Metrics of feature sets, files of statistics, and scores of images with captions."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from ratiograph.algebra.rewards import LinearReward
from ratiograph.data import captions
from ratiograph.evaluation.alignment import ClipScore, RewardScore
from ratiograph.evaluation.documents import merged, read_document
from ratiograph.evaluation.feature_sets import FeatureSet, read_statistics, write_statistics
from ratiograph.evaluation.frechet import fit, frechet_with_error
from ratiograph.evaluation.inception_score import inception_score
from ratiograph.evaluation.kid import kernel_distance, unbiased_distance
from ratiograph.evaluation.manifold import Manifold
from ratiograph.evaluation.metrics import (
    ExactKernelDistance,
    Frechet,
    InBatchSimilarity,
    InceptionScore,
    KernelDistance,
    NearestNeighbours,
    in_batch_similarity,
)
from ratiograph.networks.rewards.clip_rewards import CLIPReward
from tiny_pipelines import tokenizer

CPU = torch.device("cpu")


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sets():
    """Samples with logits, and real images."""
    return FeatureSet(normal(0, 120, 6) * 0.9, logits=3 * normal(2, 120, 5)), FeatureSet(normal(1, 150, 6))


def test_each_metric_is_its_function(sets):
    samples, real = sets
    distance, error = frechet_with_error(samples.features, fit(real.features), groups=4)
    assert Frechet(groups=4)(samples, real, CPU) == {"frechet": distance, "frechet_error": error}
    mean, error = kernel_distance(real.features, samples.features, subsets=9, size=30)
    assert KernelDistance(subsets=9, size=30)(samples, real, CPU) == {"kid": mean, "kid_error": error}
    exact = unbiased_distance(samples.features, real.features)
    assert ExactKernelDistance()(samples, real, CPU)["kid_exact"] == pytest.approx(exact, rel=1e-12)
    score, error = inception_score(samples.logits, splits=6)
    assert InceptionScore(splits=6)(samples, real, CPU) == {"inception_score": score, "inception_score_error": error}


def test_neighbours_are_the_manifolds_and_errors_its_spread(sets):
    samples, real = sets
    found = NearestNeighbours(splits=3)(samples, real, CPU)
    whole = Manifold(real.features).compare(samples.features)
    assert {name: found[name] for name in whole} == whole
    parts = [
        Manifold(x).compare(y)
        for x, y in zip(real.features.tensor_split(3), samples.features.tensor_split(3), strict=True)
    ]
    for name in whole:
        expected = np.std([part[name] for part in parts], ddof=1) / math.sqrt(3)
        assert found[f"{name}_error"] == pytest.approx(expected, rel=1e-9)
    assert set(NearestNeighbours(splits=0)(samples, real, CPU)) == set(whole)
    assert set(NearestNeighbours(splits=40)(samples, real, CPU)) == set(whole)  # parts of three have no neighbours
    assert all(set(metric.labels) >= set(found) for metric in [NearestNeighbours])


def test_in_batch_similarity_is_the_mean_cosine_of_pairs():
    features, groups = normal(0, 9, 5), torch.tensor([3, 1, 3, 1, 3, 7, 7, 7, 2])
    means = []
    for group in (1, 3, 7):
        members = [f for f, g in zip(features, groups, strict=True) if g == group]
        cosines = [
            float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
            for i, a in enumerate(members)
            for b in members[:i]
        ]
        means.append(np.mean(cosines))
    mean, error = in_batch_similarity(features, groups)
    assert mean == pytest.approx(np.mean(means), rel=1e-10)
    assert error == pytest.approx(np.std(means, ddof=1) / math.sqrt(3), rel=1e-9)
    assert in_batch_similarity(features[:1].expand(4, 5), torch.zeros(4))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="two samples of one caption"):
        in_batch_similarity(features, torch.arange(9))


def test_what_is_lacking_is_said(sets):
    samples, real = sets
    fitted = FeatureSet(None, gaussian=real.gaussian)
    assert Frechet().lacks(samples, fitted) == ""
    assert Frechet()(samples, fitted, CPU) == Frechet()(samples, real, CPU)
    for metric in (KernelDistance(), ExactKernelDistance(), NearestNeighbours()):
        assert "only their mean and covariance" in metric.lacks(samples, fitted)
        assert metric.lacks(samples, real) == ""
    assert "no real images" in Frechet().lacks(samples, None)
    assert InceptionScore().lacks(samples, None) == ""
    assert InceptionScore().lacks(real, None) == "the network has no classifier"
    assert InBatchSimilarity().lacks(samples, real) == "no caption has two samples"
    assert InBatchSimilarity().lacks(FeatureSet(samples.features, groups=torch.arange(120)), real)
    assert InBatchSimilarity().lacks(FeatureSet(samples.features, groups=torch.arange(120) // 2), real) == ""


# ------------------------------------------------------------------------------------------------ statistics


class Extractor:
    """What a file of statistics asks of an extractor."""

    name, size = "tiny", 6

    def __init__(self, identity="a"):
        self.identity = lambda: identity


def test_statistics_come_back(sets, tmp_path):
    _, real = sets
    write_statistics(tmp_path / "s.npz", real, Extractor())
    again = read_statistics(tmp_path / "s.npz", Extractor())
    assert torch.equal(again.features, real.features)
    assert torch.equal(again.gaussian.mean, real.gaussian.mean)
    assert torch.equal(again.gaussian.covariance, real.gaussian.covariance)
    write_statistics(tmp_path / "s.npz", real, Extractor(), features=False)
    assert read_statistics(tmp_path / "s.npz", Extractor()).features is None


def test_cleanfids_custom_statistics(sets, tmp_path):
    samples, real = sets
    array = real.features.numpy()
    np.savez_compressed(tmp_path / "x_clean_custom_na.npz", mu=array.mean(0), sigma=np.cov(array, rowvar=False))
    found = read_statistics(tmp_path / "x_clean_custom_na.npz", Extractor())
    assert found.features is None
    expected = Frechet()(samples, real, CPU)["frechet"]
    assert Frechet()(samples, found, CPU)["frechet"] == pytest.approx(expected, rel=1e-5)
    np.savez_compressed(tmp_path / "x_clean_custom_na_kid.npz", feats=array)
    assert torch.equal(read_statistics(tmp_path / "x_clean_custom_na.npz", Extractor()).features, real.features)


def test_statistics_of_other_features(sets, tmp_path):
    write_statistics(tmp_path / "s.npz", sets[1], Extractor())
    with pytest.raises(ValueError, match="made by other features"):
        read_statistics(tmp_path / "s.npz", Extractor("b"))
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="statistics of 5 features, 'tiny' has 6"):
        read_statistics(tmp_path / "s.npz", Extractor())
    np.savez(tmp_path / "s.npz", x=np.zeros(5))
    with pytest.raises(ValueError, match="a file of statistics holds mu and sigma"):
        read_statistics(tmp_path / "s.npz", Extractor())
    (tmp_path / "s.npz").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match="no whole"):
        read_statistics(tmp_path / "s.npz", Extractor())
    np.savez(tmp_path / "s.npz", mu=np.array([{}], dtype=object), sigma=np.eye(6))
    with pytest.raises(ValueError, match="no whole"):
        read_statistics(tmp_path / "s.npz", Extractor())


# ------------------------------------------------------------------------------------------------ scores


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP model."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip") / "model"
    words = tokenizer(folder / "tokenizer")
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 190, "eos_token_id": 191, "pad_token_id": 191}
    config = transformers.CLIPConfig(
        text_config={**part, **ends, "vocab_size": 192, "max_position_embeddings": 12},
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=10,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(image_processor=images, tokenizer=words).save_pretrained(folder)
    return folder


def test_clip_score_is_torchmetrics(clip):
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(clip)
    for kind in ("image", "text"):  # newer transformers return an object where torchmetrics expects a tensor
        features = getattr(model, f"get_{kind}_features")
        setattr(model, f"get_{kind}_features", lambda *a, _f=features, **k: getattr(_f(*a, **k), "pooler_output"))  # noqa: B009
    images, texts = normal(0, 3, 3, 20, 24).clamp(-1, 1), ["ab cd", "a dog", "x"]
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    metric = CLIPScore(model_name_or_path=lambda: (model, CLIPProcessor.from_pretrained(clip)))
    with torch.no_grad():
        expected = [float(metric(pixels[k : k + 1], texts[k : k + 1])) for k in range(3)]
    found = ClipScore(folder=str(clip)).load()(images, texts)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 2) for value in found.tolist()}) == 3


def test_long_captions_are_cut(clip):
    score = ClipScore(folder=str(clip)).load()
    images = normal(1, 1, 3, 16, 16)
    assert score(images, ["ab " * 40]).item() == pytest.approx(score(images, ["ab " * 60]).item(), abs=1e-4)


def test_clip_without_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.safetensors \(1,711 MB .* hf download openai/clip") as error:
        ClipScore(folder=str(tmp_path / "none")).load()
    assert "\n" not in str(error.value)


def test_clip_without_its_image_processor(clip, tmp_path):
    shutil.copytree(clip, tmp_path, ignore=shutil.ignore_patterns("*processor_config.json"), dirs_exist_ok=True)
    with pytest.raises(FileNotFoundError, match=r"there is no preprocessor_config\.json\. Fetch it once: hf download"):
        ClipScore(folder=str(tmp_path)).load()


def test_scores_and_rewards_agree(clip):
    """CLIP's reward is its logit, the score 100 times the cosine; images of the tower's size are not resized."""
    images, texts = normal(3, 3, 3, 16, 16).clamp(-1, 1), ["ab cd", "a dog", "x"]
    score, reward = ClipScore(folder=str(clip)).load(), RewardScore(reward=CLIPReward(weights=str(clip))).load()
    scale = float(reward.network.network.logit_scale.exp())
    torch.testing.assert_close(reward(images, texts), score(images, texts) * scale / 100, rtol=1e-4, atol=1e-4)


def test_reward_score_is_the_reward():
    images = normal(2, 4, 1, 2, 2).sign()
    slope = [1.0, -2.0, 0.5, 3.0]
    score = RewardScore(reward=LinearReward(slope=slope)).load().to(CPU)
    torch.testing.assert_close(score(images, None), images.flatten(1) @ torch.tensor(slope))

    torch.testing.assert_close(score(0.999 * images, None), score(images, None), rtol=0, atol=0)  # as image files are

    class Length(nn.Module):
        def log_reward(self, x0, condition):
            return torch.tensor([float(len(text)) for text in captions.unpack(condition.caption)])

    assert RewardScore(reward=Length())(images[:2], ["abc", "é"]).tolist() == [3, 1]


# ------------------------------------------------------------------------------------------------ documents


def test_the_newer_document_says_which_row_is_best():
    old = {"rows": [{"name": "a", "samples": 4, "best": True}, {"name": "b", "samples": 4}], "metrics": {}, "notes": []}
    new = {"rows": [{"name": "a", "samples": 4}, {"name": "b", "samples": 4, "best": True}], "metrics": {}, "notes": []}
    assert [row.get("best") for row in merged(old, new, "x")["rows"]] == [None, True]
    new["rows"][1].pop("best")
    assert [row.get("best") for row in merged(old, new, "x")["rows"]] == [True, None]


def test_documents_are_merged_by_row_and_label(tmp_path):
    old = {
        "title": "T",
        "rows": [{"name": "student", "samples": 5, "precision": 0.5}],
        "metrics": {"precision": {"label": "precision of digits"}},
        "notes": ["a"],
        "histograms": {"labels": []},
    }
    labels = {
        "precision": {"label": "precision (lite0)"},
        "precision_error": {"label": "± precision (lite0)", "of": "precision"},
        "kid": {"label": "KID"},
    }
    rows = [
        {"name": "student", "samples": 5, "precision": 0.7, "precision_error": 0.1, "kid": 1.0},
        {"name": "student", "samples": 9, "kid": 2.0},
    ]
    found = merged(old, {"metrics": labels, "rows": rows, "notes": ["a", "b"]}, "lite0")
    assert found["rows"] == [
        {"name": "student", "samples": 5, "precision": 0.5, "precision_lite0": 0.7, "precision_error": 0.1, "kid": 1.0},
        {"name": "student", "samples": 9, "kid": 2.0},
    ]
    assert found["metrics"]["precision"]["label"] == "precision of digits"
    assert found["metrics"]["precision_lite0"]["label"] == "precision (lite0)"
    assert found["metrics"]["precision_error"]["of"] == "precision_lite0"
    assert (found["notes"], found["title"], found["histograms"]) == (["a", "b"], "T", {"labels": []})
    assert len(old["rows"][0]) == 3
    assert read_document(tmp_path / "none.json")["rows"] == []
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no evaluation\.json"):
        read_document(tmp_path / "x.json")
