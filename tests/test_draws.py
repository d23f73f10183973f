"""Keyed draws: the same wherever and whenever they are drawn, different under any other key."""

from __future__ import annotations

import numpy as np
import torch

from acdit import draws

KEY = {"seed": 3, "stream": "noise", "step": 7}


def test_a_samples_draws_do_not_depend_on_its_batch() -> None:
    whole = draws.normal((4, 2), samples=range(6), copies=3, **KEY)
    parts = [draws.normal((4, 2), samples=part, copies=3, **KEY) for part in ([0, 1], [2], [3, 4, 5])]
    assert whole.shape == (6, 3, 4, 2)
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[:, :1], draws.normal((4, 2), samples=range(6), copies=1, **KEY))
    assert torch.equal(whole[:, 0], draws.normal((4, 2), samples=range(6), **KEY))


def test_every_part_of_the_key_counts() -> None:
    base = {**KEY, "sample": 5, "copy": 2}
    first = draws.keyed_generator(**base).random(8)
    assert np.array_equal(first, draws.keyed_generator(**base).random(8))
    for other in ({"seed": 4}, {"stream": "timestep"}, {"step": 8}, {"sample": 6}, {"copy": 3}):
        assert not np.array_equal(first, draws.keyed_generator(**{**base, **other}).random(8)), other


def test_draws_are_pinned() -> None:
    """A change of these numbers would break the resumption of every run there is."""
    assert draws.normal((3,), samples=[1], **KEY).tolist() == PINNED_NORMAL
    assert draws.uniform((2,), samples=[1], **KEY).tolist() == PINNED_UNIFORM
    assert draws.permutation(6, seed=1, stream="order", step=2).tolist() == PINNED_ORDER


def test_distributions() -> None:
    normal = draws.normal((2000,), samples=range(10), **KEY)
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    uniform = draws.uniform((2000,), samples=range(10), **KEY)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01
    assert sorted(draws.permutation(50, seed=0, stream="order").tolist()) == list(range(50))


PINNED_NORMAL = [[0.3036757707595825, -0.5300824642181396, 0.38464847207069397]]
PINNED_UNIFORM = [[0.5768675306273567, 0.9008282852572136]]
PINNED_ORDER = [2, 3, 4, 5, 0, 1]
