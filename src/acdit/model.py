"""The transformer: it reads clean blocks and denoises noisy ones with the same weights (paper sections 4.1–4.3).

    prefill: clean blocks + cache of the blocks before them → their keys and values, appended to the cache
    denoise: noisy block, timestep, label + cache           → the prediction for that block
    forward: both verbs for all blocks of a sequence at once, for training
    encode:  clean blocks                                    → their features, for other tasks than generation

Its parts are in `acdit.layers` and `acdit.positions`. Shapes: B batch, C noisy copies, N blocks, L tokens a block, D
token width, V vocabulary, W hidden width, H heads, K head width.

Data are continuous, tokens (…, L, D), or text, token ids (…, L): then the embedder of tokens is a table and the
prediction is V logits a token. Nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from acdit.attention import SinkRotation
from acdit.cache import KVCache
from acdit.errors import ConfigError
from acdit.hooks import execution_device, under_hooks
from acdit.inputs import layer_indices, require_blocks, require_text, spread
from acdit.layers import ACDiTLayer, FinalLayer, Rope, TimestepEmbedder, wide_dtype
from acdit.layout import BlockLayout
from acdit.mask import Streams, Window, make_window
from acdit.positions import Positions
from acdit.products import Linear
from acdit.safe_loading import SafetensorsOnly

PRESETS: dict[str, dict[str, int]] = {
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 18, "attention_head_dim": 64},
    "H": {"num_layers": 32, "num_attention_heads": 20, "attention_head_dim": 64},
}
"""Sizes of the paper's models (Table 5)."""
_CHANNELS = 4


@dataclass
class ACDiTTransformerOutput(BaseOutput):
    """Output of `ACDiTTransformer`: `sample`, shaped like `noisy`; of text with V logits a token behind."""

    sample: Tensor


