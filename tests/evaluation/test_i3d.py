"""The network that FVD is defined by, without its weights: structure, preprocessing, and the files it loads from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from acdit.errors import ConfigError, DataError
from acdit.evaluation.extractors import Extractor, ExtractorOptions, build_extractor
from acdit.evaluation.i3d import I3D, I3D_PREPROCESSINGS, preprocess_clips, same_padded
from acdit.evaluation.i3d_weights import load_i3d
from acdit.provenance import weights_sha256
from tests.evaluation.clips import ScriptedStandIn, save_stand_in

# Written down from piergiaj/pytorch-i3d's code, not from ours: module → (input channels, outputs of its six units).
MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (128 + 192 + 96 + 64, 192, 96, 208, 16, 48, 64), "4c": (192 + 208 + 48 + 64, 160, 112, 224, 24, 64, 64),
    "4d": (160 + 224 + 64 + 64, 128, 128, 256, 24, 64, 64), "4e": (128 + 256 + 64 + 64, 112, 144, 288, 32, 64, 64),
    "4f": (112 + 288 + 64 + 64, 256, 160, 320, 32, 128, 128),
    "5b": (256 + 320 + 128 + 128, 256, 160, 320, 32, 128, 128),
    "5c": (256 + 320 + 128 + 128, 384, 192, 384, 48, 128, 128),
}  # fmt: skip
# Channels, time, height, width behind each layer for 16 frames of 224 × 224.
SIZES = {
    "Conv3d_1a_7x7": (64, 8, 112, 112), "Conv3d_2b_1x1": (64, 8, 56, 56), "Conv3d_2c_3x3": (192, 8, 56, 56),
    "Mixed_3b": (256, 8, 28, 28), "Mixed_3c": (480, 8, 28, 28), "Mixed_4b": (512, 4, 14, 14),
    "Mixed_4f": (832, 4, 14, 14), "Mixed_5b": (832, 2, 7, 7), "Mixed_5c": (1024, 2, 7, 7),
    "logits.conv3d": (400, 1, 1, 1),
}  # fmt: skip


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict, batch norm's counters aside."""
    units = {
        "Conv3d_1a_7x7": (64, 3, 7, 7, 7), "Conv3d_2b_1x1": (64, 64, 1, 1, 1), "Conv3d_2c_3x3": (192, 64, 3, 3, 3)
    }  # fmt: skip
    for name, (given, b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
        units |= {
            f"Mixed_{name}.b0": (b0, given, 1, 1, 1),
            f"Mixed_{name}.b1a": (b1a, given, 1, 1, 1), f"Mixed_{name}.b1b": (b1b, b1a, 3, 3, 3),
            f"Mixed_{name}.b2a": (b2a, given, 1, 1, 1), f"Mixed_{name}.b2b": (b2b, b2a, 3, 3, 3),
            f"Mixed_{name}.b3b": (b3b, given, 1, 1, 1),
        }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}
    for unit, shape in units.items():
        shapes[f"{unit}.conv3d.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{unit}.bn.{part}"] = shape[:1]
    return shapes


@pytest.fixture(scope="module")
def network() -> I3D:
    torch.manual_seed(0)
    return I3D().eval()


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return torch.randint(0, 256, (1, 9, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}


def test_the_names_and_shapes_are_those_of_the_published_state_dict(network: I3D) -> None:
    ours = {name: tuple(value.shape) for name, value in plain_state(network).items()}
    assert ours == published_shapes()
    assert len(ours) == 57 * 5 + 2


def test_every_layer_has_its_size_for_sixteen_frames() -> None:
    with torch.device("meta"):
        network, clips = I3D().eval(), torch.zeros(2, 16, 3, 30, 40, dtype=torch.uint8)
    seen: dict[str, tuple[int, ...]] = {}
    for name in SIZES:
        network.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: tuple(out.shape[1:])})
        )
    assert network(clips).pooled.shape == (2, 400)
    assert seen == SIZES


