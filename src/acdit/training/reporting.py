"""What a run tells: progress bar, log.jsonl, tensorboard, sample grids, loss curve."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acdit import pictures, storage
from acdit.errors import DataError
from acdit.pipelines import ACDiTPipeline
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.recipe import Recipe

logger = logging.getLogger(__name__)


class Report:
    """Reports of one run; a report of another process than the first says nothing.

    Args:
        run: the run's directory.
        recipe: what is run.
        first_step, total_steps: for the bar; records after `first_step` (from before a kill) are dropped.
        active: whether this process reports.
        progress: whether to draw a bar.
    """

    def __init__(
        self, run: Path, recipe: Recipe, first_step: int, total_steps: int, *, active: bool, progress: bool
    ) -> None:
        self.run, self.recipe, self.active = run, recipe, active
        self.log_path = run / "log.jsonl"
        self._started = self._mark = time.perf_counter()
        self._mark_step = first_step
        self._bar: tqdm[Any] | None = None
        self._tensorboard: Any = None
        if not active:
            return
        self._drop_records_after(first_step)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not progress, dynamic_ncols=True)
        if recipe.train.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("no tensorboard log: install acdit[train], or set train.tensorboard=false")
            else:
                self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def step(self) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update(1)

    def record(self, step: int, values: dict[str, float]) -> None:
        """A line of the log, with throughput since the last one; `step` counts optimizer steps done."""
        if not self.active:
            return
        now = time.perf_counter()
        steps = max(1, step - self._mark_step)
        speed = steps * self.recipe.optim.batch_size / max(now - self._mark, 1e-9)
        self._mark, self._mark_step = now, step
        line = {"step": step, **values, "samples_per_second": round(speed, 2), "seconds": round(now - self._started, 3)}
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._bar is not None and "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", samples_per_s=f"{speed:.0f}")
        if self._tensorboard is not None:
            for name, value in {**values, "samples_per_second": speed}.items():
                self._tensorboard.add_scalar(name, value, step)

    def samples(self, pipeline: ACDiTPipeline | ACDiTTextPipeline, step: int) -> None:
        """Draw samples/step-N.png: up to 8 classes, one a column (of clips one a row, a frame a column), and the loss
        curve so far. Of text: four of them in samples/step-N.txt."""
        if not self.active:
            return
        recipe = self.recipe
        if isinstance(pipeline, ACDiTTextPipeline):
            tokens, texts = pipeline(batch_size=4, generator=recipe.seed, return_dict=False)
            texts = texts or [" ".join(map(str, row)) for row in tokens]
            place = self.run / "samples" / f"step-{step}.txt"
            place.parent.mkdir(exist_ok=True)
            place.write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")
            self.loss_curve()
            return
        classes = recipe.model.num_classes
        labels = recipe.sampling.labels or (list(range(min(classes, 8))) if classes else None)
        count = len(labels) if labels else 8
        pipeline.set_progress_bar_config(disable=True)
        (images,) = pipeline(
            labels * 2 if labels else None,
            num_inference_steps=recipe.sampling.num_inference_steps,
            guidance_scale=recipe.sampling.guidance_scale,
            generator=recipe.seed,
            batch_size=None if labels else count,
            output_type="pt",
            return_dict=False,
        )
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        if images.ndim == 5:  # clips, (B, T, C, H, W)
            images, count = images.flatten(0, 1), images.shape[1]
        pictures.image_grid(images.float().cpu(), columns=count).save(folder / f"step-{step}.png")
        self.loss_curve()

    def loss_curve(self) -> None:
        """Draw loss.png from the log; a run never ends for want of a picture."""
        if not self.active or not self.log_path.is_file():
            return
        try:
            pictures.loss_curve(self.log_path, self.run / "loss.png")
        except (DataError, ImportError) as error:  # nothing logged yet, or no matplotlib
            logger.warning("no loss curve: %s", error)

    def close(self) -> None:
        """End the bar and the tensorboard log."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _drop_records_after(self, step: int) -> None:
        if not self.log_path.is_file():
            return
        kept = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line torn by a kill
        # In place, a kill between emptying and writing would lose the whole log.
        storage.write_text_atomic(self.log_path, "".join(line + "\n" for line in kept))
