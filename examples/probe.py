"""What a model that learned to draw knows of what it sees: linear probes on the features of its clean stream.

    python examples/probe.py --output runs/probe

The clean stream reads pictures without noise, timestep or label. On the features of each layer, averaged over a
picture, a linear layer learns to tell the built-in digits apart; beside it, the same for an untrained model. The probe
of all layers together is saved: `acdit classify runs/probe pictures/` asks it.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from acdit import ACDiTClassifier, ACDiTPipeline, ACDiTTransformer
from acdit.data import DigitsDataset
from acdit.heads import ClassificationHead, Classifier

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="digits", help="a built-in model, a folder or a hub id")
parser.add_argument("--steps", type=int, default=300, help="of learning a probe")
parser.add_argument("--output", type=Path, default=Path("runs/probe"))
options = parser.parse_args()

pipe = ACDiTPipeline.from_pretrained(options.model)
model, train, held_out = pipe.transformer, DigitsDataset("train"), DigitsDataset("held_out")
every_layer = list(range(len(model.layers)))


@torch.no_grad()
def features(reader: ACDiTTransformer, pictures: Tensor) -> list[Tensor]:
    """Of every layer, (B, N, L, W) each."""
    return reader.encode(reader.layout.to_blocks(pipe.codec.encode(pictures)), every_layer)


def probe(layers: list[int], seen: list[Tensor], unseen: list[Tensor]) -> tuple[ClassificationHead, float]:
    """A probe of these layers, and its accuracy on held-out digits."""
    head = ClassificationHead(seen[0].shape[-1], 10, layers)
    pooled = head.pool([seen[layer] for layer in layers])  # once: the features do not change
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-2)
    for _ in range(options.steps):
        optimizer.zero_grad()
        F.cross_entropy(head.logits(pooled), train.labels).backward()
        optimizer.step()
    answers = head([unseen[layer] for layer in layers]).argmax(-1)
    return head, float((answers == held_out.labels).float().mean())


torch.manual_seed(0)
untrained = ACDiTTransformer.from_config(model.config)
readers = [[features(reader, data.images) for data in (train, held_out)] for reader in (model, untrained)]
for layers in [*([layer] for layer in every_layer), every_layer]:
    (head, learned), (_, random) = (probe(layers, *seen_and_unseen) for seen_and_unseen in readers)
    print(f"layers {layers}: {learned:.3f} of held-out digits told apart (untrained model: {random:.3f})")

pipe.save_pretrained(options.output)
ACDiTClassifier(Classifier(model, head), pipe).save(options.output, whole=False)
print(f"saved: acdit classify {options.output} PICTURES")
