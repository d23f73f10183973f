"""Run by the tests in processes of their own: load folders one way and write hashes of what they draw.

    python loading.py theirs|own FOLDER …

`theirs`: by diffusers' own loader, given leave, in a process that has never imported acdit. `own`: by acdit's classes.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def drawn(pipeline: Any) -> str:
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline, "scheduler"):
        written = pipeline([[0, 1]], generator=5)
        return json.dumps([written.tokens, written.texts])
    labels = None if pipeline.transformer.config.num_classes is None else [1, 3]
    images = pipeline(labels, num_inference_steps=2, generator=5, batch_size=2, output_type="pt").images
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def theirs(folder: str) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def own(folder: str) -> Any:
    import acdit

    text = "ACDiTTextPipeline" in Path(folder, "model_index.json").read_text()
    return (acdit.ACDiTTextPipeline if text else acdit.ACDiTPipeline).from_pretrained(folder)


if __name__ == "__main__":
    way, *folders = sys.argv[1:]
    if way == "theirs":
        import diffusers  # noqa: F401

        assert not [name for name in sys.modules if name.partition(".")[0] == "acdit"]
    print(json.dumps([drawn({"theirs": theirs, "own": own}[way](folder)) for folder in folders]))
