"""Measurements of bd3lm.py: all sides trained on the same tokens, and cached sampling, in turns in one process."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import torch
from bd3lm_peer import (
    PeerAsOurs,
    PeerStep,
    agreement,
    build_bd3lms,
    configuration,
    parameters_of,
    peer_bound,
    peer_sample,
)
from bd3lm_report import PEER
from machine import say
from memory import peaks
from torch import Tensor

from acdit.data.build import build_dataset
from acdit.evaluation.perplexity import text_bound
from acdit.model import ACDiTTransformer
from acdit.recipe import Recipe, recipe_from_dict
from acdit.text_sampling import sample_tokens
from acdit.training.batches import Batches
from acdit.training.build import build, build_model, parameter_groups
from acdit.training.lr_schedules import make_lr_scheduler

OURS = {"ours, rate": "rate", "ours, count": "count"}
"""What is trained of ours, and `corruption.mask_draw`."""
MAX_GRAD_NORM = 1.0
EPS = 1e-8
HELD_OUT = 0.1
LOSS_EVERY = 50
"""Steps of which the mean loss is kept."""
CPU = torch.device("cpu")


def load() -> float:
    """How many want to run at this moment."""
    return round(os.getloadavg()[0], 2)


# --- training ---------------------------------------------------------------------------------------------------------


def recipe_of(options: argparse.Namespace, seed: int, draw: str) -> Recipe:
    """The run of ours."""
    data: dict[str, Any] = {"kind": "builtin_text", "sequence_length": options.context, "wrap": "bos", "crop": "random"}
    if options.data is not None:
        data |= {
            "kind": "text", "root": str(options.data), "held_out": HELD_OUT, "cache": str(options.output / "tokens")
        }  # fmt: skip
    return recipe_from_dict({
        "name": "bd3lm", "seed": seed, "data": data,
        "model": {
            "grid": [options.context], "block": [options.block], "num_layers": options.layers,
            "num_attention_heads": options.heads, "attention_head_dim": options.width // options.heads,
        },
        "corruption": {"kind": "masking", "mask_draw": draw, "first_token_given": True},
        "optim": {
            "batch_size": options.batch, "lr": options.lr, "betas": list(options.betas), "eps": EPS,
            "weight_decay": options.weight_decay, "schedule": "constant", "warmup_steps": options.lr_warmup,
            "max_grad_norm": MAX_GRAD_NORM,
        },
        "train": {"steps": options.steps},
    })  # fmt: skip


class OurStep:
    """Our training step: batch and draws, forward, loss, backward, clipping, AdamW."""

    def __init__(self, recipe: Recipe) -> None:
        self.built = build(recipe)
        optim = self.built.recipe.optim
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.built.model, optim.weight_decay), lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True,
        )  # fmt: skip
        self.lr_scheduler = make_lr_scheduler(self.optimizer, optim, self.built.total_steps)
        self.batches = iter(Batches(self.built, 0, 1, 0, CPU))
        self.tokens = torch.empty(0)
        self.built.model.train()

    def __call__(self) -> float:
        """The loss, in nats a token; the tokens it was of stay in `tokens`, (B, S)."""
        (batch,) = next(self.batches)
        model, corruption = self.built.model, self.built.corruption
        clean = batch.clean[:, None]
        noisy = corruption.corrupt(clean, batch.noise, batch.timestep)
        (prediction,) = model(batch.context, noisy, batch.timestep, batch.labels, return_dict=False)
        loss = corruption.loss(prediction, clean, batch.noise, batch.timestep)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.tokens = batch.clean.flatten(1)
        return float(loss.detach())


def their_model(options: argparse.Namespace, seed: int, vocabulary: Any, **sizes: Any) -> Any:
    """Theirs of the same size; `sizes` are length, block and sampling of `configuration`."""
    config = configuration(
        options.bd3lms, layers=options.layers, width=options.width, heads=options.heads, cond_dim=options.cond_dim,
        dropout=options.dropout, warmup_steps=options.lr_warmup,
        optim={
            "lr": options.lr, "beta1": options.betas[0], "beta2": options.betas[1], "eps": EPS,
            "weight_decay": options.weight_decay,
        }, **sizes,
    )  # fmt: skip
    return build_bd3lms(
        options.bd3lms, config, vocab_size=vocabulary.vocab_size, bos_token=vocabulary.bos_token_id,
        eos_token=vocabulary.eos_token_id, seed=seed,
    )  # fmt: skip


def train(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All sides for one seed: seconds of every counted step, losses, parameters, memory, bounds."""
    ours = {name: OurStep(recipe_of(options, seed, draw)) for name, draw in OURS.items()}
    first = next(iter(ours.values()))
    feed = iter(Batches(first.built, 0, 1, 0, CPU))
    sizes = {"length": options.context, "block": options.block, "sampling": False}
    theirs = PeerStep(their_model(options, seed, first.built.tokenizer, **sizes), MAX_GRAD_NORM)
    names = [*ours, PEER]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    tokens = torch.empty(0)
    for step in range(options.steps):
        (batch,) = next(feed)
        turn = step % len(names)
        tokens = batch.clean.flatten(1)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            loss = theirs(tokens) if name == PEER else ours[name]()
            seconds[name].append(time.perf_counter() - started)
            losses[name].append(loss)
        apart = [name for name, side in ours.items() if not torch.equal(side.tokens, tokens)]
        if apart or not all(math.isfinite(loss[-1]) for loss in losses.values()):
            raise SystemExit(f"step {step + 1}: {apart or 'a side'} got other tokens, or has a loss that is no number")
        if (step + 1) % LOSS_EVERY == 0 or step + 1 == options.steps:
            shown = (
                f"{name} {statistics.fmean(losses[name][-LOSS_EVERY:]):.3f} ({statistics.median(seconds[name]):.2f} s)"
                for name in names
            )
            say(f"seed {seed}, step {step + 1}: " + ", ".join(shown))
    held_out = held_out_tokens(first.built.recipe)
    result = {}
    for name in names:
        model = theirs.peer if name == PEER else ours[name].built.model
        measured: Any = PeerAsOurs(theirs.peer, first.built.model.layout) if name == PEER else model
        parts = [losses[name][start : start + LOSS_EVERY] for start in range(0, options.steps, LOSS_EVERY)]
        own = theirs.peer if name == PEER else None
        result[name] = {
            "parameters": parameters_of(model) if own else sum(part.numel() for part in model.parameters()),
            **timing(seconds[name][options.untimed :]),
            "losses": [round(statistics.fmean(part), 4) for part in parts],
            **bounds(measured, own, held_out, options),
        }
    say(f"seed {seed}: memory")
    runs: dict[str, Callable[[], Any]] = {**ours, PEER: lambda: theirs(tokens)}
    for name in names:  # another step each, with the profiler: the weights have been measured before
        result[name] |= peaks(runs[name])
    return {"sides": result, "held_out_sequences": len(held_out), "load_average": load()}


