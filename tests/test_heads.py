"""Heads: pooling against its definition, block by block against all at once, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from acdit.classifiers import ACDiTClassifier, corruption_of
from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError
from acdit.heads import POOLINGS, ClassificationHead, Classifier
from acdit.pipelines import ACDiTPipeline
from tests.conftest import awaken, blocks_like, tiny_model


def head_for(pooling: str, **options: object) -> ClassificationHead:
    settings = {"layers": [0, -1], "heads": 4, "num_blocks": 4, **options}
    return awaken(ClassificationHead(32, 7, pooling=pooling, **settings), 0.5).double()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_the_average_it_says(pooling: str) -> None:
    head = head_for(pooling)
    features = [3 * torch.randn(2, 3, 5, 32, dtype=torch.float64) for _ in range(2)]
    tokens = torch.cat([layer.flatten(1, 2) for layer in features], dim=-1)
    if pooling == "mean":
        average = tokens.mean(1)
    elif pooling == "blocks":
        means = [torch.cat([layer[:, block].mean(1) for layer in features], dim=-1) for block in range(3)]
        average = torch.cat([*means, torch.zeros_like(means[0])], dim=-1)  # the fourth has not been seen
    else:
        tokens = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rows = []
        for sample in tokens:
            keys, values = head.key(sample).unflatten(-1, (4, 16)), head.value(sample).unflatten(-1, (4, 16))
            weights = torch.einsum("thk,hk->th", keys, head.query).div(4).softmax(0)
            rows.append(torch.einsum("th,thk->hk", weights, values).flatten())
        average = torch.stack(rows)
    expected = head.linear(average / (average.square().mean(-1, keepdim=True) + 1e-6).sqrt() * head.norm.weight)
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", [{}, {"window": 1, "sink_blocks": 1}])
def test_streaming_answers_as_all_blocks_at_once_after_every_block(pooling: str, kind: dict[str, int]) -> None:
    model = tiny_model((8, 4, 4), (2, 4, 4), **kind)
    found = ACDiTClassifier(
        Classifier(model, head_for(pooling)), ACDiTPipeline(model, GaussianCorruption().sampling_scheduler())
    )
    clean = blocks_like(model, 3)
    reads = []
    model.x_embedder.register_forward_hook(lambda _, inputs, __: reads.append(inputs[0].shape[1]))
    streamed = list(found.stream(clean))
    assert reads == [1, 1, 1, 1]  # each block is read once
    for seen, logits in enumerate(streamed, start=1):
        torch.testing.assert_close(logits, found.of_blocks(clean[:, :seen]), rtol=0, atol=1e-12)
    assert (streamed[0] - streamed[-1]).abs().max() > 1e-6


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_head_saved_and_loaded_gives_the_same_logits(pooling: str, whole: bool, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    pipeline = ACDiTPipeline(model, GaussianCorruption("v_prediction").sampling_scheduler())
    head = head_for(pooling, id2label={str(index): f"class {index}" for index in range(7)}).float()
    tuned = awaken(tiny_model(dtype=torch.float32), 0.3) if whole else model
    made = ACDiTClassifier(Classifier(tuned, head), pipeline)
    pipeline.save_pretrained(tmp_path)
    made.save(tmp_path, whole)
    found = ACDiTClassifier.from_pretrained(tmp_path)
    pixels = torch.rand(3, 2, 8, 8)
    assert torch.equal(found(pixels), made(pixels))
    assert (tmp_path / "classifier" / "transformer").is_dir() == whole
    best = found.best(found(pixels), 3)
    assert [one["name"] for one in best[0]] == [f"class {one['class']}" for one in best[0]]
    assert best[0][0]["probability"] >= best[0][1]["probability"]
    generative = ACDiTPipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert all(torch.equal(generative[name], value) for name, value in model.state_dict().items())


def test_a_one_block_models_noisy_features_are_dits_and_keyed_by_the_sample() -> None:
    model = tiny_model((8, 8), (8, 8))
    pipeline = ACDiTPipeline(model, GaussianCorruption().sampling_scheduler())
    found = ACDiTClassifier(Classifier(model, head_for("mean", noise_timestep=200.0), GaussianCorruption()), pipeline)
    clean = blocks_like(model, 4)
    whole = found.of_blocks(clean)
    torch.testing.assert_close(found.of_blocks(clean[2:], first=2), whole[2:], rtol=0, atol=1e-12)
    assert (found.of_blocks(clean[2:], first=3) - whole[2:]).abs().max() > 1e-6
    noise = torch.randn_like(clean)
    noisy = GaussianCorruption().corrupt(clean, noise, torch.full((4, 1), 200))
    expected = model.encode_noisy(torch.zeros_like(clean), noisy, 200, layers=[0, -1])  # the context is not read
    torch.testing.assert_close(found.classifier.features(clean, noise)[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_a_schedulers_corruption_is_the_one_it_was_made_for(kind: str) -> None:
    trained = GaussianCorruption(kind)
    found = corruption_of(trained.sampling_scheduler())
    assert found is not None
    clean, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    timestep = trained.uniform_timesteps(torch.rand(2, 3))
    assert torch.equal(found.corrupt(clean, noise, timestep), trained.corrupt(clean, noise, timestep))


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="pooling"):
        ClassificationHead(32, 7, pooling="max")
    with pytest.raises(ConfigError, match="width"):
        Classifier(model, ClassificationHead(16, 7))
    with pytest.raises(ConfigError, match="noisy"):
        Classifier(model, head_for("mean", noise_timestep=5.0))
    for options in ({"bidirectional": True}, {"noise_timestep": 5.0}):
        made = Classifier(model, head_for("mean", **options), GaussianCorruption())
        with pytest.raises(ConfigError, match="block-causal"):
            made.go_on(blocks_like(model, 1)[:, :1], model.new_cache(1))
