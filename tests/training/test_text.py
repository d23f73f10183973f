"""Training on text: from a recipe to a model folder that writes and is measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit import ACDiTTextPipeline
from acdit.cli import main
from acdit.errors import ConfigError
from acdit.recipe import Recipe, recipe_from_dict
from acdit.training import Trainer
from acdit.training.batches import Batches
from acdit.training.build import build
from tests.training.runs import run, state_hash


def text_recipe(**overrides: Any) -> Recipe:
    """Overrides are dotted keys with `__` for the dot."""
    data: dict[str, Any] = {
        "name": "tiny-text",
        "seed": 3,
        "model": {"grid": [16], "block": [4], "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16},
        "data": {"kind": "builtin_text", "sequence_length": 16},
        "corruption": {"kind": "masking"},
        "optim": {"batch_size": 8, "lr": 1e-2},
        "ema": {"decays": [0.9]},
        "train": {"steps": 20, "checkpoint_every": 10, "log_every": 5, "tensorboard": False, "keep_checkpoints": 100},
    }  # fmt: skip
    for key, value in overrides.items():
        group, _, name = key.partition("__")
        data.setdefault(group, {})[name] = value
    return recipe_from_dict(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps, with its range of masks chosen on the way and a sample at the end."""
    path = tmp_path_factory.mktemp("text") / "run"
    run(text_recipe(corruption__range_search_every=10, train__sample_every=20), path)
    return path


def test_twenty_steps_leave_a_model_that_writes_with_its_own_tokenizer(trained: Path) -> None:
    pipeline = ACDiTTextPipeline.from_pretrained(trained / "model")
    assert pipeline.transformer.config.vocab_size == pipeline.tokenizer.vocab_size == 63
    assert pipeline.transformer.config.time_conditioning is False
    written = pipeline(["To be", "or"], generator=0)
    assert [text[: len(prompt)] for text, prompt in zip(written.texts, ["To be", "or"], strict=True)] == ["To be", "or"]
    assert [len(row) for row in written.tokens] == [16, 16]
    assert len((trained / "samples/step-20.txt").read_text().split("\n----\n")) == 4
    losses = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    values = [row["loss"] for row in losses if "loss" in row]
    assert values[-1] < torch.tensor(63.0).log()
    assert sum("mask_range_low" in row for row in losses) == 2
    assert "vocab_size: 63" in (trained / "recipe.yaml").read_text()


def test_a_stopped_run_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    recipe = text_recipe(corruption__range_search_every=10, train__sample_every=20)
    whole = Trainer(recipe, trained, resume="latest", progress=False)
    half = tmp_path / "half"
    half.mkdir()
    (half / "checkpoint-10").symlink_to(trained / "checkpoint-10")
    again = run(recipe, half, resume="latest")
    assert state_hash(again) == state_hash(whole)
    assert again.built.corruption.mask_range == whole.built.corruption.mask_range


