"""What a run costs, in closed form: parameters, floating-point operations (`acdit.flops`), memory.

Memory counts the bytes torch's allocator holds: what the layers of `acdit.layers` keep for their backward, tensor by
tensor, and the largest temporaries beside them. Buffers that libraries take by themselves, the driver's share and
fragmentation are not in it. The CPU's eager execution is what the tests hold it against.

Shapes: B batch (of one device), C noisy copies, N blocks, L tokens a block, S = N·L, D token width, W hidden width,
H heads, r MLP ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from acdit.errors import ConfigError
from acdit.flops import CHECKPOINTING, FREQUENCIES, Architecture, picture_flops, training_flops

__all__ = [
    "CHECKPOINTING", "PRECISIONS", "SHARDINGS", "Architecture", "SamplingMemory", "TrainingMemory", "activation_peak",
    "picture_flops", "sampling_memory", "training_flops", "training_memory",
]  # fmt: skip

PRECISIONS = ("fp32", "bf16", "fp64")
SHARDINGS = ("ddp", "fsdp")


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


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes on one device while it samples."""

    weights: int
    cache: int
    """Keys and values of the clean blocks that are kept: all but the last, or those a window sees and one."""
    working: int
    """The most that one call of the model allocates beside the cache."""

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.weights + self.cache + self.working


def sampling_memory(arch: Architecture, batch: int, *, guided: bool = True, precision: str = "fp32") -> SamplingMemory:
    """Memory of one device that draws samples.

    Args:
        arch: the model.
        batch: samples at once.
        guided: both branches of classifier-free guidance, which share the cache.
        precision: of weights, cache and activations.
    """
    _known("precision", precision, PRECISIONS)
    size, wide = {"fp32": (4, 4), "bf16": (2, 4), "fp64": (8, 8)}[precision]
    layout, w = arch.layout, arch.width
    kept = layout.num_blocks - 1 if arch.window is None else arch.window.capacity + 1  # one more is being read
    tokens = batch * (2 if guided else 1) * layout.block_tokens
    # While GELU works in a layer: its input and output, the residual before and after attention, q and k, the product
    # that v is a part of, attention's output and projection, and the MLP's modulated input.
    working = tokens * size * (10 * w + 2 * arch.inner)
    working += wide * tokens * 3 * arch.token_dim  # the solver's: noisy block, prediction, the one before
    working += 2 * wide * arch.head_dim * layout.block_tokens  # rotations
    return SamplingMemory(
        weights=arch.parameters * size,
        cache=2 * batch * kept * layout.block_tokens * w * arch.num_layers * size,
        working=working,
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
    condition = noisy_blocks * (2 * size * w + 2 * wide * w + wide * FREQUENCIES)
    return rotations + max(wide, size) * (arch.input_dim * tokens + 3 * d * noisy_tokens) + condition


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(name, found=repr(value), expected=f"one of {known}")
