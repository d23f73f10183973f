"""The fields of a recipe: plain dataclasses, the values they may have. Read by `acdit.recipe`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class ModelRecipe:
    """Arguments of `ACDiTTransformer`. `preset` (B, L, XL, H) fills the sizes that are not given; of text the data's
    tokenizer a `vocab_size` that is not. `time_conditioning`: null is true, but false of text."""

    grid: list[int]
    block: list[int]
    patch: list[int] | None = None
    in_channels: int = 4
    preset: str | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    rope: str = "axial"
    rope_split: list[int] | None = None
    rope_base: float | None = None
    window: int | None = None
    sink_blocks: int = 0
    sink_positions: str = "true"
    vocab_size: int | None = None
    time_conditioning: bool | None = None


@dataclass
class DataRecipe:
    """What to train on.

    `size` is what pictures are resized and cropped to: a square's side, or [height, width]. `shift`: in training each
    picture, or whole clip, moves by up to so many pixels up or down and left or right, and black comes in (what others
    call a random crop with padding). `classes` is a file that gives classes their order and names. `shuffle_buffer`
    counts the rows of a stream that are shuffled together; up to twice as many lie in the memory of each process,
    undecoded.

    A clip has `frames` frames: of those its file shows (with `fps`, of so many a second) every `frame_stride`-th, from
    `start` on: random, center or first. `short_clips` says what becomes of shorter files: error or loop. `split_file`
    is one of UCF-101's lists. Of moving digits there are `digits_per_clip`.

    Text becomes ids by `tokenizer`: "characters" (those of the training text), a folder or tokenizer.json, or a name on
    the hub (gpt2). A document is a text file, or each `document=line` of one; of JSONL and tables each `text_column`.
    `held_out`: the share (below 1) or number of the documents at the end that split "held_out" has and "train" has not.
    Documents are joined by EOS and cut into `sequence_length` tokens; `wrap` says which of them are added: joined
    (none), bos, bos_eos. `subset` is a configuration of a data set on the hub. Tokenised text is kept in `cache`.
    """

    kind: str
    root: str | None = None
    split: str = "train"
    size: int | list[int] | None = None
    crop: str = "center"
    channels: int = 3
    flip: bool = False
    shift: int = 0
    classes: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    streaming: bool = False
    shuffle_buffer: int = 2048
    frames: int = 16
    frame_stride: int = 1
    fps: float | None = None
    start: str = "random"
    short_clips: str = "error"
    split_file: str | None = None
    digits_per_clip: int = 1
    tokenizer: str = "characters"
    sequence_length: int = 1024
    wrap: str = "joined"
    document: str = "file"
    text_column: str = "text"
    held_out: float = 0.0
    subset: str | None = None
    cache: str | None = None
    max_bad_files: int = 0
    num_workers: int = 0


@dataclass
class CodecRecipe:
    """`pixels`: model space is (value in [0, 1] − mean) / std.

    `vae`: latents of the diffusers autoencoder `vae` (a folder or a hub id, in its `subfolder`), from pictures at every
    step or cached (data.kind=latents; then `vae` may be left out, and the model is published without it). The
    autoencoder's own scale is used; `scaling_factor`, `shift_factor` and `vae_sha256` only say what it must be.
    `posterior` is mode or sample. `tiling` and `slicing` save memory on large pictures.
    """

    kind: str = "pixels"
    mean: float = 0.5
    std: float = 0.5
    vae: str | None = None
    subfolder: str | None = None
    posterior: str = "mode"
    scaling_factor: float | None = None
    shift_factor: float | None = None
    vae_sha256: str | None = None
    tiling: bool = False
    slicing: bool = False


@dataclass
class CorruptionRecipe:
    """How clean data become noisy; how many noisy copies share one clean pass; how noisy the context may be.

    `kind`: "gaussian" (arguments of `GaussianCorruption`) or "masking" of text (arguments of `MaskingCorruption`:
    `mask_draw`, `mask_range`, `first_token_given`). `low_discrepancy`: mask rates fill their range evenly over the
    blocks of a global batch. `range_search_every`: after every so many steps the range of width 0.5 in which the bound
    varied least on the step's batch becomes the `mask_range` (BD3-LMs).

    `context_noise`: 0, clean context (the paper's). Above 0 each clean block is replaced, for the context only, by its
    corruption at a timestep of its own, uniform below this share of the schedule: 1 is the paper's ablation "noisy
    context". The model is not told. Sampling context is clean.

    `self_context`: the share of samples whose context is of the model's own making (see
    `acdit.training.self_context`), in `self_context_steps` model calls a block from at most `self_context_strength` of
    the schedule: fine-tuning against drift over long streams.
    """

    kind: str = "gaussian"
    prediction_type: str = "epsilon"
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timestep_draw: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    copies: int = 1
    context_noise: float = 0.0
    self_context: float = 0.0
    self_context_steps: int = 2
    self_context_strength: float = 0.5
    mask_draw: str = "rate"
    mask_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    first_token_given: bool = False
    low_discrepancy: bool = True
    range_search_every: int | None = None


@dataclass
class OptimRecipe:
    """AdamW. `batch_size` is global; `accumulation` cuts it into micro-batches."""

    batch_size: int
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    schedule: str = "wsd"
    warmup_steps: int = 0
    decay_fraction: float = 0.15
    label_dropout: float = 0.1


@dataclass
class EMARecipe:
    """Exponential moving averages of the weights; the first decay is the model that is published."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    warmup: bool = True
    inv_gamma: float = 1.0
    power: float = 2 / 3


