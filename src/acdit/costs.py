"""What a run costs, in closed form: parameters, floating-point operations, memory.

FLOPs count a multiply-add as two and matrix products only (linears and attention), the field's convention. A training
step computes 2N−1 blocks, of the clean ones in the last layer keys and values alone, and attends the allowed pairs
only, so nothing here is the dense figure of 2N blocks.

Memory counts the bytes torch's allocator holds: what the layers of `acdit.layers` keep for their backward, tensor by
tensor, and the largest temporaries beside them. Buffers that libraries take by themselves, the driver's share and
fragmentation are not in it. The CPU's eager execution is what the tests hold it against.

Shapes: B batch (of one device), C noisy copies, N blocks, L tokens a block, S = N·L, D token width, W hidden width,
H heads, r MLP ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acdit.errors import ConfigError
from acdit.layout import BlockLayout
from acdit.mask import Window, make_window

CHECKPOINTING = ("none", "elementwise", "layers")
PRECISIONS = ("fp32", "bf16", "fp64")
SHARDINGS = ("ddp", "fsdp")
_FREQUENCIES = 256
"""Width of the timestep's sinusoid."""
_BACKWARD_OF_ATTENTION = 2.5
"""Products of attention's backward by its forward's: scores again, and four gradients' worth (5 against 2)."""


@dataclass(frozen=True)
class Architecture:
    """What a model's cost depends on."""

    layout: BlockLayout
    channels: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    window: Window | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Architecture:
        """From the config of an `ACDiTTransformer`."""
        return cls(
            layout=BlockLayout(config["grid"], config["block"], config["patch"]),
            channels=config["in_channels"],
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            mlp_ratio=config["mlp_ratio"],
            num_classes=config["num_classes"],
            window=make_window(config.get("window"), config.get("sink_blocks", 0), "true", can_turn=True),
            vocab_size=config.get("vocab_size"),
        )

    @property
    def width(self) -> int:
        """W."""
        return self.num_heads * self.head_dim

    @property
    def inner(self) -> int:
        """Width inside the MLP, r·W."""
        return int(self.width * self.mlp_ratio)

    @property
    def token_dim(self) -> int:
        """Width of a token's prediction: D, or V of text."""
        return self.layout.token_dim(self.channels) if self.vocab_size is None else self.vocab_size

    @property
    def input_dim(self) -> int:
        """Width of a token that the embedder multiplies: D; 0 of text, whose ids are looked up."""
        return self.token_dim if self.vocab_size is None else 0

    @property
    def seen_blocks(self) -> int:
        """Pairs of a block and a clean block before it that it sees, of all N blocks: N·(N−1)/2 without a window."""
        return self._seen_before(self.layout.num_blocks)

    @property
    def seen_clean_blocks(self) -> int:
        """The same of the N−1 clean blocks that are read, each with itself."""
        read = self.layout.num_blocks - 1
        return self._seen_before(read) + read

    def _seen_before(self, blocks: int) -> int:
        if self.window is None:
            return blocks * (blocks - 1) // 2
        return sum(stop - start for block in range(blocks) for start, stop in self.window.segments(block))

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: products, their biases, norms and adaLN."""
        w, inner = self.width, self.inner
        products = 4 * w * w + 4 * w + 2 * w * inner + inner + w
        return products + 2 * w + 2 * self.head_dim + 6 * w * w + 6 * w

    @property
    def parameters(self) -> int:
        """All parameters."""
        w, d = self.width, self.token_dim
        rows = d if self.vocab_size is None else d + 1  # the mask token's
        ends = rows * w + _FREQUENCIES * w + w + w * w + w  # token and timestep embedders
        ends += w + 2 * w * w + 2 * w + w * d + d  # final layer
        labels = 0 if self.num_classes is None else (self.num_classes + 1) * w
        return ends + labels + self.num_layers * self.layer_parameters


# --- floating-point operations ------------------------------------------------------------------------------------


def training_flops(arch: Architecture, batch: int, copies: int = 1, checkpointing: str = "none") -> float:
    """FLOPs of forward and backward of one training step; what checkpointing computes again is counted.

    Args:
        arch: the model.
        batch: samples, of all devices and micro-batches together.
        copies: noisy copies that share a clean pass.
        checkpointing: "layers" runs every layer's forward twice; the other modes repeat no product.
    """
    _known("gradient_checkpointing", checkpointing, CHECKPOINTING)
    layers = _layer_products(arch, copies)
    pairs = _attention_products(arch, copies)
    ends, without_input_gradient = _end_products(arch, copies)
    flops = 3 * (layers + ends) - without_input_gradient + (1 + _BACKWARD_OF_ATTENTION) * pairs
    if checkpointing == "layers":
        flops += layers + pairs
    return batch * flops


def picture_flops(arch: Architecture, steps: int = 25, guided: bool = True) -> float:
    """FLOPs of drawing one sample: every block denoised in `steps` steps against the cache, then read once.

    Args:
        arch: the model.
        steps: model calls a block (a multistep solver makes one a step).
        guided: both branches of classifier-free guidance; they share the cache and its writing.
    """
    w, length, blocks, depth = arch.width, arch.layout.block_tokens, arch.layout.num_blocks, arch.num_layers
    token = _products_a_token(arch)
    embed, predict = 2 * arch.input_dim * w, 2 * arch.token_dim * w
    condition = 12 * w * w * depth + 2 * w * (_FREQUENCIES + w) + 4 * w * w
    seen = (arch.seen_blocks + blocks) * length**2
    denoise = blocks * (length * (token * depth + embed + predict) + condition) + 4 * w * seen * depth
    read_pairs = arch.seen_clean_blocks * length**2
    read = (blocks - 1) * length * (token * (depth - 1) + 4 * w * w + embed) + 4 * w * read_pairs * (depth - 1)
    return steps * (2 if guided else 1) * denoise + read


def _products_a_token(arch: Architecture) -> float:
    """Forward FLOPs of a layer's linears for one token: 24·W² with the usual MLP."""
    return 2 * (4 * arch.width**2 + 2 * arch.width * arch.inner)


