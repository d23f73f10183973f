"""GPT-2 (Radford et al. 2019), as a judge of text: only what is needed to read its weights and score tokens.

Written here because the judge must not bring a library of its own; checked against the usual implementation's numbers.
Weights are those of the Hugging Face folders (gpt2, gpt2-medium, gpt2-large, gpt2-xl): config.json beside
model.safetensors or pytorch_model.bin.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from acdit.errors import DataError, first_line
from acdit.evaluation.weight_files import fill, read_state_dict

FORMS = "a folder with GPT-2's config.json, its model.safetensors or pytorch_model.bin, and its tokenizer's files"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files carry along
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


@dataclass(frozen=True)
class GPT2Config:
    """Sizes, by the names of config.json."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float


class _Linear(nn.Module):
    """GPT-2's files hold the transposed matrix."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_attn, self.c_proj = _Linear(config.n_embd, 3 * config.n_embd), _Linear(config.n_embd, config.n_embd)
        self.heads = config.n_head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.c_proj(out.transpose(1, 2).flatten(2))
        return attended


class _MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc, self.c_proj = _Linear(config.n_embd, config.n_inner), _Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return out


class _Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = _Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT2(nn.Module):
    """Next-token logits.

    Args:
        config: sizes.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) ids, S at most `n_positions` → (B, S, V): what follows each token. Output and input share a table."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.ln_f(x) @ self.wte.weight.T
        return logits


def load_gpt2(folder: str | Path) -> GPT2:
    """A local folder's model, in eval mode; no code is executed.

    Raises:
        DataError: no such folder or files, another kind of model, names or shapes that do not fit.
    """
    folder = Path(folder)
    where = f"--language-model {folder}"
    if not folder.is_dir():
        raise DataError(where, found="no such folder", expected=FORMS)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
        raise DataError(where, found=present, expected=FORMS)
    network = GPT2(_config(folder / "config.json", where))
    state = {name.removeprefix("transformer."): value for name, value in read_state_dict(weights, FORMS).items()}
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state.get("wte.weight", head)):
        raise DataError(
            where, found="lm_head.weight that is not wte.weight", expected="GPT-2, whose output and input share a table"
        )
    state = {name: value for name, value in state.items() if not name.endswith(_NOT_WEIGHTS)}
    fill(network, state, weights, FORMS, "gpt2, gpt2-medium, gpt2-large and gpt2-xl fit")
    return network.eval()


def _config(file: Path, where: str) -> GPT2Config:
    try:
        given: Any = json.loads(file.read_text(encoding="utf-8"))
        kind, activation = given.get("model_type", "gpt2"), given.get("activation_function", "gelu_new")
        if kind != "gpt2" or activation not in _ACTIVATIONS:
            found = f"model_type {kind!r}, activation_function {activation!r}"
            raise DataError(where, found=found, expected="GPT-2's config.json")
        other = [name for name, usual in _FIXED.items() if given.get(name, usual) != usual]
        if other:
            raise DataError(where, found=f"{other[0]}={given[other[0]]!r}", expected=repr(_FIXED[other[0]]))
        sizes = {name: int(given[name]) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
        inner = given.get("n_inner")
        config = GPT2Config(
            **sizes, n_inner=4 * sizes["n_embd"] if inner is None else int(inner),
            layer_norm_epsilon=float(given.get("layer_norm_epsilon", 1e-5)),
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(str(file), found=f"no readable config ({first_line(error)})", expected=FORMS) from None
    if min(sizes.values()) < 1 or config.n_embd % config.n_head:
        raise DataError(str(file), found=str(sizes), expected="sizes above 0, n_embd a multiple of n_head")
    return config