class ACDiTTransformer(SafetensorsOnly, ModelMixin, ConfigMixin):
    """Blockwise autoregressive diffusion transformer (Hu et al., arXiv 2412.07720).

    It predicts and nothing else: it knows no scheduler, no guidance, no files, draws no random number and keeps no
    state between calls.

    Args:
        grid: cells per axis of the data, before patching: (32, 32), or (16, 32, 32) for video.
        block: tokens per axis of an autoregressive block.
        patch: cells per axis of a token; an int holds for every axis.
        in_channels: channels of the data.
        num_layers, num_attention_heads, attention_head_dim: size; see `PRESETS`. W = heads × head dim.
        mlp_ratio: inner width of the MLP over W.
        num_classes: classes of the label embedding, which gets one more row for "no label"; None: unconditional.
        rope: "axial" (the paper's), "reference" (for converted checkpoints), "1d" (over the place in the sequence) or
            "none"; see `acdit.rope`.
        rope_split: proportion of the head dimension per axis; None: even, and 2:3:3 for three axes. "1d" and "none"
            have no axes to split between.
        rope_base: base of the angles of every axis, such as 10000; None: by the rule of `acdit.rope.base_for_extent`.
        window: clean blocks before its own that a block sees, in training and sampling; None: all of them.
        sink_blocks: with a window, blocks at the very beginning that stay in sight.
        sink_positions: "true": sinks keep their positions; "sliding": they are seen right before the window, moved
            along the first axis (needs a RoPE that is a rotation: not "reference").
        vocab_size: V, for text (or other discrete data): token ids 0 … V−1 instead of channels; noisy tokens may also
            be `mask_token`. None: continuous data.
        time_conditioning: False: the timestep's embedder is fed zero whatever the timestep, as MDLM and BD3-LMs do: its
            answer is one learned vector. Parameters are the same, so weights can go from one to the other.

    Raises:
        ConfigError: a block or patch that does not divide, a head dimension that does not split.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ACDiTLayer"]  # noqa: RUF012 (diffusers' class attribute convention)
    _repeated_blocks = ["ACDiTLayer"]  # noqa: RUF012 (the same)
    # Small, and they say in which dtype the model computes.
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "y_embedder", "final_layer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        patch: int | Sequence[int] = 1,
        in_channels: int = _CHANNELS,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        rope: str = "axial",
        rope_split: Sequence[int] | None = None,
        rope_base: float | None = None,
        window: int | None = None,
        sink_blocks: int = 0,
        sink_positions: str = "true",
        vocab_size: int | None = None,
        time_conditioning: bool = True,
    ) -> None:
        super().__init__()
        self.layout = BlockLayout(grid, block, patch)
        self.window = make_window(window, sink_blocks, sink_positions, can_turn=rope != "reference")
        self.positions = Positions(self.layout, attention_head_dim, rope, rope_split, rope_base)
        hidden_size = num_attention_heads * attention_head_dim
        if int(hidden_size * mlp_ratio) < 1:
            raise ConfigError("mlp_ratio", found=str(mlp_ratio), expected=f"at least 1/{hidden_size}, one feature")
        if vocab_size is None:
            token_dim = self.layout.token_dim(in_channels)
            self.x_embedder: Linear | nn.Embedding = Linear(token_dim, hidden_size, bias=False)
        else:
            require_text(self.layout, vocab_size, in_channels, _CHANNELS)
            token_dim = vocab_size
            self.x_embedder = nn.Embedding(vocab_size + 1, hidden_size)  # the last row is the mask token's
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.Embedding(num_classes + 1, hidden_size) if num_classes is not None else None
        self.layers = nn.ModuleList(
            ACDiTLayer(hidden_size, num_attention_heads, int(hidden_size * mlp_ratio)) for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, token_dim)
        self.gradient_checkpointing = False
        self.attention_execution = "auto"
        """How `forward` attends: "auto", "sdpa", "flex" or "dense"; all give the same numbers."""
        self.initialize_weights()

    @property
    def null_label(self) -> int | None:
        """Label that means "no label", for guidance and label dropout; None of an unconditional model."""
        return self.config.num_classes

    @property
    def mask_token(self) -> int | None:
        """Token id that means "masked", one beyond the vocabulary; None of a model of continuous data."""
        return self.config.vocab_size

    @property
    def execution_device(self) -> torch.device:
        """Where the model computes; under offloading, weights may wait elsewhere."""
        return execution_device(self, self.x_embedder.weight, self.x_embedder)

    @property
    def token_dim(self) -> int:
        """Width of a token's prediction: D, or V of text."""
        vocab_size = self.config.vocab_size
        return self.layout.token_dim(self.config.in_channels) if vocab_size is None else vocab_size

    def initialize_weights(self) -> None:
        """Xavier linears, N(0, 0.02) embeddings, zero adaLN and output: the model starts as "predict zero"."""
        for name, parameter in self.named_parameters():
            table = name.startswith("x_embedder") and self.mask_token is not None
            if (table or name.startswith(("t_embedder", "y_embedder"))) and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.ones_(parameter)  # norms

    def new_cache(self, batch_size: int, num_blocks: int | None = None, window: Window | None = None) -> KVCache:
        """An empty cache in the model's dtype and on its device.

        Args:
            batch_size: B samples; guidance branches need no room of their own.
            num_blocks: blocks it must hold; default N−1, since the last block has no reader.
            window: what it keeps; default: the model's own window. Another one than the training's is an experiment.
        """
        window = self.window if window is None else window
        blocks = self.layout.num_blocks - 1 if num_blocks is None else num_blocks
        return KVCache(
            num_layers=len(self.layers),
            batch_size=batch_size,
            max_tokens=blocks * self.layout.block_tokens,
            num_heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            block_tokens=self.layout.block_tokens,
            dtype=self.x_embedder.weight.dtype,
            device=self.execution_device,
            window=window,
        )

    def forward(
        self,
        clean: Tensor,
        noisy: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> ACDiTTransformerOutput | tuple[Tensor]:
        """Denoise every noisy block against the clean blocks before it, in one pass (paper Figure 2a).

        Args:
            clean: (B, N, L, D), the context; of text (B, N, L) token ids. Its last block has no reader and is not
                computed. Under a window N may be any number: blocks beyond the grid go on along its first axis.
            noisy: like `clean`, or (B, C, N, L, D) for C noisy copies that share the clean pass; of text (B, C, N, L).
            timestep: a number for all, (B,) one a sample, or one a block: broadcastable to (B, N) or (B, C, N).
            class_labels: one for all, (B,), or one a block, like `timestep`; None: no label.
            return_dict: False gives a tuple.

        Returns:
            `sample`, the prediction, shaped like `noisy`; of text (…, L, V) logits.
        """
        x, condition, copies = self._denoise_all(clean, noisy, timestep, class_labels, {})
        sample = self.final_layer(x, condition).reshape(*copies.shape[:4], -1)
        sample = sample if noisy.ndim == copies.ndim else sample[:, 0]
        return ACDiTTransformerOutput(sample=sample) if return_dict else (sample,)

    def _denoise_all(
        self,
        clean: Tensor,
        noisy: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None,
        found: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` up to its last layer's output (B, C·N, L, W); also the condition, and `noisy` with copies' axis.

        The layers that are keys of `found` leave what they make of the noisy blocks there, (B, C, N, L, W).
        """
        ndim = 2 + len(self._token_shape)
        count = clean.shape[1] if self.window is not None and clean.ndim == ndim else None
        with_copies = noisy.ndim == ndim + 1
        self._require_blocks("clean", clean, count)
        self._require_blocks("noisy", noisy, count, with_copies)
        copies = noisy if with_copies else noisy[:, None]
        batch, num_copies, num_blocks, length = copies.shape[:4]
        if clean.shape[0] != batch:
            raise ConfigError("noisy", found=f"batch {batch}", expected=f"the batch of clean, {clean.shape[0]}")
        streams = Streams(num_blocks - 1, num_blocks, num_copies, length, self.window)
        context = clean[:, : streams.num_clean]
        x = self.x_embedder(torch.cat([context, copies.flatten(1, 2).to(clean.dtype)], dim=1))
        shape = (batch, num_copies, num_blocks)
        condition = self._condition(timestep, class_labels, shape, keep_copies=with_copies).flatten(1, 2)
        rope = self._rope(0, num_blocks)
        order = [*range(streams.num_clean), *list(range(num_blocks)) * num_copies]
        rope = Rope(rope.cos[order], rope.sin[order], rope.form)
        sinks = self._sink_rotation(self.window, 0, num_blocks)
        last = len(self.layers) - 1
        for index, layer in enumerate(self._layers()):
            x = self._run(layer, x, condition, rope, streams, self.attention_execution, index == last, sinks)
            if index in found:
                noisy_part = x if index == last else x[:, streams.num_clean :]
                found[index] = noisy_part.reshape(*copies.shape[:4], -1)
        return x, condition, copies

    @under_hooks
    def encode(
        self,
        clean: Tensor,
        layers: Sequence[int] | None = None,
        *,
        bidirectional: bool = False,
        cache: KVCache | None = None,
    ) -> list[Tensor]:
        """Features of clean blocks: the clean stream, which sees no noise, no timestep and no label.

        It is what `prefill` computes, the last block included, and it can be learned through.

        Args:
            clean: (B, n, L, D), of text (B, n, L): blocks from the beginning, or those that follow the ones in `cache`.
            layers: whose outputs, 0 … num_layers − 1, or counted from the end as −1, −2 …; None: the last one's.
            bidirectional: every block sees all n, as fine-tuning may wish; a generative model was not trained so.
            cache: to read on block by block; it is written to as by `prefill`.

        Returns:
            (B, n, L, W) of each of `layers`, in their order.

        Raises:
            ConfigError: a wrong shape, a layer that is not there, a full cache, or a cache and `bidirectional`.
        """
        wanted = layer_indices(layers, len(self.layers))
        self._require_blocks("clean", clean, clean.shape[1])
        found: dict[int, Tensor] = {}
        if cache is not None:
            if bidirectional:
                raise ConfigError("bidirectional", found="a cache", expected="all blocks at once, without one")
            parts = [self._read(part, cache, wanted) for part in self._readable(clean, cache)]
            return [torch.cat([part[index] for part in parts], dim=1) for index in wanted]
        count = clean.shape[1]
        streams = Streams(count, count, 0, clean.shape[2], self.window)
        sinks = self._sink_rotation(self.window, 0, count)
        x, rope = self.x_embedder(clean), self._rope(0, count)
        for index, layer in enumerate(self._layers()):
            if len(found) == len(set(wanted)):
                break
            x = self._run(layer.encode, x, rope, streams, self.attention_execution, sinks, bidirectional)
            if index in wanted:
                found[index] = x
        return [found[index] for index in wanted]

    @under_hooks
    def encode_noisy(
        self,
        clean: Tensor,
        noisy: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Features of noisy blocks, as a plain diffusion transformer gives them: from the layers of `forward`.

        Args:
            clean, noisy, timestep, class_labels: as of `forward`. With one block this is DiT: the context is not read.
            layers: as of `encode`.

        Returns:
            (B, N, L, W), or (B, C, N, L, W) of noisy copies, of each of `layers`, in their order.
        """
        wanted = layer_indices(layers, len(self.layers))
        found = dict.fromkeys(wanted, noisy)
        _, _, copies = self._denoise_all(clean, noisy, timestep, class_labels, found)
        return [found[index] if noisy.ndim == copies.ndim else found[index][:, 0] for index in wanted]

    @under_hooks
    def prefill(self, clean: Tensor, cache: KVCache) -> None:
        """Read clean blocks: append their keys and values to the cache.

        Args:
            clean: (B, n, L, D), of text (B, n, L), the n blocks that follow those in the cache.
            cache: of B samples, with room for n more blocks.

        Raises:
            ConfigError: a wrong shape, or a cache that is full.
        """
        self._require_blocks("clean", clean, clean.shape[1])
        for part in self._readable(clean, cache):
            self._read(part, cache)

    @staticmethod
    def _readable(clean: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        """Clean blocks in parts that a cache takes at once, once there is room for all of them."""
        cache.require_room(clean.shape[1] * clean.shape[2])
        # A ring forgets with every block: under a window they are read one after the other.
        return clean.split(1 if cache.window is not None else max(1, clean.shape[1]), dim=1)

    def _read(self, clean: Tensor, cache: KVCache, wanted: Sequence[int] = ()) -> dict[int, Tensor]:
        """`prefill` of blocks that a cache takes at once; the outputs of the `wanted` layers."""
        found: dict[int, Tensor] = {}
        x = self.x_embedder(clean)
        rope = self._rope(cache.num_blocks, clean.shape[1])
        last = len(self.layers) - 1
        for index, layer in enumerate(self._layers()):
            x = layer.read(x, rope, cache, index, index == last and last not in wanted)
            if index in wanted:
                found[index] = x
        cache.advance(clean.shape[1] * clean.shape[2])
        sinks = self._sink_rotation(cache.window, cache.num_blocks, 1)
        if sinks is not None:
            cache.turn_sinks(lambda keys: sinks.turn(keys, 0))
        return found

    @under_hooks
    def denoise(self, noisy: Tensor, timestep: Tensor | float, class_labels: Tensor | None, cache: KVCache) -> Tensor:
        """Predict for the noisy block that follows the blocks in the cache; the cache is only read.

        Args:
            noisy: (G·B, L, D), of text (G·B, L), for a cache of B samples: G guidance branches, branch-major, share its
                entries.
            timestep: scalar, or (G·B,).
            class_labels: (G·B,), or None: no label.
            cache: what `prefill` has read so far.

        Returns:
            (G·B, L, D); of text (G·B, L, V) logits.
        """
        batch = noisy.shape[0]
        if tuple(noisy.shape[1:]) != self._token_shape:
            raise ConfigError(
                "noisy",
                found=f"shape {tuple(noisy.shape)}",
                expected=f"(G·B, {', '.join(map(str, self._token_shape))})",
            )
        if batch % cache.batch_size:
            raise ConfigError("noisy", found=f"batch {batch}", expected=f"a multiple of the cache's {cache.batch_size}")
        x = self.x_embedder(noisy)
        condition = self._condition(timestep, class_labels, (batch,))
        rope = self._rope(cache.num_blocks, 1)
        rope = Rope(rope.cos[0], rope.sin[0], rope.form)
        for index, layer in enumerate(self._layers()):
            x = layer.denoise(x, condition, rope, cache, index)
        return self.final_layer(x, condition)

    def _layers(self) -> Iterator[ACDiTLayer]:
        return cast(Iterator[ACDiTLayer], iter(self.layers))

    def _run(self, layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """A layer's output; what it needs for its backward is computed again there, where that is asked for."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            again: Tensor = self._gradient_checkpointing_func(layer, *arguments)
            return again
        return layer(*arguments)

    def _condition(
        self, timestep: Tensor | float, class_labels: Tensor | None, shape: tuple[int, ...], keep_copies: bool = False
    ) -> Tensor:
        """emb(t) + emb(label), (*shape, W): one vector a block; (1, …, 1, W) where all blocks share one."""
        device = self.execution_device
        t = spread(torch.as_tensor(timestep, device=device), shape, keep_copies)
        if not self.config.time_conditioning:
            t = torch.zeros((1,) * len(shape), device=device)
        embedded = self.t_embedder(t)
        if self.y_embedder is None:
            if class_labels is not None:
                raise ConfigError("class_labels", found="labels", expected="None: this model is unconditional")
            return embedded if not self.config.time_conditioning else embedded.expand(*shape, -1)
        if class_labels is None:
            class_labels = torch.tensor(self.config.num_classes, device=device)
        labels = self.y_embedder(spread(class_labels.to(device), shape, keep_copies))
        return (embedded + labels).expand(*shape, -1)

    def _rope(self, first_block: int, num_blocks: int) -> Rope:
        """Rotations of consecutive blocks, (num_blocks, L, 1, K)."""
        dtype = wide_dtype(self.x_embedder.weight.dtype)
        return self.positions.rope(first_block, num_blocks, dtype, self.execution_device)

    def _sink_rotation(self, window: Window | None, first_block: int, num_blocks: int) -> SinkRotation | None:
        """How far queries of consecutive blocks see the sinks turned; see `Positions`."""
        dtype = wide_dtype(self.x_embedder.weight.dtype)
        return self.positions.sink_rotation(window, first_block, num_blocks, dtype, self.execution_device)

    @property
    def _token_shape(self) -> tuple[int, ...]:
        """(L, D), or (L,) of text."""
        length = self.layout.block_tokens
        return (length,) if self.mask_token is not None else (length, self.token_dim)

    def _require_blocks(self, name: str, x: Tensor, num_blocks: int | None = None, copies: bool = False) -> None:
        blocks = self.layout.num_blocks if num_blocks is None else num_blocks
        require_blocks(name, x, (blocks, *self._token_shape), copies, ids=self.mask_token is not None)