def _layer_products(arch: Architecture, copies: int) -> float:
    """Forward FLOPs of all layers' linears, one sample."""
    w, length, blocks, depth = arch.width, arch.layout.block_tokens, arch.layout.num_blocks, arch.num_layers
    clean, noisy = (blocks - 1) * length, copies * blocks * length
    tokens = _products_a_token(arch) * (noisy * depth + clean * (depth - 1)) + 4 * w * w * clean
    return tokens + depth * copies * blocks * 12 * w * w  # adaLN: one vector a noisy block


def _attention_products(arch: Architecture, copies: int) -> float:
    """Forward FLOPs of all layers' attention over the allowed pairs, one sample."""
    length, blocks, depth = arch.layout.block_tokens, arch.layout.num_blocks, arch.num_layers
    noisy = copies * (arch.seen_blocks + blocks) * length**2
    clean = arch.seen_clean_blocks * length**2
    return 4 * arch.width * (noisy * depth + clean * (depth - 1))


def _end_products(arch: Architecture, copies: int) -> tuple[float, float]:
    """Forward FLOPs of embedders and final layer, one sample; and of those whose inputs need no gradient."""
    w, length, blocks = arch.width, arch.layout.block_tokens, arch.layout.num_blocks
    noisy = copies * blocks
    embed = 2 * arch.input_dim * w * length * (blocks - 1 + noisy)
    sinusoid = 2 * _FREQUENCIES * w * noisy
    rest = 2 * w * w * noisy + 4 * w * w * noisy + 2 * w * arch.token_dim * noisy * length
    return embed + sinusoid + rest, embed + sinusoid


# --- memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device while it trains."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    ema: int
    communication: int
    """DDP's gradient buckets; FSDP's gathered layers and their gradients before they are scattered."""
    activations: int
    """What forward and backward allocate at their peak, gradients of weights aside."""
    total: int
    """The most that is held at once. Not the sum: gradients come while activations go, unless earlier micro-batches
    have left theirs, and the averages' update needs a copy of the weights when activations are gone."""