def held_out_tokens(recipe: Recipe) -> Tensor:
    """(M, S) token ids, all held-out sequences."""
    recipe.data.split, recipe.data.crop = "held_out", "center"
    dataset: Any = build_dataset(recipe.data)
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def bounds(model: Any, peer: Any, tokens: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """By our estimators: "rate", the peers' protocol, and "count", which varies less; of theirs by its own code too."""
    (model if peer is None else peer).eval()
    result: dict[str, Any] = {}
    for key, draw in (("bound", "rate"), ("bound_by_count", "count")):
        found = text_bound(
            cast(ACDiTTransformer, model), tokens.split(options.batch), draw=draw, num_draws=options.draws,
            first_token_given=True, seed=0,
        )  # fmt: skip
        result[key] = {**_figures(found.nats_per_token, found.interval), "protocol": found.protocol}
    if peer is not None:
        own = peer_bound(peer, tokens, batch_size=options.batch, num_draws=options.draws, seed=0)
        result["bound_by_its_own_code"] = _figures(*own)
        result["agreement_of_token_losses"] = agreement(peer, model.layout, tokens[: options.batch])
    return result


def _figures(nats: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {"nats_per_token": round(nats, 5), "interval_of_draws": [round(end, 5) for end in interval]}


def timing(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"seconds": middle, "seconds_quartiles": [low, high], "timed": len(seconds)}


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample(options: argparse.Namespace, block: int) -> dict[str, Any]:
    """Tokens a second of both, in turns; the first text of each is drawn to warm up and to count model calls."""
    recipe = recipe_of(options, 0, "rate")
    vocabulary = build_dataset(recipe.data).tokenizer  # type: ignore[union-attr]  # of text
    length = options.sample_tokens
    recipe.model.grid, recipe.model.block, recipe.model.vocab_size = [length], [block], vocabulary.vocab_size
    ours = build_model(recipe.model).eval()
    theirs = their_model(options, 0, vocabulary, length=length, block=block, sampling=True).eval()

    def our_text(seed: int) -> Tensor:
        return torch.cat(list(sample_tokens(ours, prompts=[[vocabulary.bos_token_id]], generator=seed)), dim=1)

    def their_text(seed: int) -> Tensor:
        return peer_sample(theirs, length=length, block=block, seed=seed)

    texts: dict[str, Callable[[int], Tensor]] = {"ours": our_text, PEER: their_text}
    with (
        mock.patch.object(ours, "denoise", wraps=ours.denoise) as denoise,
        mock.patch.object(ours, "prefill", wraps=ours.prefill) as prefill,
        mock.patch.object(theirs, "forward", wraps=theirs.forward) as forward,
    ):
        for text in texts.values():
            text(0)
    calls = {"ours": denoise.call_count + prefill.call_count, PEER: forward.call_count}
    seconds: dict[str, list[float]] = {name: [] for name in texts}
    for index in range(options.repetitions):
        for name in list(texts)[:: 1 if index % 2 else -1]:
            started = time.perf_counter()
            tokens = texts[name](index + 1)
            seconds[name].append(time.perf_counter() - started)
            if tokens.shape != (1, length) or not bool((tokens < vocabulary.vocab_size).all()):
                raise SystemExit(f"sampling, block {block}: {name} has not written {length} tokens")
        say(f"block {block}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()))
    rows: dict[str, Any] = {
        name: {**timing(values), "tokens_per_second": (length - 1) / statistics.median(values), "calls": calls[name]}
        for name, values in seconds.items()
    }
    return {"tokens": length - 1, "sides": rows, "load_average": load()}  # BOS is given
