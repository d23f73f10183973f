"""A model of latents on the page: its autoencoder decodes what is seen, and reads what is uploaded."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acdit import ACDiTPipeline
from acdit.app import drawing, files, markup
from acdit.app.events import Picture
from acdit.app.models import ServedModel
from acdit.app.requests import Limits
from acdit.app.service import Service
from acdit.sampling import DenoisingStep, sample_blocks
from acdit.streaming import Stream
from tests.app.served import latent_model, latent_video_model
from tests.app.serving import served_page
from tests.app.test_service import ask, eight_bits, result, settled


@pytest.fixture
def service() -> Iterator[Service]:
    with Service([latent_model(), latent_video_model()]) as made:
        yield made


def decoded(served: ServedModel, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) → uint8 (B, 3, H, W), by the autoencoder itself."""
    vae = served.pipeline.vae
    with torch.no_grad():
        pixels = vae.decode(latents.float() / vae.config.scaling_factor + vae.config.shift_factor).sample
    return eight_bits((pixels / 2 + 0.5).clamp(0, 1))


def apart(one: torch.Tensor, other: torch.Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def test_pictures_are_the_pipelines(service: Service) -> None:
    got = result(service.submit(ask(model="latent", samples=2, seed=5)))
    wanted = service.models["latent"].pipeline(
        class_labels=[1, 1], num_inference_steps=3, generator=5, output_type="pt"
    ).images  # fmt: skip
    assert got.frames is not None
    assert got.frames.shape == (2, 3, 1, 16, 16)
    assert len(got.frames.unique()) > 20  # a picture, not one colour
    assert apart(got.frames[:, :, 0], eight_bits(wanted)) <= 1  # the autoencoder computes in fp32
    assert settled(service)


def test_previews_are_the_predicted_clean_latents_decoded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(drawing, "PREVIEW_SHARE", 0)
    served = service.models["latent"]
    layout, past, wanted = served.layout, [], {}

    def on_step(state: DenoisingStep) -> None:
        blocks = [*past, state.estimate()]
        blocks += [torch.zeros_like(blocks[0])] * (layout.num_blocks - len(blocks))
        wanted[state.block, state.step + 1] = decoded(served, layout.from_blocks(torch.stack(blocks, 1)))

    options = {"class_labels": [1], "num_inference_steps": 6, "guidance_scale": 1.5, "generator": 0}
    for block in sample_blocks(served.pipeline.transformer, served.pipeline.scheduler, on_step=on_step, **options):
        past.append(block)
    told: list[Picture] = []
    monkeypatch.setattr(drawing.Ticket, "put", lambda _, event: told.append(event))
    served_ticket = drawing.Ticket(service.checked(ask(model="latent", steps=6)), 100.0)
    drawing.draw(served, [served_ticket], lambda _: None)
    seen = {(one.block, one.step): one.frames for one in told if isinstance(one, Picture) and not one.finished}
    assert seen.keys() == wanted.keys()
    for at, frames in seen.items():
        assert apart(frames[:, :, 0], wanted[at]) <= 1
    changes = [apart(seen[3, step], seen[3, step + 1]) for step in range(1, 6)]
    assert max(changes) > 1  # it is seen being denoised


def test_an_upload_is_continued(service: Service, tmp_path: Path) -> None:
    served = service.models["latent"]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    given = files.read_upload(served, tmp_path / "given.png", 2, Limits())
    assert given.shape == (3, 1, 16, 16)
    got = result(service.submit(ask(model="latent", given=given, keep=2, samples=3)))
    wanted = served.pipeline(
        class_labels=[1] * 3, num_inference_steps=3, generator=0, output_type="pt",
        prefix=given[None, :, 0].float() / 255, num_prefix_blocks=2,
    ).images  # fmt: skip
    assert got.frames is not None
    assert apart(got.frames[:, :, 0], eight_bits(wanted)) <= 1
    assert len({picture.numpy().tobytes() for picture in got.frames}) == 3


def test_a_clip_is_made_and_continued(service: Service) -> None:
    served = service.models["latent video"]
    got = result(service.submit(ask(model="latent video", blocks=5)))
    stream = Stream(served.pipeline, [1], num_inference_steps=3)
    wanted = torch.cat(list(stream.frames(5)), dim=1)
    assert got.frames is not None
    assert apart(got.frames.transpose(1, 2), eight_bits(wanted)) <= 1
    given = torch.randint(0, 256, (3, 4, 8, 8), dtype=torch.uint8)
    got = result(service.submit(ask(model="latent video", given=given, keep=2, samples=2)))
    assert got.frames is not None
    assert got.frames.shape == (2, 3, 6, 8, 8)
    kept = decoded(served, served.pipeline.codec.encode(given[None])[0].transpose(0, 1)).transpose(0, 1)
    assert all(apart(clip[:, :4], kept) <= 1 for clip in got.frames)
    assert settled(service)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_event_is_shown(dtype: torch.dtype) -> None:
    """As HTML: the frame at work is where the block is, in pixels of the picture."""
    served = latent_model(dtype)
    served.pipeline.vae.to(dtype)
    with Service([served]) as service:
        ticket = service.submit(ask(model="latent", steps=2))
        gallery = markup.Gallery(served, served.layout, 4, 0)
        shown = [gallery.progress(event) if isinstance(event, Picture) else event for event in ticket.events()]
        assert "width:50.0000%;height:50.0000%" in "".join(one for one in shown if isinstance(one, str))
        page = gallery.done(shown[-1])
        assert page.count("download=") == 1


def test_a_saved_model_is_served_with_its_autoencoder(tmp_path: Path) -> None:
    """`acdit app DIR`, over HTTP: generate, and continue what came out."""
    client_library = pytest.importorskip("gradio_client", reason="the extra `app` is not installed")
    latent_model(torch.float32).pipeline.save_pretrained(tmp_path / "model")
    served = ServedModel("latent", ACDiTPipeline.from_pretrained(tmp_path / "model"))
    with served_page([served], Limits()) as (address, service):
        options = {"verbose": False, "download_files": str(tmp_path), "httpx_kwargs": {"timeout": 60}}
        client = client_library.Client(address, **options)
        done = client.predict({"label": 2, "steps": 2}, api_name="/image")
        (tmp_path / "made.png").write_bytes(base64.b64decode(done["files"][0]["data"]))
        assert Image.open(tmp_path / "made.png").size == (256, 256)
        upload = client_library.handle_file(str(tmp_path / "made.png"))
        more = client.predict({"keep": 2, "samples": 2, "steps": 2}, upload, api_name="/image")
        assert len(more["files"]) == 2
        assert settled(service)
