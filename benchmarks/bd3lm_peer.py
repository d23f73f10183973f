"""Runs BD3-LMs (kuleshov-group/bd3lms, arXiv 2503.09573) from a checkout, beside ours. None of its code is kept here:
it is imported at run time, with its own configuration files. What is done to it from outside is listed in `CHANGES`,
which every result carries.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from acdit.corruption import MaskingCorruption
from acdit.corruption.masking import LOWEST_RATE
from acdit.layout import BlockLayout

TESTED_COMMIT = "1c3e8f43d88dfbcee5ff2aa6932a9e74b31ae1d7"
FILES = {
    "configs/algo/bd3lm.yaml": "c4f90db899aa1ee7c8d3b0a8a2cba5f392eb1fb6",
    "configs/config.yaml": "4f73f630d24110b6b90edc9e2f06cb51419a151b",
    "configs/lr_scheduler/constant_warmup.yaml": "0bfcbe3213ae1d1e568b1bca3846c1924bd62cce",
    "configs/model/small.yaml": "92ff9fea4fe4c029784e6da699a4ab660d465320",
    "configs/noise/loglinear.yaml": "04c914f32ffe43e52b35ea31fb4617d366983393",
    "dataloader.py": "6ccc21fe95dc97572ff67e5000ec1d82b74bc064",
    "diffusion.py": "377a2b9babcf061a8955b5ee6c275798176b29da",
    "metrics.py": "90a5558999c5ed1dd8b355ca31687368c177b003",
    "models/__init__.py": "4a1b52937fe02d353ece76f33f33f76588faf2f8",
    "models/dit.py": "7c0ebe64d86674428806b4acbf527e7fe3f21469",
    "models/ema.py": "4389c2556128f6ef822176de3cbdd2bcd8328ca5",
    "noise_schedule.py": "64ccd24c5a3c6959e8388d49630bba9c9c1a7735",
    "utils.py": "5265c7fad3a6fd29588577f6258c7be09e4eb5d3",
}
"""What is read or imported, and git's hash of each at that commit."""
CHANGES = (
    "timm, of which utils.py imports a cosine schedule that is not used here: an empty class stands in for it",
    "metrics.py fetches the tokenizer of gpt2-large for generative perplexity, which is not measured here: a stand-in "
    "is handed to it, and no metric is updated",
    "Lightning's Trainer: a plain loop calls _loss, backward, clip_grad_norm_, and the optimizer and scheduler of its "
    "own configure_optimizers",
    "the tokenizer: ids come from our character tokenizer; it is told the vocabulary's size, BOS and EOS, and puts its "
    "mask token behind them, as ours does",
    "models/dit.py reset_kv_cache is called with an argument that it does not take, and makes its cache on device "
    "'cuda' in bfloat16: the argument is dropped, and the cache made on the CPU in fp32",
    "_check_stop_conds gives up a sample whose last 256 tokens have an entropy below 4 nats, as text by characters "
    "has: it never stops",
    "its progress bars are off; its autocasts are for CUDA and do nothing on a CPU, so everything runs in fp32",
)
BACKEND = "sdpa"
"""FlexAttention, its other one, has no backward on a CPU."""


def require_bd3lms(checkout: Path) -> None:
    """Refuse, before anything is measured, a path that is no checkout."""
    missing = [name for name in FILES if not (checkout / name).is_file()]
    if missing:
        raise SystemExit(
            f"--bd3lms {checkout}: no {', '.join(missing)} there; give a checkout of kuleshov-group/bd3lms"
        )


def describe_bd3lms(checkout: Path) -> dict[str, Any]:
    """Which version it is: the tested commit, if all files that matter are that commit's; else their hashes."""

    def blob(path: Path) -> str:
        content = path.read_bytes()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    found = {name: blob(checkout / name) for name in FILES}
    apart = {name: digest for name, digest in found.items() if digest != FILES[name]}
    told: dict[str, Any] = {"repository": "kuleshov-group/bd3lms", "changes": list(CHANGES)}
    if apart:
        return {**told, "commit": f"not {TESTED_COMMIT}", "files_apart": apart}
    return {**told, "commit": TESTED_COMMIT}


def load_bd3lms(checkout: Path) -> ModuleType:
    """Import `diffusion` of a checkout.

    Raises:
        SystemExit: the path holds no such files, or one of their imports is missing.
    """
    require_bd3lms(checkout)
    timm, scheduler = ModuleType("timm"), ModuleType("timm.scheduler")
    # A module made here has no attributes that a type checker knows.
    scheduler.CosineLRScheduler = type("CosineLRScheduler", (), {})  # type: ignore[attr-defined]
    sys.modules.update({"timm": timm, "timm.scheduler": scheduler})
    sys.path.insert(0, str(checkout))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its TorchScript and CUDA autocasts
            module = importlib.import_module("diffusion")
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"BD3-LMs import {error.name}, which is not installed; see the head of benchmarks/bd3lm.py"
        ) from None
    finally:
        sys.path.remove(str(checkout))
    module.tqdm = lambda steps, **_: steps  # type: ignore[attr-defined]  # one bar for each of its samples
    # Said at every one of its autocasts, which is so on purpose.
    warnings.filterwarnings("ignore", message="CUDA is not available or torch_xla is imported")
    return module


