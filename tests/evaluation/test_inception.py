"""The network that FID is defined by, without its weights: structure, preprocessing, and the files it loads from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from acdit.errors import ConfigError, DataError
from acdit.evaluation.extractors import ExtractorOptions, build_extractor
from acdit.evaluation.inception import FIDInception, Mixed, preprocess
from acdit.evaluation.weight_files import load_inception
from acdit.provenance import weights_sha256

# Written down from the published state dict's listing, not from our code: unit → shape of its kernel.
UNITS = {
    "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
    "Mixed_5b.branch1x1": (64, 192, 1, 1), "Mixed_5b.branch5x5_2": (64, 48, 5, 5),
    "Mixed_5b.branch3x3dbl_3": (96, 96, 3, 3), "Mixed_5b.branch_pool": (32, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_1": (64, 288, 1, 1), "Mixed_5d.branch_pool": (64, 288, 1, 1),
    "Mixed_6a.branch3x3": (384, 288, 3, 3), "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3),
    "Mixed_6b.branch7x7_2": (128, 128, 1, 7), "Mixed_6b.branch7x7_3": (192, 128, 7, 1),
    "Mixed_6c.branch7x7dbl_2": (160, 160, 7, 1), "Mixed_6c.branch7x7dbl_3": (160, 160, 1, 7),
    "Mixed_6d.branch1x1": (192, 768, 1, 1), "Mixed_6e.branch7x7dbl_5": (192, 192, 1, 7),
    "Mixed_7a.branch3x3_2": (320, 192, 3, 3), "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a": (384, 384, 1, 3), "Mixed_7b.branch3x3_2b": (384, 384, 3, 1),
    "Mixed_7b.branch3x3dbl_3b": (384, 384, 3, 1), "Mixed_7c.branch3x3dbl_1": (448, 2048, 1, 1),
    "Mixed_7c.branch_pool": (192, 2048, 1, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> FIDInception:
    torch.manual_seed(0)
    return FIDInception().eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def output(network: FIDInception, pixels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        features = network(pixels)
    return {"pooled": features.pooled, "spatial": features.spatial, "probabilities": features.probabilities}


def test_the_names_and_shapes_are_those_of_the_published_state_dict(network: FIDInception) -> None:
    state = network.state_dict()
    for unit, shape in UNITS.items():
        assert tuple(state[f"{unit}.conv.weight"].shape) == shape, unit
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert tuple(state[f"{unit}.bn.{part}"].shape) == shape[:1], unit
    assert tuple(state["fc.weight"].shape) == (1008, 2048)
    kept = [name for name in state if not name.endswith("num_batches_tracked")]
    assert len(kept) == 94 * 5 + 2
    # Inception v3 without its auxiliary head has 23,834,568 parameters with 1,000 classes.
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_834_568 + 8 * 2049


def test_outputs_have_the_sizes_that_the_metrics_are_defined_on(output: dict[str, Tensor]) -> None:
    assert output["pooled"].shape == (2, 2048)
    assert output["spatial"].shape == (2, 2023)
    assert output["probabilities"].shape == (2, 1008)
    assert torch.allclose(output["probabilities"].sum(dim=1), torch.ones(2))
    assert all(bool(value.isfinite().all()) for value in output.values())
    assert not torch.allclose(output["pooled"][0], output["pooled"][1])


def test_spatial_features_are_the_first_channels_of_a_unit_with_channels_last(
    network: FIDInception, pixels: Tensor, output: dict[str, Tensor]
) -> None:
    seen: list[Tensor] = []
    hook = network.Mixed_6d.get_submodule("branch1x1").register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        network(pixels[:1])
    hook.remove()
    cells = output["spatial"][0].reshape(17, 17, 7)
    assert torch.allclose(cells[3, 5], seen[0][0, :7, 3, 5], atol=1e-5)


def test_average_pools_leave_the_padding_out_and_the_last_layer_takes_the_maximum() -> None:
    x = torch.rand(1, 4, 5, 5)
    for pool, corner in (("average", x[0, :, :2, :2].mean(dim=(1, 2))), ("max", x[0, :, :2, :2].amax(dim=(1, 2)))):
        mixed = Mixed(4, [[("branch1x1", 2, (1, 1))]], pool, 4).eval()
        with torch.no_grad():
            mixed.branch_pool.conv.weight.copy_(torch.eye(4)[:, :, None, None])
            found = mixed(x)[0, 2:, 0, 0]
        assert torch.allclose(found, corner / (1 + 1e-3) ** 0.5, atol=1e-6), pool


def test_which_layers_pool_how(network: FIDInception) -> None:
    pools = {name: layer.pool for name, layer in network.named_children() if isinstance(layer, Mixed)}
    assert [name for name, pool in pools.items() if pool == "max"] == ["Mixed_7c"]
    assert [name for name, pool in pools.items() if pool == "halve"] == ["Mixed_6a", "Mixed_7a"]
    assert len(pools) == 11


def test_preprocessing_of_tensorflow_reads_at_multiples_of_the_ratio() -> None:
    ramp = torch.arange(0, 250, 25, dtype=torch.uint8).reshape(1, 1, 1, 10).expand(1, 3, 10, 10)
    resized = preprocess(ramp, "tensorflow")[0, 0, 0]
    position = np.minimum(np.arange(299) * (10 / 299), 9)
    assert np.abs((resized.numpy() * 128 + 128) - 25 * position).max() < 1e-3
    same = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(preprocess(same, "tensorflow"), (same.float() - 128) / 128)
    assert torch.allclose(preprocess(same, "pytorch-fid"), same.float() / 127.5 - 1, atol=1e-6)


# --- files -------------------------------------------------------------------------------------------------------


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("form", ["pth", "older pth", "safetensors", "with counters"])
def test_a_state_dict_loads_in_every_form(
    form: str, network: FIDInception, pixels: Tensor, output: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    state = dict(network.state_dict()) if form == "with counters" else plain_state(network)
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form != "older pth")
    extractor = build_extractor("inception", ExtractorOptions(str(path)))
    if form == "pth":
        assert torch.allclose(extractor(pixels).pooled, output["pooled"], atol=1e-5)
    assert extractor.describe()["weights_sha256"] == weights_sha256(load_inception(path, "tensorflow"))
    assert extractor.describe()["weights"] == path.name


def test_weights_that_do_not_fit_are_listed(network: FIDInception, tmp_path: Path) -> None:
    state = plain_state(network)
    state["AuxLogits.fc.weight"] = torch.zeros(1000, 768)
    state["fc.weight"] = torch.zeros(1000, 2048)
    del state["Mixed_6d.branch1x1.conv.weight"]
    save_file(state, tmp_path / "zoo.safetensors")
    with pytest.raises(DataError) as refused:
        load_inception(tmp_path / "zoo.safetensors", "pytorch-fid")
    for part in ("Mixed_6d.branch1x1.conv.weight", "AuxLogits.fc.weight", "(1000, 2048) (expected (1008, 2048))"):
        assert part in str(refused.value)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bad:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (canary,))

    for new_form in (True, False):
        torch.save({"fc.weight": Bad()}, tmp_path / "bad.pth", _use_new_zipfile_serialization=new_form)
        with pytest.raises(DataError, match=r"bad\.pth"):
            load_inception(tmp_path / "bad.pth", "pytorch-fid")
    assert not canary.exists()


class Scripted(nn.Module):
    """As the circulating archive is called, in small: features, or probabilities without the output's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name in ("conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1", "mixed"):
            self.layers[name] = nn.Identity()
        for index in range(1, 6):
            self.layers[f"mixed_{index}"] = nn.AdaptiveAvgPool2d(17) if index == 1 else nn.Identity()
        self.layers["mixed_6"] = nn.ModuleDict({"conv": nn.Conv2d(3, 9, 1)})
        self.output = nn.Linear(12, 5)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(img / 255, 2).flatten(1)
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(dim=1)


