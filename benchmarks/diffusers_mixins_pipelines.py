"""ACDiTPipeline and ACDiTTextPipeline under diffusers' own testers of pipelines. `diffusers_mixins.py` puts this file
into a checkout's tests/pipelines/acdit and runs it there; it is of no use elsewhere.

Four pipelines: pictures of pixels, pictures of latents, pictures of one block, and text.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn

from acdit import ACDiTPipeline, ACDiTTextPipeline, ACDiTTransformer
from acdit.codecs import CharacterTokenizer

from ...testing_utils import enable_full_determinism
from ..pipeline_params import (
    CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS,
    CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS,
)
from ..testing_utils import BasePipelineTesterConfig, MemoryTesterMixin, PipelineTesterMixin

enable_full_determinism()

SIZE: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "mlp_ratio": 2.0}


def model(**settings: Any) -> ACDiTTransformer:
    """A small model with no zero among its weights, the same in every call."""
    made = ACDiTTransformer(**SIZE, **settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1, generator=generator)
    return made.eval()


class Pictures(BasePipelineTesterConfig):
    """Pixels, four blocks."""

    pipeline_class = ACDiTPipeline
    required_input_params_in_call_signature = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    # As upstream's own tester of its class-conditional DiTPipeline, which has neither.
    optional_input_params = BasePipelineTesterConfig.optional_input_params - {"latents", "num_images_per_prompt"}
    output_shape = (3, 8, 8)
    block = (2, 2)

    def get_dummy_components(self) -> dict[str, Any]:
        transformer = model(grid=(8, 8), block=self.block, patch=2, in_channels=3, num_classes=5)
        return {"transformer": transformer, "scheduler": DDIMScheduler(clip_sample=False), "vae": None}

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {
            "class_labels": [1], "generator": self.get_generator(0), "num_inference_steps": 2, "output_type": "pt",
        }  # fmt: skip


class OneBlock(Pictures):
    """Pixels, one block: plain diffusion."""

    block = (4, 4)


class Latents(Pictures):
    """Latents of an autoencoder, four blocks."""

    output_shape = (3, 16, 16)

    def get_dummy_components(self) -> dict[str, Any]:
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        )  # fmt: skip
        transformer = model(grid=(8, 8), block=(2, 2), patch=2, in_channels=4, num_classes=5)
        return {"transformer": transformer, "scheduler": DDIMScheduler(clip_sample=False), "vae": vae.eval()}


class TokensOut(ACDiTTextPipeline):
    """The text pipeline with its rows of tokens as one tensor, since the testers compare tensors."""

    @functools.wraps(ACDiTTextPipeline.__call__)
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        output = super().__call__(*arguments, **options)
        return (torch.tensor(output[0]), *output[1:])


class Text(BasePipelineTesterConfig):
    """Text of four blocks after a prompt."""

    pipeline_class = TokensOut
    required_input_params_in_call_signature = frozenset({"prompts"})
    batch_input_params = frozenset({"prompts"})
    optional_input_params = frozenset({"num_inference_steps", "generator", "return_dict"})
    output_shape = (16,)

    def get_dummy_components(self) -> dict[str, Any]:
        return {"transformer": model(grid=(16,), block=(4,), vocab_size=5), "tokenizer": CharacterTokenizer("abcd")}

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {"prompts": "abc", "generator": self.get_generator(0), "num_inference_steps": 4, "eos_token": -1}


def _cases(name: str, tester: type) -> dict[str, type]:
    """A test class for each of the four pipelines."""
    return {f"Test{name}{kind.__name__}": type(f"Test{name}{kind.__name__}", (kind, tester), {})
            for kind in (Pictures, OneBlock, Latents, Text)}  # fmt: skip


globals().update(_cases("Pipeline", PipelineTesterMixin))
globals().update(_cases("PipelineMemory", MemoryTesterMixin))
