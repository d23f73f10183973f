"""Mistakes that are easy to make in a service, each planted on purpose: the named test must catch it."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit import sampling
from acdit.app import drawing, events, models, service
from acdit.app.events import Ticket
from acdit.app.guard import Guard
from acdit.app.models import ServedModel
from acdit.app.requests import Limits
from acdit.app.service import Service
from acdit.cache import KVCache
from acdit.codecs.vae import VAECodec
from acdit.model import ACDiTTransformer
from acdit.sampling import DenoisingStep, Staying
from tests import test_sampling
from tests.app import test_guard, test_latents, test_service
from tests.app.served import image_model, latent_model, video_model
from tests.planted import Plant, require_caught

# --- nothing is left behind -------------------------------------------------------------------------------------------


def _impatient(patch: pytest.MonkeyPatch) -> None:
    """What never settles need not be waited for."""
    patch.setattr(test_service, "settled", functools.partial(test_service.settled, tries=10))


def cache_kept_after_a_cancel(patch: pytest.MonkeyPatch) -> None:
    """By the traceback of the exception that ended the loop."""
    draw, kept = drawing.draw, []

    def remembering(*arguments: Any) -> None:
        try:
            draw(*arguments)
        except drawing.Stopped as error:
            kept.append(error)
            raise

    patch.setattr(drawing, "draw", remembering)
    _impatient(patch)


def cancel_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ticket, "cancelled", property(lambda _: None))


def a_silent_listener_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ticket, "cancelled", property(lambda self: self._cancelled))
    _impatient(patch)


def every_preview_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(events, "_passes", lambda _: False)


def rows_leave_at_the_end_of_the_block(patch: pytest.MonkeyPatch) -> None:
    on_step = drawing._Drawing._on_step

    def late(self: Any, state: DenoisingStep) -> Staying | None:
        return on_step(self, state) if state.step == state.num_steps - 1 else None

    patch.setattr(drawing._Drawing, "_on_step", late)


def the_cache_keeps_who_left(patch: pytest.MonkeyPatch) -> None:
    keep = KVCache.keep
    patch.setattr(KVCache, "keep", lambda self, samples: keep(self, list(range(len(samples)))))


def the_solver_remembers_who_left(patch: pytest.MonkeyPatch) -> None:
    keep = sampling._keep_in_solver
    patch.setattr(sampling, "_keep_in_solver", lambda solver, samples, shape: keep(solver, range(len(samples)), shape))


# --- bounds -----------------------------------------------------------------------------------------------------------


def numbers_without_bounds(patch: pytest.MonkeyPatch) -> None:
    whole = models.whole
    patch.setattr(models, "whole", lambda name, value, low, high: whole(name, value, -(2**70), 2**70))


def cache_without_a_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ServedModel, "cache_bytes", lambda *_: 0)


def queue_without_a_bound(patch: pytest.MonkeyPatch) -> None:
    start = Service.__init__

    def boundless(self: Service, served: Any, limits: Limits | None = None) -> None:
        start(self, served, dataclasses.replace(limits or Limits(), waiting=10**9))

    patch.setattr(Service, "__init__", boundless)


def any_path_is_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "_ours", lambda *_: True)


def links_are_not_followed(patch: pytest.MonkeyPatch) -> None:
    """A path that lies in the folder by its letters only."""
    patch.setattr(Guard, "_ours", lambda self, path: path.startswith(str(self._uploads)))


def any_origin_is_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "_refusal", lambda *_: None)


# --- together as alone ------------------------------------------------------------------------------------------------


def one_generator_for_all(patch: pytest.MonkeyPatch) -> None:
    one = torch.Generator()
    patch.setattr(drawing, "generators_from_seed", lambda seed, count: [one.manual_seed(seed)] * count)


def neighbours_in_the_result(patch: pytest.MonkeyPatch) -> None:
    denoise = ACDiTTransformer.denoise

    def mixing(self: ACDiTTransformer, *arguments: Any) -> torch.Tensor:
        out = denoise(self, *arguments)
        return out + 1e-6 * out.mean(0)

    patch.setattr(ACDiTTransformer, "denoise", mixing)


def other_settings_in_one_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(service, "batch_key", lambda request: request.model)


def switch_in_the_running_block(patch: pytest.MonkeyPatch) -> None:
    sample = drawing.sample_blocks

    def live(*arguments: Any, class_labels: Any, on_step: Any, **options: Any) -> Any:
        labels, own = torch.tensor(class_labels), on_step.__self__

        def then(state: DenoisingStep) -> Staying | None:
            answer = on_step(state)
            labels.copy_(torch.tensor([job.ticket.label for job in own._jobs for _ in range(job.request.samples)]))
            return answer

        return sample(*arguments, class_labels=labels, on_step=then, **options)

    patch.setattr(drawing, "sample_blocks", live)


# --- what is seen -----------------------------------------------------------------------------------------------------


def the_noisy_block_is_shown(patch: pytest.MonkeyPatch) -> None:
    on_step = drawing._Drawing._on_step
    patch.setattr(
        drawing._Drawing, "_on_step",
        lambda self, state: on_step(self, dataclasses.replace(state, estimate=lambda: state.noisy)),
    )  # fmt: skip


def latents_decoded_without_their_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        VAECodec, "_pixels_of", lambda self, latents: self.vae.decode(latents.float(), return_dict=False)[0] / 2 + 0.5
    )


# --- the tests that must notice ---------------------------------------------------------------------------------------


def with_service(test: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    def run() -> None:
        with Service([image_model(), video_model()]) as made:
            test(made, *arguments)

    return run


def with_blocks(test: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            test(test_service.kept_blocks(patch), *arguments)

    return run


def with_guard(test: Callable[..., None], *arguments: Any, folder: bool = False) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name).resolve()
            test(Guard(test_guard.echo(), path, 10_000), *arguments, *([path] if folder else []))

    return run


def previews() -> None:
    with pytest.MonkeyPatch.context() as patch, Service([latent_model()]) as made:
        test_latents.test_previews_are_the_predicted_clean_latents_decoded(made, patch)


FAULTS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "a cache is kept after a cancel": (
        cache_kept_after_a_cancel, with_service(test_service.test_cancel_stops_within_a_step_and_frees_the_cache),
    ),
    "cancel is ignored": (
        cancel_ignored, with_service(test_service.test_cancel_stops_within_a_step_and_frees_the_cache),
    ),
    "who went away is waited for": (
        a_silent_listener_is_waited_for, test_service.test_who_stops_listening_is_given_up,
    ),
    "every preview is kept for a slow listener": (
        every_preview_is_kept, with_service(test_service.test_a_slow_listener_costs_no_memory),
    ),
    "rows leave at the end of the block": (
        rows_leave_at_the_end_of_the_block,
        with_blocks(test_service.test_one_leaves_a_batch_at_the_next_step_and_the_others_do_not_notice, 2),
    ),
    "the cache keeps who left": (
        the_cache_keeps_who_left,
        with_blocks(test_service.test_one_leaves_a_batch_at_the_next_step_and_the_others_do_not_notice, 5),
    ),
    "the solver remembers who left": (
        the_solver_remembers_who_left,
        lambda: test_sampling.test_samples_leave_at_a_step_and_the_others_do_not_notice("dpm++"),
    ),
    "numbers without bounds": (
        numbers_without_bounds, with_service(test_service.test_bad_fields_are_refused_at_once, "samples"),
    ),
    "a cache of any size": (
        cache_without_a_bound, test_service.test_too_much_cache_is_refused_before_it_is_made,
    ),
    "a queue of any length": (queue_without_a_bound, test_service.test_a_full_queue_says_busy),
    "a path of any file": (any_path_is_ours, with_guard(test_guard.test_foreign_paths, "/etc/passwd", folder=True)),
    "links out of the folder": (links_are_not_followed, with_guard(test_guard.test_other_kinds_of_paths, folder=True)),
    "pages of other origins": (
        any_origin_is_ours, with_guard(test_guard.test_foreign_origins, {"origin": "http://evil.example"}),
    ),
    "requests share a generator": (one_generator_for_all, test_service.test_a_batch_gives_what_each_gets_alone),
    "a result depends on its neighbours": (
        neighbours_in_the_result, with_blocks(test_service.test_rows_of_a_batch_agree_to_rounding),
    ),
    "other settings in one batch": (
        other_settings_in_one_batch, test_service.test_only_the_same_settings_share_a_batch,
    ),
    "a switch in the running block": (
        switch_in_the_running_block, with_service(test_service.test_a_switch_changes_the_blocks_that_follow),
    ),
    "the noisy block is shown": (the_noisy_block_is_shown, previews),
    "latents decoded without their scale": (latents_decoded_without_their_scale, previews),
}  # fmt: skip


def failing(test: Callable[[], None]) -> Callable[[], None]:
    """With "did not raise" as an assertion like the others."""

    def run() -> None:
        try:
            test()
        except pytest.fail.Exception as error:
            raise AssertionError(str(error)) from None

    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = FAULTS[fault]
    require_caught(plant, failing(test), monkeypatch)