def configuration(
    checkout: Path, *, length: int, block: int, layers: int, width: int, heads: int, cond_dim: int, dropout: float,
    optim: dict[str, float], warmup_steps: int, sampling: bool,
) -> Any:  # fmt: skip
    """Its own configuration of BD3-LMs with these values set.

    Args:
        checkout: of the repository.
        length: S, tokens of the context.
        block: tokens of a block.
        layers, width, heads, cond_dim, dropout: of the transformer.
        optim: lr, beta1, beta2, eps and weight_decay.
        warmup_steps: of the learning rate.
        sampling: for its cached first-hitting sampler; else for training.
    """
    from omegaconf import OmegaConf

    folder = checkout / "configs"
    parts = {
        "algo": "algo/bd3lm.yaml", "model": "model/small.yaml", "noise": "noise/loglinear.yaml",
        "lr_scheduler": "lr_scheduler/constant_warmup.yaml",
    }  # fmt: skip
    whole = OmegaConf.load(folder / "config.yaml")
    kept = {key: whole[key] for key in ("mode", "diffusion", "sampling", "training", "optim")}
    evaluation = {key: whole.eval[key] for key in ("perplexity_batch_size", "gen_ppl_eval_model_name_or_path")}
    config = OmegaConf.create(
        {**kept, **{key: OmegaConf.load(folder / name) for key, name in parts.items()}, "eval": evaluation}
    )
    ours = {
        "mode": "sample_eval" if sampling else "train", "block_size": block, "loader": {"eval_batch_size": 1},
        "model": {
            "length": length, "n_blocks": layers, "hidden_size": width, "n_heads": heads, "cond_dim": cond_dim,
            "dropout": dropout, "attn_backend": BACKEND,
        },
        "training": {"ema": 0}, "optim": optim, "lr_scheduler": {"num_warmup_steps": warmup_steps},
        "sampling": {"kv_cache": sampling, "first_hitting": True, "nucleus_p": 1.0},
    }  # fmt: skip
    return OmegaConf.merge(config, ours)


def build_bd3lms(checkout: Path, config: Any, *, vocab_size: int, bos_token: int, eos_token: int, seed: int) -> Any:
    """Its `Diffusion` with the random weights of its own initialisation, on the CPU.

    Args:
        checkout: of the repository.
        config: of `configuration`.
        vocab_size: V, without the mask token.
        bos_token, eos_token: ids.
        seed: of torch's generator, which it draws everything from.
    """
    module = load_bd3lms(checkout)
    tokenizer = SimpleNamespace(vocab_size=vocab_size, bos_token_id=bos_token, eos_token_id=eos_token, mask_token=None)
    unused = SimpleNamespace(pad_token="", pad_token_id=0)
    torch.manual_seed(seed)
    loads = mock.patch("transformers.AutoTokenizer.from_pretrained", return_value=unused)
    with loads, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.Diffusion(config, tokenizer)


def parameters_of(peer: Any) -> int:
    """Trained parameters; its noise schedule has none."""
    return sum(parameter.numel() for parameter in peer._get_parameters() if parameter.requires_grad)


# --- training ---------------------------------------------------------------------------------------------------------


