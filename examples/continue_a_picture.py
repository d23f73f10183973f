"""Keep the first blocks of a picture and draw the others, many times: several futures of one past.

    python examples/continue_a_picture.py --keep 2 --labels 3 5 8 --output continued.png
    python examples/continue_a_picture.py --model runs/pictures/model --picture cat.png

Without --picture the model draws one first. The kept blocks are read once, into one cache: it knows no class, so its
copies serve all of them. continued.png: a row a class, on the left the given picture, with what is not kept in gray.
"""

import argparse
from pathlib import Path

import torch

from acdit import ACDiTPipeline, sample_blocks
from acdit.data.picture import decode_picture
from acdit.pictures import image_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="digits", help="a built-in model, a folder or a hub id")
parser.add_argument("--picture", type=Path, help="a file to continue")
parser.add_argument("--keep", type=int, default=2, help="how many of its blocks are given")
parser.add_argument("--labels", type=int, nargs="+", default=[3, 5, 8], help="classes to continue it as")
parser.add_argument("--each", type=int, default=6, help="continuations of each class")
parser.add_argument("--steps", type=int, default=25, help="solver steps a block")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("continued.png"))
options = parser.parse_args()

pipe = ACDiTPipeline.from_pretrained(options.model)
pipe.set_progress_bar_config(disable=True)
model, layout = pipe.transformer, pipe.transformer.layout
print(f"{options.model}: {layout.num_blocks} blocks, {options.keep} are kept")

if options.picture:
    data = options.picture.read_bytes()
    picture = decode_picture(data, model.config.in_channels, layout.grid)[None] / 255
else:
    first = {"class_labels": options.labels[:1], "num_inference_steps": options.steps, "generator": options.seed}
    picture = pipe(**first, output_type="pt").images  # (1, C, H, W) in [0, 1]

given = layout.to_blocks(pipe.codec.encode(picture))  # (1, N, L, D)
kept = given[:, : options.keep]
with torch.no_grad():
    past = model.new_cache(batch_size=1)
    model.prefill(kept, past)
labels = [label for label in options.labels for _ in range(options.each)]
future = sample_blocks(
    model, pipe.scheduler, class_labels=labels, num_inference_steps=options.steps, guidance_scale=1.5,
    cache=past.fork(len(labels)), generator=options.seed,
)  # fmt: skip
blocks = torch.cat([kept.expand(len(labels), -1, -1, -1), torch.stack(list(future), dim=1)], dim=1)
continued = pipe.decode_blocks(blocks, "pt")  # what pipe(prefix=picture, num_prefix_blocks=…) gives, too

given[:, options.keep :] = 0
left = pipe.decode_blocks(given, "pt").expand(len(options.labels), 1, *picture.shape[1:])
rows = torch.cat([left, continued.unflatten(0, (-1, options.each))], dim=1)
names = [f"as {label}" for label in options.labels]
image_grid(rows.flatten(0, 1), columns=1 + options.each, row_labels=names).save(options.output)
print(f"{len(labels)} continuations: look at {options.output}")
