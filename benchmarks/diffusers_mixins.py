"""diffusers' own tests of models and pipelines, run on ours in a checkout of diffusers.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    python benchmarks/diffusers_mixins.py --diffusers diffusers --report report.md
    python benchmarks/diffusers_mixins.py --diffusers diffusers -- -k "ModelPicture and sharded" -x

The checkout's tests are not changed; two files of ours lie among them while they run. Four things are done from
outside, so that as many tests as possible mean something here; `--as-upstream` leaves all four:

- without an accelerator, upstream skips what asks for one; here it runs on the CPU, and what cannot is in
  `NEEDS_ACCELERATOR`;
- without an accelerator, group offloading goes without streams, which a CPU has not;
- upstream saves some models as pickles and loads them back; ours then load as diffusers' own do
  (otherwise only with `use_safetensors=False`);
- what cannot apply to a model of blocks, or does nothing, is skipped with its reason: `DOES_NOT_APPLY`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
PLACES = {
    "diffusers_mixins_models.py": "tests/models/transformers/test_models_transformer_acdit.py",
    "diffusers_mixins_pipelines.py": "tests/pipelines/acdit/test_acdit.py",
}
SUBJECTS = {
    "models": {"Picture": "picture", "Clip": "clip, a window", "Text": "text"},
    "pipelines": {"Pictures": "pixels", "OneBlock": "one block", "Latents": "latents", "Text": "text"},
}
NAMES = ("Pictures", "Picture", "Clip", "OneBlock", "Latents", "Text")
NEEDS_ACCELERATOR = {
    r"TestMemory(Picture|Clip|Text)::test_(cpu|disk)_offload": "splits weights between device 0 and the CPU or disk",
    r"::test_cpu_offload_forward_pass_twice": "enable_model_cpu_offload() without a device looks for an accelerator",
    r"::test_sequential_(cpu_)?offload_forward_pass": "accelerate cannot offload to a device cpu:0, "
    "diffusers' own DiTPipeline neither; tests/test_hooks.py offloads ours to meta",
    r"::test_mixed_precision_training": "on a CPU it does nothing",
}
DOES_NOT_APPLY = {
    r"Pipeline(Pictures|Latents)::test_callback_inputs": "a callback's latents are the block at hand, not the picture: "
    "zeroing them at the last step zeroes the last block; the pipeline of one block passes",
    r"PipelineLatents::test_save_load_optional_components": "asks for pixels without the vae, which a latent model "
    "refuses; the pipeline of pixels passes",
    r"PipelineText::test_components_function": "the tokenizer is no registered component: the pipeline saves and loads "
    "it itself, so that no code is looked up by name",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of diffusers, with its tests")
    parser.add_argument(
        "--library", choices=("installed", "checkout"), default="installed", help="whose diffusers the tests import"
    )
    parser.add_argument("--as-upstream", action="store_true", help="nothing is lifted and nothing skipped by us")
    parser.add_argument("--report", type=Path, help="where the table of outcomes goes, as markdown")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind --")
    arguments = parser.parse_args()
    checkout = arguments.diffusers.resolve()
    if arguments.library == "checkout":
        sys.path.insert(0, str(checkout / "src"))
    import diffusers  # before the checkout's conftest puts its own on the path

    print(f"diffusers {diffusers.__version__} of {Path(diffusers.__file__).parent}")
    record = Record(lift=not arguments.as_upstream)
    targets = [checkout / place for place in PLACES.values()]
    options = [f"--rootdir={checkout}", "-p", "no:cacheprovider", "-W", "ignore", *map(str, targets), *arguments.pytest]
    try:
        for name, target in zip(PLACES, targets, strict=True):
            target.parent.mkdir(exist_ok=True)
            (target.parent / "__init__.py").touch()
            shutil.copy(HERE / name, target)
        code = pytest.main(options, plugins=[record])
    finally:
        for target in targets:
            target.unlink(missing_ok=True)
    if arguments.report is not None:
        arguments.report.write_text(table(record.outcomes), encoding="utf-8")
        lines = "".join(json.dumps(one) + "\n" for one in record.outcomes)
        arguments.report.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    return int(code)


class Record:
    """A pytest plugin: does from outside what the module's docstring says, and keeps every outcome."""

    def __init__(self, lift: bool) -> None:
        self.lift = lift
        self.outcomes: list[dict[str, str]] = []

    @pytest.fixture(scope="session", autouse=True)
    def lifted(self) -> Iterator[None]:
        """Pickles as diffusers reads them, and no streams on a CPU."""
        if not self.lift:
            yield
            return
        from diffusers import DiffusionPipeline, ModelMixin

        from acdit.safe_loading import SafetensorsOnly

        def load(cls: type, *arguments: Any, **options: Any) -> Any:
            base: Any = super(SafetensorsOnly, cls)
            return base.from_pretrained(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SafetensorsOnly, "from_pretrained", classmethod(load))
            if not _accelerated():
                for owner in (ModelMixin, DiffusionPipeline):
                    patch.setattr(owner, "enable_group_offload", _without_streams(owner.enable_group_offload))
            yield

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if not self.lift:
            return
        reasons = DOES_NOT_APPLY
        if not _accelerated():
            reasons = {**reasons, **{test: f"needs an accelerator: {why}" for test, why in NEEDS_ACCELERATOR.items()}}
            for node in {node for item in items for node in item.listchain()}:
                node.own_markers = [mark for mark in node.own_markers if not _asks_for_accelerator(mark)]
        for item in items:
            for test, why in reasons.items():
                if re.search(test, item.nodeid):
                    item.add_marker(pytest.mark.skip(reason=why))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        why = ""
        if report.outcome == "skipped":
            why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash is not None else report.longrepr)
        _, kind, test = report.nodeid.split("::")
        why = next(iter(why.removeprefix("Skipped: ").splitlines()), "")
        subject = next(name for name in NAMES if kind.endswith(name))
        self.outcomes.append({"kind": kind, "subject": subject, "test": test, "outcome": report.outcome, "why": why})


