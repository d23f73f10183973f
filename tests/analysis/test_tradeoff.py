"""Measured against predicted: what is kept, what a second start does, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from acdit.analysis import tradeoff
from acdit.analysis.subject import block_family, load_subject
from acdit.analysis.tradeoff import measure_tradeoff
from acdit.cli import main
from acdit.errors import ConfigError, StorageError
from acdit.flops import picture_flops
from acdit.layout import BlockLayout

BLOCKS = [(8, 8), (4, 4)]
OPTIONS: dict[str, Any] = {
    "steps": 2, "guided": True, "batch": 2, "rounds": 2, "minutes": 10.0, "dtype": "fp32", "device": "cpu",
}  # fmt: skip


def test_a_record_holds_every_measurement_and_what_was_predicted(tmp_path: Path) -> None:
    subject = load_subject("digits")
    record = measure_tradeoff(subject, BLOCKS, tmp_path / "t.json", **OPTIONS)
    assert [(entry["block"], entry["round"]) for entry in record["measured"]] == [
        ([8, 8], 0), ([4, 4], 0), ([4, 4], 1), ([8, 8], 1),
    ]  # fmt: skip  # in turns, from another size on each round
    assert json.loads((tmp_path / "t.json").read_text())["measured"] == record["measured"]
    whole, cut = record["rows"]
    flops = [2 * picture_flops(subject.with_block(size).architecture, 2, True) for size in BLOCKS]
    assert [whole["flops"], cut["flops"]] == flops
    assert cut["time"]["predicted"] == flops[1] / flops[0]
    assert cut["time"]["measured"] == cut["seconds"] / whole["seconds"]
    assert whole["time"] == {"predicted": 1.0, "measured": 1.0}
    for row in record["rows"]:
        assert row["memory"]["measured"] == pytest.approx(row["memory"]["predicted"], rel=0.1)
        assert row["seconds_range"][0] <= row["seconds"] <= row["seconds_range"][1]
    assert record["left"] == []


def test_a_second_start_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, path, asked = load_subject("digits"), tmp_path / "t.json", []

    def measured(resized: Any, *_: Any) -> dict[str, Any]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(resized.layout.block)
        return {"seconds": float(len(asked)), "peak": 100}

    monkeypatch.setattr(tradeoff, "_measure", measured)
    with pytest.raises(KeyboardInterrupt):
        measure_tradeoff(subject, BLOCKS, path, **OPTIONS)
    assert len(json.loads(path.read_text())["measured"]) == 3
    asked.clear()
    record = measure_tradeoff(subject, BLOCKS, path, **OPTIONS)
    assert asked == [(8, 8)]
    assert len(record["measured"]) == 4
    # No time: nothing is begun, and what is missing is named.
    late = measure_tradeoff(subject, BLOCKS, path, **{**OPTIONS, "rounds": 3, "minutes": -1.0})
    assert late["left"] == [{"block": [8, 8], "round": 2}, {"block": [4, 4], "round": 2}]


def test_measurements_of_other_settings_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tradeoff, "_measure", lambda *_: {"seconds": 1.0, "peak": 1})
    subject, path = load_subject("digits"), tmp_path / "t.json"
    measure_tradeoff(subject, BLOCKS, path, **OPTIONS)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        measure_tradeoff(subject, BLOCKS, path, **{**OPTIONS, "steps": 3})
    monkeypatch.setattr("acdit.provenance.processor", lambda: "another")
    with pytest.raises(ConfigError, match="processor"):
        measure_tradeoff(subject, BLOCKS, path, **OPTIONS)
    path.write_text("[]")
    with pytest.raises(StorageError, match="no record"):
        measure_tradeoff(subject, BLOCKS, path, **OPTIONS)


def test_the_command_goes_on_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "t.json"
    command = ["analyze", "tradeoff", "digits", "--blocks", "8x8", "4x4", "--steps", "1", "--output", str(output)]
    assert main([*command, "--rounds", "1"]) == 0
    first = json.loads(output.read_text())
    assert main([*command, "--rounds", "2"]) == 0
    second = json.loads(output.read_text())
    assert second["measured"][:2] == first["measured"]
    assert len(second["measured"]) == 4
    assert second["command"]
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert "FLOPs say" in capsys.readouterr().out
    assert main(["analyze", "tradeoff", "text", "model.vocab_size=9", "--output", str(tmp_path / "x.json")]) == 2


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (BlockLayout((8, 8), (4, 4)), [(8, 8), (4, 4), (2, 2), (1, 1)]),
        (BlockLayout((4, 4, 4), (2, 2, 2)), [(4, 4, 4), (2, 4, 4), (1, 4, 4), (2, 2, 2), (1, 2, 2), (1, 1, 1)]),
        (BlockLayout((12,), (4,)), [(12,), (6,), (4,), (3,), (2,), (1,)]),
        (BlockLayout((8, 12), (4, 6), (1, 2)), [(8, 6), (4, 6), (4, 3)]),
    ],
)  # fmt: skip
def test_block_sizes_go_from_the_whole_down(layout: BlockLayout, expected: list[tuple[int, ...]]) -> None:
    assert block_family(layout) == expected
    for size in block_family(layout):
        BlockLayout(layout.grid, size, layout.patch)
