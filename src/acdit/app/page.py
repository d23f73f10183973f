"""The page: gradio's components around `acdit.app.service`, and the same functions as its API.

Annotations are real objects in this file (no `from __future__`): gradio looks for its `Request` among them.
"""

import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from acdit.app import files, links, markup
from acdit.app.anatomy import MOST_FRAMES, anatomy
from acdit.app.api import add_api, heard
from acdit.app.events import Cancelled, Done, Failed, Picture, Text, Ticket, Waiting
from acdit.app.models import ServedModel
from acdit.app.requests import Request, SampleRequest, TextRequest, whole
from acdit.app.service import Service
from acdit.errors import AcditError
from acdit.layout import BlockLayout
from acdit.model import PRESETS

TITLE = "ACDiT, block by block"
_OWN = "the model's own"
_SESSIONS = 64
"""What gradio remembers of a visit takes about 100 kB, and nothing here reads it: older visits are forgotten."""
_HELP = "Blocks are denoised one after another; each reads the finished ones before it from a cache."


class Page:
    """Builds the page and answers its events; one instance a server.

    Args:
        service: what is asked.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tickets: weakref.WeakValueDictionary[tuple[str, str], Ticket] = weakref.WeakValueDictionary()
        """Of (session, tab): what cancel and switch speak of."""
        self._fields: dict[str, dict[str, Any]] = {}
        """Components by tab and setting: what a link fills in."""

    def build(self) -> Any:
        """The `gradio.Blocks`."""
        import gradio as gr

        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, 600)) as blocks:
            add_api(blocks, self._service)  # first: names that others have taken would be changed
            gr.Markdown(f"# {TITLE}\n{_HELP}")
            with gr.Tabs() as tabs:
                for kind in ("image", "video", "text"):
                    models = [one for one in self._service.models.values() if one.kind == kind]
                    if models:
                        with gr.Tab(kind.capitalize(), id=kind):
                            self._text_tab(models) if kind == "text" else self._sample_tab(kind, models)
                with gr.Tab("Anatomy", id="anatomy"):
                    self._anatomy_tab(blocks)
            filled = [component for fields in self._fields.values() for component in fields.values()]
            told = gr.HTML(visible=False)

            def from_link(request: gr.Request) -> list[Any]:
                return self._from_link(dict(request.query_params))

            blocks.load(
                from_link, None, [tabs, told, *filled], queue=False, api_visibility="private",
                show_progress="hidden",
            )  # fmt: skip
        blocks.state_session_capacity = _SESSIONS
        blocks.queue(default_concurrency_limit=None, max_size=None)
        return blocks

    # --- tabs -------------------------------------------------------------------------------------------------------

    def _sample_tab(self, kind: str, models: list[ServedModel]) -> None:
        import gradio as gr

        first = models[0]
        a_step = first.blocks_a_step
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                fields: dict[str, Any] = {"model": self._model_field(models)}
                fields["label"] = gr.Dropdown(
                    first.class_names, value=0 if first.num_classes else None, label="Class",
                    visible=bool(first.num_classes),
                )  # fmt: skip
                with gr.Row():
                    fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
                    fields["samples"] = gr.Slider(
                        1,
                        self._service.limits.samples,
                        4 if kind == "image" else 1,
                        step=1,
                        label="How many",
                        min_width=140,
                    )
                with gr.Row():
                    run = gr.Button("Generate", variant="primary", min_width=120)
                    stop = gr.Button("Cancel", variant="stop", min_width=90)
                with gr.Accordion("Solver and blocks", open=False):
                    fields["steps"] = gr.Slider(1, self._service.limits.steps, 25, step=1, label="Steps a block")
                    fields["guidance"] = gr.Slider(0, 10, 1.2, step=0.05, label="Guidance (1 is off)")
                    fields["solver"] = gr.Dropdown(
                        [(_OWN, ""), *[(name, name) for name in first.solvers]], value="", label="Solver"
                    )
                    fields["block"] = gr.Dropdown(
                        self._blocks(first), value=_joined(first.layout.block), label="Block, in tokens",
                        visible=len(self._blocks(first)) > 1,
                    )  # fmt: skip
                    if kind == "video":
                        fields["blocks"] = gr.Slider(
                            a_step,
                            self._most_blocks(first),
                            first.layout.num_blocks,
                            step=a_step,
                            label="Blocks in all",
                        )
                with gr.Accordion(f"Continue a {'picture' if kind == 'image' else 'clip or picture'}", open=False):
                    upload = gr.File(
                        label="Upload", file_types=list(files.upload_suffixes(kind)), file_count="single", height=140
                    )
                    keep = gr.Slider(
                        a_step, max(a_step, first.layout.num_blocks - a_step), self._half(first),
                        step=a_step, label="Blocks to keep",
                    )  # fmt: skip
                    more = gr.Button("Continue", variant="primary")
                with gr.Accordion("Switch while it runs", open=kind == "video", visible=bool(first.num_classes)):
                    to = gr.Dropdown(
                        first.class_names, value=min(1, (first.num_classes or 1) - 1), label="Next block's class"
                    )
                    switch = gr.Button("Switch")
                    said = gr.Markdown("")
            with gr.Column(scale=3, min_width=280):
                view = gr.HTML(markup.empty("The blocks will appear here."), elem_id=f"view-{kind}")
        # A link may name switches; they are kept beside the components.
        fields["switches"] = gr.Textbox("", visible=False)
        self._fields[kind] = {**fields, "keep": keep}
        names = list(fields)

        async def generate(request: gr.Request, *values: Any) -> AsyncIterator[str]:
            asked = self._sample_request(dict(zip(names, values, strict=True)))
            async for shown in self._watch(kind, request.session_hash or "", asked):
                yield shown

        async def proceed(request: gr.Request, path: str | None, kept: Any, *values: Any) -> AsyncIterator[str]:
            settings = dict(zip(names, values, strict=True))
            if not path:
                yield markup.note("Choose a file first.")
                return
            asked = self._sample_request(settings, path, kept)
            async for shown in self._watch(kind, request.session_hash or "", asked):
                yield shown

        everything = list(fields.values())
        hidden: dict[str, Any] = {
            "api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden", "js": _seen(kind),
        }  # fmt: skip
        run.click(generate, everything, view, **hidden)
        more.click(proceed, [upload, keep, *everything], view, **hidden)
        self._cancel(stop, kind)
        switch.click(self._switcher(kind), [to], said, queue=False, api_visibility="private", show_progress="hidden")
        for field in (
            "label",
            "seed",
            "samples",
            "steps",
            "guidance",
        ):  # a change by hand is no longer the link's result
            fields[field].input(lambda: "", None, fields["switches"], queue=False, api_visibility="private")
        if len(models) > 1:
            outputs = [fields[name] for name in ("label", "solver", "block")] + [keep, to]
            outputs += [fields["blocks"]] if kind == "video" else []
            fields["model"].change(self._model_changed, fields["model"], outputs, queue=False, api_visibility="private")

    def _text_tab(self, models: list[ServedModel]) -> None:
        import gradio as gr

        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                fields: dict[str, Any] = {"model": self._model_field(models)}
                fields["prompt"] = gr.Textbox("", label="Prompt", lines=2, max_length=self._service.limits.prompt)
                with gr.Row():
                    fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
                    fields["samples"] = gr.Slider(
                        1, self._service.limits.samples, 1, step=1, label="How many", min_width=140
                    )
                with gr.Row():
                    run = gr.Button("Write", variant="primary", min_width=120)
                    stop = gr.Button("Cancel", variant="stop", min_width=90)
                with gr.Accordion("Sampler", open=False):
                    fields["sampler"] = gr.Dropdown(
                        [("first hitting: one token a call", "first_hitting"), ("ancestral: even steps", "ancestral"),
                         ("confidence: all that are sure", "confidence")], value="first_hitting", label="Sampler",
                    )  # fmt: skip
                    fields["steps"] = gr.Slider(
                        1, self._service.limits.steps, 64, step=1, label="Steps a block (ancestral)"
                    )
                    fields["threshold"] = gr.Slider(0, 1, 0.9, step=0.01, label="Threshold (confidence)")
                    fields["temperature"] = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
                    fields["top_p"] = gr.Slider(0.05, 1, 1, step=0.01, label="Top p")
                    fields["new_tokens"] = gr.Number(
                        None, label="New tokens (empty: to the end)", precision=0, minimum=1
                    )
            with gr.Column(scale=3, min_width=280):
                view = gr.HTML(markup.empty("The text will appear here."), elem_id="view-text")
        self._fields["text"] = fields
        names = list(fields)

        async def generate(request: gr.Request, *values: Any) -> AsyncIterator[str]:
            async for shown in self._watch(
                "text", request.session_hash or "", TextRequest(**dict(zip(names, values, strict=True)))
            ):
                yield shown

        run.click(
            generate, list(fields.values()), view, api_visibility="private", concurrency_limit=None,
            show_progress="hidden", js=_seen("text"),
        )  # fmt: skip
        self._cancel(stop, "text")

    def _anatomy_tab(self, blocks: Any) -> None:
        import gradio as gr

        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    height = gr.Slider(1, 64, 32, step=1, label="Grid height", min_width=140)
                    width = gr.Slider(1, 64, 32, step=1, label="Grid width", min_width=140)
                with gr.Row():
                    high = gr.Slider(1, 64, 16, step=1, label="Block height", min_width=140)
                    wide = gr.Slider(1, 64, 16, step=1, label="Block width", min_width=140)
                with gr.Row():
                    frames = gr.Slider(1, MOST_FRAMES, 1, step=1, label="Frames", min_width=140)
                    long = gr.Slider(1, MOST_FRAMES, 1, step=1, label="Block frames", min_width=140)
                with gr.Row():
                    size = gr.Dropdown(list(PRESETS), value="B", label="Model", min_width=100)
                    steps = gr.Slider(1, 200, 25, step=1, label="Steps a block", min_width=140)
                guided = gr.Checkbox(True, label="Guidance")
                picture = gr.File(label="A picture to lay the blocks on", file_types=list(files.PICTURES), height=140)
            with gr.Column(scale=3, min_width=280):
                view = gr.HTML(self._anatomy(32, 32, 16, 16, 1, 1, "B", 25, True, None), elem_id="view-anatomy")
        inputs = [height, width, high, wide, frames, long, size, steps, guided, picture]
        for component in inputs:
            component.change(
                self._anatomy, inputs, view, queue=False, api_visibility="private", show_progress="hidden",
                trigger_mode="always_last",
            )  # fmt: skip

    @staticmethod
    def _half(served: ServedModel) -> int:
        """Half of the blocks, in whole steps of time."""
        a_step = served.blocks_a_step
        return max(a_step, served.layout.num_blocks // 2 // a_step * a_step)

    def _model_field(self, models: list[ServedModel]) -> Any:
        import gradio as gr

        return gr.Dropdown(
            [model.name for model in models], value=models[0].name, label="Model", visible=len(models) > 1
        )

    def _model_changed(self, name: str) -> list[Any]:
        import gradio as gr

        served = self._service.models[name]
        count, a_step = served.layout.num_blocks, served.blocks_a_step
        blocks = gr.update(maximum=self._most_blocks(served), minimum=a_step, step=a_step, value=count)
        return [
            gr.update(
                choices=served.class_names, value=0 if served.num_classes else None, visible=bool(served.num_classes)
            ),
            gr.update(choices=[(_OWN, ""), *[(one, one) for one in served.solvers]], value=""),
            gr.update(choices=self._blocks(served), value=_joined(served.layout.block)),
            gr.update(maximum=max(a_step, count - a_step), minimum=a_step, step=a_step, value=self._half(served)),
            gr.update(choices=served.class_names, value=0 if served.num_classes else None),
            *([blocks] if served.kind == "video" else []),
        ]

    def _most_blocks(self, served: ServedModel) -> int:
        """Of a clip, in whole steps of time."""
        most = self._service.limits.blocks if served.endless else served.layout.num_blocks
        return most // served.blocks_a_step * served.blocks_a_step

    def _blocks(self, served: ServedModel) -> list[tuple[str, str]]:
        own = served.layout.block
        return [
            ("×".join(map(str, one)) + (" (trained)" if one == own else ""), _joined(one))
            for one in served.block_choices(self._service.limits.blocks)
        ]

    # --- events -----------------------------------------------------------------------------------------------------

    def _sample_request(
        self, settings: dict[str, Any], upload: str | None = None, keep: Any = 0
    ) -> Request | AcditError:
        """What the fields of a tab ask for, or what is wrong with them."""
        words = {name: settings.pop(name) for name in ("block", "switches") if name in settings}
        try:
            told = links.from_query({name: str(word) for name, word in words.items() if word})[1]
            asked = {**settings, "solver": settings["solver"] or None, **told}
            if upload is not None:
                served, limits = self._service.models[settings["model"]], self._service.limits
                asked["keep"] = whole("keep", keep, 1, limits.blocks)
                asked["given"] = files.read_upload(served, Path(upload), asked["keep"], limits)
            return SampleRequest(**asked)
        except AcditError as error:
            return error

    async def _watch(self, tab: str, session: str, asked: Request | AcditError) -> AsyncIterator[str]:
        """What is shown while a request runs; a listener that goes away cancels it."""
        if isinstance(asked, AcditError):
            yield markup.note(str(asked))
            return
        before = self._tickets.get((session, tab))
        if before is not None:
            self._service.cancel(before, "a new request took its place")
        try:
            ticket = self._service.submit(asked)
        except AcditError as error:
            yield markup.note(str(error))
            return
        self._tickets[session, tab] = ticket
        checked, gallery = ticket.request, None
        if isinstance(checked, SampleRequest):
            served = self._service.models[checked.model]
            layout = BlockLayout(served.layout.grid, checked.block or served.layout.block, served.layout.patch)
            gallery = markup.Gallery(served, layout, checked.blocks or layout.num_blocks, checked.seed)
        last = ""
        try:
            async for event in heard(ticket):
                last = _shown(event, gallery, checked, last)
                yield last
        finally:
            self._service.cancel(ticket, "nobody listens")

    def _cancel(self, button: Any, tab: str) -> None:
        import gradio as gr

        def cancel(request: gr.Request) -> None:
            ticket = self._tickets.get((request.session_hash or "", tab))
            if ticket is not None:
                self._service.cancel(ticket)

        button.click(cancel, None, None, queue=False, api_visibility="private")

    def _switcher(self, tab: str) -> Callable[..., str]:
        import gradio as gr

        def switch(request: gr.Request, label: Any) -> str:
            ticket = self._tickets.get((request.session_hash or "", tab))
            if ticket is None or ticket.ended:
                return "Nothing runs: start with Generate."
            try:
                to = self._service.switch(ticket, label)
            except AcditError as error:
                return str(error)
            names = {index: name for name, index in self._service.models[ticket.request.model].class_names}
            return f"The next block will be of class {names.get(to, to) if to is not None else to}."

        return switch

    @staticmethod
    def _anatomy(
        height: Any, width: Any, high: Any, wide: Any, frames: Any, long: Any, size: Any, steps: Any, guided: Any,
        path: str | None,
    ) -> str:  # fmt: skip
        try:
            below = None
            if path:
                from acdit.data.picture import BadPicture, decode_picture

                try:
                    pixels = decode_picture(Path(path).read_bytes(), 3, (480, 480))
                except BadPicture as error:
                    return markup.note(str(error))
                below = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
            found = anatomy(height, width, high, wide, size, steps, guided, below, frames, long)
        except AcditError as error:
            return markup.note(str(error))
        return markup.anatomy_view(found.mask, found.order, found.figures, clip=frames > 1)

    def _from_link(self, query: dict[str, str]) -> list[Any]:
        import gradio as gr

        nothing = [gr.skip()] * sum(len(fields) for fields in self._fields.values())
        try:
            tab, settings = links.from_query(query)
        except AcditError as error:
            return [gr.skip(), gr.update(value=markup.note(str(error)), visible=True), *nothing]
        if tab is None or (tab not in self._fields and tab != "anatomy"):
            return [gr.skip(), gr.skip(), *nothing]
        values: list[Any] = []
        for kind, fields in self._fields.items():
            for name in fields:
                known = kind == tab and name in settings
                values.append(gr.update(value=_as_field(name, settings[name])) if known else gr.skip())
        return [gr.update(selected=tab), gr.skip(), *values]


def _shown(event: Any, gallery: markup.Gallery | None, asked: Request, last: str) -> str:
    if isinstance(event, Waiting):
        return markup.waiting(event.ahead)
    if isinstance(event, Picture) and gallery is not None:
        return gallery.progress(event)
    if isinstance(event, Text) and isinstance(asked, TextRequest):
        return markup.writing(event, asked.prompt, asked.seed)
    if isinstance(event, Done):
        return markup.written(event) if gallery is None else gallery.done(event)
    if isinstance(event, Cancelled):
        return last + markup.note(f"Stopped: {event.why}.")
    assert isinstance(event, Failed)
    return markup.note(event.message)


def _seen(kind: str) -> str:
    """A script that brings the view of a tab on the screen, where it lies below the controls."""
    found = f"document.getElementById('view-{kind}')"
    return f"(...given) => {{{found}.scrollIntoView({{block: 'nearest', behavior: 'smooth'}}); return given;}}"


def _joined(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _as_field(name: str, value: Any) -> Any:
    if name == "block":
        return _joined(value)
    if name == "switches":
        return ",".join(f"{block}:{label}" for block, label in value)
    return value
