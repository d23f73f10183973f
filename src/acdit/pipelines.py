"""What users load and call: model, scheduler and codec behind diffusers' conventions.

Annotations are real objects in this file (no `from __future__`): diffusers reads them when it loads a pipeline, and
looks up `ModelMixin` among this module's names.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from acdit.codecs import PixelCodec, VAECodec
from acdit.errors import ConfigError
from acdit.model import ACDiTTransformer
from acdit.safe_loading import SafetensorsOnly
from acdit.sampling import DenoisingStep, Generators, sample_blocks
from acdit.shims import ReadsTravelledFolders

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepEndCallback = Callable[["ACDiTPipeline", int, Any, dict[str, Any]], dict[str, Any]]
BlockEndCallback = Callable[["ACDiTPipeline", int, dict[str, Any]], dict[str, Any] | None]


class ACDiTPipeline(SafetensorsOnly, ReadsTravelledFolders, DiffusionPipeline):
    """Class-conditional (or unconditional) generation, block by block.

    Args:
        transformer: predicts.
        scheduler: any diffusers scheduler of the same prediction type.
        vae: a diffusers autoencoder for latent models; None for models of pixels.
        pixel_mean, pixel_std: of a model of pixels: model space = (value in [0, 1] − mean) / std.
        latents: a model of latents; without a vae it gives output_type="latent" only.
        id2label: class names by index, as JSON keeps them (string keys).
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' class attribute convention)
    _callback_tensor_inputs = ["latents", "block"]  # noqa: RUF012 (the same)

    def __init__(
        self,
        transformer: ACDiTTransformer,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        pixel_mean: float = 0.5,
        pixel_std: float = 0.5,
        id2label: dict[str, str] | None = None,
        latents: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(pixel_mean=pixel_mean, pixel_std=pixel_std, latents=latents, id2label=id2label)
        self._guidance_scale: float | Sequence[float] = 1.0
        self._num_timesteps = 0

    @property
    def guidance_scale(self) -> float | Sequence[float]:
        """Of the latest call; a step callback that sets `_guidance_scale` changes it for the steps that follow."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Solver steps of the latest call, over all its blocks."""
        return self._num_timesteps

    @property
    def codec(self) -> PixelCodec | VAECodec:
        """Files' space ↔ model space, rebuilt from the registered components and config."""
        if self.vae is not None:
            return VAECodec(self.vae)
        return PixelCodec(self.config.pixel_mean, self.config.pixel_std)

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """Class indices of class names.

        Raises:
            ConfigError: an unknown name, or a model without names.
        """
        ids = {name: int(index) for index, name in (self.config.id2label or {}).items()}
        wanted = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in wanted if name not in ids]
        if unknown:
            raise ConfigError("class name", found=str(unknown), expected=f"names of this model: {sorted(ids)}")
        return [ids[name] for name in wanted]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int | Sequence[int] = 25,
        guidance_scale: float | Sequence[float] = 1.5,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        prefix: Tensor | None = None,
        num_prefix_blocks: int | None = None,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents", "block"),
        callback_on_block_end: BlockEndCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate.

        Args:
            class_labels: (B,) class indices or class names, or (B, N) indices for a label per block; one alone is a
                batch of one; None: no label (guidance is off then).
            num_inference_steps: solver steps a block, or one number per block.
            guidance_scale: classifier-free guidance; 1 is off. Or one number per block.
            generator: a list gives one stream per sample; an int s gives sample i the seed s + i; a single
                `torch.Generator` draws for the whole batch, as in diffusers.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" (B, C, *grid) in model
                space. Videos, (B, C, T, H, W) in model space, come as frames: (B, T, H, W, C), (B, T, C, H, W).
            return_dict: False gives a tuple.
            batch_size: how many, when there are no labels.
            guidance_interval: (low, high) timesteps outside which guidance is off.
            prefix: a picture (B or 1, C, H, W), or a clip (B or 1, T, C, H, W), in [0, 1], as output_type "pt" gives
                them; its first `num_prefix_blocks` blocks are kept.
            num_prefix_blocks: how many blocks of `prefix` are given.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": (B, L, D), "block": index}); a
                changed "latents" in the returned dict takes the place of the noisy block. Steps count over all blocks,
                `num_timesteps` of them. What it makes of `pipeline._guidance_scale` holds from the next step on.
            callback_on_step_end_tensor_inputs: which of "latents" and "block" it gets.
            callback_on_block_end: called as (pipeline, block, {"latents": the finished block (B, L, D)}).

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ConfigError: an argument that does not fit the model.
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError("output_type", found=repr(output_type), expected=f"one of {OUTPUT_TYPES}")
        if output_type != "latent":
            self._require_codec()
            if self.transformer.layout.ndim not in (2, 3):
                raise ConfigError(
                    "output_type", found=f"{output_type!r} of a model of {self.transformer.layout.ndim}-D data",
                    expected='"latent": only pictures and clips have pixels',
                )  # fmt: skip
        labels = self._label_list(class_labels)
        if labels is None:
            guidance_scale = 1.0
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ConfigError(
                "callback_on_step_end_tensor_inputs",
                found=str(sorted(unknown)),
                expected=str(self._callback_tensor_inputs),
            )
        layout = self.transformer.layout
        given = self._prefix_blocks(prefix, num_prefix_blocks)
        first = 0 if given is None else given.shape[1]
        steps = self._steps_per_block(num_inference_steps, first, layout.num_blocks)
        done, scale = 0, guidance_scale
        self._guidance_scale, self._num_timesteps = guidance_scale, sum(steps)
        with self.progress_bar(total=sum(steps)) as bar:

            def on_step(state: DenoisingStep) -> Tensor | None:
                nonlocal done, scale
                replaced = None
                if callback_on_step_end is not None:
                    values = {"latents": state.noisy, "block": state.block}
                    wanted = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                    # This run's own scale, whatever other runs of this pipeline have.
                    self._guidance_scale = scale
                    answer = callback_on_step_end(self, done, state.timestep, wanted)
                    scale = self._guidance_scale
                    replaced = (answer or {}).get("latents")
                done += 1
                bar.update(1)
                return replaced

            finished = [] if given is None else list(given.unbind(1))
            for block, tokens in enumerate(
                sample_blocks(
                    self.transformer,
                    self.scheduler,
                    class_labels=labels,
                    batch_size=batch_size,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=lambda: scale,
                    guidance_interval=guidance_interval,
                    prefix=given,
                    generator=generator,
                    on_step=on_step,
                ),
                start=first,
            ):
                if callback_on_block_end is not None:
                    callback_on_block_end(self, block, {"latents": tokens})
                finished.append(tokens)
        batch = finished[-1].shape[0]
        blocks = torch.stack([tokens.to(finished[-1]).expand(batch, -1, -1) for tokens in finished], dim=1)
        images = self.decode_blocks(blocks, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode_blocks(self, blocks: Tensor, output_type: str = "pil") -> Any:
        """Blocks (B, N, L, D) in model space → pictures as `output_type` says."""
        grid = self.transformer.layout.from_blocks(blocks)
        if output_type == "latent":
            return grid
        pixels = self.codec.decode(grid)
        if pixels.ndim == 5:  # a video: frames take the place of pictures
            frames = pixels.transpose(1, 2)
            if output_type == "pt":
                return frames
            arrays = [VaeImageProcessor.pt_to_numpy(clip) for clip in frames]
            if output_type == "np":
                return torch.stack([torch.from_numpy(clip) for clip in arrays]).numpy()
            return [VaeImageProcessor.numpy_to_pil(clip) for clip in arrays]
        if output_type == "pt":
            return pixels
        array = VaeImageProcessor.pt_to_numpy(pixels)
        return array if output_type == "np" else VaeImageProcessor.numpy_to_pil(array)

    def _require_codec(self) -> None:
        if self.vae is None and (self.config.latents or self.transformer.config.in_channels not in (1, 3)):
            raise ConfigError(
                "output_type",
                found=f"a latent model ({self.transformer.config.in_channels} channels) without its vae",
                expected='output_type="latent", or a pipeline with a vae',
                fix="load it with the autoencoder of the training: ACDiTPipeline.from_pretrained(…, "
                "vae=acdit.codecs.load_vae(…)), or acdit sample --vae PATH; codec.vae=PATH in the recipe publishes it "
                "with the model",
            )

    def _prefix_blocks(self, prefix: Tensor | None, num_prefix_blocks: int | None) -> Tensor | None:
        if prefix is None:
            if num_prefix_blocks is not None:
                raise ConfigError("num_prefix_blocks", found="no prefix", expected="both or neither")
            return None
        total = self.transformer.layout.num_blocks
        if num_prefix_blocks is None or not 0 < num_prefix_blocks < total:
            raise ConfigError("num_prefix_blocks", found=str(num_prefix_blocks), expected=f"1 … {total - 1}")
        if prefix.ndim == 5:
            prefix = prefix.transpose(1, 2)
        encoded = self.codec.encode(prefix.to(self.transformer.execution_device))
        return self.transformer.layout.to_blocks(encoded)[:, :num_prefix_blocks]

    def _label_list(self, labels: Any) -> Any:
        """One label as a batch of one; names as indices."""
        if isinstance(labels, str) or (
            isinstance(labels, list | tuple) and any(isinstance(one, str) for one in labels)
        ):
            return self.get_label_ids(labels)
        alone = hasattr(labels, "__index__") and not getattr(labels, "shape", ())
        return [operator.index(labels)] if alone else labels

    @staticmethod
    def _steps_per_block(steps: Any, first: int, num_blocks: int) -> list[int]:
        steps = steps.tolist() if hasattr(steps, "tolist") else steps
        return [steps] * (num_blocks - first) if isinstance(steps, int) else list(steps)[first:num_blocks]
