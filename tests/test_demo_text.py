"""The text demo: its files, its baselines, its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from acdit import ACDiTTextPipeline, demo_text
from acdit.errors import ConfigError, StorageError

TINY = ["train.steps=2", "train.checkpoint_every=2", "train.sample_every=null", "model.num_layers=1",
        "model.grid=[32]", "data.sequence_length=32", "optim.batch_size=2", "train.tensorboard=false"]  # fmt: skip


def test_counted_bits_are_those_of_the_formula() -> None:
    """By hand on two tokens: with much text, smoothing vanishes."""
    train = np.array([0, 0, 1] * 3000 + [0])
    single, pair = demo_text.counted_bits(train, train, 2)
    share = (train == 0).mean()
    assert single == pytest.approx(-(share * np.log2(share) + (1 - share) * np.log2(1 - share)), abs=1e-6)
    # After 0 comes 0 or 1, equally often; after 1 always 0: two of three characters cost a bit.
    assert pair == pytest.approx(2 / 3, abs=2e-3)


def test_pairs_that_were_never_seen_cost_bits_and_no_infinity() -> None:
    single, pair = demo_text.counted_bits(np.array([0, 1, 0, 1]), np.array([2, 2, 2]), 3)
    assert np.isfinite([single, pair]).all()
    assert min(single, pair) > 1


def test_shuffled_text_has_no_pairs_to_learn_from() -> None:
    row = np.random.default_rng(0).integers(0, 4, 20_000)
    single, pair = demo_text.counted_bits(row[:10_000], row[10_000:], 4)
    assert single == pytest.approx(2, abs=0.01)
    assert pair == pytest.approx(2, abs=0.01)


def test_it_leaves_what_it_promises_and_refuses_a_strangers_folder(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    for _ in range(2):  # a second demo replaces the first
        metrics = demo_text.run_demo_text(run, overrides=TINY, draws=2, samples=2, progress=False)
    for name in ("samples.txt", "loss.png", "metrics.json", "model", "ar/model", "recipe.yaml"):
        assert (run / name).exists(), name
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert (run / "samples.txt").read_text(encoding="utf-8").count("===") == 8
    # Two steps of training know nothing: the bound is near that of equally likely characters, and honest about it.
    vocab = ACDiTTextPipeline.from_pretrained(run / "model").transformer.config.vocab_size
    for name in ("bits_per_char", "ar_bits_per_char"):
        assert metrics[name] == pytest.approx(np.log2(vocab), abs=0.5), name
    assert 3 < metrics["bigram_bits_per_char"] < metrics["unigram_bits_per_char"] < 5
    assert not metrics["targets"]["met"]
    blocks = [
        ACDiTTextPipeline.from_pretrained(run / folder).transformer.config.block for folder in ("model", "ar/model")
    ]
    assert [list(block) for block in blocks] == [[8], [1]]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        demo_text.run_demo_text(tmp_path / "other", overrides=TINY, progress=False)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_setting_that_does_not_fit_is_refused_before_the_old_demo_goes(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises(ConfigError):
        demo_text.run_demo_text(tmp_path, overrides=["model.no_such_field=1"], progress=False)
    assert (tmp_path / "metrics.json").read_text() == "old"
