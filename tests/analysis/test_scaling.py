"""Loss over model size: what is read from runs' folders, and the fitted power."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from acdit.analysis.scaling import fit_power, read_runs
from acdit.cli import main
from acdit.errors import ConfigError, DataError
from acdit.flops import training_flops
from acdit.recipe import Recipe, recipe_to_yaml
from acdit.training.build import architecture
from tests.training.runs import tiny_recipe


def finished(folder: Path, losses: list[float], bits: float | None = None, **overrides: Any) -> Recipe:
    """A run's folder as far as it is read."""
    recipe = tiny_recipe(**overrides)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model_index.json").write_text("{}")
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    lines = [json.dumps({"step": 10 * (place + 1), "loss": loss}) for place, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    if bits is not None:
        (folder / "loss.json").write_text(json.dumps({"bound": {"bits_per_dim": bits}}))
    return recipe


def size(layers: int) -> dict[str, Any]:
    return {
        "model": {
            "grid": [8, 8], "block": [4, 4], "in_channels": 1, "num_layers": layers, "num_attention_heads": 1,
            "attention_head_dim": 8, "num_classes": 10,
        }
    }  # fmt: skip


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    for layers in (4, 1, 2):
        parameters = architecture(tiny_recipe(**size(layers)).model).parameters
        loss = 7.0 * parameters**-0.25
        finished(tmp_path / f"run{layers}", [9.0] * 9 + [loss - 0.01, loss + 0.01], 2 * loss, **size(layers))
    return [str(tmp_path / f"run{layers}") for layers in (4, 1, 2)]


def test_sizes_losses_and_flops_are_read_and_a_power_law_is_found_again(three: list[str]) -> None:
    rows = read_runs(three, None, "", tail=0.1)
    assert [row["name"] for row in rows] == ["run1", "run2", "run4"]
    for row, layers in zip(rows, (1, 2, 4), strict=True):
        arch = architecture(tiny_recipe(**size(layers)).model)
        assert row["parameters"] == arch.parameters
        assert (row["steps"], row["records"]) == (110, 2)
        assert row["training_flops"] == 110 * training_flops(arch, 4)
        assert row["curve"]["flops"][0] == 10 * training_flops(arch, 4)
    rows = read_runs(three, None, "", tail=0.15)
    fit = fit_power(rows)
    assert fit is not None
    assert fit["exponent"] == pytest.approx(-0.25, abs=1e-9)
    assert fit["factor"] == pytest.approx(7.0, rel=1e-9)
    assert fit["largest_deviation"] < 1e-9
    bits = read_runs(three, "loss.json", "bound.bits_per_dim", 0.1)
    assert [row["value"] for row in bits] == pytest.approx([2 * row["value"] for row in rows])


def test_no_law_of_two_sizes_or_of_negative_bits(three: list[str]) -> None:
    rows = read_runs(three, None, "", 0.1)
    assert fit_power(rows[:2]) is None
    assert fit_power([{**row, "value": -1.0} for row in rows]) is None


def test_what_does_not_compare_is_refused(three: list[str], tmp_path: Path) -> None:
    def refused(folder: Path, error: type[Exception], message: str, metrics: str | None = None) -> None:
        with pytest.raises(error, match=message):
            read_runs([three[0], str(folder)], metrics, "bound.bits_per_dim", 0.1)

    with pytest.raises(ConfigError, match="at least two"):
        read_runs(three[:1], None, "", 0.1)
    refused(tmp_path, ConfigError, r"no recipe\.yaml")
    finished(tmp_path / "v", [1.0], corruption__prediction_type="v_prediction")
    refused(tmp_path / "v", ConfigError, r"corruption\.prediction_type")
    finished(tmp_path / "more", [1.0], optim__lr=1.0, train__steps=99)
    assert len(read_runs([three[0], str(tmp_path / "more")], None, "", 0.1)) == 2
    refused(tmp_path / "more", DataError, r"loss\.json", "loss.json")
    (tmp_path / "more" / "loss.json").write_text('{"bound": null}')
    refused(tmp_path / "more", DataError, "expected a number", "loss.json")
    (tmp_path / "more" / "model" / "model_index.json").unlink()
    refused(tmp_path / "more", ConfigError, "a finished run")
    (tmp_path / "more" / "log.jsonl").unlink()
    refused(tmp_path / "more", DataError, "no such file")


def test_the_command_writes_figures_and_a_picture(three: list[str], tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    assert main(["analyze", "scaling", *three, "--tail", "0.15", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert figures["fit"]["exponent"] == pytest.approx(-0.25, abs=1e-9)
    assert figures["command"]
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert main(["analyze", "scaling", three[0]]) == 2
