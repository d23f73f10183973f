"""A study that runs in seconds, and judges that were never trained: figures without meaning, but exact ones."""

from __future__ import annotations

from pathlib import Path

from acdit.evaluation import ClassifierFacts, save_classifier
from acdit.evaluation.classifier import build_network
from acdit.studies.catalog import ACCURACY, FRECHET, SETTINGS
from acdit.studies.study import Arm, Branch, Claim, Study, ends

DIGITS = SETTINGS["digits"]
TINY = (
    "model.num_layers=1", "model.num_attention_heads=1", "optim.batch_size=4", "optim.warmup_steps=1",
    "train.steps=5", "train.checkpoint_every=2", "train.sample_every=null", "train.tensorboard=false",
    "sampling.num_inference_steps=1",
)  # fmt: skip
CONSTANT = ("optim.schedule=constant",)


def small_study(name: str = "small", arms: tuple[Arm, ...] | None = None) -> Study:
    """Two arms; the first is the plain recipe."""
    if arms is None:
        arms = (
            Arm("plain", ("model.block=[4, 4]",), "", 1, "4"), Arm("one block", ("model.block=[8, 8]",), "", 2, "1"),
        )  # fmt: skip
    return Study(
        name=name, figure="Figure 0", question="Is it?", recipe="digits", overrides=TINY, measure="pictures",
        metrics=(FRECHET, ACCURACY), arms=arms,
        claims=(Claim("plain is better", FRECHET.key, ends(arms[0].label, arms[-1].label)),), axis="blocks",
    )  # fmt: skip


def branching_study() -> Study:
    """A trunk, its checkpoints, and a decay that starts from one of them."""
    return small_study(
        "branching",
        (
            Arm("half way", CONSTANT, "constant", 0.5, at=0.4),
            Arm("end", CONSTANT, "constant", 1, at=1.0, weights="raw"),
            Arm("decayed", (), "decayed", 1, branch=Branch(CONSTANT, 0.4, 0.8)),
        ),
    )  # fmt: skip


def put_judges(cache: Path) -> None:
    """Untrained judges where a study looks for its own."""
    for name, shape in (("digits", (1, 8, 8)), ("moving-digits", (1, 12, 12))):
        facts = ClassifierFacts("small", shape, 10, "nothing", 0.1)
        file = cache / "judges" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_classifier(build_network("small", shape, 10), facts, file)