def test_a_torchscript_archive_gives_all_three_kinds_of_features(pixels: Tensor, tmp_path: Path) -> None:
    module = Scripted().eval()
    torch.jit.script(module).save(str(tmp_path / "inception.pt"))
    extractor = build_extractor("inception", ExtractorOptions(str(tmp_path / "inception.pt")))
    features = extractor(pixels)
    with torch.no_grad():
        assert torch.allclose(features.pooled, module(pixels.float(), return_features=True))
        assert torch.allclose(features.probabilities, module(pixels.float(), no_output_bias=True))
        cells = module.layers["mixed_6"]["conv"](module.layers["mixed_1"](preprocess(pixels, "tensorflow")))
    assert features.spatial.shape == (2, 2023)
    assert torch.allclose(features.spatial.reshape(2, 17, 17, 7)[:, 2, 3], cells[:, :7, 2, 3], atol=1e-6)
    assert "tensorflow" in extractor.describe()["preprocessing"]
    assert len(extractor.describe()["weights_sha256"]) == 64
    with pytest.raises(ConfigError, match="resizes by itself"):
        build_extractor("inception", ExtractorOptions(str(tmp_path / "inception.pt"), "pytorch-fid"))


def test_a_torchscript_of_features_alone_is_used_for_what_it_gives(pixels: Tensor, tmp_path: Path) -> None:
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())).save(str(tmp_path / "plain.pt"))
    features = build_extractor("inception", ExtractorOptions(str(tmp_path / "plain.pt")))(pixels)
    assert features.pooled.shape == (2, 12)
    assert features.spatial is None
    assert features.probabilities is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text"])
def test_files_of_no_form_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"weights\.pt"):
        load_inception(tmp_path / "weights.pt", "pytorch-fid")
    with pytest.raises(DataError, match="no such file"):
        load_inception(tmp_path / "nothing.pt", "pytorch-fid")