def table(outcomes: list[dict[str, str]]) -> str:
    """Two tables, models and pipelines: a line a test, its parameters counted, a column a subject, then why not."""
    parts = []
    for what, subjects in SUBJECTS.items():
        tests: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
        for one in outcomes:
            tester = one["kind"].removeprefix("Test").removesuffix(one["subject"])
            if tester.startswith("Pipeline") == (what == "pipelines"):
                rows = tests.setdefault((tester, one["test"].partition("[")[0]), {})
                rows.setdefault(one["subject"], []).append(one)
        parts += [f"| tester | test | {' | '.join(subjects.values())} | why not |", "|---" * (len(subjects) + 3) + "|"]
        for (tester, test), rows in tests.items():
            cells = [_counted(rows.get(subject, [])) for subject in subjects]
            why = dict.fromkeys(
                one["why"].replace("|", "\\|") for cases in rows.values() for one in cases if one["why"]
            )
            parts.append(f"| {tester} | `{test}` | {' | '.join(cells)} | {'; '.join(why)} |")
        parts.append("")
    return "\n".join(parts)


def _counted(cases: list[dict[str, str]]) -> str:
    counts = Counter(one["outcome"] for one in cases)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())


def _accelerated() -> bool:
    return torch.accelerator.is_available()


def _asks_for_accelerator(mark: pytest.Mark) -> bool:
    reason = mark.kwargs.get("reason", "") if mark.name == "skipif" else ""
    return "multiple" not in reason and any(words in reason for words in ("accelerator", "requires CUDA or XPU"))


def _without_streams(enable: Any) -> Any:
    def enabled(self: Any, *arguments: Any, **options: Any) -> Any:
        return enable(self, *arguments, **{**options, "use_stream": False, "record_stream": False})

    return enabled


if __name__ == "__main__":
    sys.exit(main())
