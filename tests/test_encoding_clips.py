"""acdit encode of clips: frame by frame through an autoencoder of pictures, then trained from and sampled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is in the extra video")

from acdit import encoding, storage
from acdit.cli import main
from acdit.codecs import VAECodec, load_vae
from acdit.data import ClipsDataset, LatentsDataset
from acdit.data.frame_choice import FrameChoice
from acdit.data.latents import LatentsManifest, read_manifest
from acdit.encoding import ShardEncoder, encode_dataset
from acdit.encoding_plan import EncodeSettings, read_dataset
from acdit.errors import ConfigError, DataError
from tests import autoencoders
from tests.data.videos import write_video
from tests.training.runs import run, tiny_recipe

CLIP = {"kind": "clips", "size": 12, "frames": 4, "frame_stride": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five films of random frames in two classes, a list of three of them, and an autoencoder of factor 2."""
    folder, rng = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    for index in range(5):
        noise = rng.integers(0, 256, (12, 16, 20, 3), dtype=np.uint8)
        write_video(folder / "clips" / ("cat", "dog")[index % 2] / f"{index}.avi", noise, codec="mpeg4")
    (folder / "list.txt").write_text("dog/3.avi 1\ncat/4.avi 2\ncat/0.avi 2\n")
    autoencoders.kl().save_pretrained(folder / "vae")
    return folder


def settings_for(base: Path, **options: Any) -> EncodeSettings:
    given = {"data": str(base / "clips"), "vae": str(base / "vae"), "batch_size": 3, "shard_size": 2, "dtype": "fp32"}
    return EncodeSettings(**{**given, **CLIP, **options})


def encode(base: Path, output: Path, **options: Any) -> LatentsManifest:
    return encode_dataset(settings_for(base, **options), output, device="cpu", progress=False)


def content(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(output.iterdir()) if file.name != ".lock"}


def expected(base: Path, clip: torch.Tensor) -> torch.Tensor:
    """A clip (C, T, H, W), each frame coded as a picture of its own."""
    codec = VAECodec(load_vae(str(base / "vae")))
    return torch.cat([codec.encode(frame[None]) for frame in clip.unbind(1)]).transpose(0, 1)


# --- what is stored ----------------------------------------------------------------------------------------------


def test_every_frame_is_coded_as_a_picture_in_both_views(base: Path, tmp_path: Path) -> None:
    manifest = encode(base, tmp_path, flips=True)
    assert manifest == read_manifest(tmp_path)
    assert (manifest.latent_shape, [shard.count for shard in manifest.shards]) == ([4, 4, 6, 6], [2, 2, 1])
    assert manifest.clips == {
        "frames": 4, "frame_stride": 2, "fps": None, "start": "center", "short_clips": "error", "clips_per_file": 1,
    }  # fmt: skip
    clips = ClipsDataset(base / "clips", size=12, choice=FrameChoice(4, 2, start="center"))
    latents = LatentsDataset(tmp_path, flip=True)
    assert (latents.shape, latents.class_names, latents.labels) == ((4, 4, 6, 6), ["cat", "dog"], [0, 0, 0, 1, 1])
    for index in range(5):
        (both, label), clip = latents[index], clips[index][0]
        assert (tuple(both.shape), label) == ((2, 1, 4, 4, 6, 6), clips[index][1])
        for view, seen in enumerate((clip, clip.flip(-1))):
            torch.testing.assert_close(both[view, 0], expected(base, seen), rtol=1e-4, atol=1e-4)
    values = torch.stack([latents[index][0][:, 0] for index in range(5)]).double().transpose(0, 2).flatten(1)
    np.testing.assert_allclose(manifest.channel_mean, values.mean(1), rtol=1e-9)
    np.testing.assert_allclose(manifest.channel_std, values.std(1, correction=0), rtol=1e-9)


def test_a_list_a_rate_and_a_start_are_as_in_training(base: Path, tmp_path: Path) -> None:
    split = str(base / "list.txt")
    manifest = encode(base, tmp_path, split_file=split, fps=12.5, frame_stride=1, start="first")
    assert (manifest.samples, manifest.class_names) == (3, ["dog", "cat"])
    choice = FrameChoice(4, fps=12.5, start="first")
    clips = ClipsDataset(base / "clips", size=12, choice=choice, split_file=split)
    latents = LatentsDataset(tmp_path)
    assert latents.labels == [0, 1, 1]
    for index in range(3):
        torch.testing.assert_close(latents[index][0][0, 0], expected(base, clips[index][0]), rtol=1e-4, atol=1e-4)


