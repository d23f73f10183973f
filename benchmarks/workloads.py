"""The work that is timed, for each side: a training step, and a picture. Same weights, same function, same inputs.

Ours takes the reference's form of RoPE here, so both sides compute the same numbers; `agreement` checks it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import build_reference, load_reference, perturb
from torch import Tensor, nn

from acdit import ACDiTTransformer
from acdit.convert import reference_name
from acdit.corruption.gaussian import GaussianCorruption
from acdit.recompute import checkpoint_elementwise
from acdit.sampling import sample_blocks

NUM_CLASSES = 1000
CHANNELS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[..., Tensor]
"""Does the work once with inputs of a seed; what it returns is compared between the sides. A picture's also takes the
number of solver steps."""


@dataclass(frozen=True)
class Work:
    """A square latent of `side`², cut into squares of `block`², patch 1."""

    name: str
    kind: str
    """ "step": forward, backward, AdamW. "picture": all blocks × steps × both guidance branches."""
    side: int
    block: int
    batch: int
    layers: int = 12
    heads: int = 12
    inference_steps: int = 25
    guidance_scale: float = 1.5

    @property
    def num_blocks(self) -> int:
        return (self.side // self.block) ** 2

    @property
    def block_tokens(self) -> int:
        return self.block**2

    @property
    def tokens(self) -> int:
        return self.side**2

    def describe(self) -> str:
        size = f"{self.layers} layers × {64 * self.heads}"
        shape = f"{self.tokens} tokens = {self.num_blocks} × {self.block_tokens}, batch {self.batch}"
        more = "" if self.kind == "step" else f", {self.inference_steps} steps, guidance {self.guidance_scale}"
        return f"{size}, {shape}{more}"

    def flops(self, ours: bool) -> float:
        """Multiply-adds × 2 of linears and attention over the tokens: what no execution can leave out of its rule.

        Ours computes 2N−1 blocks and the allowed pairs; the reference 2N blocks and, in a step, all pairs.
        """
        width, length, blocks = 64 * self.heads, self.block_tokens, self.num_blocks
        linear, pair = 24 * width**2, 4 * width
        if self.kind == "step":
            if ours:
                clean, noisy = blocks - 1, blocks
                # In the last layer a clean token needs keys and values only: 4 of the 24 width² of its linears.
                token_layers = (noisy * self.layers + clean * (self.layers - 1)) * length * linear
                token_layers += clean * length * 4 * width**2
                pairs = sum(range(1, blocks + 1)) * length**2
                clean_pairs = sum(range(1, blocks)) * length**2
                attention = pair * (pairs * self.layers + clean_pairs * (self.layers - 1))
                return 3 * self.batch * (token_layers + attention * 3.5 / 3)
            tokens = 2 * self.tokens
            return 3 * self.batch * self.layers * (tokens * linear + pair * tokens**2 * 3.5 / 3)
        branches = 2 if self.guidance_scale != 1 else 1
        seen = sum(range(1, blocks + 1)) * length**2
        denoising = self.inference_steps * branches * (self.tokens * linear + pair * seen)
        prefills = 1 if ours else branches
        reading = prefills * ((self.tokens - length) * linear + pair * sum(range(1, blocks)) * length**2)
        return self.batch * self.layers * (denoising + reading)


def build_ours(work: Work, seed: int = 0) -> ACDiTTransformer:
    """Random weights everywhere, fp32."""
    model = ACDiTTransformer(
        grid=(work.side, work.side),
        block=(work.block, work.block),
        in_channels=CHANNELS,
        num_layers=work.layers,
        num_attention_heads=work.heads,
        num_classes=NUM_CLASSES,
        rope="reference",
    )
    perturb(model, seed)
    return model


def build_theirs(work: Work, checkout: Path, ours: nn.Module) -> nn.Module:
    """The reference with the weights of ours."""
    args = Namespace(
        vae_latent_size=CHANNELS, patch_size=1, block_size=work.block_tokens, ar_len=work.num_blocks, num_frames=1,
        image_size=8 * work.side, vae_patch_pixels=8, nd_split=None, square_block=True,
    )  # fmt: skip
    model = build_reference(
        load_reference(checkout), args, hidden_size=64 * work.heads, depth=work.layers, num_classes=NUM_CLASSES
    )
    model.load_state_dict({reference_name(name): value for name, value in ours.state_dict().items()})
    return model


def step_inputs(work: Work, seed: int) -> dict[str, Tensor]:
    """Inputs of one training step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (work.batch, work.num_blocks, work.block_tokens, CHANNELS)
    return {
        "clean": torch.randn(shape, generator=generator),
        "noisy": torch.randn(shape, generator=generator),
        "target": torch.randn(shape, generator=generator),
        "timestep": torch.randint(1000, shape[:2], generator=generator),
        "labels": torch.randint(NUM_CLASSES, shape[:1], generator=generator),
    }


