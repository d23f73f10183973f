"""FLOPs as torch's counter sees them, apart by the parts of `acdit.flops`.

The counter knows no attention of the CPU and no operator of ours: formulas for them are registered here. The model's
own code runs, on fake tensors, which have shapes and no numbers: a model of any size is counted in seconds and no
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import acdit.attention
import acdit.products  # noqa: F401 (both register operators named below)
from acdit.flops import FlopsByPart
from acdit.mask import Streams, Window
from acdit.model import ACDiTTransformer
from acdit.recompute import checkpoint_elementwise

_LINEAR = ("aten.mm", "aten.addmm", "acdit.bf16_linear", "acdit.bf16_linear_backward")
"""Operators of linears; whatever else multiplies is attention."""


# --- formulas: each gets the shapes of an operator's tensors and its other arguments as they are --------------------


def _pairs(q: tuple[int, ...], num_clean: int, num_blocks: int, copies: int, window: int, sinks: int) -> int:
    """Multiply-adds of one product over the pairs that our operator visits, rectangle by rectangle."""
    batch, rows, length, heads, head_dim = q
    streams = Streams(num_clean, num_blocks, copies, length, Window(window, sinks) if window else None)
    first_query = streams.total - rows
    blocks = rows  # each its own
    for block, readers in streams.prefix_readers(first_query):
        blocks += len(readers) * sum(stop - start for start, stop in streams.segments(block))
    return batch * heads * head_dim * blocks * length**2


def _blockwise(q: tuple[int, ...], k: Any, v: Any, *streams: int, out_shape: Any = None) -> int:
    return 4 * _pairs(q, *streams)


def _blockwise_backward(
    grad: Any, q: tuple[int, ...], k: Any, v: Any, out: Any, lse: Any, *streams: int, out_shape: Any = None
) -> int:
    return 10 * _pairs(q, *streams)


def _attention(q: tuple[int, ...], k: tuple[int, ...], *rest: Any, out_shape: Any = None, **options: Any) -> int:
    batch, heads, queries, head_dim = q
    return 4 * batch * heads * queries * k[2] * head_dim


def _attention_backward(grad: Any, q: tuple[int, ...], k: tuple[int, ...], *rest: Any, **options: Any) -> int:
    return _attention(q, k) * 5 // 2


def _linear(x: tuple[int, ...], weight: tuple[int, int], *rest: Any, out_shape: Any = None) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


def _linear_backward(grad: Any, x: tuple[int, ...], weight: tuple[int, int], *rest: Any, out_shape: Any = None) -> int:
    return 2 * _linear(x, weight)


def formulas() -> dict[Any, Any]:
    """For `FlopCounterMode(custom_mapping=…)`: what torch's registry lacks to count this package on a CPU."""
    aten, ours = torch.ops.aten, torch.ops.acdit
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        ours.blockwise_attention: _blockwise,
        ours.blockwise_attention_backward: _blockwise_backward,
        ours.bf16_linear: _linear,
        ours.bf16_linear_backward: _linear_backward,
    }


# --- whose FLOPs they are --------------------------------------------------------------------------------------------


class PartCounter:
    """Counts a model's FLOPs part by part, by hooks on its linears; whatever attends runs outside of them.

    Args:
        model: whose calls are counted inside `counting`.
    """

    def __init__(self, model: ACDiTTransformer) -> None:
        self._model = model
        self._counter = FlopCounterMode(display=False, custom_mapping=formulas())
        self._inside: str | None = None
        self._seen = (0, 0)
        self._found = dict.fromkeys(FlopsByPart.__dataclass_fields__, 0.0)

    @property
    def parts(self) -> FlopsByPart:
        """What was counted and given to a part so far."""
        return FlopsByPart(**self._found)

    @property
    def total(self) -> int:
        """Everything that was counted so far."""
        return sum(self._counted())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs inside."""
        handles = []
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear):
                part = _part_of(name)
                handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._enter(part)))
                handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            with self._counter:
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, everything is prefill."""
        self._settle(None)
        self._found, kept = dict.fromkeys(self._found, 0.0), self._found
        yield
        self._settle(None)
        kept["prefill"] += sum(self._found.values())
        self._found = kept

    def settle(self) -> None:
        """Give what was counted since the last linear to its part."""
        self._settle(None)

    def _enter(self, part: str) -> None:
        self._settle(None)
        self._inside = part

    def _leave(self) -> None:
        self._settle(self._inside)
        self._inside = None

    def _settle(self, part: str | None) -> None:
        linear, attention = self._counted()
        new = (linear - self._seen[0], attention - self._seen[1])
        self._seen = (linear, attention)
        # Outside of modules: attention, and the last layer's product for keys and values alone.
        self._found[part or "transformer"] += new[0]
        self._found[part or "attention"] += new[1]

    def _counted(self) -> tuple[int, int]:
        counts: Mapping[Any, int] = self._counter.get_flop_counts().get("Global", {})
        linear = sum(count for operator, count in counts.items() if str(operator) in _LINEAR)
        return linear, sum(counts.values()) - linear


