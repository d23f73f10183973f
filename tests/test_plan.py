"""`acdit plan`: what it prints, and whether its advice holds."""

from __future__ import annotations

import re

import pytest

from acdit.cli import main


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:22].strip(): line[22:] for line in lines}


def test_it_says_what_a_recipe_costs_and_that_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "imagenet256-xl", "--devices", "8", "--memory", "80GB")
    assert plan["parameters"] == "674,856,708 (28 layers × 1152)"
    assert plan["tokens"] == "1024 = 4 blocks × 256"
    assert plan["batch"] == "1024 = 8 devices × 4 accumulated × 32"
    assert plan["weights"] == "2.70 GB"
    assert plan["optimizer"].startswith("5.40 GB")
    assert plan["fits"].startswith("yes")
    assert float(plan["FLOPs a step"]) == pytest.approx(5.33e15, rel=0.01)
    days = 1.2e6 * float(plan["FLOPs a step"]) / (8 * 312e12 * 0.4) / 86400
    assert float(plan["days"].split()[0]) == pytest.approx(days, rel=0.01)
    assert "8 × 312 TFLOP/s at 40% (assumed)" in plan["days"]


def test_where_it_does_not_fit_its_advice_does(capsys: pytest.CaptureFixture[str]) -> None:
    where = ("imagenet256-xl", "--devices", "8", "--memory", "32GiB")
    plan = planned(capsys, *where, "optim.accumulation=1")
    assert plan["fits"].startswith("no")
    largest = int(re.search(r"at most (\d+)", plan["what would"])[1])
    advice = re.search(r"optim\.accumulation=\d+", plan["what would"])[0]
    assert planned(capsys, *where, advice)["fits"].startswith("yes")
    # The largest is the largest: batch and devices chosen so that this is the micro-batch.
    for size, answer in ((largest, "yes"), (largest + 1, "no")):
        edge = (f"optim.batch_size={16 * size}", "optim.accumulation=2")
        assert planned(capsys, *where, *edge)["fits"].startswith(answer)


def test_sharding_and_checkpointing_are_what_helps_where_no_batch_fits(capsys: pytest.CaptureFixture[str]) -> None:
    where = ("imagenet256-h", "--devices", "8", "--memory", "16GB")
    assert "not even 1" in planned(capsys, *where)["what would"]
    sharded = planned(capsys, *where, "--sharding", "fsdp", "optim.accumulation=128")
    assert sharded["fits"].startswith("yes")
    assert float(sharded["weights"].split()[0]) * 1e6 == pytest.approx(950_959_620 * 4 / 8, rel=0.01)


def test_what_cannot_be_planned_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits", "--devices", "3"]) == 2
    assert "a multiple of accumulation × devices = 3" in capsys.readouterr().err
    for wrong in (["--memory", "80"], ["--memory", "0GB"], ["--utilisation", "1.5"], ["--tflops", "-1"]):
        with pytest.raises(SystemExit) as done:
            main(["plan", "digits", *wrong])
        assert done.value.code == 2