def test_short_films_are_looped_where_that_is_said(base: Path, tmp_path: Path) -> None:
    encode(base, tmp_path, frames=13, frame_stride=1, short_clips="loop")
    clip = LatentsDataset(tmp_path)[0][0][0, 0]
    torch.testing.assert_close(clip[:, 12], clip[:, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(clip[:, 11], clip[:, 0], rtol=1e-2, atol=1e-2)


def test_several_clips_a_file_are_spread_over_it(base: Path, tmp_path: Path) -> None:
    """12 frames and a span of 7: 6 places. Three clips begin in the middle of each third of them."""
    manifest = encode(base, tmp_path / "three", clips_per_file=3)
    assert (manifest.samples, manifest.clips["clips_per_file"]) == (15, 3)
    latents = LatentsDataset(tmp_path / "three")
    assert latents.labels == [0] * 9 + [1] * 6
    whole = ClipsDataset(base / "clips", size=12, choice=FrameChoice(12, start="first"))
    for file in range(5):
        film = whole[file][0]
        for clip, first in enumerate((1, 3, 5)):
            found = latents[3 * file + clip][0][0, 0]
            torch.testing.assert_close(found, expected(base, film[:, first : first + 7 : 2]), rtol=1e-4, atol=1e-4)
    listed = list(read_dataset(settings_for(base, clips_per_file=3), 3).listing())
    assert listed[:2] == [("cat/0.avi#0", 0), ("cat/0.avi#1", 0)]
    assert len({name for name, _ in listed}) == 15


@pytest.mark.parametrize(("posterior", "names"), [("moments", ("mean", "std")), ("sample", ("latents",))])
def test_posteriors_of_clips(base: Path, tmp_path: Path, posterior: str, names: tuple[str, ...]) -> None:
    encode(base, tmp_path / "mode")
    encode(base, tmp_path / "out", posterior=posterior)
    found = LatentsDataset(tmp_path / "out", posterior="sample")
    assert found._names == names
    mode, other = LatentsDataset(tmp_path / "mode")[1][0][0], found[1][0][0]
    assert other.shape == (len(names), 4, 4, 6, 6)
    assert torch.equal(other[0], mode[0]) == (posterior == "moments")


def test_no_more_frames_than_the_batch_size_go_through_the_autoencoder_at_once(base: Path, tmp_path: Path) -> None:
    vae = load_vae(str(base / "vae"))
    seen: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for batch_size, batches in ((3, [3, 1] * 2), (8, [8])):
        seen.clear()
        settings = settings_for(base, batch_size=batch_size)
        encoder = ShardEncoder(settings, read_dataset(settings, 3), tmp_path, "cpu")
        encoder.vae = vae
        encoder.prepare(0)
        encoder(0, lambda _: None)
        assert seen == batches


# --- kills, copies, bad clips, refusals --------------------------------------------------------------------------


def test_an_encoding_that_was_cut_short_goes_on_and_ends_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(base, tmp_path / "whole", flips=True)
    real, saved = encoding.save_file, 0

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal saved
        saved += 1
        if saved > 1:
            raise KeyboardInterrupt
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "save_file", save)
        with pytest.raises(KeyboardInterrupt):
            encode(base, tmp_path / "cut", flips=True)
    assert not (tmp_path / "cut" / storage.MANIFEST).exists()
    capsys.readouterr()
    encode(base, tmp_path / "cut", flips=True)
    assert "encoded 3 clips (two views each)" in capsys.readouterr().out
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"clips\.frame_stride was 2, is 1.*latent_shape|latent_shape.*clips\.frames"):
        encode(base, tmp_path / "cut", flips=True, frames=3, frame_stride=1)