def training_memory(
    arch: Architecture,
    micro_batch: int,
    copies: int = 1,
    *,
    checkpointing: str = "none",
    precision: str = "fp32",
    averages: int = 1,
    accumulation: int = 1,
    devices: int = 1,
    sharding: str = "ddp",
    bf16_units: bool = True,
) -> TrainingMemory:
    """Memory of one device of a training run.

    Args:
        arch: the model.
        micro_batch: samples that one device computes at once.
        copies: noisy copies that share a clean pass.
        checkpointing, precision: as in the recipe; bf16 is autocast over fp32 weights.
        averages: how many moving averages of the weights are kept.
        accumulation: micro-batches a step.
        devices: how many share the work.
        sharding: "ddp" keeps everything on every device; "fsdp" (full shard) a share of weights, gradients, moments
            and averages, and gathers a layer when it is computed.
        bf16_units: see `activation_peak`.
    """
    _known("sharding", sharding, SHARDINGS)
    options: dict[str, Any] = {"checkpointing": checkpointing, "precision": precision, "bf16_units": bf16_units}
    sharded = sharding == "fsdp" and devices > 1
    start, end = _backward_peaks(arch, micro_batch, copies, **options, sharded=sharded)
    size = 8 if precision == "fp64" else 4
    held = arch.parameters * size
    communication = held if devices > 1 else 0
    if sharded:
        held = -(-held // devices)
        # The layer at work and the one fetched ahead, and the gradients of both on their way out.
        communication = 2 * arch.layer_parameters * ((2 if precision == "bf16" else size) + size)
    # Between start and end of the backward both kinds change evenly from layer to layer: one of the ends is the most.
    working = max(start + (held if accumulation > 1 else 0), held + end, held + held)
    return TrainingMemory(
        weights=held,
        gradients=held,
        optimizer=2 * held,
        ema=averages * held,
        communication=communication,
        activations=start,
        total=(3 + averages) * held + communication + working,
    )


def activation_peak(
    arch: Architecture,
    batch: int,
    copies: int = 1,
    *,
    checkpointing: str = "none",
    precision: str = "fp32",
    bf16_units: bool = True,
) -> int:
    """Bytes that forward and backward of one micro-batch allocate at their peak.

    The peak lies in the backward of the last layer's MLP or, because it holds clean tokens too and may have to compute
    a layer again, of the one before: all that is still kept, plus what was recomputed, plus the MLP's gradients.

    Args:
        arch: the model.
        batch: B, samples at once.
        copies: C.
        checkpointing: "none" keeps 14 + 2r activations of width W a token and layer, "elementwise" 7 + r, "layers" 1.
        precision: "bf16" is autocast over fp32 weights.
        bf16_units: whether the device multiplies bf16: then autocast keeps bf16 copies of the weights; without them
            `acdit.products` widens factors while it multiplies.
    """
    return _backward_peaks(
        arch, batch, copies, checkpointing=checkpointing, precision=precision, bf16_units=bf16_units
    )[0]


def _backward_peaks(
    arch: Architecture,
    batch: int,
    copies: int,
    *,
    checkpointing: str,
    precision: str,
    bf16_units: bool,
    sharded: bool = False,
) -> tuple[int, int]:
    """What is allocated at the backward's start, its peak, and while the first layer goes backward, near its end."""
    _known("gradient_checkpointing", checkpointing, CHECKPOINTING)
    _known("precision", precision, PRECISIONS)
    layer, last = (_Kept(arch, batch, copies, precision, is_last) for is_last in (False, True))
    depth = arch.num_layers
    kept_layer = layer.kept(checkpointing)
    ends = _ends(arch, batch, copies, precision)
    if precision == "bf16" and bf16_units and not sharded:
        ends += 2 * arch.parameters  # autocast's copies; sharded, they are the gathered layers
    before_last = ends + (depth - 1) * kept_layer
    peaks = [before_last + last.everything + last.temporary(bf16_units)]
    if depth > 1:
        peaks.append(before_last - kept_layer + layer.everything + layer.temporary(bf16_units))
    first = layer if depth > 1 else last
    return round(max(peaks)), round(ends + first.everything + first.temporary(bf16_units))


@dataclass(frozen=True)
class _Kept:
    """What one layer of one micro-batch keeps for its backward, in bytes."""

    arch: Architecture
    batch: int
    copies: int
    precision: str
    is_last: bool

    @property
    def clean(self) -> int:
        return self.batch * (self.arch.layout.num_blocks - 1) * self.arch.layout.block_tokens

    @property
    def noisy(self) -> int:
        return self.batch * self.copies * self.arch.layout.num_blocks * self.arch.layout.block_tokens

    @property
    def size(self) -> int:
        return {"fp32": 4, "bf16": 2, "fp64": 8}[self.precision]

    @property
    def wide(self) -> int:
        return max(4, self.size)

    @property
    def full(self) -> int:
        """Tokens that go through the whole layer."""
        return self.noisy if self.is_last else self.clean + self.noisy

    @property
    def everything(self) -> float:
        """Without checkpointing: everything a backward asks for."""
        w, ratio, heads = self.arch.width, self.arch.inner / self.arch.width, self.arch.num_heads
        tokens = self.clean + self.noisy
        # Layer input; then norm, modulated norm, q k v, placed q and k, attended, its projection; the sum, norm and
        # modulated norm before the MLP; inside it before and after GELU; its output.
        per_token = 13 + 2 * ratio
        kept = self.size * w * (tokens + per_token * self.full)
        if self.precision == "bf16":
            kept += 2 * self.wide * w * self.full  # q and k as the norms saw them, in fp32
        kept += self.wide * self.full * (3 * heads + 2)  # norms' inverses and attention's log-sum-exp
        if self.is_last and self.clean:
            # Clean tokens: normed input, keys and values. Keys and values of all tokens are joined; the placed keys of
            # the noisy ones are then not kept by themselves.
            kept += self.size * w * (3 * self.clean + 2 * tokens - self.noisy)
            kept += self.wide * self.clean * (heads + 1)
            kept += self.wide * w * self.clean if self.precision == "bf16" else 0
        return kept + self._modulation(8) + self.size * w * self._noisy_blocks

    def kept(self, checkpointing: str) -> float:
        """From forward to backward under a checkpointing mode, by a layer that is not the last."""
        w, heads, tokens = self.arch.width, self.arch.num_heads, self.clean + self.noisy
        if checkpointing == "none":
            return self.everything
        kept = float(self.size * w * tokens)
        if checkpointing == "elementwise":
            # q k v, attended, its projection, the MLP's inner product and its output.
            kept += self.size * w * (6 + self.arch.inner / w) * self.full + self.wide * heads * self.full
            kept += self.size * w * 6 * self._noisy_blocks
        return kept

    def temporary(self, bf16_units: bool) -> float:
        """Gradients in flight where the MLP's second product goes backward: of the residual, of the output (in the
        place of the output itself), of the inner activations; and the product's weight gradient."""
        w, inner = self.arch.width, self.arch.inner
        if self.precision == "bf16" and not bf16_units:
            widened = self.size * w + self.wide * (w + inner) + self.size * inner
            return self.full * widened + 4 * w * inner
        return self.full * self.size * (w + inner) + max(4, self.size) * w * inner

    @property
    def _noisy_blocks(self) -> int:
        return self.batch * self.copies * self.arch.layout.num_blocks

    def _modulation(self, vectors: int) -> float:
        """adaLN's six vectors a block and the two scales with one added."""
        blocks = self.full // self.arch.layout.block_tokens
        return self.size * self.arch.width * vectors * blocks


def _ends(arch: Architecture, batch: int, copies: int, precision: str) -> float:
    """Embedders, rotations and loss: what is held beside the layers while the last of them goes backward."""
    size, wide = {"fp32": (4, 4), "bf16": (2, 4), "fp64": (8, 8)}[precision]
    layout, w, d = arch.layout, arch.width, arch.token_dim
    blocks = layout.num_blocks - 1 + copies * layout.num_blocks
    noisy_blocks = batch * copies * layout.num_blocks
    rotations = 2 * wide * arch.head_dim * layout.block_tokens * (blocks + layout.num_blocks)
    tokens = batch * blocks * layout.block_tokens
    noisy_tokens = noisy_blocks * layout.block_tokens
    condition = noisy_blocks * (2 * size * w + 2 * wide * w + wide * _FREQUENCIES)
    return rotations + max(wide, size) * (arch.input_dim * tokens + 3 * d * noisy_tokens) + condition


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(name, found=repr(value), expected=f"one of {known}")
