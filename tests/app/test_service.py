"""The service behind the page: its results are the library's, and rows 31 to 34 and 36 of the reliability bar."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from acdit.app.drawing import Canvas
from acdit.app.events import Busy, Cancelled, Done, Failed, Picture, Text, Ticket, Waiting
from acdit.app.requests import Limits, SampleRequest, TextRequest
from acdit.app.service import Service
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
        release.wait(30)
        return denoise(*arguments, **options)

    model.denoise = waits
    return release


def settled(service: Service) -> bool:
    for _ in range(200):
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
    ticket = service.submit(ask(model="video", blocks=6, steps=2))
    for event in ticket.events():
        if isinstance(event, Picture) and event.block == 2 and not event.finished:
            service.switch(ticket, 4)
        if isinstance(event, Done):
            got = event
    switched = got.labels.index(4)
    assert got.labels == (1,) * switched + (4,) * (6 - switched)
    assert switched >= 3
    stream = Stream(service.models["video"].pipeline, [1], num_inference_steps=2)
    frames = list(stream.frames(switched))
    stream.labels = [4]
    frames += list(stream.frames(6 - switched))
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
    calls = 0
    model = service.models["image"].pipeline.transformer
    denoise = model.denoise

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            service.cancel(ticket)
        return denoise(*arguments)

    model.denoise = counted
    ticket = service.submit(ask(steps=50))
    events = list(ticket.events())
    assert isinstance(events[-1], Cancelled)
    assert calls == 4
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


def test_rows_of_a_batch_agree_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are made 8-bit: fp64 ≤ 1e-10."""
    seen: list[torch.Tensor] = []
    pixels = Canvas.pixels

    def kept(self: Canvas, blocks: list[torch.Tensor]) -> torch.Tensor:
        if len(blocks) == 4:
            seen.append(torch.stack(list(blocks), 1))
        return pixels(self, blocks)

    monkeypatch.setattr(Canvas, "pixels", kept)
    with Service([image_model()]) as service:
        result(service.submit(ask(label=2, seed=7)))
        alone = seen[-1]
        release = held(service)
        first = service.submit(ask(steps=2))
        while not service.running:
            time.sleep(0.01)
        tickets = [service.submit(ask(label=label, seed=seed)) for label, seed in ((0, 3), (2, 7), (4, 1))]
        release.set()
        result(first)
        assert [result(ticket).batch for ticket in tickets] == [3, 3, 3]
    assert (seen[-1][1] - alone[0]).abs().max() <= 1e-10


def test_one_leaves_a_batch_and_the_others_do_not_notice() -> None:
    with Service([image_model()]) as service:
        alone = result(service.submit(ask(label=3, seed=9)))
        release = held(service)
        first = service.submit(ask(steps=2))
        while not service.running:
            time.sleep(0.01)
        leaving, staying = service.submit(ask(samples=3)), service.submit(ask(label=3, seed=9))
        threading.Timer(0.05, release.set).start()
        for event in leaving.events():
            if isinstance(event, Picture):
                leaving.cancel()
        got = result(staying)
        assert result(first)
        assert leaving.ended
        assert settled(service)
    assert alone.frames is not None
    assert got.frames is not None
    assert (alone.frames.int() - got.frames.int()).abs().max() <= 1


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
