"""The training loop: draw, forward, backward, clip, step, follow, report, save.

Training goes through `model.forward` only, so DDP's hooks and torch.compile see every call. Gradients are the exact
gradient of the global batch's mean loss, however it is cut into processes and micro-batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from acdit import storage
from acdit.corruption import MaskingCorruption
from acdit.data.build import length
from acdit.data.stream import StreamDataset
from acdit.errors import ConfigError, NonFiniteError, StorageError
from acdit.recipe import Recipe, recipe_from_dict, recipe_to_yaml
from acdit.training import checkpoints, history
from acdit.training.batches import Batches
from acdit.training.build import Built, build, load_pipeline, parameter_groups
from acdit.training.checkpoints import RunState
from acdit.training.consolidate import empty_model, publish
from acdit.training.ema import EMAWeights
from acdit.training.initial import initialise
from acdit.training.lr_schedules import decay_start, make_lr_scheduler
from acdit.training.parallel import Parallel
from acdit.training.range_search import choose_range
from acdit.training.reporting import Report
from acdit.training.shards import whole

logger = logging.getLogger(__name__)

Evaluate = Callable[[Any, int], dict[str, float]]


class Trainer:
    """One run in one directory.

    Args:
        recipe: what to train.
        output_dir: the run's directory: recipe.yaml, log.jsonl, samples/, loss.png, checkpoint-N/, model/ (the averaged
            weights as an `ACDiTPipeline`, of text as an `ACDiTTextPipeline`).
        resume: "latest", "checkpoint-N" or a path: go on, exactly to the bit. None: a new run; the directory must hold
            no checkpoint.
        branch_from: path of another run's checkpoint to start from, with this recipe's learning-rate schedule.
        allow_inexact: resume without generator states.
        evaluate: called with the averaged model's pipeline and the step wherever samples are drawn; what it returns
            is logged.
        progress: draw a progress bar.

    Raises:
        ConfigError, DataError, StorageError: before the first step.
    """

    def __init__(
        self,
        recipe: Recipe,
        output_dir: str | Path,
        *,
        resume: str | None = None,
        branch_from: str | Path | None = None,
        allow_inexact: bool = False,
        evaluate: Evaluate | None = None,
        progress: bool = True,
    ) -> None:
        if resume is not None and branch_from is not None:
            raise ConfigError("resume, from", found="both", expected="one of the two")
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        self.evaluate, self.progress = evaluate, progress
        self.parallel = Parallel(recipe)
        self.built: Built = self._build(recipe)
        recipe = self.built.recipe
        self.recipe, self.run = recipe, Path(output_dir)
        self._require_even_batches()
        model = self._model(begins=resume is None and branch_from is None)
        optimizer = torch.optim.AdamW(
            self._groups(model),
            lr=recipe.optim.lr,
            betas=(recipe.optim.betas[0], recipe.optim.betas[1]),
            eps=recipe.optim.eps,
            fused=True,
        )
        self.state = RunState(
            model=model,
            ema=EMAWeights(model, recipe.ema),
            optimizer=optimizer,
            lr_scheduler=make_lr_scheduler(optimizer, recipe.optim, self.built.total_steps),
        )
        with self.parallel.peers():
            source = self.parallel.processes.by_first(lambda: self._source(resume, branch_from, allow_inexact))
        if source is not None:
            self._restore(source, branch=branch_from is not None, allow_inexact=allow_inexact)
        self._interrupted: int | None = None

    def train(self) -> Any:
        """Run to the end.

        Returns:
            The pipeline around the averaged weights, as published in model/ (a `Pipeline`).

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; the update was not made and nothing was published.
            SystemExit: after SIGTERM (143) or SIGINT (130), once the step is done and saved.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.parallel.peers())
            self.parallel.processes.by_first(lambda: self._open(stack))
            stack.enter_context(self._signals())
            self._loop()
            self.parallel.processes.wait_for_all()
            return self._published()

    # --- what is trained; a run that trains something else has its own ------------------------------------------------

    def _build(self, recipe: Recipe) -> Built:
        if recipe.classification is not None:
            raise ConfigError(
                "classification", found="a recipe that trains a classifier", expected="one that trains a model",
                fix="acdit finetune",
            )  # fmt: skip
        return build(recipe)

    def _model(self, begins: bool) -> nn.Module:
        """What learns, in its place; of a run that begins with its first weights."""
        if self.recipe.train.init_from is not None and begins:
            initialise(self.built.model, self.recipe.train.init_from, self.built.tokenizer)
        return self.parallel.place(self.built.model)

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """AdamW's groups of parameters."""
        return parameter_groups(model, self.recipe.optim.weight_decay)

    def _batches(self) -> Batches:
        return Batches(self.built, self.parallel.rank, self.parallel.world_size, self.state.step, self.parallel.device)

    def _publish(self, checkpoint: Path) -> None:
        publish(checkpoint, self.run / "model", self.built.vae, self.built.tokenizer)

    def _published(self) -> Any:
        return load_pipeline(self.recipe, self.run / "model")

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _open(self, stack: contextlib.ExitStack) -> None:
        """The run's directory, held until the stack is closed."""
        stack.enter_context(storage.RunLock(self.run))
        storage.clean_leftovers(self.run)
        history.set_aside_later(self.run, self.state.step)
        storage.write_text_atomic(self.run / "recipe.yaml", recipe_to_yaml(self.recipe))

    def _loop(self) -> None:
        state, recipe, total = self.state, self.recipe, self.built.total_steps
        parallel = self.parallel
        model = parallel.wrap(state.model)
        model.train()
        batches = iter(self._batches())
        report = Report(self.run, recipe, state.step, total, active=parallel.main, progress=self.progress)
        saved_at = -1
        try:
            while state.step < total:
                batch = next(batches)
                loss, norm = self._step(model, batch)
                state.loss_sum += loss
                state.loss_count += 1
                report.step()
                last = state.step == total
                every = recipe.corruption.range_search_every
                if every is not None and state.step % every == 0:
                    # Before saving: the checkpoint holds what the next step is drawn with.
                    report.record(state.step, choose_range(self.built, model, batch, parallel, state.step))
                if state.step % recipe.train.log_every == 0 or last:
                    self._log(report, norm)
                stopping = self._stop_requested()
                if state.step % recipe.train.checkpoint_every == 0 or last or stopping:
                    self._save()
                    saved_at = state.step
                # After saving: whatever goes wrong with a picture, the steps are kept.
                if recipe.train.sample_every is not None and (state.step % recipe.train.sample_every == 0 or last):
                    self._draw(report)
                if stopping:
                    assert self._interrupted is not None
                    raise SystemExit(128 + self._interrupted)
            if saved_at != state.step:
                self._save()  # resumed at the end of the run
            report.loss_curve()
        finally:
            report.close()

    def _step(self, model: Any, batches: list[Any]) -> tuple[float, float]:
        """One optimizer step; (mean loss of this process's samples, gradient norm)."""
        state, parallel = self.state, self.parallel
        # The sum over micro-batches and processes is the gradient of the global batch's mean loss.
        scale = parallel.gradient_scale / self.recipe.optim.batch_size
        total = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(batches):
            with parallel.accumulating(model, last=index == len(batches) - 1):
                loss = self._loss(model, batch) * (len(batch.clean) * scale)
                loss.backward()
            total += loss.detach().double().cpu()
        total *= parallel.world_size / parallel.gradient_scale
        norm = parallel.clip(state.model, self.recipe.optim.max_grad_norm)
        if parallel.processes.any(not (math.isfinite(norm) and math.isfinite(float(total)))):
            raise NonFiniteError(
                f"step {state.step + 1}", found=f"loss {float(total):g}, gradient norm {norm:g}",
                expected="finite numbers",
                fix="lower optim.lr, use train.precision=fp32, or look at the data; the last checkpoint is untouched",
            )  # fmt: skip
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.lr_scheduler.step()
        state.ema.step(state.model)
        state.step += 1
        return float(total), norm

    def _loss(self, model: Any, batch: Any) -> Tensor:
        corruption = self.built.corruption
        clean = batch.clean[:, None]
        noisy = corruption.corrupt(clean, batch.noise, batch.timestep)
        bf16 = self.recipe.train.precision == "bf16"
        with torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=bf16):
            (prediction,) = model(batch.context, noisy, batch.timestep, batch.labels, return_dict=False)
        return corruption.loss(prediction, clean, batch.noise, batch.timestep)

    def _log(self, report: Report, norm: float) -> None:
        state = self.state
        loss = self.parallel.processes.mean(state.loss_sum / max(1, state.loss_count))
        state.loss_sum, state.loss_count = 0.0, 0
        report.record(
            state.step, {"loss": loss, "lr": float(state.lr_scheduler.get_last_lr()[0]), "gradient_norm": norm}
        )

    def _draw(self, report: Report) -> None:
        """Samples and evaluation by the first process, with a model of its own around the averaged weights."""
        weights = whole(self.state.ema.weights(0), keep=self.parallel.main)
        if not self.parallel.main:
            return
        model = empty_model(self.recipe)
        model.load_state_dict(weights, assign=True)
        pipeline = dataclasses.replace(self.built, model=model).pipeline()
        report.samples(pipeline, self.state.step)
        if self.evaluate is not None:
            report.record(self.state.step, self.evaluate(pipeline, self.state.step))

    def _save(self) -> None:
        """Checkpoint and published model; all processes stop when one of them fails."""
        # A mean: any number of processes can go on from it.
        self.state.loss_sum = self.parallel.processes.mean(self.state.loss_sum)
        place = self._place_in_data()
        checkpoint = checkpoints.save(self.state, self.recipe, self.run, self.built, self.parallel, place)
        self.parallel.processes.by_first(lambda: self._publish(checkpoint))

    def _place_in_data(self) -> dict[str, Any]:
        dataset = self.built.dataset
        place: dict[str, Any] = {"dataset_length": length(dataset)}
        if isinstance(dataset, StreamDataset):
            place["stream"] = dataset.state(self.state.step * self.recipe.optim.batch_size)
        return place

    def _source(self, resume: str | None, branch_from: str | Path | None, allow_inexact: bool) -> Path | None:
        """The checkpoint to start from, if any; a new run's directory must hold none."""
        if resume is not None:
            return checkpoints.find(self.run, resume, allow_inexact=allow_inexact)
        if history.committed_checkpoints(self.run):
            raise StorageError(
                f"{self.run}", found="checkpoints of an earlier run", expected="an empty directory for a new run",
                fix="add --resume to go on, or choose another --output",
            )  # fmt: skip
        if branch_from is None:
            return None
        return checkpoints.find(Path(branch_from).parent, Path(branch_from).name, allow_inexact=allow_inexact)

    def _restore(self, path: Path, *, branch: bool, allow_inexact: bool) -> None:
        description = checkpoints.read_description(path)
        old = recipe_from_dict(description["recipe"])
        samples = length(self.built.dataset)
        old_steps = old.train.steps or max(1, (old.train.epochs or 1) * (samples or 0) // old.optim.batch_size)
        notes = checkpoints.require_same_run(
            description, self.recipe, self.built.total_steps, old_steps,
            branch=branch, dataset_length=samples,
        )  # fmt: skip
        checkpoints.require_same_tokens(description, self.built.tokenizer)
        step = description["step"]
        if branch and old.optim.schedule == "wsd" and step > decay_start(old.optim, old_steps):
            notes.append(f"{path.name} lies in the decay of its run, not in the constant phase")
        if step > self.built.total_steps:
            raise ConfigError(
                "train.steps", found=str(self.built.total_steps), expected=f"at least {step}, done already"
            )
        notes += checkpoints.restore(
            self.state, path, description, world_size=self.parallel.world_size, allow_inexact=allow_inexact
        )
        if isinstance(self.built.dataset, StreamDataset):
            self.built.dataset.load_state(description["sampler"]["stream"])
        if isinstance(self.built.corruption, MaskingCorruption) and self.recipe.corruption.range_search_every:
            low, high = description["mask_range"]
            self.built.corruption.set_range((low, high))
        logger.info("%s %s at step %d", "branching from" if branch else "resuming", path.name, step)
        for note in notes if self.parallel.main else ():
            logger.warning("%s", note)

    def _require_even_batches(self) -> None:
        parts = self.recipe.optim.accumulation * self.parallel.world_size
        if self.recipe.optim.batch_size % parts:
            raise ConfigError(
                "optim.batch_size", found=str(self.recipe.optim.batch_size),
                expected=f"a multiple of accumulation × processes = {parts}",
            )  # fmt: skip

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step at hand; a second one ends it at once."""
        kept: dict[int, Any] = {}

        def request(number: int, _: FrameType | None) -> None:
            self._interrupted = number
            signal.signal(number, kept[number])

        try:
            for number in map(int, (signal.SIGTERM, signal.SIGINT)):
                kept[number] = signal.signal(number, request)
        except ValueError:  # not in the main thread: the caller handles signals
            kept = {}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _stop_requested(self) -> bool:
        requested = self.parallel.processes.any(self._interrupted is not None)
        if requested and self._interrupted is None:
            self._interrupted = signal.SIGTERM
        return requested
