"""Train on a folder of pictures, a subfolder a class, and draw some of every class.

    python examples/train_on_your_folder.py pictures/ --size 16 --output runs/pictures

Pictures of any kind and size are cut to squares of --size pixels, a multiple of 8. Without a folder the built-in digits
are written as one, to see how it looks: three minutes of one core. In --output lie samples.png, a row a class, and all
that `acdit train` leaves: model/, which continue_a_picture.py takes as --model, loss.png, checkpoints.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from acdit.data import DigitsDataset, ImagesDataset
from acdit.pictures import image_grid
from acdit.recipe import load_recipe
from acdit.training import Trainer


def write_digits(folder: Path) -> Path:
    """The built-in digits as files: 0/00001.png, …"""
    for index, (picture, label) in enumerate(DigitsDataset()):
        place = folder / str(label) / f"{index:05}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[0].numpy()).save(place)
    return folder


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", type=Path, help="FOLDER/<class>/<picture>.png, jpg, …")
parser.add_argument("--size", type=int, default=8, help="edge of what is learned, in pixels")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--output", type=Path, default=Path("runs/pictures"))
options = parser.parse_args()

folder = options.folder or write_digits(options.output / "digits")
names = ImagesDataset(folder, size=options.size).class_names
print(f"{folder}: {len(names)} classes, {', '.join(names)}")

# The recipe of the demo, 8×8 tokens in four blocks, with these data: a token is a square of pixels.
size, patch = options.size, options.size // 8
recipe = load_recipe(
    "digits",
    ["data.kind=images", f"data.root={folder}", f"data.size={size}", "data.channels=3", "model.in_channels=3",
     f"model.grid=[{size}, {size}]", f"model.patch=[{patch}, {patch}]", f"model.num_classes={len(names)}",
     f"train.steps={options.steps}"],
)  # fmt: skip
pipe = Trainer(recipe, options.output).train()

pipe.set_progress_bar_config(disable=True)
labels = torch.arange(len(names)).repeat_interleave(8)
pictures = pipe(class_labels=labels, guidance_scale=1.5, generator=0, output_type="pt").images
image_grid(pictures, columns=8, row_labels=names).save(options.output / "samples.png")
print(f"look at {options.output / 'samples.png'}; the model is {options.output / 'model'}")
