"""A modality of one's own is a layout, a codec and a corruption: here heat in a ring over time, which is then forecast.

    python examples/custom_layout.py --output heat.png

A minute of one core on exact solutions of the heat equation, in glass and in copper; then the first block of new rings
is given and the rest drawn. heat.png: truth, below the forecast, a row an instant. docs/extending.md does so to sound.
"""

import argparse

import torch
from tqdm import trange

from acdit import ACDiTTransformer, sample_blocks
from acdit.corruption import GaussianCorruption
from acdit.pictures import image_grid


class Celsius:  # the codec
    def encode(self, heat: torch.Tensor) -> torch.Tensor:  # (B, T, X) in °C → (B, 1, T, X) of about unit variance
        return (heat[:, None] - 20) / 8

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        return data[:, 0] * 8 + 20


def rings(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves of k periods, fading by exp(-diffusivity · k² · t): (B, 16, 32) °C; and 0 of glass, 1 of copper, (B,)."""
    material, k, t = torch.randint(2, (count,)), torch.arange(1, 6), torch.arange(16)[:, None]
    angle = 2 * torch.pi * (torch.arange(32) / 32 * k[:, None] + torch.rand(count, 5, 1))
    fading = (-torch.tensor([0.01, 0.04])[material, None, None] * k.square() * t).exp()
    return 20 + 7 * fading @ (torch.randn(count, 5, 1) * angle.cos()), material


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2000, help="0: an untrained model")
parser.add_argument("--output", default="heat.png")
options = parser.parse_args()
torch.manual_seed(0)
codec, corruption = Celsius(), GaussianCorruption("flow_prediction")
size = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}  # a token an instant, four of them a block
model = ACDiTTransformer(grid=[16, 32], block=[4, 1], patch=[1, 32], in_channels=1, num_classes=2, **size)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
for step in trange(options.steps):
    heat, material = rings(32)
    clean = model.layout.to_blocks(codec.encode(heat))  # (B, N, L, D)
    noise, timestep = torch.randn_like(clean), corruption.timesteps(torch.rand(clean.shape[:2]))  # one a block
    prediction = model(clean, corruption.corrupt(clean, noise, timestep), timestep, material).sample
    optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / options.steps)
    optimizer.zero_grad()
    corruption.loss(prediction, clean, noise, timestep).backward()
    optimizer.step()

heat, material = rings(64)
given = model.layout.to_blocks(codec.encode(heat))[:, :1]
drawn = sample_blocks(model, corruption.sampling_scheduler(), class_labels=material, prefix=given, generator=0)
forecast = codec.decode(model.layout.from_blocks(torch.stack([given[:, 0], *drawn], dim=1)))
error, still = ((guess - heat)[:, 4:].square().mean().sqrt() for guess in (forecast, heat[:, 3:4]))
print(f"the forecast is {error:.2f} °C off; the last given instant, as if nothing went on, {still:.2f} °C")
image_grid(torch.cat([heat[:8], forecast[:8]])[:, None] / 40, 8, 3, row_labels=["true", "drawn"]).save(options.output)
