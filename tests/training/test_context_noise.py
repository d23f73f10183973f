"""Noisy context (the ablation of the paper's Figure 6): what the clean slots hold, and who notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from acdit import draws
from acdit.errors import ConfigError
from acdit.training import Trainer, build
from acdit.training.batches import Batch, Batches
from tests.training.runs import run, tiny_recipe


def first_batch(rank: int = 0, world: int = 1, **options: object) -> Batch:
    return next(iter(Batches(build(tiny_recipe(**options)), rank, world, 0, torch.device("cpu"))))[0]


def test_clean_context_is_the_clean_data_itself() -> None:
    batch = first_batch()
    assert batch.context is batch.clean


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_noisy_context_is_the_corruption_at_keyed_timesteps_below_the_level(prediction_type: str) -> None:
    options = {"corruption__prediction_type": prediction_type, "optim__batch_size": 64}
    plain, noisy = (first_batch(**options, corruption__context_noise=level) for level in (0.0, 0.3))
    for name in ("clean", "noise", "timestep", "labels"):  # everything else is drawn as without it
        assert torch.equal(getattr(plain, name), getattr(noisy, name))
    key = {"seed": 3, "step": 0, "samples": range(64)}
    u = draws.uniform((4,), stream="context_timestep", **key)
    noise = draws.normal((4, 16, 1), stream="context_noise", **key)
    if prediction_type == "epsilon":
        alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[(300 * u).long()]
        by_hand = alpha.sqrt()[..., None, None] * noisy.clean + (1 - alpha).sqrt()[..., None, None] * noise
    else:
        by_hand = noisy.clean + 0.3 * u[..., None, None] * (noise - noisy.clean)
    torch.testing.assert_close(noisy.context, by_hand.float(), rtol=0, atol=1e-5)
    # One timestep a block: blocks of one picture are not corrupted alike.
    assert u[0].unique().numel() == 4


def test_two_processes_draw_the_context_of_one() -> None:
    options = {"corruption__context_noise": 1.0, "optim__batch_size": 8}
    whole = first_batch(**options).context
    parts = [first_batch(rank, 2, **options).context for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_model_reads_the_noisy_context_and_is_asked_for_the_same_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    trainer = Trainer(tiny_recipe(corruption__context_noise=1.0), tmp_path, progress=False)
    batch = next(iter(Batches(trainer.built, 0, 1, 0, torch.device("cpu"))))[0]
    forward = trainer.built.model.forward
    monkeypatch.setattr(trainer.built.model, "forward", lambda *a, **k: seen.append(a) or forward(*a, **k))
    loss = trainer._loss(trainer.built.model, batch)
    context, noisy, *_ = seen[0]
    assert torch.equal(context, batch.context)
    assert not torch.allclose(context, batch.clean)
    corruption = trainer.built.corruption
    assert torch.equal(noisy, corruption.corrupt(batch.clean[:, None], batch.noise, batch.timestep))
    # A new model predicts zero, so the loss is the target's mean square, whatever the context: ε here.
    torch.testing.assert_close(loss, batch.noise.square().mean())


def test_what_was_trained_so_is_published_and_sampled_like_any_other(tmp_path: Path) -> None:
    trained = run(tiny_recipe(corruption__context_noise=1.0), tmp_path / "noisy")
    pipeline = trained.built.pipeline()
    images = pipeline([3], num_inference_steps=2, generator=0, output_type="pt").images
    assert images.shape == (1, 1, 8, 8)
    assert "context_noise" not in pipeline.transformer.config


def test_levels_outside_the_schedule_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"corruption\.context_noise"):
        tiny_recipe(corruption__context_noise=1.5)
