"""The converter: what it makes of a good checkpoint, and that a bad one writes nothing, lists all and runs nothing."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file
from torch import Tensor

from acdit import ACDiTPipeline, ACDiTTransformer, convert
from acdit.convert import convert_reference, read_reference, reference_name, to_reference_state_dict
from acdit.errors import DataError, StorageError
from acdit.model import PRESETS
from tests.conftest import awaken

IMAGE = {
    "image_size": 64, "vae_patch_pixels": 8, "patch_size": 1, "vae_latent_size": 4, "block_size": 16, "ar_len": 4,
    "num_frames": 1, "nd_split": None, "square_block": True, "dataset": "ImageNet", "lr": 1e-4, "results_dir": "x",
}  # fmt: skip
VIDEO = {
    **IMAGE, "patch_size": 2, "num_frames": 6, "block_size": 32, "ar_len": 3, "nd_split": "2_3_3",
    "square_block": False, "dataset": "UCF101",
}  # fmt: skip
SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 5}
GEOMETRY = {
    "image": {"grid": (8, 8), "block": (4, 4), "patch": (1, 1), "rope_split": None},
    "video": {"grid": (6, 8, 8), "block": (2, 4, 4), "patch": (1, 2, 2), "rope_split": [2, 3, 3]},
}


def random_model(kind: str = "image", **sizes: Any) -> ACDiTTransformer:
    model = ACDiTTransformer(**GEOMETRY[kind], in_channels=4, rope="reference", **{**SIZES, **sizes})
    awaken(model)
    return model


def save(path: Path, state: dict[str, Any], args: dict[str, Any] | None = None, **more: Any) -> Path:
    """A checkpoint as the reference's training writes it."""
    torch.save({"model": state, "args": argparse.Namespace(**(IMAGE if args is None else args)), **more}, path)
    return path


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Converts a file that must be refused, checks that nothing appeared, and returns the message."""

    def run(checkpoint: Path, match: str | None = None, **options: Any) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError, match=match) as caught:
            convert_reference(checkpoint, tmp_path / "out", **options)
        assert caught.value.exit_code == 3
        assert sorted(tmp_path.rglob("*")) == before
        return str(caught.value)

    return run


# --- a good checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "args"), [("image", IMAGE), ("video", VIDEO)])
def test_converted_folder_loads_as_a_pipeline_with_the_same_weights(
    tmp_path: Path, kind: str, args: dict[str, Any]
) -> None:
    model = random_model(kind)
    read = convert_reference(save(tmp_path / "in.pt", to_reference_state_dict(model), args), tmp_path / "out")
    pipe = ACDiTPipeline.from_pretrained(tmp_path / "out")
    assert read.num_parameters == model.num_parameters()
    for name, value in model.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], value), name
    assert pipe.transformer.layout == model.layout
    assert pipe.transformer.config.rope == "reference"
    latents = pipe(class_labels=[1], num_inference_steps=2, generator=0, output_type="latent").images
    assert latents.shape == (1, 4, *model.layout.grid)


def test_folder_is_what_the_pipeline_itself_would_save(tmp_path: Path) -> None:
    convert_reference(save(tmp_path / "in.pt", to_reference_state_dict(random_model())), tmp_path / "out")
    ACDiTPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    ours, theirs = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("out", "again"))
    ours.pop("_name_or_path", None), theirs.pop("_name_or_path", None)
    assert ours == theirs
    saved = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*")}
    assert saved <= {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}


def test_solver_is_the_references(tmp_path: Path) -> None:
    convert_reference(save(tmp_path / "in.pt", to_reference_state_dict(random_model())), tmp_path / "out")
    ours = ACDiTPipeline.from_pretrained(tmp_path / "out").scheduler
    theirs = DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(25)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert {key: ours.config[key] for key in ours.config if not key.startswith("_")}.items() <= theirs.config.items()


def test_dtype_is_kept(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in to_reference_state_dict(random_model()).items()}
    assert convert_reference(save(tmp_path / "in.pt", state), tmp_path / "out").dtype == torch.bfloat16
    written = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert all(torch.equal(written[name], state[reference_name(name)]) for name in written)


def test_parameters_of_a_training_checkpoint_and_its_ema(tmp_path: Path) -> None:
    state = {name: torch.nn.Parameter(value) for name, value in to_reference_state_dict(random_model()).items()}
    averaged = {name: value.detach() * 2 for name, value in state.items()}
    optimizer = torch.optim.AdamW(state.values())
    sum(value.sum() for value in state.values()).backward()
    optimizer.step()
    path = save(tmp_path / "in.pt", state, ema=averaged, opt=optimizer.state_dict(), lrs={})
    assert torch.equal(read_reference(path).weights["x_embedder.weight"], state["x_embedder.weight"].detach())
    assert torch.equal(read_reference(path, "ema").weights["x_embedder.weight"], averaged["x_embedder.weight"])


def test_sizes_come_from_shapes() -> None:
    for preset in PRESETS.values():
        with torch.device("meta"):
            model = ACDiTTransformer((32, 32), (16, 16), num_classes=1000, **preset)
        found = convert._sizes(Path("x.pt"), to_reference_state_dict(model))
        assert found == {**preset, "mlp_ratio": 4.0, "num_classes": 1000}


def test_names_are_the_references() -> None:
    # Spec section 8, written out once more.
    layer = [
        "norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "attn.q_norm.weight", "attn.k_norm.weight", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
        "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    ]  # fmt: skip
    names = {
        "x_embedder.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "final_layer.norm_final.weight",
        "final_layer.linear.weight", "final_layer.linear.bias", "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias", *(f"blocks.{index}.{name}" for index in range(2) for name in layer),
    }  # fmt: skip
    assert {reference_name(name) for name in random_model().state_dict()} == names


@pytest.mark.parametrize(
    ("changes", "block"),
    [
        ({}, (2, 4, 4)),
        ({"block_size": 96, "ar_len": 1}, (6, 4, 4)),
        ({"block_size": 16, "ar_len": 6}, (1, 4, 4)),
        ({"block_size": 8, "ar_len": 12}, (1, 2, 4)),
        ({"block_size": 2, "ar_len": 48}, (1, 1, 2)),
        ({"block_size": 32, "ar_len": 3, "square_block": True}, (2, 4, 4)),
    ],
)
def test_video_blocks_are_spans_of_the_raster(tmp_path: Path, changes: dict[str, Any], block: tuple[int, ...]) -> None:
    path = save(tmp_path / "in.pt", to_reference_state_dict(random_model("video")), {**VIDEO, **changes})
    config = read_reference(path).config
    assert config["block"] == block
    layout = ACDiTTransformer(**config).layout
    raster = torch.arange(layout.num_tokens).reshape(1, 1, *layout.token_grid)
    cells = raster.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    # The reference cuts the raster of tokens into consecutive spans.
    assert torch.equal(layout.to_blocks(cells)[0, :, :, 0].flatten(), raster.flatten())


def test_images_cut_in_rows_when_their_training_says_so(tmp_path: Path) -> None:
    state = to_reference_state_dict(random_model())
    rows = {**IMAGE, "square_block": False, "dataset": "UCF101"}
    assert read_reference(save(tmp_path / "rows.pt", state, rows)).config["block"] == (2, 8)
    for unsaid in (("square_block", "dataset"), ("square_block",), ("dataset",)):
        args = {name: value for name, value in rows.items() if name not in unsaid}
        assert read_reference(save(tmp_path / "square.pt", state, args)).config["block"] == (4, 4)


def test_ignored_fields_are_listed(tmp_path: Path) -> None:
    read = read_reference(save(tmp_path / "in.pt", to_reference_state_dict(random_model())))
    assert read.ignored_fields == ("lr", "results_dir")


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "in.pt", to_reference_state_dict(random_model()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(StorageError):
        convert_reference(path, tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine"]


# --- weights that do not fit ---------------------------------------------------------------------------------------


def test_all_misfits_are_listed(tmp_path: Path, refused: Callable[..., str]) -> None:
    state = to_reference_state_dict(random_model())
    del state["blocks.1.attn.qkv.bias"], state["final_layer.linear.weight"]
    state["pos_embed"] = torch.zeros(3)
    state["layers.0.norm1.weight"] = torch.zeros(32)  # our name is not the reference's
    state["blocks.1.mlp.fc2.weight"] = torch.zeros(32, 32)
    message = refused(save(tmp_path / "in.pt", state), "5 weights do not fit")
    for part in (
        "missing blocks.1.attn.qkv.bias",
        "missing final_layer.linear.weight",
        "extra 'pos_embed'",
        "extra 'layers.0.norm1.weight'",
        "blocks.1.mlp.fc2.weight is (32, 32), not (32, 128)",
    ):
        assert part in message


@pytest.mark.parametrize("name", list(to_reference_state_dict(random_model())))
def test_every_name_and_shape_counts(tmp_path: Path, refused: Callable[..., str], name: str) -> None:
    state = to_reference_state_dict(random_model())
    value = state.pop(name)
    assert name in refused(save(tmp_path / "missing.pt", state))
    doubled = torch.cat([value, value], dim=-1)
    refused(save(tmp_path / "misshaped.pt", {**state, name: doubled}), "do not fit|whole heads")


def test_a_gap_in_the_layers(tmp_path: Path, refused: Callable[..., str]) -> None:
    state = to_reference_state_dict(random_model())
    moved = {name.replace("blocks.1.", "blocks.1000000000."): value for name, value in state.items()}
    message = refused(save(tmp_path / "in.pt", moved))
    assert "missing blocks.1.norm1.weight" in message
    assert "extra 'blocks.1000000000.norm1.weight'" in message


def odd_weights() -> dict[str, Any]:
    good = to_reference_state_dict(random_model())["blocks.0.mlp.fc1.weight"]
    return {
        "huge by stride 0": torch.zeros(1).expand(2**40, 2**20),
        "small by stride 0": torch.zeros(1).expand(good.shape),
        "transposed": torch.zeros(good.shape[::-1]).T,
        "sparse": good.to_sparse(),
        "integers": good.long(),
        "complex": good.to(torch.complex64),
        "another dtype": good.double(),
        "meta": good.to("meta"),
        "nan": torch.full_like(good, float("nan")),
        "infinite": torch.full_like(good, float("inf")),
        "not a tensor": [1.0, 2.0],
        "none": None,
        "empty": torch.zeros(0),
        "scalar": torch.zeros(()),
    }


@pytest.mark.parametrize("kind", list(odd_weights()))
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "x_embedder.weight", "blocks.0.attn.proj.weight"])
def test_odd_weights_are_refused(tmp_path: Path, refused: Callable[..., str], kind: str, name: str) -> None:
    state = to_reference_state_dict(random_model())
    refused(save(tmp_path / "in.pt", {**state, name: odd_weights()[kind]}))


def test_weights_that_share_one_storage_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    state = to_reference_state_dict(random_model())
    one: dict[tuple[int, ...], Tensor] = {}
    shared = {name: one.setdefault(tuple(value.shape), value) for name, value in state.items()}
    shared |= {f"blocks.{index}.{name}": one[(96, 32)] for index in range(2, 60) for name in ("attn.qkv.weight",)}
    refused(save(tmp_path / "in.pt", shared), "share memory")


# --- arguments that do not fit (row 29) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_size": 15}, "do not add up"),
        ({"ar_len": 3}, "do not add up"),
        ({"block_size": 8, "ar_len": 8}, "a square that divides"),
        ({"block_size": 64, "ar_len": 1, "nd_split": "2_3_3"}, "nd_split"),
        ({"nd_split": "3"}, "nd_split"),
        ({"nd_split": "3_2"}, "do not go together"),
        ({"nd_split": "1_" * 3000 + "1"}, "nd_split"),
        ({"nd_split": [1, 1]}, "nd_split"),
        ({"vae_latent_size": 3}, "x_embedder.weight"),
        ({"image_size": 8, "block_size": 1, "ar_len": 1, "patch_size": 2}, "do not add up"),
        ({"vae_latent_size": 65536, "patch_size": 1}, "x_embedder.weight"),
        ({"square_block": 1}, "square_block"),
        ({"dataset": 3}, "dataset"),
    ],
)
def test_arguments_are_checked(
    tmp_path: Path, refused: Callable[..., str], changes: dict[str, Any], match: str
) -> None:
    state = to_reference_state_dict(random_model())
    assert len(refused(save(tmp_path / "in.pt", state, {**IMAGE, **changes}), match)) < 2000


def test_video_blocks_that_are_no_rectangle(tmp_path: Path, refused: Callable[..., str]) -> None:
    state = to_reference_state_dict(random_model("video"))
    refused(save(tmp_path / "in.pt", state, {**VIDEO, "block_size": 12, "ar_len": 8}), "whole frames or rows")


ODD_VALUES = [
    None, True, 0, -1, 2**40, 10**5000, 1.0, float("nan"), "16", b"16", (16,), [16], {"a": 1}, {1, 2},
    torch.tensor(16), argparse.Namespace(value=16), "x" * 10**6,
]  # fmt: skip


@pytest.mark.parametrize("value", ODD_VALUES, ids=[str(index) for index in range(len(ODD_VALUES))])
@pytest.mark.parametrize("name", convert._REQUIRED)
def test_odd_values_of_fields_are_refused(tmp_path: Path, refused: Callable[..., str], name: str, value: Any) -> None:
    if isinstance(value, int) and value > 2**63:
        pytest.skip("torch.save itself cannot write it")
    path = save(tmp_path / "in.pt", {"w": torch.zeros(1)}, {**IMAGE, name: value})
    assert len(refused(path, f"{name}|_codecs encode|__builtin__ set")) < 2000


def test_a_missing_field_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    args = {name: value for name, value in IMAGE.items() if name not in ("block_size", "ar_len")}
    message = refused(save(tmp_path / "in.pt", to_reference_state_dict(random_model()), args))
    assert "block_size=missing" in message
    assert "ar_len=missing" in message


def test_odd_extra_fields_do_no_harm(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    wide: list[Any] = []
    for _ in range(60):  # 2⁶⁰ leaves when written out
        wide = [wide, wide]
    args = argparse.Namespace(**IMAGE)
    vars(args).update({"loop": loop, "wide": wide, "__class__": "x", "__dict__": 3, "x" * 10**5: 1, 7: 8})
    vars(args)[("odd",)] = torch.zeros(3)
    path = tmp_path / "in.pt"
    torch.save({"model": to_reference_state_dict(random_model()), "args": args}, path)
    ignored = read_reference(path).ignored_fields
    assert {"loop", "wide", "__class__", "__dict__", "7", "a tuple", "lr"} <= set(ignored)
    assert max(map(len, ignored)) <= 80


@pytest.mark.parametrize(
    "content",
    [
        {}, [], 3, torch.zeros(3), {"model": {}}, {"args": {}, "model": {}}, {"args": argparse.Namespace},
        {"args": argparse.Namespace(**IMAGE)}, {"args": argparse.Namespace(**IMAGE), "model": {}},
        {"args": argparse.Namespace(**IMAGE), "model": [1]}, {"args": argparse.Namespace(), "model": {"a": 1}},
        {"args": argparse.Namespace(**IMAGE), "model": {3: torch.zeros(1)}},
    ],
)  # fmt: skip
def test_other_contents_are_refused(tmp_path: Path, refused: Callable[..., str], content: Any) -> None:
    torch.save(content, tmp_path / "in.pt")
    refused(tmp_path / "in.pt")


def test_another_entry_must_exist(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = save(tmp_path / "in.pt", to_reference_state_dict(random_model()))
    refused(path, 'no "ema" state dict', weights="ema")


def test_one_single_place_reads_pickle() -> None:
    source = Path(convert.__file__).parent
    readers = re.compile(r"torch\.load|pickle\.load|Unpickler|allow_pickle=True|joblib|shelve|dill")
    found = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if readers.search(path.read_text())}
    assert found == {"pickles.py"}
    assert len(re.findall(r"torch\.load\(path", (source / "pickles.py").read_text())) == 1
