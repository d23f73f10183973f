"""Streams: the same blocks as a whole clip, for ever, and to the bit after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from acdit import ACDiTPipeline
from acdit.errors import ConfigError, StorageError
from acdit.mask import Window
from acdit.streaming import Stream
from tests.conftest import tiny_model


def pipeline_for(block: tuple[int, ...] = (2, 4, 4), **options: Any) -> ACDiTPipeline:
    settings = {"in_channels": 1, "window": 2, "sink_blocks": 1, **options}
    model = tiny_model((4, 4, 4), block, torch.float32, **settings)
    pipeline = ACDiTPipeline(model, DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stream_of(pipeline: ACDiTPipeline, **options: Any) -> Stream:
    return Stream(pipeline, [1, 3], num_inference_steps=2, seed=5, **options)


@pytest.mark.parametrize("block", [(2, 4, 4), (1, 2, 4)])
def test_the_first_clip_of_a_stream_is_the_clip(block: tuple[int, ...]) -> None:
    pipeline = pipeline_for(block)
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": 5, "output_type": "pt", "return_dict": False}
    (clip,) = pipeline([1, 3], **options)
    frames = torch.cat(list(stream_of(pipeline).frames(pipeline.transformer.layout.num_blocks)), dim=1)
    torch.testing.assert_close(frames, clip, rtol=0, atol=1e-6)


def test_frames_come_with_every_step_of_time() -> None:
    pipeline = pipeline_for((1, 2, 4))  # two blocks a frame
    stream = stream_of(pipeline)
    shapes = [tuple(frames.shape) for frames in stream.frames(7)]
    assert shapes == [(2, 1, 1, 4, 4)] * 3
    assert [tuple(frames.shape) for frames in stream.frames(1)] == [(2, 1, 1, 4, 4)]
    assert stream.num_blocks == 8


@pytest.mark.parametrize("window", [None, Window(1, 1, slide=True)])
def test_a_stream_stopped_and_resumed_goes_on_to_the_bit_in_constant_memory(
    window: Window | None, tmp_path: Path
) -> None:
    pipeline = pipeline_for((1, 2, 4))
    whole = stream_of(pipeline, window=window)
    size = whole.cache_nbytes
    expected = torch.cat(list(whole.frames(40)), dim=1)
    assert whole.cache_nbytes == size
    first = stream_of(pipeline, window=window)
    before = list(first.frames(13))  # in the middle of a step of time
    first.save(tmp_path / "kept")
    second = stream_of(pipeline, window=window)
    second.load(tmp_path / "kept")
    assert torch.equal(torch.cat([*before, *second.frames(27)], dim=1), expected)


def test_a_label_may_change_on_the_way_and_the_past_stays() -> None:
    pipeline = pipeline_for()
    plain, switched = stream_of(pipeline), stream_of(pipeline)
    same = torch.cat(list(plain.frames(3)), dim=1), torch.cat(list(switched.frames(3)), dim=1)
    assert torch.equal(*same)
    switched.labels = [0, 3]
    later, other = next(plain.frames(1)), next(switched.frames(1))
    assert not torch.equal(later[0], other[0])
    torch.testing.assert_close(later[1], other[1], rtol=0, atol=1e-6)


def test_given_blocks_are_continued_as_the_pipeline_continues_them() -> None:
    pipeline = pipeline_for()
    clip = torch.rand(1, 4, 1, 4, 4)
    (continued,) = pipeline(
        [1, 3], num_inference_steps=2, generator=5, output_type="pt", return_dict=False, prefix=clip,
        num_prefix_blocks=1,
    )  # fmt: skip
    stream = stream_of(pipeline)
    encoded = pipeline.codec.encode(clip.transpose(1, 2))
    stream.give(pipeline.transformer.layout.to_blocks(encoded)[:, :1])
    frames = next(stream.frames(1))
    torch.testing.assert_close(frames, continued[:, 2:], rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="before the first one"):
        stream.give(pipeline.transformer.layout.to_blocks(encoded)[:, :1])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipeline = pipeline_for()
    with pytest.raises(ConfigError, match="without a window"):
        Stream(pipeline_for(window=None, sink_blocks=0), [1])
    assert Stream(pipeline_for(window=None, sink_blocks=0), [1], max_blocks=3).num_blocks == 0
    image = ACDiTPipeline(tiny_model(dtype=torch.float32, in_channels=1), DPMSolverMultistepScheduler())
    with pytest.raises(ConfigError, match="a video model"):
        Stream(image, [1])
    stream = stream_of(pipeline)
    list(stream.frames(2))
    stream.save(tmp_path / "kept")
    with pytest.raises(ConfigError, match="seed was 5, is 6"):
        Stream(pipeline, [1, 3], seed=6).load(tmp_path / "kept")
    with pytest.raises(ConfigError, match="window"):
        stream_of(pipeline, window=Window(1)).load(tmp_path / "kept")
    other = ACDiTPipeline(pipeline.transformer, DDIMScheduler(clip_sample=False))
    with pytest.raises(ConfigError, match="solver was DPMSolver"):
        stream_of(other).load(tmp_path / "kept")
    with pytest.raises(StorageError):
        stream_of(pipeline).load(tmp_path / "nowhere")
    state = tmp_path / "kept" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match=r"sha256|bytes"):
        stream_of(pipeline).load(tmp_path / "kept")