def labels_of(work: Work, seed: int) -> Tensor:
    """Classes to draw pictures of."""
    return torch.randint(NUM_CLASSES, (work.batch,), generator=torch.Generator().manual_seed(seed))


class TrainingStep:
    """Forward, backward and optimizer step of one side; under bf16 autocast over fp32 weights when dtype is bf16.

    Args:
        model: whose parameters are trained.
        predict: the model or its compiled twin, called as (clean, noisy, timestep, labels).
        fused: ours steps with the fused AdamW, as its trainer does; the reference as its train.py does.
    """

    def __init__(self, work: Work, model: nn.Module, predict: Callable[..., Tensor], dtype: str, fused: bool) -> None:
        self.work, self.model, self.predict = work, model, predict
        self.autocast = dtype == "bf16"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=fused or None
        )

    def forward_backward(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            prediction = self.predict(inputs["clean"], inputs["noisy"], inputs["timestep"], inputs["labels"])
            loss = nn.functional.mse_loss(prediction.float(), inputs["target"].reshape(prediction.shape))
        loss.backward()
        return loss.detach()

    def __call__(self, seed: int) -> Tensor:
        inputs = step_inputs(self.work, seed)
        self.optimizer.zero_grad()
        loss = self.forward_backward(inputs)
        self.optimizer.step()
        return loss


class CompiledVerbs:
    """A model whose `prefill` and `denoise` are compiled; everything else is the model's."""

    def __init__(self, model: ACDiTTransformer) -> None:
        self._model = model
        self.prefill = torch.compile(model.prefill)
        self.denoise = torch.compile(model.denoise)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def our_step(work: Work, model: ACDiTTransformer, dtype: str, compiled: bool) -> TrainingStep:
    """Compiled, it recomputes what is cheap, which the compiler fuses away; eager would pay a tenth: it keeps all."""
    forward = torch.compile(model) if compiled else model
    model.enable_gradient_checkpointing(checkpoint_elementwise)

    def predict(clean: Tensor, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        model.gradient_checkpointing = compiled  # eager and compiled runs may share the model
        return forward(clean, noisy, timestep, labels, return_dict=False)[0]

    return TrainingStep(work, model, predict, dtype, fused=True)


def their_step(work: Work, model: nn.Module, dtype: str) -> TrainingStep:
    model.train()
    return TrainingStep(work, model, model, dtype, fused=False)


def our_picture(work: Work, model: ACDiTTransformer, compiled: bool) -> Run:
    """`model` in the dtype to sample in."""
    sampler: Any = CompiledVerbs(model) if compiled else model
    scheduler = GaussianCorruption().sampling_scheduler()

    def run(seed: int, steps: int = work.inference_steps) -> Tensor:
        blocks = sample_blocks(
            sampler,
            scheduler,
            class_labels=labels_of(work, seed),
            num_inference_steps=steps,
            guidance_scale=work.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        )
        return torch.stack(list(blocks), dim=1)

    return run


def their_picture(work: Work, model: nn.Module) -> Run:
    """`model` in the dtype to sample in. In fp32 its noise is the same as ours, drawn in the same order."""
    dtype = next(model.parameters()).dtype
    shape = (work.batch, work.num_blocks, work.block_tokens, CHANNELS)
    model.eval()

    def run(seed: int, steps: int = work.inference_steps) -> Tensor:
        return model.sample(
            labels_of(work, seed),
            GaussianCorruption().sampling_scheduler(),
            steps,
            cfg=work.guidance_scale,
            target_shape=shape,
            generator=torch.Generator().manual_seed(seed),
            dtype=dtype,
        )

    return run


def build_side(work: Work, side: str, dtype: str, checkout: Path | None) -> tuple[nn.Module, Run]:
    """One side by itself: "reference", "ours" or "ours, compiled"."""
    model: nn.Module = build_ours(work)
    if side == "reference":
        assert checkout is not None
        model = build_theirs(work, checkout, model)
    if work.kind == "step":
        if side == "reference":
            return model, their_step(work, model, dtype)
        assert isinstance(model, ACDiTTransformer)
        return model, our_step(work, model, dtype, compiled=side != "ours")
    model = model.to(DTYPES[dtype])
    if side == "reference":
        return model, their_picture(work, model)
    assert isinstance(model, ACDiTTransformer)
    return model, our_picture(work, model, compiled=side != "ours")