def test_what_travels_to_a_worker_makes_the_same_shard(base: Path, tmp_path: Path) -> None:
    encode(base, tmp_path / "whole")
    settings = settings_for(base)
    (tmp_path / "there").mkdir()
    made = ShardEncoder(settings, read_dataset(settings, 3), tmp_path / "there", "cpu")
    there = pickle.loads(pickle.dumps(made))
    there.prepare(0)
    there(1, lambda _: None)
    for end in ("json", "safetensors"):
        name = f"shard-00001.{end}"
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_bad_clips_are_named_counted_and_replaced(base: Path, tmp_path: Path) -> None:
    for path in (base / "clips").rglob("*.avi"):
        (tmp_path / "clips" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "clips" / "cat" / "2.avi").write_bytes(b"no film")
    write_video(tmp_path / "clips" / "dog" / "1.avi", np.zeros((3, 16, 20), np.uint8), codec="mpeg4")
    data = {"data": str(tmp_path / "clips"), "clips_per_file": 2}
    with pytest.raises(DataError, match=r"a bad clip \(.*, one of 2; expected at most 1 bad files"):
        encode(base, tmp_path / "out", max_bad_files=1, **data)
    manifest = encode(base, tmp_path / "out", max_bad_files=2, **data)
    assert {Path(name).name: reason for name, reason in manifest.bad_files.items()}["1.avi"] == "3 frames, 7 needed"
    latents = LatentsDataset(tmp_path / "out")
    for bad, stands_in in ((2, 4), (3, 4), (6, 8), (7, 8)):  # the next good clip of its class
        assert torch.equal(latents[bad][0], latents[stands_in][0])


def test_a_video_autoencoder_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    made = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    made.save_pretrained(tmp_path / "video-vae")
    message = r"vae: AutoencoderKLWan; found an autoencoder of videos.*expected one of pictures: clips are coded frame"
    with pytest.raises(ConfigError, match=message):
        encode(base, tmp_path / "out", vae=str(tmp_path / "video-vae"))
    with pytest.raises(ConfigError, match=message):
        VAECodec(made)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"start": "random"}, r"--start; found 'random'.*Fix: --clips-per-file N"),
        ({"start": "first", "clips_per_file": 2}, r"--start; found 'first', and --clips-per-file 2"),
        ({"clips_per_file": 0}, r"--clips-per-file; found 0; expected at least 1"),
        ({"kind": "images", "frame_stride": 1}, r"--frames; found 4; expected 16: only --kind clips"),
        ({"kind": "images", "frames": 16, "frame_stride": 1, "start": "first"}, r"--start; found 'first'; expected 'c"),
        ({"label_column": "class"}, r"data\.label_column; found 'class'"),
        ({"fps": float("nan")}, r"data\.fps; found nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        encode(base, tmp_path / "out", **options)


# --- from files to a model ---------------------------------------------------------------------------------------


def test_encoded_by_the_command_trained_from_and_sampled(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = str(tmp_path / "latents")
    command = ["encode", str(base / "clips"), "--vae", str(base / "vae"), "--output", latents, "--device", "cpu"]
    clips = ["--kind", "clips", "--size", "12", "--frames", "8", "--flips", "--split-file", str(base / "list.txt")]
    assert main([*command, *clips]) == 0
    printed = capsys.readouterr().out
    assert "done: " + latents + ": 3 clips of 2 classes as 4×8×6×6, standard deviation" in printed
    assert len(list(Path(latents).glob("shard-*.safetensors"))) == 1
    assert main([*command[:-3], str(tmp_path / "b"), *clips, "--frames", "13"]) == 3
    message = capsys.readouterr().err
    assert "(12 frames, 13 needed)" in message
    assert "data." not in message
    model = {
        "grid": [8, 6, 6], "block": [4, 3, 3], "patch": [1, 1, 1], "in_channels": 4, "num_layers": 1,
        "num_attention_heads": 1, "attention_head_dim": 16, "num_classes": 2,
    }  # fmt: skip
    recipe = tiny_recipe(
        model=model, data={"kind": "latents", "root": latents, "flip": True},
        codec={"kind": "vae", "vae": str(base / "vae")}, train__steps=2,
    )  # fmt: skip
    trained = run(recipe, tmp_path / "run")
    assert trained.built.dataset.shape == (4, 8, 6, 6)
    sample = ["sample", str(tmp_path / "run" / "model"), "--labels", "1", "--steps", "1", "--format", "frames"]
    assert main([*sample, "--output", str(tmp_path / "out")]) == 0
    from PIL import Image

    frames = [path for path in sorted((tmp_path / "out").rglob("*.png")) if path.name != "grid.png"]
    assert len(frames) >= 8
    with Image.open(frames[0]) as frame:
        assert frame.size == (12, 12)
    model["grid"] = [4, 6, 6]
    with pytest.raises(ConfigError, match=r"model\.grid.*expected \[8, 6, 6\], the size of the latents"):
        run(tiny_recipe(model=model, data={"kind": "latents", "root": latents}, codec={"kind": "vae"}), tmp_path / "no")
