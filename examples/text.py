"""Write text by blocks behind a prompt, and measure the model in bits a character.

    python examples/text.py --prompt "ROMEO:" --temperature 0.8

Every block is printed as soon as it is finished: a few characters, unmasked in any order. Then comes the bound on the
packaged held-out text: what a character costs, at most, a compressor that knows this model. --output keeps the text.
"""

import argparse
import math
from pathlib import Path

from acdit import ACDiTTextPipeline
from acdit.data import TextDataset
from acdit.data.build import as_measured, build_dataset
from acdit.evaluation.perplexity import count_characters, text_bound
from acdit.recipe import load_recipe

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="text", help="a built-in model, a folder or a hub id")
parser.add_argument("--prompt", default="ROMEO:")
parser.add_argument("--length", type=int, help="new characters (default: to the end of the context)")
parser.add_argument("--temperature", type=float, default=0.8)
parser.add_argument("--sequences", type=int, default=64, help="of held-out text, to measure on")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("text.txt"))
options = parser.parse_args()

pipe = ACDiTTextPipeline.from_pretrained(options.model)
model, tokenizer = pipe.transformer, pipe.tokenizer
context, block = model.layout.num_tokens, model.layout.block_tokens
print(f"{options.model}: {context} tokens in blocks of {block}, {tokenizer.vocab_size} kinds\n")

written = ""
for (new,) in pipe.stream(options.prompt, options.length, generator=options.seed, temperature=options.temperature):
    print(new, end="", flush=True)
    written += new
options.output.write_text(written, encoding="utf-8")
print(f"\n\nkept in {options.output}")

recipe = load_recipe("text", [f"data.sequence_length={context}"])
held_out = build_dataset(as_measured(recipe.data, "held_out"), tokenizer=tokenizer)
assert isinstance(held_out, TextDataset)
batches = list(held_out.batches(32, min(options.sequences, len(held_out))))
bound = text_bound(model, batches, num_draws=8)
characters = count_characters(tokenizer, batches)
print(f"at most {bound.bits_per_character(characters):.3f} bits a character of {characters:,} held-out ones")
print(f"(one of {tokenizer.vocab_size}, guessed, costs {math.log2(tokenizer.vocab_size):.3f}; {bound.protocol})")