def test_the_whole_network_answers(network: I3D, clips: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acdit.evaluation.i3d.INPUT_SIZE", 193)  # the least that gives 7 × 7 cells: time is short here
    with torch.no_grad():
        logits = network(clips).pooled
    assert logits.shape == (1, 400)
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0
    assert float(logits.min()) < 0  # not probabilities, nor behind a ReLU


def test_features_are_the_mean_over_time_of_the_logits(network: I3D, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = torch.rand(1, 1024, 4, 7, 7)  # four steps of time make three of the logits
    monkeypatch.setattr(I3D, "_mixed", lambda self, x, *names: cells)
    with torch.no_grad():
        found = network(torch.zeros(1, 9, 3, 8, 8, dtype=torch.uint8)).pooled
        steps = torch.stack([cells[:, :, start : start + 2].mean(dim=(2, 3, 4)) for start in range(3)])
        expected = steps.mean(dim=0) @ network.logits.conv3d.weight.flatten(1).T + network.logits.conv3d.bias
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_is_tensorflows_same() -> None:
    for extent in range(1, 20):
        for kernel, stride in ((7, 2), (3, 2), (3, 1), (2, 2), (1, 1)):
            # As piergiaj's code computes it, from TensorFlow's documentation.
            total = max(kernel - stride if extent % stride == 0 else kernel - extent % stride, 0)
            padded = same_padded(torch.ones(1, 1, extent, extent, extent), (kernel,) * 3, (stride,) * 3)
            line = padded[0, 0, :, total // 2, total // 2].tolist()
            assert line == [0.0] * (total // 2) + [1.0] * extent + [0.0] * (total - total // 2), (
                extent,
                kernel,
                stride,
            )


def test_pools_take_uneven_axes_each_for_itself() -> None:
    padded = same_padded(torch.ones(1, 1, 4, 5, 6), (1, 3, 3), (1, 2, 2))
    assert padded.shape == (1, 1, 4, 7, 7)
    assert padded[0, 0, 0].sum(dim=1).tolist() == [0, 6, 6, 6, 6, 6, 0]
    assert padded[0, 0, 0].sum(dim=0).tolist() == [5] * 6 + [0]


def test_preprocessings_resize_frame_by_frame_as_their_protocols_say() -> None:
    clips = torch.randint(0, 256, (2, 3, 3, 10, 20), dtype=torch.uint8)
    for how in I3D_PREPROCESSINGS:
        inputs = preprocess_clips(clips, how)
        assert inputs.shape == (2, 3, 3, 224, 224)
        assert -1 <= float(inputs.min()) < float(inputs.max()) <= 1
        alone = preprocess_clips(clips[1:, 2:], how)  # frames do not mix
        torch.testing.assert_close(inputs[1:, :, 2:], alone)
    squeezed, cropped = preprocess_clips(clips, "stylegan-v"), preprocess_clips(clips, "center-crop")
    whole = nn.functional.interpolate(clips.flatten(0, 1).float(), (224, 448), mode="bilinear", align_corners=False)
    expected = (whole[..., 112:336] / 127.5 - 1).unflatten(0, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(cropped, expected)
    assert not torch.allclose(squeezed, cropped, atol=0.1)
    same = torch.randint(0, 256, (1, 2, 3, 224, 224), dtype=torch.uint8)
    for how in I3D_PREPROCESSINGS:
        torch.testing.assert_close(preprocess_clips(same, how), same.transpose(1, 2).float() / 127.5 - 1)
    ramp = torch.arange(0, 250, 25, dtype=torch.uint8).reshape(1, 1, 1, 1, 10).expand(1, 1, 3, 10, 10)
    line = preprocess_clips(ramp, "tensorflow")[0, 0, 0, 0]
    assert np.abs((line.numpy() + 1) * 127.5 - 25 * np.minimum(np.arange(224) * (10 / 224), 9)).max() < 1e-3


@pytest.mark.parametrize("form", ["pt", "older pt", "safetensors", "with counters"])
def test_a_state_dict_loads_in_every_form(form: str, network: I3D, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "rgb_imagenet.pt")
    state = dict(network.state_dict()) if form == "with counters" else plain_state(network)
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form != "older pt")
    extractor = build_extractor("i3d", ExtractorOptions(str(path), "tensorflow"))
    described = extractor.describe()
    assert (described["kind"], described["weights"]) == ("clips", path.name)
    assert described["weights_sha256"] == weights_sha256(network)
    assert all(part in described["preprocessing"] for part in ("tensorflow", "400 logits", "state dict"))


def test_weights_that_do_not_fit_are_all_listed(network: I3D, tmp_path: Path) -> None:
    state = plain_state(network)
    gone = [name for name in state if name.startswith("Mixed_4d")]
    for name in gone:
        del state[name]
    state["logits.conv3d.weight"] = torch.zeros(157, 1024, 1, 1, 1)
    state |= {f"extra.{index}": torch.zeros(1) for index in range(30)}
    save_file(state, tmp_path / "charades.safetensors")
    with pytest.raises(DataError) as refused:
        load_i3d(tmp_path / "charades.safetensors", "stylegan-v")
    message = str(refused.value)
    assert all(name in message for name in gone)
    assert "30 missing" in message
    assert "30 unexpected: extra.0," in message
    assert "(157, 1024, 1, 1, 1) (expected (400, 1024, 1, 1, 1))" in message
    assert "extra.29" not in message  # a file does not choose how long a message gets


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bad:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (canary,))

    for new_form in (True, False):
        torch.save({"logits.conv3d.bias": Bad()}, tmp_path / "bad.pt", _use_new_zipfile_serialization=new_form)
        with pytest.raises(DataError, match=r"bad\.pt"):
            build_extractor("i3d", ExtractorOptions(str(tmp_path / "bad.pt")))
    assert not canary.exists()


def test_a_torchscript_archive_is_asked_for_logits_of_inputs_made_here(clips: Tensor, tmp_path: Path) -> None:
    extractor = build_extractor("i3d", ExtractorOptions(save_stand_in(tmp_path / "i3d_torchscript.pt")))
    found = extractor(clips).pooled
    with torch.no_grad():
        itself = ScriptedStandIn()(clips.transpose(1, 2).float(), rescale=True, resize=True, return_features=True)
    torch.testing.assert_close(found, itself, rtol=1e-4, atol=1e-5)
    described = extractor.describe()
    for part in ("stylegan-v", "'rescale': False", "'resize': False", "'return_features': True"):
        assert part in described["preprocessing"]
    assert len(described["weights_sha256"]) == 64
    cropped = build_extractor("i3d", ExtractorOptions(str(tmp_path / "i3d_torchscript.pt"), "center-crop"))
    assert not torch.allclose(cropped(clips).pooled, found, atol=1e-4)


class NoFeatures(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :400].softmax(dim=1)


class Narrow(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.flatten(1)[:, :7]


def test_archives_that_cannot_be_fvds_are_refused(clips: Tensor, tmp_path: Path) -> None:
    torch.jit.script(NoFeatures()).save(str(tmp_path / "probabilities.pt"))
    with pytest.raises(DataError, match="return_features"):
        build_extractor("i3d", ExtractorOptions(str(tmp_path / "probabilities.pt")))
    torch.jit.script(Narrow()).save(str(tmp_path / "narrow.pt"))
    with pytest.raises(DataError, match="7 features; expected 400"):
        build_extractor("i3d", ExtractorOptions(str(tmp_path / "narrow.pt")))(clips)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text"])
def test_files_of_no_form_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"weights\.pt"):
        load_i3d(tmp_path / "weights.pt", "stylegan-v")
    with pytest.raises(DataError, match="no such file"):
        load_i3d(tmp_path / "nothing.pt", "stylegan-v")


def test_options_are_checked_and_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--weights; found nothing.*never fetched"):
        build_extractor("i3d")
    with pytest.raises(ConfigError, match=r"pytorch-fid; expected one of stylegan-v"):
        build_extractor("i3d", ExtractorOptions(save_stand_in(tmp_path / "a.pt"), "pytorch-fid"))
    with pytest.raises(ConfigError, match="at least 9"):
        build_extractor("i3d", ExtractorOptions(str(tmp_path / "a.pt"))).require_frames(8)


def test_pictures_for_i3d_and_clips_for_an_extractor_of_frames_are_told(tmp_path: Path) -> None:
    i3d = build_extractor("i3d", ExtractorOptions(save_stand_in(tmp_path / "a.pt")))
    with pytest.raises(ConfigError, match=r"i3d; found pictures; expected clips\. Fix: .*inception"):
        i3d(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    frames: Any = build_extractor("pixels")
    assert isinstance(frames, Extractor)
    with pytest.raises(ConfigError, match=r"pixels; found clips; expected pictures"):
        frames(torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8))
