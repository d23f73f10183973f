"""Samplers of text, each against its own distribution, enumerated; prompts, ends, windows, batches."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from acdit import ACDiTTransformer
from acdit.errors import ConfigError
from acdit.sampling import generators_from_seed
from acdit.text_sampling import (
    AncestralSampler,
    ConfidenceSampler,
    FirstHittingSampler,
    RowDraws,
    TextSamplingStep,
    categorical,
    sample_tokens,
    tempered,
)
from tests.texts import VOCAB, text_model

State = tuple[int, ...]
Law = dict[State, float]
Table = list[list[float]]
MASK = VOCAB


def text_of(model: ACDiTTransformer, **options: object) -> torch.Tensor:
    return torch.cat(list(sample_tokens(model, **options)), dim=1)


# --- the laws, enumerated: plain dictionaries, nothing of the samplers' code --------------------------------------


def predictions(
    model: ACDiTTransformer, past: State, temperature: float = 1.0, top_p: float = 1.0
) -> Callable[[State, float], Table]:
    cache, length = model.new_cache(1), model.layout.block_tokens
    if past:
        with torch.no_grad():
            model.prefill(torch.tensor([past]).reshape(1, -1, length), cache)
    known: dict[tuple[State, float], Table] = {}

    def predict(state: State, t: float) -> Table:
        key = (state, t if model.config.time_conditioning else 0.0)
        if key not in known:
            with torch.no_grad():
                p = (model.denoise(torch.tensor([state]), 1000 * t, None, cache)[0] / temperature).softmax(-1)
            for row in p:  # nucleus, the slow way
                mass = 0.0
                for index in row.argsort(descending=True).tolist():
                    row[index], mass = (row[index], mass + float(row[index])) if mass < top_p else (0.0, mass)
            known[key] = (p / p.sum(-1, keepdim=True)).tolist()
        return known[key]

    return predict


def reveal(state: State, places: tuple[int, ...], p: Table) -> Law:
    """All ways in which these places get values."""
    law: Law = defaultdict(float)
    for values in itertools.product(range(VOCAB), repeat=len(places)):
        new, chance = list(state), 1.0
        for place, value in zip(places, values, strict=True):
            new[place], chance = value, chance * p[place][value]
        law[tuple(new)] += chance
    return law


def run_law(start: State, step: Callable[[State, int], Law], steps: int) -> Law:
    law: Law = {start: 1.0}
    for k in range(steps):
        after: Law = defaultdict(float)
        for state, chance in law.items():
            for new, more in (step(state, k) if MASK in state else {state: 1.0}).items():
                after[new] += chance * more
        law = after
    assert all(MASK not in state or chance < 1e-12 for state, chance in law.items())
    return law


def masked(state: State) -> tuple[int, ...]:
    return tuple(i for i, token in enumerate(state) if token == MASK)


def ancestral_law(predict: Callable[[State, float], Table], start: State, steps: int) -> Law:
    def step(state: State, k: int) -> Law:
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        law: Law = defaultdict(float)
        for size in range(len(masked(state)) + 1):
            for places in itertools.combinations(masked(state), size):
                chance = ((t - s) / t) ** size * (s / t) ** (len(masked(state)) - size)
                for new, more in reveal(state, places, predict(state, t)).items():
                    law[new] += chance * more
        return law

    return run_law(start, step, steps)


def first_hitting_law(predict: Callable[[State, float], Table], start: State) -> Law:
    def step(state: State, k: int) -> Law:
        law: Law = defaultdict(float)
        for place in masked(state):
            for new, more in reveal(state, (place,), predict(state, 0.0)).items():
                law[new] += more / len(masked(state))
        return law

    return run_law(start, step, len(start))


def confidence_law(predict: Callable[[State, float], Table], start: State, threshold: float) -> Law:
    def step(state: State, k: int) -> Law:
        p = predict(state, len(masked(state)) / len(state))
        sure = {place: max(p[place]) for place in masked(state)}
        places = {place for place in sure if sure[place] >= threshold} | {max(sure, key=lambda place: sure[place])}
        return reveal(state, tuple(sorted(places)), p)

    return run_law(start, step, len(start))


def assert_drawn_from(law: Law, drawn: torch.Tensor) -> None:
    """Chi-square; rare outcomes are counted together; what cannot be must not be."""
    counts, total = Counter(map(tuple, drawn.tolist())), len(drawn)
    assert sum(law.values()) == pytest.approx(1)
    assert all(law.get(state, 0.0) > 0 for state in counts)
    often = [state for state, chance in law.items() if chance * total >= 8]
    observed, expected = [counts[state] for state in often], [law[state] * total for state in often]
    rest = total - sum(expected)
    if rest >= 8:
        observed.append(total - sum(observed))
        expected.append(rest)
    assert len(observed) > 1
    scale = sum(observed) / sum(expected)
    assert stats.chisquare(observed, [value * scale for value in expected]).pvalue > 1e-3


SAMPLES = 2000
CASES = {
    "ancestral, 1 step": (AncestralSampler(1), lambda p, s: ancestral_law(p, s, 1), {}),
    "ancestral, 2 steps": (AncestralSampler(2), lambda p, s: ancestral_law(p, s, 2), {}),
    "ancestral, 5 steps": (AncestralSampler(5), lambda p, s: ancestral_law(p, s, 5), {}),
    "first hitting": (FirstHittingSampler(), first_hitting_law, {}),
    "first hitting, warm and cut": (FirstHittingSampler(), first_hitting_law, {"temperature": 2.0, "top_p": 0.9}),
    "surest first": (ConfidenceSampler(1.1), lambda p, s: confidence_law(p, s, 1.1), {}),
    "sure ones at once": (ConfidenceSampler(0.5), lambda p, s: confidence_law(p, s, 0.5), {}),
    "all at once": (ConfidenceSampler(0.0), lambda p, s: confidence_law(p, s, 0.0), {"temperature": 1.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sampler_draws_from_its_enumerated_law(name: str) -> None:
    """The second block, behind a given one; and one of whose three tokens the first is given."""
    sampler, law, options = CASES[name]
    model, past = text_model(6, 3), (2, 0, 1)
    for known in ((), (1,)):
        start = known + (MASK,) * (3 - len(known))
        drawn = text_of(
            model, prompts=[[*past, *known]], batch_size=SAMPLES, sampler=sampler,
            generator=torch.Generator().manual_seed(5), **options,
        )  # fmt: skip
        assert_drawn_from(law(predictions(model, past, **options), start), drawn)


def test_generators_of_their_own_draw_from_the_law_too_and_the_first_block_has_no_past() -> None:
    model = text_model(2, 2)
    drawn = text_of(model, batch_size=1500, generator=0)
    assert_drawn_from(first_hitting_law(predictions(model, ()), (MASK, MASK)), drawn)


def test_a_model_that_is_told_the_time_is_told_the_steps_own() -> None:
    model = text_model(2, 2, time_conditioning=True)
    g = torch.Generator().manual_seed(1)
    drawn = text_of(model, batch_size=SAMPLES, sampler=AncestralSampler(3), generator=g)
    assert_drawn_from(ancestral_law(predictions(model, ()), (MASK, MASK), 3), drawn)


def test_the_text_of_two_blocks_follows_the_chain_of_their_laws() -> None:
    model = text_model(4, 2)
    first = first_hitting_law(predictions(model, ()), (MASK, MASK))
    law: Law = {}
    for past, chance in first.items():
        for block, more in first_hitting_law(predictions(model, past), (MASK, MASK)).items():
            law[past + block] = chance * more
    assert_drawn_from(law, text_of(model, batch_size=3000, generator=torch.Generator().manual_seed(3)))


# --- reuse, batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [AncestralSampler(12), FirstHittingSampler(), ConfidenceSampler(0.6)])
def test_reuse_changes_no_text_and_saves_calls(sampler: object) -> None:
    model, calls = text_model(6, 3), {True: 0, False: 0}
    texts = []
    for reuse in (True, False):

        def count(step: TextSamplingStep, reuse: bool = reuse) -> None:
            calls[reuse] += step.called_model

        texts.append(text_of(model, batch_size=2, sampler=sampler, generator=7, reuse=reuse, on_step=count))
    assert torch.equal(*texts)
    if isinstance(sampler, AncestralSampler):
        assert calls[True] < calls[False]
    else:
        assert calls[True] == calls[False] <= 6  # every step reveals something


def test_a_model_that_is_told_the_time_is_called_at_every_step() -> None:
    model, called = text_model(3, 3, time_conditioning=True), []
    text_of(model, sampler=AncestralSampler(12), generator=0, on_step=lambda step: called.append(step.called_model))
    assert all(called)


@pytest.mark.parametrize("sampler", [AncestralSampler(4), FirstHittingSampler(), ConfidenceSampler(0.6)])
def test_a_text_is_the_same_in_any_batch(sampler: object) -> None:
    model = text_model(12, 3)
    prompts = [[], [1, 2], [0, 1, 2, 0], [2] * 7]
    options = {"sampler": sampler, "eos_token": 0, "max_new_tokens": 5}
    together = text_of(model, prompts=prompts, generator=20, **options)
    for row, prompt in enumerate(prompts):
        alone = text_of(model, prompts=[prompt], generator=20 + row, **options)[0].tolist()
        start = len(prompt) // 3 * 3
        assert together[row, start : start + len(alone)].tolist() == alone
        assert together[row, : len(prompt)].tolist() == prompt


# --- prompts, ends, lengths ----------------------------------------------------------------------------------------


def test_prompt_tokens_stay_and_the_rest_is_conditioned_on_them() -> None:
    model = text_model(6, 3)
    prompt = [1, 2, 0, 2]
    drawn = text_of(model, prompts=[prompt], batch_size=SAMPLES, generator=torch.Generator().manual_seed(2))
    assert drawn.shape == (SAMPLES, 3)  # from the block that the prompt ends in
    assert (drawn[:, 0] == 2).all()
    law = first_hitting_law(predictions(model, (1, 2, 0)), (2, MASK, MASK))
    assert_drawn_from(law, drawn)


def test_a_row_stops_at_its_own_end_of_text() -> None:
    model, eos = text_model(12, 3), 1
    plain = text_of(model, batch_size=40, generator=0)
    stopped = text_of(model, batch_size=40, generator=0, eos_token=eos)
    assert stopped.shape[1] <= plain.shape[1]
    for row, full in zip(stopped.tolist(), plain.tolist(), strict=True):
        end = full.index(eos) if eos in full else len(full)
        assert row[:end] == full[:end]
        assert all(token == eos for token in row[end:])
    always = text_model(12, 3)
    with torch.no_grad():
        always.final_layer.linear.bias[eos] = 1e3
    assert text_of(always, prompts=[[eos, 0]], eos_token=eos, generator=0).tolist() == [[eos, 0, eos]]


def test_blocks_come_as_they_finish() -> None:
    model, steps = text_model(9, 3), []
    blocks = sample_tokens(model, generator=0, on_step=lambda step: steps.append(step.block))
    next(blocks)
    assert steps == [0, 0, 0]
    next(blocks)
    assert steps == [0, 0, 0, 1, 1, 1]


def test_a_window_writes_beyond_the_grid_and_sees_no_further_than_itself() -> None:
    model = text_model(6, 2, window=1)
    text = text_of(model, generator=0, max_new_tokens=21)
    assert text.shape == (1, 22)
    # One block with the window's past alone, at its true position.
    with torch.no_grad():
        clean = text.reshape(1, 11, 2)
        noisy = torch.full_like(clean, MASK)
        cache = model.new_cache(1)
        model.prefill(clean[:, :10], cache)
        torch.testing.assert_close(
            model.denoise(noisy[:, 10], 0.0, None, cache), model(clean, noisy, 0.0).sample[:, 10], rtol=0, atol=1e-10
        )
    greedy = text_of(model, temperature=0, max_new_tokens=20, sampler=ConfidenceSampler(0.0))
    with torch.no_grad():
        clean = greedy.reshape(1, 10, 2)
        expected = model(clean, torch.full_like(clean, MASK), 0.0).sample.argmax(-1)
    assert torch.equal(expected, clean)
    with pytest.raises(ConfigError, match="context"):
        text_of(text_model(6, 2), max_new_tokens=7)


# --- draws ---------------------------------------------------------------------------------------------------------


def test_temperature_and_nucleus_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()
    assert tempered(logits.float()).dtype == torch.float64
    torch.testing.assert_close(tempered(logits), logits.exp())
    torch.testing.assert_close(tempered(logits, 0.5), logits.exp() ** 2 / (logits.exp() ** 2).sum())
    torch.testing.assert_close(tempered(logits, top_p=0.75), torch.tensor([0.625, 0.375, 0, 0]).double())
    torch.testing.assert_close(tempered(logits, top_p=0.81), torch.tensor([0.5, 0.3, 0.15, 0]).double() / 0.95)
    assert tempered(logits, top_p=1e-9).tolist() == [1, 0, 0, 0]
    assert tempered(logits.flip(0), 0).tolist() == [0, 0, 0, 1]


def test_categorical_draws_in_fp64_and_never_what_has_no_probability() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).double()
    for u, token in ((0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2**-53, 3), (1.0, 3)):
        assert categorical(p, torch.tensor([u]).double()).tolist() == [token]
    tiny = torch.full((1, 50000), 1e-9).double()
    tiny[0, 0] = 1 - tiny[0, 1:].sum()
    assert categorical(tiny, torch.tensor([1 - 1e-9], dtype=torch.float64)).item() == 49999
    assert abs(categorical(tiny, torch.tensor([1 - 2.5e-5], dtype=torch.float64)).item() - 25000) <= 1


def test_only_rows_that_draw_move_their_generator() -> None:
    two = generators_from_seed(0, 2)
    out = RowDraws(two, torch.device("cpu")).uniform(torch.tensor([False, True]), 3)
    assert out.dtype == torch.float64
    assert torch.equal(two[0].get_state(), generators_from_seed(0, 1)[0].get_state())
    assert torch.equal(out[1], torch.rand(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    model = text_model(6, 3)
    for options, found in (
        ({"prompts": [[0] * 6]}, "context"),
        ({"prompts": [[0], [3]]}, "prompt 1"),
        ({"prompts": [[-1]]}, "prompt 0"),
        ({"prompts": [[0], [1]], "batch_size": 3}, "batch_size"),
        ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"eos_token": 3}, "eos_token"), ({"sampler": AncestralSampler(0)}, "steps"),
        ({"sampler": ConfidenceSampler(-0.1)}, "threshold"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=found):
            text_of(model, **options)


def test_which_tokens_are_revealed_and_how_many() -> None:
    """First hitting: one of the masked, uniformly. Ancestral: each with probability (t − s)/t."""
    rows = 4000
    masked = torch.tensor([True, False, True, True]).expand(rows, 4)
    even = torch.full((rows, 4, VOCAB), 1 / VOCAB, dtype=torch.float64)
    draws = RowDraws(torch.Generator().manual_seed(0), torch.device("cpu"))
    revealed, _ = FirstHittingSampler().step(0, masked, even, draws)
    assert (revealed.sum(-1) == 1).all()
    assert stats.chisquare(revealed.sum(0)[[0, 2, 3]].tolist()).pvalue > 1e-3
    assert not revealed[:, 1].any()
    for step in range(4):
        revealed, _ = AncestralSampler(4).step(step, masked, even, draws)
        share, expected = revealed[:, [0, 2, 3]].double().mean(), 1 / (4 - step)
        assert abs(share - expected) <= 4.5 * (expected * (1 - expected) / (3 * rows)) ** 0.5
        assert not revealed[:, 1].any()
