"""The studies: which figure of the paper each is, its arms, and what the paper found."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from acdit.errors import ConfigError
from acdit.studies.study import Arm, Branch, Claim, Metric, Study, better_to_worse, ends, gap_closes

FRECHET = Metric("frechet_distance", "Fréchet distance", lower_is_better=True, ratio=True)
ACCURACY = Metric("conditional_accuracy", "read as their class", lower_is_better=False)
FRAME_ACCURACY = Metric("frame_accuracy", "digit read, worst frame", lower_is_better=False)
VELOCITY = Metric("velocity_error", "velocity error", lower_is_better=True)
PROBE = Metric("probe_accuracy", "linear probe, held out", lower_is_better=False)
NO_COST = 0.1
"""A cost of less than about 10 % of the distance counts as none."""


@dataclass(frozen=True)
class Setting:
    """Data to run the studies on, and how they are shortened for it."""

    name: str
    recipe: str
    what: str
    steps: int
    seeds: tuple[int, ...]
    patches: tuple[tuple[int, tuple[int, ...]], ...]
    """(cells of a token's side, sides of the blocks that are compared), the recipe's own patch first."""
    sizes: tuple[tuple[int, int], ...]
    """(layers, heads), the recipe's own first, then smaller ones."""
    held_out: str
    """Split that samples are compared with."""
    per_class: int
    """Samples of each class, and held-out pictures they are compared with."""
    floor: float = 0.5
    """Share of samples read as their class below which a model has learned too little to be compared; chance: 0.1."""
    judge: dict[str, Any] = field(default_factory=dict)
    """How the classifier that judges is trained."""
    head_dim: int = 16
    needs_data: bool = True


SETTINGS = {
    "digits": Setting(
        "digits", "digits", "the built-in digits, 8×8", steps=400, seeds=(0, 1, 2),
        patches=((1, (8, 4, 2)), (2, (4, 2, 1))), sizes=((4, 4), (3, 2), (2, 1)),
        held_out="held_out", per_class=50, needs_data=False,
    ),
    "mnist": Setting(
        "mnist", "mnist", "MNIST from its idx files, 28×28", steps=500, seeds=(0,),
        patches=((2, (14, 7, 2)), (4, (7, 1))), sizes=((4, 3), (3, 2), (2, 1)), head_dim=32,
        held_out="test", per_class=80,
        judge={"network": "small", "epochs": 3, "batch_size": 128, "required_accuracy": 0.985},
    ),
    "cifar10": Setting(
        "cifar10", "cifar10", "CIFAR-10 in train/CLASS and held_out/CLASS, 32×32", steps=400, seeds=(0,),
        patches=((2, (16, 8, 4)), (4, (8, 4, 2))), sizes=((4, 3), (3, 2), (2, 1)), head_dim=32,
        held_out="held_out", per_class=60, floor=0.15,
        judge={"network": "residual", "epochs": 12, "batch_size": 128, "learning_rate": 5e-3, "augment": True,
               "required_accuracy": 0.75},
    ),
}  # fmt: skip
"""By name."""

_QUIET = (
    "train.sample_every=null",
    "train.tensorboard=false",
    "train.checkpoint_every=100",
    "train.keep_checkpoints=1",
)
_VIDEO = (
    "data.frames=8", "model.grid=[8, 12, 12]", "model.window=null", "train.steps=800", "optim.lr=2e-3",
    "optim.decay_fraction=0.3",
)  # fmt: skip
"""A frame is a token, as in the recipe."""
_CONSTANT = ("optim.schedule=constant",)
_DECAY_FROM, _DECAY_TO = 0.4, 0.7
_DECAYED = ("optim.schedule=wsd", f"optim.decay_fraction={1 - _DECAY_TO:g}")


def studies(setting: Setting) -> dict[str, Study]:
    """All studies on these data, by name, in the order of the paper."""
    made = [
        _ar_length(setting), _model_size(setting), _positions(setting), _context(setting), _decay(setting),
        _representation(setting),
    ]  # fmt: skip
    if setting.name == "digits":
        made.insert(1, _ar_length_video())
    return {study.name: study for study in made}


def find_setting(name: str) -> Setting:
    """The setting of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SETTINGS:
        raise ConfigError("--on", found=repr(name), expected=f"one of {', '.join(SETTINGS)}")
    return SETTINGS[name]


def find_study(name: str, setting: Setting) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none, or not on these data.
    """
    known = studies(setting)
    if name in known:
        return known[name]
    if name in studies(SETTINGS["digits"]):
        raise ConfigError(f"study {name!r}", found=f"--on {setting.name}", expected="--on digits: it has no other data")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise ConfigError(
        f"study {name!r}", found="no such study", expected=f"one of {', '.join(known)}, or all",
        fix=f"did you mean {close[0]!r}?" if close else "acdit study lists them",
    )  # fmt: skip


def _of_pictures(setting: Setting, **described: Any) -> Study:
    return Study(
        recipe=setting.recipe, overrides=(*_QUIET, f"train.steps={setting.steps}"), measure="pictures",
        metrics=(FRECHET, ACCURACY), floor=(ACCURACY.key, setting.floor), **described,
    )  # fmt: skip


def _blocks(setting: Setting, patch: int, side: int) -> tuple[int, tuple[str, str]]:
    """AR length and overrides of blocks of so many tokens a side, at a patch of so many cells a side."""
    tokens = dict(setting.patches)[patch][0]  # the first is the whole picture
    return (tokens // side) ** 2, (f"model.patch=[{patch}, {patch}]", f"model.block=[{side}, {side}]")


def _ar_length(setting: Setting) -> Study:
    arms, claims = [], []
    for patch, sides in setting.patches:
        labels = []
        for side in sides:
            length, overrides = _blocks(setting, patch, side)
            labels.append(f"patch {patch}, {length} block{'s' * (length > 1)}")
            arms.append(Arm(labels[-1], overrides, f"patch {patch}", length, str(length)))
        text = f"at patch {patch} a longer AR length costs quality"
        claims.append(Claim(text, FRECHET.key, better_to_worse(*labels)))
    return _of_pictures(
        setting, name="ar-length", figure="Figure 4, pictures",
        question="Does a longer AR length cost quality at an equal number of tokens?",
        arms=tuple(arms), claims=tuple(claims), axis="AR length (blocks)", log_axis=True,
    )  # fmt: skip


def _ar_length_video() -> Study:
    arms = tuple(
        Arm(f"{8 // frames} block{'s' * (frames < 8)}", (f"model.block=[{frames}, 1, 1]",), "8 frames", 8 // frames,
            str(8 // frames))
        for frames in (8, 4, 2, 1)
    )  # fmt: skip
    text = f"a longer AR length costs video nothing (less than {NO_COST:.0%} of the distance, in logarithms)"
    return Study(
        name="ar-length-video", figure="Figure 4, video",
        question="Does a longer AR length cost video quality?", recipe="moving-digits", overrides=(*_QUIET, *_VIDEO),
        measure="clips", metrics=(FRECHET, FRAME_ACCURACY, VELOCITY), arms=arms, floor=(FRAME_ACCURACY.key, 0.3),
        claims=(Claim(text, FRECHET.key, ends(arms[0].label, arms[-1].label), margin=NO_COST),),
        axis="AR length (blocks)", log_axis=True,
        note="The distance is that of single frames; motion is judged by the velocity error.",
    )  # fmt: skip


def _size(setting: Setting, layers: int, heads: int) -> tuple[str, tuple[str, str]]:
    return f"{layers}×{heads * setting.head_dim}", (
        f"model.num_layers={layers}", f"model.num_attention_heads={heads}",
    )  # fmt: skip


def _model_size(setting: Setting) -> Study:
    patch, (whole, own, small) = setting.patches[0]
    arms, by_length = [], {}
    for place, (layers, heads) in enumerate(reversed(setting.sizes)):
        name, sizes = _size(setting, layers, heads)
        for side in (own,) if place == 0 else (whole, own, small):
            length, blocks = _blocks(setting, patch, side)
            label = f"{name}, {length} block{'s' * (length > 1)}"
            by_length[name, side] = label
            line = f"{length} block{'s' * (length > 1)}"
            arms.append(Arm(label, (*sizes, *blocks), line, place, name))
    names = [_size(setting, *size)[0] for size in setting.sizes]
    wide, narrow = names[1], names[0]
    return _of_pictures(
        setting, name="model-size", figure="Figures 4 and 6a",
        question="Are larger models better, and do they close the gap that a long AR length leaves?",
        arms=tuple(arms), axis="layers × width",
        claims=(
            Claim("larger models are better", FRECHET.key,
                  better_to_worse(*(by_length[name, own] for name in names))),
            Claim(f"the larger model closes the gap between the longest AR length and one block ({wide} → {narrow})",
                  FRECHET.key,
                  gap_closes((by_length[wide, whole], by_length[wide, small]),
                             (by_length[narrow, whole], by_length[narrow, small])),
                  presumes=ends(by_length[wide, whole], by_length[wide, small])),
        ),
    )  # fmt: skip


def _positions(setting: Setting) -> Study:
    names = {"RoPE-ND": "axial", "1-D RoPE": "1d", "none": "none"}
    arms = tuple(
        Arm(label, (f"model.rope={rope}",), "", place, label) for place, (label, rope) in enumerate(names.items())
    )
    return _of_pictures(
        setting, name="positions", figure="Figure 6b, positions",
        question="Is RoPE-ND better than RoPE in one dimension, and than no positions?", arms=arms, axis="positions",
        claims=(
            Claim("RoPE-ND is better than 1-D RoPE", FRECHET.key, ends("RoPE-ND", "1-D RoPE")),
            Claim("RoPE-ND is better than no positions", FRECHET.key, ends("RoPE-ND", "none")),
        ),
    )  # fmt: skip


def _context(setting: Setting) -> Study:
    return _of_pictures(
        setting, name="context", figure="Figure 6b, context", question="Is clean context better than noisy context?",
        arms=(
            Arm("clean", ("corruption.context_noise=0.0",), "", 0, "clean"),
            Arm("noisy", ("corruption.context_noise=1.0",), "", 1, "noisy"),
        ),
        claims=(Claim("clean context is better than noisy context", FRECHET.key, ends("clean", "noisy")),),
        axis="context while training",
    )  # fmt: skip


def _decay(setting: Setting) -> Study:
    arms, claims = [], []
    for weights, words in (("ema", "average"), ("raw", "weights")):
        constant = {share: f"{words}, constant rate, {share:.0%}" for share in (_DECAY_FROM, _DECAY_TO, 1.0)}
        decayed = {share: f"{words}, decayed, {share:.0%}" for share in (_DECAY_TO, 1.0)}
        for share, label in constant.items():
            line, tick = f"{words}, constant rate", f"{share:.0%}"
            arms.append(Arm(label, _CONSTANT, line, share, tick, at=share, weights=weights))
        branch = Branch(_CONSTANT, _DECAY_FROM, _DECAY_TO)
        for share, label in decayed.items():
            how: dict[str, Any] = {"branch": branch} if share < 1 else {"overrides": _DECAYED}
            arms.append(
                Arm(
                    label, line=f"{words}, decayed to {share:.0%}", x=share, tick=f"{share:.0%}", weights=weights, **how
                )
            )
            text = f"the decay lowers the distance of the {words} at equal steps, {share:.0%}"
            claims.append(Claim(text, FRECHET.key, ends(label, constant[share])))
    return _of_pictures(
        setting, name="decay", figure="Figure 6c", question="Does the distance drop in the WSD decay?",
        arms=tuple(arms), claims=tuple(claims), axis="share of the steps",
        note=f"The decay starts at {_DECAY_FROM:.0%} or {_DECAY_TO:.0%} of the steps and lasts {1 - _DECAY_TO:.0%}. "
        "The average is what is published; the weights themselves show the decay without its smoothing.",
    )  # fmt: skip


def _representation(setting: Setting) -> Study:
    patch, sides = setting.patches[0]
    arms = tuple(
        Arm(label, _blocks(setting, patch, side)[1], "", place, label)
        for place, (label, side) in enumerate((("ACDiT", sides[1]), ("DiT", sides[0])))
    )
    return Study(
        name="representation", figure="Table 3",
        question="Do a linear probe's classes come easier from ACDiT's features than from DiT's of the same size?",
        recipe=setting.recipe, overrides=(*_QUIET, f"train.steps={setting.steps}"), measure="probe", metrics=(PROBE,),
        arms=arms, claims=(Claim("ACDiT's features are better than DiT's", PROBE.key, ends("ACDiT", "DiT")),),
        axis="model",
        note="DiT is our model of one block. Its features are those of the noisy stream: it has no other. Layers, "
        "noise level, and averages of the whole or of quarters are chosen on a part of the training pictures. Frozen "
        "features and a linear probe: the paper's table has fine-tuned models.",
    )  # fmt: skip