class PeerStep:
    """Its training step: loss, backward, clipping, its own optimizer and scheduler.

    Args:
        peer: its `Diffusion`.
        max_grad_norm: what the gradient's norm is clipped to, its Trainer's `gradient_clip_val`.
    """

    def __init__(self, peer: Any, max_grad_norm: float) -> None:
        self.peer, self.max_grad_norm = peer, max_grad_norm
        (self.optimizer,), (schedule,) = peer.configure_optimizers()
        self.lr_scheduler = schedule["scheduler"]
        peer.train()

    def __call__(self, tokens: Tensor) -> float:
        """tokens (B, S) → the loss, in nats a token."""
        loss = self.peer._loss(tokens, torch.ones_like(tokens)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.peer.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        return float(loss.detach())


# --- its bound, by its code and by ours -------------------------------------------------------------------------------


@torch.no_grad()
def peer_bound(
    peer: Any, tokens: Tensor, *, batch_size: int, num_draws: int, seed: int
) -> tuple[float, tuple[float, float]]:
    """Its bound by its own `_loss`, t on [1e-3, 1]: nats a token that counts, and a 95 % interval of the draws.

    Its rates fill [1e-3, 1] in the order of the batch: the first sequence always gets the lowest. Each draw therefore
    takes the sequences in a new random order; else each would be measured at its own rates only, however many draws.

    Args:
        peer: its `Diffusion`.
        tokens: (M, S) token ids, M sequences.
        batch_size: sequences at once.
        num_draws: draws for each sequence, at least 2.
        seed: of torch's generator.
    """
    training = peer.training
    peer.eval()
    torch.manual_seed(seed)
    estimates = []
    for _ in range(num_draws):
        total = counted = 0.0
        for part in tokens[torch.randperm(len(tokens))].split(batch_size):
            # The mask is new each time: it is written into, to leave BOS out.
            found = peer._loss(part, torch.ones_like(part), sampling_eps_min=LOWEST_RATE, sampling_eps_max=1.0)
            total += float(found.nlls.double().sum())
            counted += float(found.token_mask.sum())
        estimates.append(total / counted)
    peer.train(training)
    mean = float(np.mean(estimates))
    half = 1.96 * float(np.std(estimates, ddof=1)) / math.sqrt(num_draws)
    return mean, (mean - half, mean + half)


class PeerAsOurs:
    """Its model as `acdit.evaluation.text_bound` calls ours: the same estimator measures both.

    Args:
        peer: its `Diffusion`, not told the time.
        layout: of our model of the same context and block.
    """

    def __init__(self, peer: Any, layout: BlockLayout) -> None:
        self.peer, self.layout = peer, layout
        self.mask_token: int = peer.mask_index
        self.config = SimpleNamespace(time_conditioning=False)
        self.x_embedder = SimpleNamespace(weight=peer.backbone.vocab_embed.embedding)

    def __call__(self, clean: Tensor, noisy: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """clean (B, N, L), noisy (B, C, N, L) → log-probabilities (B, C, N, L, V), from its own `forward`."""
        batch, copies, blocks, length = noisy.shape
        context = clean[:, None].expand(noisy.shape)
        x = torch.cat([noisy.flatten(2), context.flatten(2)], dim=-1).flatten(0, 1)
        found = self.peer.forward(x, sigma=torch.zeros(len(x), 1))[..., : self.mask_token]
        return (found.reshape(batch, copies, blocks, length, -1),)


@torch.no_grad()
def agreement(peer: Any, layout: BlockLayout, tokens: Tensor, seed: int = 0) -> dict[str, float]:
    """Each token's part of the bound of its model by both codes, at the same rates and masks: the largest difference,
    and the largest part.

    Args:
        peer: its `Diffusion`.
        layout: of the context and block.
        tokens: (B, S) token ids, BOS first.
        seed: of rates and masks.
    """
    peer.eval()
    generator = torch.Generator().manual_seed(seed)
    corruption = MaskingCorruption(layout.block_tokens, peer.mask_index, "rate", first_token_given=True)
    clean = layout.to_blocks(tokens)[:, None]
    noise = torch.rand(clean.shape, generator=generator, dtype=torch.float64)
    timestep = corruption.timesteps(torch.rand(clean.shape[:-1], generator=generator, dtype=torch.float64))
    noisy = corruption.corrupt(clean, noise, timestep)
    (prediction,) = PeerAsOurs(peer, layout)(clean[:, 0], noisy, timestep)
    ours = corruption.token_losses(prediction, clean, noise, timestep).flatten(1)
    rates = corruption.rate(timestep)[:, 0].repeat_interleave(layout.block_tokens, dim=-1).float()
    with mock.patch.object(peer, "q_xt", return_value=noisy.flatten(1).clone()):
        theirs = peer._forward_pass_diffusion(tokens, t=rates, sampling_eps_min=LOWEST_RATE, sampling_eps_max=1.0)
    return {"largest_difference": float((ours - theirs).abs().max()), "largest": float(ours.max())}


# --- sampling ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def samples_on_cpu(peer: Any) -> Iterator[None]:
    """What its cached sampler needs to run here; see `CHANGES`."""
    zeros, reset = torch.zeros, peer.backbone.reset_kv_cache

    def reset_here(**_: Any) -> None:
        with mock.patch.object(torch, "zeros", lambda *shape, **_: zeros(*shape)):
            reset()

    with (
        mock.patch.object(peer.backbone, "reset_kv_cache", reset_here),
        mock.patch.object(peer, "_check_stop_conds", lambda x: (False, x)),
    ):
        yield


def peer_sample(peer: Any, *, length: int, block: int, seed: int) -> Tensor:
    """(1, S) token ids behind BOS from its `_semi_ar_sampler`, with its cache, one token a model call."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    with samples_on_cpu(peer):
        # As many steps as its script asks for: with first-hitting only an upper limit.
        tokens, _ = peer._semi_ar_sampler(n_samples=1, num_steps=5000, num_strides=length // block, seqlen=length)
    return tokens
