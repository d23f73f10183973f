"""Recipe → data set of text: which documents, whose tokens, how wrapped."""

from __future__ import annotations

from pathlib import Path

from acdit.codecs.text import CharacterTokenizer, Tokenizer
from acdit.codecs.tokenizer_files import load_tokenizer
from acdit.data.bad_files import BadFiles
from acdit.data.documents import BuiltInText, Documents
from acdit.data.hf_text import TableText
from acdit.data.text import TextDataset, Wrap
from acdit.data.text_files import text_files
from acdit.data.text_stream import TailOfStream, TextStream
from acdit.data.token_cache import cached, default_cache, in_memory
from acdit.errors import ConfigError
from acdit.recipe import DataRecipe

CHARACTERS = "characters"


def build_text(recipe: DataRecipe, tokenizer: Tokenizer | None = None) -> TextDataset | TextStream:
    """The text a recipe names, as sequences of token ids.

    Args:
        recipe: of one of the kinds of text.
        tokenizer: a model's own, instead of the one that data.tokenizer names.

    Raises:
        ConfigError, DataError, StorageError: see the documents, the tokenizer, `cached` and `Wrap`.
    """
    bad = BadFiles(recipe.max_bad_files, what="text")
    if recipe.crop == "random" and recipe.streaming:
        raise ConfigError("data.crop", found="random, of a stream", expected="center: a stream is cut as it comes")
    if tokenizer is None:
        tokenizer = _tokenizer(recipe, bad)
    wrap = Wrap(recipe.wrap, recipe.sequence_length, tokenizer)
    if recipe.streaming and not (recipe.split == "held_out" and recipe.held_out):
        assert recipe.root is not None
        return TextStream(
            recipe.root, recipe.split, recipe.text_column, tokenizer, wrap, subset=recipe.subset,
            max_bad_files=recipe.max_bad_files, shuffle_buffer=recipe.shuffle_buffer, held_out=recipe.held_out,
        )  # fmt: skip
    documents = _documents(recipe, recipe.split, bad)
    if isinstance(documents, BuiltInText):
        row, counted = in_memory(documents, tokenizer, bad)
        return TextDataset(row, counted, tokenizer, wrap, bad, documents.where)
    cache = default_cache() if recipe.cache is None else Path(recipe.cache)
    file, counted = cached(documents, tokenizer, cache, bad)
    return TextDataset(file, counted, tokenizer, wrap, bad, documents.where)


def _documents(recipe: DataRecipe, split: str, bad: BadFiles) -> Documents:
    if recipe.kind == "builtin_text":
        return BuiltInText(split)
    assert recipe.root is not None
    if recipe.kind == "text":
        return text_files(recipe.root, split, recipe.document, recipe.text_column, recipe.held_out, bad)
    if recipe.streaming:
        return TailOfStream(recipe.root, "train", recipe.text_column, recipe.held_out, recipe.subset)
    table = TableText(recipe.root, "train" if recipe.held_out else split, recipe.text_column, recipe.subset)
    return table.divided(recipe.held_out, split, bad) if recipe.held_out else table


def _tokenizer(recipe: DataRecipe, bad: BadFiles) -> Tokenizer:
    if recipe.tokenizer != CHARACTERS:
        return load_tokenizer(recipe.tokenizer)
    if recipe.streaming:
        raise ConfigError(
            "data.tokenizer", found="characters, of a stream", expected="a tokenizer that is known beforehand",
            fix="set data.tokenizer=gpt2, or to the folder of a saved one, or data.streaming=false",
        )  # fmt: skip
    # Of whatever split: the characters are those of the text that is trained on.
    alphabet: set[str] = set()
    for piece in _documents(recipe, "train", bad).pieces(len, bad):
        alphabet.update(piece.text)
    return CharacterTokenizer(alphabet)
