"""kill −9 at any time: the run goes on from its last commit and ends, to the bit, where an unkilled one ends.

Children are killed at random moments of a run that saves at every step, so most kills fall into a save or a prune.
After every kill the newest committed checkpoint must verify; a killed run is resumed by the next child; a finished one
must have the hash of the uninterrupted run and every step once in its log, and the next child starts a new one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from acdit import storage
from acdit.recipe import Recipe
from acdit.training import Trainer
from acdit.training.ema import EMAWeights
from acdit.training.history import committed_checkpoints
from tests.training.runs import run, state_hash, tiny_recipe


def campaign_recipe() -> Recipe:
    """Two averages, a label embedding, accumulation; a checkpoint at every step, two kept."""
    return tiny_recipe(
        train__steps=8, train__checkpoint_every=1, train__keep_checkpoints=2, train__log_every=1, optim__accumulation=2
    )


def train_or_resume(output: Path) -> None:
    """What a child does: go on if there is anything to go on from."""
    torch.set_num_threads(1)
    resume = "latest" if committed_checkpoints(output) else None
    trainer = Trainer(campaign_recipe(), output, resume=resume, progress=False)
    trainer.train()
    (output / "finished").write_text(state_hash(trainer))


class Campaign:
    """Kills so far, and the directory they fall on."""

    def __init__(self, base: Path, expected: str, seed: int) -> None:
        self.base, self.expected, self.random = base, expected, random.Random(seed)
        self.kills = self.finished = self.mid_run = 0
        self.run = base / "run-0"
        self.patience, self._newest = 1.0, 0
        """Factor on the time a child gets: on a machine with other work it might never get anywhere otherwise."""

    def child_ended(self, killed: bool) -> None:
        """Check what the child left; its last words are in `stderr`."""
        self.kills += killed
        checkpoints = committed_checkpoints(self.run)
        if checkpoints:
            storage.verify(checkpoints[-1][1])
            self.mid_run += killed
        if (self.run / "model").is_dir():
            storage.verify(self.run / "model")
        if (self.run / "finished").is_file() and (self.run / "finished").read_text():
            assert (self.run / "finished").read_text() == self.expected
            logged = [json.loads(line)["step"] for line in (self.run / "log.jsonl").read_text().splitlines()]
            assert logged == list(range(1, 9)), f"{self.run}: the log has steps {logged}"
            self.finished += 1
            self.run = self.base / f"run-{self.finished}"
            self.patience, self._newest = 1.0, 0
        else:
            left = sorted(str(path.relative_to(self.run)) for path in self.run.rglob("*"))
            words = (self.base / "stderr").read_text()[-3000:]
            newest = checkpoints[-1][0] if checkpoints else 0
            self.patience = 1.0 if newest > self._newest else min(32.0, 1.25 * self.patience)
            self._newest = newest
            assert killed, f"a child that was not killed must have finished; it said:\n{words}\nand left {left}"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the uninterrupted run, one thread, made in a fresh process like the children."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(_fresh(output), check=True, env=_environment(), timeout=300)
    return (output / "finished").read_text()


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _fresh(output: Path) -> list[str]:
    code = "import sys; from pathlib import Path; from tests.faults.test_kill_campaign import train_or_resume as t; "
    return [sys.executable, "-c", code + "t(Path(sys.argv[1]))", str(output)]


def kill_fresh_processes(campaign: Campaign, kills: int) -> None:
    """Fresh interpreters, killed at a random moment after their imports."""
    while campaign.kills < kills:
        process = subprocess.Popen(
            _fresh(campaign.run), env=_environment(), stderr=(campaign.base / "stderr").open("w")
        )
        # The lock appears when training begins; kills during the seconds of imports before it would test nothing.
        lock, before = campaign.run / ".lock", time.time()
        while process.poll() is None and not (lock.is_file() and lock.stat().st_mtime >= before):
            time.sleep(0.01)
        time.sleep(campaign.random.uniform(0, 1.2) * campaign.patience)
        process.send_signal(signal.SIGKILL)
        campaign.child_ended(killed=process.wait() == -signal.SIGKILL)


FORK_SERVER = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.faults.test_kill_campaign import Campaign, train_or_resume
# Preloaded, so that children start at once.
import acdit.data.digits, acdit.pictures, diffusers.training_utils, matplotlib.pyplot
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
import acdit.pipelines

base, expected, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
campaign = Campaign(base, expected, seed=1)
while campaign.kills < kills:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(base / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = 1
        try:
            train_or_resume(campaign.run)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    time.sleep(campaign.random.uniform(0.02, 0.9) * campaign.patience)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    campaign.child_ended(killed=os.WIFSIGNALED(status))
print(campaign.kills, campaign.finished, campaign.mid_run)
"""


def kill_forked_children(base: Path, expected: str, kills: int) -> tuple[int, int, int]:
    """Children of a parent that has imported everything; (kills, runs finished, kills with a checkpoint there)."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_SERVER, str(base), expected, str(kills)],
        env=_environment(), capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made, finished, mid_run = (int(number) for number in done.stdout.split())
    return made, finished, mid_run


def test_180_forked_children_are_killed_and_every_run_ends_the_same(tmp_path: Path, expected: str) -> None:
    kills, finished, mid_run = kill_forked_children(tmp_path, expected, 180)
    assert kills == 180
    assert finished >= 3  # the hash was compared
    assert mid_run >= 90  # most kills fell on a run with something to lose


def test_20_fresh_processes_are_killed_and_every_run_ends_the_same(tmp_path: Path, expected: str) -> None:
    campaign = Campaign(tmp_path, expected, seed=0)
    kill_fresh_processes(campaign, 20)
    assert campaign.mid_run >= 8


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_200_fresh_processes_are_killed_and_every_run_ends_the_same(tmp_path: Path, expected: str) -> None:
    campaign = Campaign(tmp_path, expected, seed=2)
    kill_fresh_processes(campaign, 200)
    assert campaign.finished >= 5


def test_the_hash_sees_a_lost_average(tmp_path: Path) -> None:
    """Planted: averages not restored. The campaign's comparison must notice."""
    run(tiny_recipe(), tmp_path / "run")
    for step in (4, 6):
        storage.remove_directory(tmp_path / "run" / f"checkpoint-{step}")
    whole = state_hash(run(tiny_recipe(), tmp_path / "whole"))
    resumed = Trainer(tiny_recipe(), tmp_path / "run", resume="latest", progress=False)
    resumed.state.ema = EMAWeights(resumed.state.model, resumed.recipe.ema)
    resumed.train()
    assert state_hash(resumed) != whole