@dataclass
class TrainRecipe:
    """How long and how. Exactly one of `steps` and `epochs`.

    `parallel` is how several processes share the work: "ddp" (whole weights in each) or "fsdp2" (rows of the weights,
    averages and moments in each). After `timeout_seconds` without an answer, the other processes count as lost.
    `init_from` is a saved model to start from: its folder, a built-in model's name or hub id.
    """

    steps: int | None = None
    epochs: int | None = None
    precision: str = "fp32"
    compile: bool = False
    gradient_checkpointing: str = "none"
    parallel: str = "ddp"
    init_from: str | None = None
    timeout_seconds: int = 1800
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 50
    sample_every: int | None = None
    tensorboard: bool = True
    threads: int | None = None


@dataclass
class SamplingRecipe:
    """How sample grids are drawn while training."""

    num_inference_steps: int = 25
    guidance_scale: float = 1.5
    labels: list[int] | None = None


@dataclass
class ClassificationRecipe:
    """A classification head on the features of a trained model (`acdit finetune`); see `docs/understanding.md`.

    `tune` is what learns: "head" (a probe: the model is frozen) or "all". `pooling` is what becomes of the tokens:
    their "mean", the means of "blocks" side by side, or an "attentive" average with a learned query of `heads` heads.
    `layers` whose outputs are read, 0 … or from the end −1 …; several stand side by side. `bidirectional`: every block
    sees every block (tune=all). `noise_timestep`: features come from the noisy stream at this timestep instead, as DiT
    has no other; None: clean.

    `layer_decay`: each layer below the head learns at this share of the rate of the one above (tune=all). `mixup`: the
    parameter of the Beta distribution of the shares in which neighbours of a batch are mixed; 0: none.
    `validation_split`: the split that train.sample_every measures on.
    """

    tune: str = "head"
    pooling: str = "mean"
    heads: int = 4
    layers: list[int] = field(default_factory=lambda: [-1])
    bidirectional: bool = False
    noise_timestep: float | None = None
    layer_decay: float = 1.0
    mixup: float = 0.0
    label_smoothing: float = 0.0
    validation_split: str | None = None


