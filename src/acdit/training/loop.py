"""The training loop: draw, forward, backward, clip, step, follow, report, save.

Training goes through `model.forward` only, so DDP's hooks and torch.compile see every call. Gradients are the exact
gradient of the global batch's mean loss, however it is cut into processes and micro-batches.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from acdit import storage
from acdit.data.build import length
from acdit.data.stream import StreamDataset
from acdit.errors import ConfigError, NonFiniteError, StorageError
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import Recipe, recipe_from_dict, recipe_to_yaml
from acdit.recompute import checkpoint_elementwise
from acdit.training import checkpoints
from acdit.training.batches import Batch, Batches
from acdit.training.build import Built, build, parameter_groups
from acdit.training.checkpoints import RunState
from acdit.training.ema import EMAWeights, ema_variant
from acdit.training.lr_schedules import decay_start, make_lr_scheduler
from acdit.training.reporting import Report

logger = logging.getLogger(__name__)

Evaluate = Callable[[ACDiTPipeline, int], dict[str, float]]


class Trainer:
    """One run in one directory.

    Args:
        recipe: what to train.
        output_dir: the run's directory: recipe.yaml, log.jsonl, samples/, loss.png, checkpoint-N/, model/ (the averaged
            weights as an `ACDiTPipeline`).
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
        self.recipe, self.run = recipe, Path(output_dir)
        self.evaluate, self.progress = evaluate, progress
        # accelerate keeps its precision for the whole process: autocast is entered here instead, per run.
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.built: Built = build(recipe)
        self._require_even_batches()
        model = self.built.model.to(self.accelerator.device)
        if recipe.train.gradient_checkpointing == "elementwise":
            model.enable_gradient_checkpointing(checkpoint_elementwise)
        elif recipe.train.gradient_checkpointing == "layers":
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe.optim.weight_decay),
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
        source = None
        if resume is not None:
            source = checkpoints.find(self.run, resume, allow_inexact=allow_inexact)
        elif branch_from is not None:
            source = checkpoints.find(Path(branch_from).parent, Path(branch_from).name, allow_inexact=allow_inexact)
        if resume is None and self.run.is_dir() and storage.committed_checkpoints(self.run):
            raise StorageError(
                f"{self.run}", found="checkpoints of an earlier run", expected="an empty directory for a new run",
                fix="add --resume to go on, or choose another --output",
            )  # fmt: skip
        if source is not None:
            self._restore(source, branch=branch_from is not None, allow_inexact=allow_inexact)
        self._interrupted: int | None = None

    def train(self) -> ACDiTPipeline:
        """Run to the end.

        Returns:
            The pipeline around the averaged weights, as published in model/.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; the update was not made and nothing was published.
            SystemExit: after SIGTERM (143) or SIGINT (130), once the step is done and saved.
        """
        main = self.accelerator.is_main_process
        with storage.RunLock(self.run) if main else contextlib.nullcontext(), self._signals():
            if main:
                storage.clean_leftovers(self.run)
                storage.set_aside_later(self.run, self.state.step)
                storage.write_text_atomic(self.run / "recipe.yaml", recipe_to_yaml(self.recipe))
            self._loop()
        return self._published()

    def _loop(self) -> None:
        state, recipe, total = self.state, self.recipe, self.built.total_steps
        model = self.accelerator.prepare(state.model)
        if recipe.train.compile:
            model.compile()
        model.train()
        accelerator = self.accelerator
        batches = iter(
            Batches(self.built, accelerator.process_index, accelerator.num_processes, state.step, accelerator.device)
        )
        report = Report(self.run, recipe, state.step, total, active=accelerator.is_main_process, progress=self.progress)
        saved_at = -1
        try:
            while state.step < total:
                loss, norm = self._step(model, next(batches))
                state.loss_sum += loss
                state.loss_count += 1
                report.step()
                last = state.step == total
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

    def _step(self, model: Any, batches: list[Batch]) -> tuple[float, float]:
        """One optimizer step; (mean loss of this process's samples, gradient norm)."""
        state, accelerator = self.state, self.accelerator
        # DDP averages gradients over processes: scale so that the sum over micro-batches is the global mean's gradient.
        scale = accelerator.num_processes / self.recipe.optim.batch_size
        total = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = self._loss(model, batch) * (len(batch.clean) * scale)
                accelerator.backward(loss)
            total += loss.detach().double().cpu()
        norm = self._clip(state.model)
        if not (math.isfinite(norm) and math.isfinite(float(total))):
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

    def _loss(self, model: Any, batch: Batch) -> Tensor:
        corruption = self.built.corruption
        clean = batch.clean[:, None]
        noisy = corruption.corrupt(clean, batch.noise, batch.timestep)
        bf16 = self.recipe.train.precision == "bf16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16):
            (prediction,) = model(batch.context, noisy, batch.timestep, batch.labels, return_dict=False)
        return corruption.loss(prediction, clean, batch.noise, batch.timestep)

    def _clip(self, model: torch.nn.Module) -> float:
        limit = self.recipe.optim.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if limit is None else limit, foreach=True)
        return float(norm)

    def _log(self, report: Report, norm: float) -> None:
        state = self.state
        mean = torch.tensor(state.loss_sum / max(1, state.loss_count), device=self.accelerator.device)
        mean = self.accelerator.reduce(mean, reduction="mean")
        state.loss_sum, state.loss_count = 0.0, 0
        report.record(
            state.step, {"loss": float(mean), "lr": float(state.lr_scheduler.get_last_lr()[0]), "gradient_norm": norm}
        )

    def _draw(self, report: Report) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.state.ema.applied(self.state.model):
            pipeline = self.built.pipeline()
            report.samples(pipeline, self.state.step)
            if self.evaluate is not None:
                report.record(self.state.step, self.evaluate(pipeline, self.state.step))

    def _save(self) -> None:
        """Checkpoint and published model, by the first process; all stop when it fails."""
        error: BaseException | None = None
        if self.accelerator.is_main_process:
            try:
                checkpoints.save(
                    self.state, self.recipe, self.run, self._place_in_data(), self.accelerator.num_processes
                )
                self._publish()
            except (OSError, StorageError) as failure:
                error = failure
        failed = self._any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise StorageError("checkpoint", found="the first process could not save", expected="see its message")

    def _place_in_data(self) -> dict[str, Any]:
        dataset = self.built.dataset
        place: dict[str, Any] = {"dataset_length": length(dataset)}
        if isinstance(dataset, StreamDataset):
            place["stream"] = dataset.state(self.state.step * self.recipe.optim.batch_size)
        return place

    def _publish(self) -> None:
        """model/: the first average as the pipeline's weights, the others as variants; see `ema_variant`."""
        ema, model = self.state.ema, self.state.model
        with storage.atomic_directory(self.run / "model") as directory:
            with ema.applied(model, 0):
                self.built.pipeline().save_pretrained(directory)
            for index, decay in enumerate(ema.decays[1:], start=1):
                with ema.applied(model, index):
                    self.built.model.save_pretrained(directory / "transformer", variant=ema_variant(decay))

    def _published(self) -> ACDiTPipeline:
        self.accelerator.wait_for_everyone()
        return ACDiTPipeline.from_pretrained(self.run / "model")

    def _restore(self, path: Path, *, branch: bool, allow_inexact: bool) -> None:
        description = checkpoints.read_description(path)
        old = recipe_from_dict(description["recipe"])
        samples = length(self.built.dataset)
        old_steps = old.train.steps or max(1, (old.train.epochs or 1) * (samples or 0) // old.optim.batch_size)
        notes = checkpoints.require_same_run(
            description, self.recipe, self.built.total_steps, old_steps,
            branch=branch, dataset_length=samples,
        )  # fmt: skip
        step = description["step"]
        if branch and old.optim.schedule == "wsd" and step > decay_start(old.optim, old_steps):
            notes.append(f"{path.name} lies in the decay of its run, not in the constant phase")
        if step > self.built.total_steps:
            raise ConfigError(
                "train.steps", found=str(self.built.total_steps), expected=f"at least {step}, done already"
            )
        notes += checkpoints.restore(
            self.state, path, description, world_size=self.accelerator.num_processes, allow_inexact=allow_inexact
        )
        if isinstance(self.built.dataset, StreamDataset):
            self.built.dataset.load_state(description["sampler"]["stream"])
        logger.info("%s %s at step %d", "branching from" if branch else "resuming", path.name, step)
        for note in notes:
            logger.warning("%s", note)

    def _require_even_batches(self) -> None:
        parts = self.recipe.optim.accumulation * self.accelerator.num_processes
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
        requested = self._any(self._interrupted is not None)
        if requested and self._interrupted is None:
            self._interrupted = signal.SIGTERM
        return requested

    def _any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        raised = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(raised, reduction="sum") > 0)