def _part_of(name: str) -> str:
    if "modulation" in name:
        return "adaln"
    if name.startswith("final_layer"):
        return "head"
    return "embeddings" if name.startswith(("x_embedder", "t_embedder")) else "transformer"


@dataclass(frozen=True)
class CountedStep:
    """FLOPs of one training step of one sample."""

    forward: FlopsByPart
    total: int
    """Forward and backward, with what checkpointing computes again."""


def count_training(config: Mapping[str, Any], copies: int = 1, checkpointing: str = "none") -> CountedStep:
    """Run forward and backward of one sample under the counter.

    Args:
        config: of an `ACDiTTransformer`.
        copies: noisy copies that share a clean pass.
        checkpointing: "none", "elementwise" or "layers", as in a recipe.
    """
    with FakeTensorMode():
        model = ACDiTTransformer.from_config(dict(config)).train()
        model.attention_execution = "sdpa"  # block by block: a dense mask multiplies pairs that nobody attends
        if checkpointing != "none":
            model.enable_gradient_checkpointing(*([checkpoint_elementwise] if checkpointing == "elementwise" else []))
        layout, counter = model.layout, PartCounter(model)
        clean, noisy = (_data(model, (1, *extra, layout.num_blocks)) for extra in ((), (copies,)))
        timestep = torch.zeros(1, copies, layout.num_blocks)
        with counter.counting():
            (prediction,) = model(clean, noisy, timestep, _labels(model, 1), return_dict=False)
            counter.settle()
            forward = counter.parts
            prediction.square().mean().backward()
            return CountedStep(forward, counter.total)


def count_sampling(config: Mapping[str, Any], steps: int = 25, guided: bool = True) -> FlopsByPart:
    """Run a model call of every block and the reading of every block but the last under the counter.

    A block's other steps are of the same shapes: the call's count is multiplied by `steps`. Solvers multiply no
    matrices.

    Args:
        config: of an `ACDiTTransformer`.
        steps: model calls a block.
        guided: both branches of classifier-free guidance.
    """
    branches = 2 if guided else 1
    with FakeTensorMode(), torch.no_grad():
        model = ACDiTTransformer.from_config(dict(config)).eval()
        counter, cache, blocks = PartCounter(model), model.new_cache(1), model.layout.num_blocks
        with counter.counting():
            for block in range(blocks):
                model.denoise(_data(model, (branches,)), torch.tensor(1.0), _labels(model, branches), cache)
                if block + 1 < blocks:
                    with counter.reading():
                        model.prefill(_data(model, (1, 1)), cache)
            counter.settle()
    parts = counter.parts
    found = {name: steps * getattr(parts, name) for name in FlopsByPart.__dataclass_fields__}
    return FlopsByPart(**(found | {"prefill": parts.prefill}))


def _data(model: ACDiTTransformer, shape: tuple[int, ...]) -> Tensor:
    """Blocks, (*shape, L, D), or token ids (*shape, L)."""
    length = model.layout.block_tokens
    if model.mask_token is not None:
        return torch.zeros(*shape, length, dtype=torch.int64)
    return torch.zeros(*shape, length, model.token_dim)


def _labels(model: ACDiTTransformer, count: int) -> Tensor | None:
    return None if model.null_label is None else torch.zeros(count, dtype=torch.int64)