def test_another_tokenizer_than_the_checkpoints_is_refused(trained: Path, tmp_path: Path) -> None:
    recipe = text_recipe(corruption__range_search_every=10, train__sample_every=20)
    place = trained / "checkpoint-20" / "state.json"
    from acdit.training import checkpoints

    description = json.loads(place.read_text())
    built = build(recipe)
    checkpoints.require_same_tokens(description, built.tokenizer)
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        checkpoints.require_same_tokens({**description, "tokenizer": "other"}, built.tokenizer)
    (tmp_path / "a.txt").write_text("".join(chr(0x100 + index) for index in range(62)) * 3, encoding="utf-8")
    other = text_recipe(
        data__kind="text", data__root=str(tmp_path / "a.txt"), data__cache=str(tmp_path / "cache"),
        train__init_from=str(trained / "model"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="as token 0"):
        Trainer(other, tmp_path / "run", progress=False)


def test_text_files_with_bos_given_and_one_token_a_block(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abracadabra " * 20)
    recipe = text_recipe(
        model__block=[1], data__kind="text", data__root=str(tmp_path / "a.txt"), data__wrap="bos",
        data__cache=str(tmp_path / "cache"), corruption__first_token_given=True, corruption__mask_draw="count",
        train__steps=2, train__checkpoint_every=2,
    )  # fmt: skip
    trainer = run(recipe, tmp_path / "run")
    assert trainer.recipe.model.vocab_size == 7
    pipeline = ACDiTTextPipeline.from_pretrained(tmp_path / "run/model")
    bos = pipeline.tokenizer.bos_token_id
    alone = pipeline(max_new_tokens=3, generator=1, eos_token=-1)
    assert alone.tokens[0][0] == bos
    assert len(alone.tokens[0]) == 4
    assert pipeline("abra", generator=1).texts[0].startswith("abra")
    assert pipeline("abra", generator=1).tokens[0][:5] == [bos, *pipeline.tokenizer.encode("abra")]
    masked = next(iter(Batches(trainer.built, 0, 1, 0, torch.device("cpu"))))[0]
    noisy = trainer.built.corruption.corrupt(masked.clean[:, None], masked.noise, masked.timestep)
    assert (noisy[:, :, 0] == bos).all()
    assert (noisy[:, :, 1:] == 7).all()


def test_draws_of_a_batch_are_low_discrepancy_whoever_takes_which_part() -> None:
    built = build(text_recipe())
    whole = next(iter(Batches(built, 0, 1, 0, torch.device("cpu"))))[0]
    strata = ((1 - whole.timestep / 1000) / 0.999 * 32).flatten().clamp(0, 31.999).floor().sort().values
    assert strata.tolist() == list(range(32))
    parts = [next(iter(Batches(built, rank, 2, 0, torch.device("cpu"))))[0] for rank in (0, 1)]
    for name in ("clean", "noise", "timestep"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert whole.clean.dtype == torch.int64
    loose = build(text_recipe(corruption__low_discrepancy=False))
    other = next(iter(Batches(loose, 0, 1, 0, torch.device("cpu"))))[0]
    assert not torch.equal(other.timestep, whole.timestep)


def test_what_does_not_fit_is_refused_before_anything_is_read() -> None:
    for overrides, name in (
        ({"corruption__kind": "gaussian"}, "corruption.kind"),
        ({"data__kind": "digits", "data__sequence_length": 1024}, "corruption.kind"),
        ({"model__vocab_size": 62}, "set model.vocab_size=63"),
        ({"model__grid": [20]}, "data.sequence_length=20"),
        ({"model__num_classes": 3}, "num_classes"),
        ({"corruption__first_token_given": True}, "data.wrap=bos"),
        ({"corruption__min_snr_gamma": 5.0}, "min_snr_gamma"),
        ({"corruption__mask_range": [0.5, 0.2]}, "mask_range"),
        ({"model__block": [1], "corruption__range_search_every": 3}, "range_search_every"),
        ({"codec__kind": "vae"}, "codec"),
    ):
        with pytest.raises(ConfigError) as caught:
            build(text_recipe(**overrides))
        assert name in str(caught.value)
    gaussian = dataclasses.replace(text_recipe(), data=dataclasses.replace(text_recipe().data, kind="digits"))
    gaussian.corruption.kind = "gaussian"
    gaussian.model.vocab_size = 5
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        build(gaussian)


def test_a_plan_counts_what_the_model_has(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(trained / "recipe.yaml")
    assert main(["plan", recipe, "--memory", "8GB"]) == 0
    shown = capsys.readouterr().out
    pipeline = ACDiTTextPipeline.from_pretrained(trained / "model")
    assert f"{sum(one.numel() for one in pipeline.transformer.parameters()):,}" in shown
    assert "(4 steps a block)" in shown
    assert main(["plan", recipe, "model.vocab_size=null", "--memory", "8GB"]) == 2
    assert "model.vocab_size=50257" in capsys.readouterr().err
