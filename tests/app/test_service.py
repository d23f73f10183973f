"""The service behind the page: its results are the library's, and rows 31 to 34 and 36 of the reliability bar."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from acdit.app.drawing import Canvas
from acdit.app.events import Busy, Cancelled, Done, Failed, Picture, Text, Ticket, Waiting
from acdit.app.models import ServedModel
from acdit.app.requests import Limits, Request, SampleRequest, TextRequest
from acdit.app.service import Service
from acdit.cache import KVCache
from acdit.errors import ConfigError
from acdit.streaming import Stream
from tests.app.served import image_model, text_model, video_model


@pytest.fixture
def service() -> Iterator[Service]:
    with Service([image_model(), video_model(), text_model()]) as made:
        yield made


def ask(**options: Any) -> SampleRequest:
    return SampleRequest(**{"model": "image", "label": 1, "steps": 3, **options})


def result(ticket: Ticket) -> Done:
    last = list(ticket.events())[-1]
    assert isinstance(last, Done), last
    return last


def held(service: Service) -> threading.Event:
    """Keep the worker busy with one picture until the event is set."""
    release = threading.Event()
    model = service.models["image"].pipeline.transformer
    denoise = model.denoise

    def waits(*arguments: Any, **options: Any) -> torch.Tensor:
        while not release.wait(0.02) and not service._closed:
            pass
        return denoise(*arguments, **options)

    model.denoise = waits
    return release


def at_call(served: ServedModel, number: int, act: Callable[[], object]) -> list[tuple[int, int]]:
    """Act during the model's call of that number, from 1; returns what is filled with every call's rows and the bytes
    of its cache."""
    calls: list[tuple[int, int]] = []
    model = served.pipeline.transformer
    denoise = model.denoise

    def counted(noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, cache: KVCache) -> torch.Tensor:
        calls.append((len(noisy), cache.nbytes))
        if len(calls) == number:
            act()
        return denoise(noisy, timestep, labels, cache)

    model.denoise = counted
    return calls


def settled(service: Service, tries: int = 200) -> bool:
    for _ in range(tries):
        gc.collect()
        if not (service.running or service.waiting or service.live_caches):
            return True
        time.sleep(0.02)
    return False


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


def test_pictures_are_the_pipelines(service: Service) -> None:
    got = result(service.submit(ask(samples=2, seed=5)))
    wanted = (
        service.models["image"]
        .pipeline(class_labels=[1, 1], num_inference_steps=3, generator=5, output_type="pt")
        .images
    )
    assert got.frames is not None
    assert torch.equal(got.frames[:, :, 0], eight_bits(wanted))
    assert got.settings["seed"] == 5
    assert settled(service)


def test_every_block_is_seen_denoising_and_finished(service: Service) -> None:
    ticket = service.submit(ask())
    seen = [event for event in ticket.events() if isinstance(event, Picture)]
    assert [event.block for event in seen if event.finished] == [0, 1, 2, 3]
    assert seen[-1].done == seen[-1].total == 12
    assert all(event.frames.shape == (1, 1, 1, 8, 8) for event in seen)


def test_a_clip_is_the_streams(service: Service) -> None:
    got = result(service.submit(ask(model="video", blocks=5, samples=2)))
    stream = Stream(service.models["video"].pipeline, [1, 1], num_inference_steps=3)
    wanted = torch.cat(list(stream.frames(5)), dim=1)
    assert got.frames is not None
    assert torch.equal(got.frames.transpose(1, 2), eight_bits(wanted))


def test_text_is_the_pipelines(service: Service) -> None:
    events = list(service.submit(TextRequest("text", "ab", samples=2, seed=3)).events())
    wanted = service.models["text"].pipeline("ab", generator=3, batch_size=2)
    assert isinstance(events[-1], Done)
    assert list(events[-1].texts) == wanted.texts
    finished = [event.block for event in events if isinstance(event, Text) and event.finished]
    assert finished == list(range(len(finished)))  # all of them, or up to where both texts have ended
    assert finished
    assert settled(service)


def test_other_block_sizes_share_the_weights(service: Service) -> None:
    served = service.models["image"]
    assert served.block_choices(64) == [(1, 1), (2, 2), (4, 4), (8, 8)]
    other, own = served.transformer((8, 8)), served.pipeline.transformer
    assert all(
        a is b or a.data_ptr() == b.data_ptr() for a, b in zip(other.parameters(), own.parameters(), strict=True)
    )
    seen = [event for event in service.submit(ask(block=(8, 8))).events() if isinstance(event, Picture)]
    assert {event.block for event in seen} == {0}


def test_continuations_share_one_past(service: Service) -> None:
    given = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    got = result(service.submit(ask(given=given, keep=2, samples=3)))
    wanted = service.models["image"].pipeline(
        class_labels=[1] * 3, num_inference_steps=3, generator=0, output_type="pt",
        prefix=given[None, :, 0].double() / 255, num_prefix_blocks=2,
    ).images  # fmt: skip
    assert got.frames is not None
    assert torch.equal(got.frames[:, :, 0, :4], given.expand(3, -1, -1, -1, -1)[:, 0, :, :4])  # two blocks: the top
    assert (got.frames[:, :, 0].int() - eight_bits(wanted).int()).abs().max() <= 1
    assert len({picture.numpy().tobytes() for picture in got.frames}) == 3


def test_a_clip_is_continued(service: Service) -> None:
    given = torch.randint(0, 256, (1, 4, 4, 4), dtype=torch.uint8)
    got = result(service.submit(ask(model="video", given=given, keep=2, samples=2)))
    assert got.frames is not None
    assert got.frames.shape == (2, 1, 6, 4, 4)
    assert torch.equal(got.frames[:, :, :4], given.expand(2, -1, -1, -1, -1))


def test_a_switch_changes_the_blocks_that_follow(service: Service) -> None:
    first_of_the_third = 5
    at_call(service.models["video"], first_of_the_third, lambda: service.switch(service._running[0], 4))
    ticket = service.submit(ask(model="video", blocks=6, steps=2))
    got = result(ticket)
    assert got.labels == (1, 1, 1, 4, 4, 4)
    stream = Stream(service.models["video"].pipeline, [1], num_inference_steps=2)
    frames = list(stream.frames(3))
    stream.labels = [4]
    frames += list(stream.frames(3))
    assert got.frames is not None
    assert torch.equal(got.frames.transpose(1, 2), eight_bits(torch.cat(frames, dim=1)))
    with pytest.raises(ConfigError, match="label"):
        service.switch(ticket, 9)


# --- row 31: bad or huge fields --------------------------------------------------------------------------------------

BAD = [None, True, "1", -1, 0.5, 10**400, 2**63, math.nan, math.inf, -math.inf, [1], {"a": 1}, "x" * 10**6]
FIELDS = ("label", "samples", "seed", "steps", "guidance", "solver", "block", "blocks", "keep", "model")
FINE = {  # what of BAD a field may be
    "label": (None,), "seed": (), "guidance": (0.5,), "solver": (None,), "block": (None,), "blocks": (None,),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_bad_fields_are_refused_at_once(service: Service, name: str) -> None:
    for value in BAD:
        if any(value is one or (value == one and type(value) is type(one)) for one in FINE.get(name, ())):
            continue
        with pytest.raises(ConfigError) as caught:
            service.submit(ask(**{name: value}))
        assert len(str(caught.value)) < 400
    assert service.live_caches == 0
    assert service.waiting == 0


@pytest.mark.parametrize(
    "name", ["prompt", "new_tokens", "samples", "seed", "sampler", "steps", "threshold", "temperature", "top_p"]
)
def test_bad_fields_of_text_are_refused_at_once(service: Service, name: str) -> None:
    fine = {"new_tokens": (None,), "prompt": ("1",), "threshold": (0.5,), "temperature": (0.5,), "top_p": (0.5,)}
    for value in [*BAD, "a" * 13]:
        if any(value is one or (value == one and type(value) is type(one)) for one in fine.get(name, ())):
            continue
        with pytest.raises((ConfigError, ValueError)):
            service.submit(TextRequest(**{"model": "text", name: value}))


def test_too_much_cache_is_refused_before_it_is_made() -> None:
    with Service([image_model()], Limits(cache_bytes=1000)) as service, pytest.raises(ConfigError, match="cache"):
        service.submit(ask())


def test_the_cache_that_is_counted_is_the_one_that_is_made(service: Service) -> None:
    for request in (ask(samples=3), ask(model="video", blocks=9, samples=2), ask(block=(2, 2))):
        checked = service.checked(request)
        assert isinstance(checked, SampleRequest)
        served = service.models[checked.model]
        model = served.transformer(checked.block)
        assert checked.blocks is not None
        made = model.new_cache(checked.samples, checked.blocks - 1)
        assert served.cache_bytes(checked) == made.nbytes


# --- rows 32 and 33: overload, cancel, nobody listens ----------------------------------------------------------------


def test_a_full_queue_says_busy() -> None:
    with Service([image_model()], Limits(waiting=2, batch=1)) as service:
        release = held(service)
        tickets = [service.submit(ask())]
        while not service.running:
            time.sleep(0.01)
        tickets += [service.submit(ask()) for _ in range(2)]
        with pytest.raises(Busy, match="2 requests in the queue"):
            service.submit(ask())
        assert isinstance(tickets[2].poll(), Waiting)
        release.set()
        assert all(result(ticket) for ticket in tickets)
        assert settled(service)


def test_cancel_stops_within_a_step_and_frees_the_cache(service: Service) -> None:
    calls = at_call(service.models["image"], 4, lambda: service.cancel(service._running[0]))
    ticket = service.submit(ask(steps=50))
    events = list(ticket.events())
    assert isinstance(events[-1], Cancelled)
    assert len(calls) == 4
    assert settled(service)


def test_text_stops_too(service: Service) -> None:
    ticket = service.submit(TextRequest("text"))
    for event in ticket.events():
        if isinstance(event, Text):
            ticket.cancel()
    assert ticket.ended
    assert settled(service)


def test_a_waiting_request_is_cancelled_at_once() -> None:
    with Service([image_model()], Limits(batch=1)) as service:
        release = held(service)
        first = service.submit(ask())
        while not service.running:
            time.sleep(0.01)
        second = service.submit(ask())
        service.cancel(second)
        assert isinstance(second.poll(), Cancelled)
        assert service.waiting == 0
        release.set()
        assert result(first)


def test_who_stops_listening_is_given_up() -> None:
    with Service([image_model()], Limits(patience=0.2)) as service:
        ticket = service.submit(ask(steps=200, block=(1, 1)))  # far longer than the patience
        assert settled(service)
        assert ticket.cancelled == "nobody listens"


def test_leaving_the_events_cancels(service: Service) -> None:
    ticket = service.submit(ask(steps=100))
    for event in ticket.events():
        if isinstance(event, Picture):
            break
    assert ticket.cancelled
    assert settled(service)


def test_a_slow_listener_costs_no_memory(service: Service) -> None:
    ticket = service.submit(ask(steps=60))
    while not ticket.ended:
        time.sleep(0.01)
    assert len(ticket._events) <= 4 + 1  # the finished blocks and the result


# --- row 34: together as alone ---------------------------------------------------------------------------------------


def test_a_batch_gives_what_each_gets_alone() -> None:
    requests = [ask(label=index, seed=100 * index, samples=1 + index % 2) for index in range(5)]
    with Service([image_model()], Limits(batch=1)) as service:
        alone = [result(service.submit(request)) for request in requests]
    with Service([image_model()], Limits(batch=16)) as service:
        release = held(service)
        first = service.submit(ask())
        while not service.running:
            time.sleep(0.01)
        tickets = [service.submit(request) for request in requests]
        release.set()
        result(first)
        together = [result(ticket) for ticket in tickets]
    assert {one.batch for one in together} == {7}
    for one, other in zip(alone, together, strict=True):
        assert one.frames is not None
        assert other.frames is not None
        apart = (one.frames.int() - other.frames.int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).double().mean() <= 1e-3


FIRST = 8
"""Model calls of the picture that a batch waits for."""


def batched(service: Service, *requests: Request) -> list[Ticket]:
    """Tickets of requests that were waiting together: they are one batch."""
    release = held(service)
    first = service.submit(ask(steps=2))
    while not service.running:
        time.sleep(0.01)
    tickets = [service.submit(request) for request in requests]
    release.set()
    result(first)
    return tickets


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """See `kept_blocks`."""
    return kept_blocks(monkeypatch)


def kept_blocks(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Filled with (B, N, L, D) of every finished batch of pictures, before they are made 8-bit."""
    seen: list[torch.Tensor] = []
    pixels = Canvas.pixels

    def kept(self: Canvas, blocks: list[torch.Tensor]) -> torch.Tensor:
        if len(blocks) == 4:
            seen.append(torch.stack(list(blocks), 1))
        return pixels(self, blocks)

    patch.setattr(Canvas, "pixels", kept)
    return seen


