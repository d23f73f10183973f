"""A video without an end, whose class changes on the way, written while it grows.

    python examples/endless_stream.py --labels 3 7 1 --every 6 --output stream.gif
    python examples/endless_stream.py --labels 0 5 --blocks 0 --output stream.mp4      # until Ctrl-C

The model sees a window of the past, so every block takes the same time and the cache never grows. An mp4 (the extra
`video`) can be watched while it is written; a gif needs nothing more and appears at the end.
"""

import argparse
import contextlib
import itertools
import time
from pathlib import Path

from acdit import ACDiTPipeline
from acdit.streaming import Stream
from acdit.videos import open_writer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="moving-digits", help="a built-in model, a folder or a hub id")
parser.add_argument("--labels", type=int, nargs="+", default=[3, 7, 1], help="classes that take turns")
parser.add_argument("--every", type=int, default=6, help="blocks until the next one's turn")
parser.add_argument("--blocks", type=int, default=36, help="how many; 0: until Ctrl-C")
parser.add_argument("--steps", type=int, default=12, help="solver steps a block")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("stream.gif"), help="FILE.gif, FILE.mp4, or a folder of frames")
options = parser.parse_args()

pipe = ACDiTPipeline.from_pretrained(options.model)
stream = Stream(
    pipe, options.labels[:1], num_inference_steps=options.steps, guidance_scale=2.5, seed=options.seed,
    max_blocks=options.blocks or None,  # for a model without a window, which keeps its whole past
)  # fmt: skip
blocks = range(options.blocks) if options.blocks else itertools.count()
with open_writer(options.output, fps=8) as film, contextlib.suppress(KeyboardInterrupt):
    for block in blocks:
        stream.labels = [options.labels[block // options.every % len(options.labels)]]
        started = time.perf_counter()
        for frames in stream.frames(1):  # (B, T, C, H, W) in [0, 1]
            film.add(frames[0])
        seconds, megabytes = time.perf_counter() - started, stream.cache_nbytes / 1e6
        print(f"block {block}: class {stream.labels[0]}, {seconds:.2f} s, cache of {megabytes:.2f} MB")
print(f"{stream.num_blocks} blocks: look at {options.output}")