@dataclass
class Recipe:
    """Everything that defines a run. With `classification` it is one of `acdit finetune`."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    optim: OptimRecipe
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    corruption: CorruptionRecipe = field(default_factory=CorruptionRecipe)
    ema: EMARecipe = field(default_factory=EMARecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    classification: ClassificationRecipe | None = None
    seed: int = 0


CHOICES: dict[str, tuple[str, ...]] = {
    "model.preset": ("B", "L", "XL", "H"),
    "model.rope": ("axial", "reference", "1d", "none"),
    "model.sink_positions": ("true", "sliding"),
    "data.kind": (
        "digits", "images", "idx", "webdataset", "hf", "latents", "clips", "moving_digits", "moving_idx",
        "text", "hf_text", "builtin_text",
    ),
    "data.crop": ("center", "random"),
    "data.start": ("random", "center", "first"),
    "data.short_clips": ("error", "loop"),
    "data.wrap": ("joined", "bos", "bos_eos"),
    "data.document": ("file", "line"),
    "codec.kind": ("pixels", "vae"),
    "codec.posterior": ("mode", "sample"),
    "corruption.kind": ("gaussian", "masking"),
    "corruption.mask_draw": ("rate", "count"),
    "corruption.prediction_type": ("epsilon", "v_prediction", "flow_prediction"),
    "corruption.timestep_draw": ("uniform", "logit_normal"),
    "corruption.beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "optim.schedule": ("wsd", "cosine", "constant"),
    "train.precision": ("fp32", "bf16", "fp64"),
    "train.gradient_checkpointing": ("none", "elementwise", "layers"),
    "train.parallel": ("ddp", "fsdp2"),
    "classification.tune": ("head", "all"),
    "classification.pooling": ("mean", "blocks", "attentive"),
}  # fmt: skip
# Inclusive lower bound and exclusive upper bound of numbers; lists are checked value by value.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63),
    "model.grid": (1, 2**31), "model.block": (1, 2**31), "model.patch": (1, 2**31),
    "model.in_channels": (1, 2**31), "model.num_layers": (1, 2**31), "model.num_attention_heads": (1, 2**31),
    "model.attention_head_dim": (2, 2**31), "model.num_classes": (1, 2**31), "model.rope_split": (1, 2**31),
    "model.rope_base": (1 + 1e-9, math.inf),
    "model.vocab_size": (1, 2**31), "model.window": (1, 2**31), "model.sink_blocks": (0, 2**31),
    "data.size": (1, 2**31), "data.channels": (1, 5), "data.shift": (0, 2**15),
    "data.max_bad_files": (0, 2**31), "data.num_workers": (0, 4096),
    "data.shuffle_buffer": (1, 2**31), "data.frames": (1, 2**16), "data.frame_stride": (1, 2**16),
    "data.fps": (1e-3, 1001), "data.digits_per_clip": (1, 3),
    "data.sequence_length": (1, 2**31), "data.held_out": (0, 2**31),
    "codec.std": (1e-12, math.inf), "codec.scaling_factor": (1e-12, math.inf), "codec.shift_factor": (-1e12, 1e12),
    "corruption.num_train_timesteps": (1, 2**31), "corruption.copies": (1, 2**31),
    "corruption.context_noise": (0, 1 + 1e-12), "corruption.self_context": (0, 1 + 1e-12),
    "corruption.self_context_steps": (1, 10_000), "corruption.self_context_strength": (1e-12, 1 + 1e-12),
    "corruption.beta_start": (1e-12, 1), "corruption.beta_end": (1e-12, 1), "model.mlp_ratio": (1e-12, 2**31),
    "corruption.mask_range": (0, 1 + 1e-12), "corruption.range_search_every": (1, 2**31),
    "corruption.logit_std": (1e-12, math.inf), "corruption.min_snr_gamma": (1e-12, math.inf),
    "optim.batch_size": (1, 2**31), "optim.lr": (0, math.inf), "optim.betas": (0, 1), "optim.eps": (0, math.inf),
    "optim.weight_decay": (0, math.inf), "optim.accumulation": (1, 2**31), "optim.max_grad_norm": (1e-12, math.inf),
    "optim.warmup_steps": (0, 2**31), "optim.decay_fraction": (0, 1 + 1e-12), "optim.label_dropout": (0, 1),
    "ema.decays": (0, 1), "ema.inv_gamma": (1e-12, math.inf), "ema.power": (0, math.inf),
    "train.steps": (1, 2**31), "train.epochs": (1, 2**31), "train.checkpoint_every": (1, 2**31),
    "train.keep_checkpoints": (1, 2**31), "train.log_every": (1, 2**31), "train.sample_every": (1, 2**31),
    "train.threads": (1, 4096), "train.timeout_seconds": (1, 2**31),
    "sampling.num_inference_steps": (1, 10_000), "sampling.guidance_scale": (0, math.inf),
    "sampling.labels": (0, 2**31),
    "classification.heads": (1, 2**16), "classification.layers": (-(2**31), 2**31),
    "classification.noise_timestep": (0, 2**31), "classification.layer_decay": (1e-12, 1 + 1e-12),
    "classification.mixup": (0, 1e6), "classification.label_smoothing": (0, 1),
}  # fmt: skip