def test_rows_of_a_batch_agree_to_rounding(finished: list[torch.Tensor]) -> None:
    """fp64 ≤ 1e-10."""
    with Service([image_model()]) as service:
        result(service.submit(ask(label=2, seed=7)))
        alone = finished[-1]
        tickets = batched(service, *[ask(label=label, seed=seed) for label, seed in ((0, 3), (2, 7), (4, 1))])
        assert [result(ticket).batch for ticket in tickets] == [3, 3, 3]
    assert (finished[-1][1] - alone[0]).abs().max() <= 1e-10


@pytest.mark.parametrize("at", [1, 2, 3, 5, 12])
def test_one_leaves_a_batch_at_the_next_step_and_the_others_do_not_notice(
    finished: list[torch.Tensor], at: int
) -> None:
    """Cancelled in any of the 12 model calls: the last of a block and of the picture among them."""
    with Service([image_model()]) as service:
        alone = result(service.submit(ask(label=3, seed=9)))
        blocks = finished[-1]
        calls = at_call(service.models["image"], FIRST + at, lambda: service.cancel(service._running[0]))
        leaving, staying = batched(service, ask(samples=3), ask(label=3, seed=9))
        got = result(staying)
        assert isinstance(list(leaving.events())[-1], Cancelled)
        assert settled(service)
    one = calls[0][1]
    both = 2  # branches of guidance, which share the cache
    assert calls[FIRST:] == [(both * 4, 4 * one)] * at + [(both * 1, one)] * (12 - at)
    assert got.batch == 1
    assert (finished[-1][-1] - blocks[0]).abs().max() <= 1e-10
    assert alone.frames is not None
    assert got.frames is not None
    assert torch.equal(got.frames, alone.frames)


