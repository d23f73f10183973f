"""What users load and call for text: model and tokenizer behind diffusers' conventions.

Annotations are real objects in this file (no `from __future__`): diffusers reads them when it loads a pipeline.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput

from acdit import builtin
from acdit.codecs import load_tokenizer, require_vocabulary
from acdit.errors import ConfigError
from acdit.model import ACDiTTransformer
from acdit.safe_loading import SafetensorsOnly
from acdit.sampling import Generators
from acdit.shims import ReadsTravelledFolders, local_folder
from acdit.text_sampling import Sampler, TextSamplingStep, cut_text, make_sampler, sample_tokens

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor | None


@dataclass
class TextPipelineOutput(BaseOutput):
    """Output of `ACDiTTextPipeline`, a row a prompt, the prompt's tokens first; EOS, where one was written, is not in
    it."""

    tokens: list[list[int]]
    texts: list[str] | None = None
    """None without a tokenizer."""


class ACDiTTextPipeline(SafetensorsOnly, ReadsTravelledFolders, DiffusionPipeline):
    """Text, block by block.

    Args:
        transformer: a model with `vocab_size`.
        tokenizer: an `acdit.codecs.Tokenizer`, saved into and loaded from tokenizer/ of the pipeline's folder. None:
            token ids in, token ids out.
        begins_with_bos: the model was trained on sequences that begin with BOS: it goes before prompts that are text,
            and before nothing.

    Raises:
        ConfigError: a model of continuous data, a tokenizer of another number of tokens.
    """

    model_cpu_offload_seq = "transformer"
    _optional_components = ["tokenizer"]  # noqa: RUF012 (diffusers' class attribute convention)

    def __init__(self, transformer: ACDiTTransformer, tokenizer: Any = None, begins_with_bos: bool = False) -> None:
        super().__init__()
        if transformer.mask_token is None:
            raise ConfigError("transformer", found="a model of continuous data", expected="one with vocab_size")
        self.register_modules(transformer=transformer, tokenizer=tokenizer)
        self.register_to_config(begins_with_bos=begins_with_bos)
        self._require_same_vocabulary()

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """diffusers' own; the tokenizer goes into tokenizer/."""
        self.register_to_config(tokenizer=(None, None))  # of a kind that diffusers cannot save
        super().save_pretrained(save_directory, *arguments, **options)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(save_directory) / "tokenizer")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """diffusers' own, for a folder, a hub id or a built-in model's name, with the tokenizer that lies in tokenizer/
        there; no code is executed."""
        place = local_folder(builtin.located(pretrained_model_name_or_path), options)
        pipeline = super().from_pretrained(place, **options)
        if pipeline.tokenizer is None:
            folder = Path(place) / "tokenizer"
            if folder.is_dir():
                pipeline.tokenizer = load_tokenizer(str(folder))
                pipeline._require_same_vocabulary()
        return pipeline

    def __call__(
        self,
        prompts: Prompts = None,
        max_new_tokens: int | None = None,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        batch_size: int | None = None,
        sampler: str = "first_hitting",
        num_inference_steps: int = 64,
        threshold: float = 0.9,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_token: int | None = None,
        on_step: Callable[[TextSamplingStep], None] | None = None,
    ) -> TextPipelineOutput | tuple[Any, ...]:
        """Write.

        Args:
            prompts: texts (with a tokenizer) or token ids, of any lengths; None: from nothing.
            max_new_tokens: behind each prompt; default: to the end of the context.
            generator: an int s gives row i the seed s + i; see `acdit.sampling.sample_blocks`.
            return_dict: False gives a tuple (tokens, texts).
            batch_size: how many texts, of no prompt or of one.
            sampler: "first_hitting", "ancestral" (in `num_inference_steps` a block) or "confidence" (all tokens above
                `threshold` at once); see `acdit.text_sampling`.
            temperature, top_p: 0 takes the likeliest; nucleus.
            eos_token: where a text ends; default: the tokenizer's `eos_token_id`; −1: nowhere.
            on_step: called after every step of the sampler.

        Raises:
            ConfigError: an argument that does not fit the model.
        """
        *_, rows = self._rows(
            prompts, max_new_tokens, generator, batch_size, make_sampler(sampler, num_inference_steps, threshold),
            temperature, top_p, eos_token, on_step,
        )  # fmt: skip
        texts = None if self.tokenizer is None else [self.tokenizer.decode(row) for row in rows]
        output = TextPipelineOutput(tokens=rows, texts=texts)
        return output if return_dict else (rows, texts)

    def stream(
        self,
        prompts: Prompts = None,
        max_new_tokens: int | None = None,
        generator: Generators = None,
        *,
        batch_size: int | None = None,
        sampler: str = "first_hitting",
        num_inference_steps: int = 64,
        threshold: float = 0.9,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_token: int | None = None,
    ) -> Iterator[list[str]]:
        """What is new in each row, as blocks finish; joined, the texts of `__call__`, prompts included.

        A character whose bytes are not all there yet waits for the next block.
        """
        if self.tokenizer is None:
            raise ConfigError("tokenizer", found="none", expected="one: only text can be streamed as text")
        streams: list[Any] = []
        shown: list[int] = []
        for rows in self._rows(
            prompts, max_new_tokens, generator, batch_size, make_sampler(sampler, num_inference_steps, threshold),
            temperature, top_p, eos_token, None,
        ):  # fmt: skip
            streams = streams or [self.tokenizer.stream() for _ in rows]
            shown = shown or [0] * len(rows)
            yield [stream.add(row[old:]) for stream, row, old in zip(streams, rows, shown, strict=True)]
            shown = [len(row) for row in rows]
        rest = [stream.finish() for stream in streams]
        if any(rest):
            yield rest

    def _rows(
        self, prompts: Prompts, max_new_tokens: int | None, generator: Generators, batch_size: int | None,
        sampler: Sampler, temperature: float, top_p: float, eos_token: int | None,
        on_step: Callable[[TextSamplingStep], None] | None,
    ) -> Iterator[list[list[int]]]:  # fmt: skip
        """All tokens of each row so far, after every block."""
        given = self.prompt_ids(prompts)
        if eos_token is None:
            eos_token = getattr(self.tokenizer, "eos_token_id", None)
        eos_token = None if eos_token == -1 else eos_token
        length = self.transformer.layout.block_tokens
        blocks = sample_tokens(
            self.transformer, prompts=given, batch_size=batch_size, sampler=sampler, temperature=temperature,
            top_p=top_p, max_new_tokens=max_new_tokens, eos_token=eos_token, generator=generator, on_step=on_step,
        )  # fmt: skip
        written: list[list[int]] = []
        for block in blocks:
            if not written:
                given = given * len(block) if len(given) == 1 else given
                first = min(map(len, given)) // length
                written = [row[: first * length] for row in given]
            written = [row + new for row, new in zip(written, block.tolist(), strict=True)]
            yield [
                cut_text(row, len(prompt), max_new_tokens, eos_token)
                for row, prompt in zip(written, given, strict=True)
            ]

    def prompt_ids(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of every prompt, BOS in front where the model's texts begin with it.

        Raises:
            ConfigError: texts, and no tokenizer.
        """
        begin: list[int] = []
        if self.config.begins_with_bos:
            if self.tokenizer is None:
                raise ConfigError("tokenizer", found="none", expected="one: this model's texts begin with its BOS")
            begin = [self.tokenizer.bos_token_id]
        if prompts is None:
            return [begin]
        if isinstance(prompts, torch.Tensor):
            return prompts.tolist()
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        if not any(isinstance(row, str) for row in rows):
            return [list(row) for row in rows]  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ConfigError("prompts", found="text", expected="token ids: this pipeline has no tokenizer")
        return [[*begin, *self.tokenizer.encode(str(row))] for row in rows]

    def _require_same_vocabulary(self) -> None:
        if self.tokenizer is not None:
            require_vocabulary(self.tokenizer, self.transformer.config.vocab_size)