def test_only_the_same_settings_share_a_batch() -> None:
    with Service([image_model()]) as service:
        tickets = batched(
            service, ask(), ask(steps=4), ask(guidance=1.0), ask(block=(8, 8)), ask(solver="ddim"), ask(label=2, seed=5)
        )
        assert [result(ticket).batch for ticket in tickets] == [2, 1, 1, 1, 1, 2]


# --- faults, and row 36 ----------------------------------------------------------------------------------------------


def test_a_fault_is_told_and_the_next_request_runs(service: Service) -> None:
    model = service.models["image"].pipeline.transformer
    denoise = model.denoise
    model.denoise = lambda *_: torch.full((2, 16, 1), math.nan, dtype=torch.float64)
    failed = list(service.submit(ask()).events())[-1]
    assert isinstance(failed, Failed)
    assert "NaN" in failed.message
    model.denoise = lambda *_: 1 / 0
    assert "bug" in str(list(service.submit(ask()).events())[-1])
    model.denoise = denoise
    assert result(service.submit(ask()))
    assert settled(service)


def test_closing_tells_everybody_and_leaves_no_thread() -> None:
    service = Service([image_model()], Limits(batch=1))
    tickets = [service.submit(ask(steps=200, block=(1, 1))) for _ in range(3)]
    service.close()
    assert all(isinstance(list(ticket.events())[-1], Cancelled) for ticket in tickets)
    assert not service._worker.is_alive()
    with pytest.raises(Busy):
        service.submit(ask())
