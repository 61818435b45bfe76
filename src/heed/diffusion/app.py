"""A page on this machine to draw masks and edit pictures with DesignEdit (gradio, extra [app]).

It listens on 127.0.0.1 only, sends nothing anywhere and loads nothing from elsewhere. One layer of the drawing is one
object. The inversion of a picture is kept, so that its second edit takes half the time.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from heed.diffusion.designedit import DesignEdit, EditPlan, operations
from heed.diffusion.inversion import Trajectory
from heed.diffusion.pictures import FLIPS
from heed.errors import MissingExtra

REMOVE, MOVE, COPY, SWAP, ZOOM, PAN = "Remove", "Move, resize, flip", "Copy", "Swap two", "Zoom out", "Pan"
OPERATIONS = {
    REMOVE: "Every layer you draw on is removed, and the background is repaired under it.",
    MOVE: "The object you draw on is lifted, changed and pasted; the background is repaired where it was.",
    COPY: "The object you draw on is pasted once more.",
    SWAP: "Draw one object on Layer 1 and the other on Layer 2; each goes where the other was.",
    ZOOM: "The picture becomes smaller, and its surroundings are made up. Nothing to draw.",
    PAN: "Everything moves, and what it leaves is made up. Nothing to draw.",
}
_LEAD = (
    "Lift objects out of a picture and put them elsewhere, without training. Drop a picture on the left, draw on the "
    "object (one layer per object), choose what happens, press Edit."
)
_PLACED, _SHAPED = (MOVE, COPY, PAN), (MOVE, COPY)
_CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto}
#head h1 {margin-bottom: 0}
#head p {margin-top: .2em; opacity: .75}
#tiny {border-left: 4px solid #d97706; background: #fef3c7; color: #713f12; padding: .6em 1em; border-radius: 4px}
"""


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise MissingExtra("gradio", "app") from error
    return gradio


def drawn_plan(
    drawing: dict[str, Any] | None,
    operation: str,
    dx: float = 0.0,
    dy: float = 0.0,
    scale: float = 1.0,
    flip: str = "none",
    zoom: float = 0.75,
) -> tuple[np.ndarray, EditPlan]:
    """The picture and the plan of what the page's form says.

    Args:
        drawing: of gr.ImageEditor: "background" and "layers" (H, W, 4) uint8, one layer per object.
        operation: one of `OPERATIONS`.
        dx, dy: fractions to the right and up, of moving, copying and panning.
        scale, flip: of moving and copying; "none" does not flip.
        zoom: of zooming out.

    Raises:
        ValueError: no picture, or fewer or more drawn layers than the operation takes.
    """
    if not drawing or drawing.get("background") is None:
        raise ValueError("there is no picture yet: drop one on the left")
    picture = np.ascontiguousarray(drawing["background"][..., :3])
    masks = [layer[..., 3] > 0 for layer in drawing.get("layers") or () if layer[..., 3].any()]
    needs_none, needs_one = operation in (ZOOM, PAN), operation in _SHAPED
    if operation == REMOVE and not masks:
        raise ValueError("draw on what is to be removed first")
    if needs_one and len(masks) != 1:
        raise ValueError(f"draw one object on one layer; {len(masks)} layers have something on them")
    if operation == SWAP and len(masks) != 2:
        raise ValueError(f"draw two objects on two layers; {len(masks)} have something on them")
    plan = operations.requested(
        picture,
        () if needs_none else masks,
        remove_it=operation == REMOVE,
        move_by=(dx, dy) if operation == MOVE else None,
        copy_by=(dx, dy) if operation == COPY else None,
        swap_them=operation == SWAP,
        resize=scale if needs_one else None,
        mirror=flip if needs_one and flip != "none" else None,  # type: ignore[arg-type]
        zoom=(zoom, zoom) if operation == ZOOM else None,
        pan_by=(dx, dy) if operation == PAN else None,
    )
    return picture, plan


def build_page(editor: DesignEdit, *, tiny: bool = False, picture: np.ndarray | None = None) -> Any:
    """The page as gradio Blocks.

    Args:
        editor: what edits.
        tiny: say on the page that its network is random.
        picture: (H, W, 3) uint8 that it starts with.
    """
    gr = _gradio()

    def run(
        drawing: dict[str, Any] | None,
        operation: str,
        dx: float,
        dy: float,
        scale: float,
        flip: str,
        zoom: float,
        prompt: str,
        kept: Trajectory | None,
        progress: Any = gr.Progress(track_tqdm=True),  # noqa: B008 - how gradio is told to show tqdm
    ) -> tuple[Any, Trajectory]:
        try:
            before, plan = drawn_plan(drawing, operation, dx, dy, scale, flip, zoom)
            reusable = kept if kept is not None and kept.prompt == prompt else None
            edited = editor.run(plan, prompt=prompt, trajectory=reusable)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        # Layers that were changed before their inversion are not kept: sliders would pile them up.
        first = edited.trajectory.select(edited.trajectory.keys[:1])
        return (before, np.asarray(edited.image)), first

    def show_controls(operation: str) -> list[Any]:
        return [
            gr.update(value=OPERATIONS[operation]),
            gr.update(visible=operation in _PLACED),
            gr.update(visible=operation in _SHAPED),
            gr.update(visible=operation == ZOOM),
        ]

    start = MOVE
    with gr.Blocks(title="heed edit", analytics_enabled=False) as page:
        kept = gr.State(None)
        gr.Markdown(f"# heed edit\n{_LEAD}", elem_id="head")
        if tiny:
            gr.Markdown(
                "**Random tiny network, no trained weights.** Layers are lifted, moved and pasted as they will be with a "
                "real model, but the holes are not repaired. Use `--model` with a Stable Diffusion folder for those.",
                elem_id="tiny",
            )
        with gr.Row():
            with gr.Column():
                drawing = gr.ImageEditor(
                    value=picture,
                    label="1. Draw on it",
                    type="numpy",
                    image_mode="RGBA",
                    sources=["upload", "clipboard"],
                    transforms=(),
                    brush=gr.Brush(default_size=24, colors=["#e11d48"], default_color="#e11d48", color_mode="fixed"),
                    height=420,
                )
            with gr.Column():
                result = gr.ImageSlider(label="3. Before | after", interactive=False, height=420, format="png")
        with gr.Row():
            operation = gr.Radio(list(OPERATIONS), value=start, label="2. Choose what happens")
        hint = gr.Markdown(OPERATIONS[start])
        with gr.Row(visible=start in _PLACED) as placed:
            dx = gr.Slider(-0.9, 0.9, 0.2, step=0.01, label="To the right, share of the width")
            dy = gr.Slider(-0.9, 0.9, 0.0, step=0.01, label="Up, share of the height")
        with gr.Row(visible=start in _SHAPED) as shaped:
            scale = gr.Slider(0.2, 3.0, 1.0, step=0.05, label="Size")
            flip = gr.Radio(["none", *FLIPS], value="none", label="Flip")
        with gr.Row(visible=start == ZOOM) as zoomed:
            zoom = gr.Slider(0.3, 1.0, 0.75, step=0.01, label="Size of the picture in its new surroundings")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox("", label="Prompt (may stay empty)", scale=3)
            button = gr.Button("Edit", variant="primary", scale=1)
        operation.change(show_controls, operation, [hint, placed, shaped, zoomed], api_name=False)
        given = [drawing, operation, dx, dy, scale, flip, zoom, prompt, kept]
        button.click(run, given, [result, kept], api_name=False, concurrency_limit=1)
    return page


def serve(page: Any, port: int = 7860, *, wait: bool = True) -> str:
    """Serve a page on 127.0.0.1.

    Args:
        page: from `build_page`.
        port: 0 for any free one.
        wait: until the process is stopped; otherwise `page.close()` ends it.

    Returns:
        Its address, once it has ended or, without waiting, at once.
    """
    gr = _gradio()
    fonts = ["system-ui", "sans-serif"]  # gradio's own would be fetched from elsewhere
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port or None,
        share=False,
        prevent_thread_lock=not wait,
        quiet=not wait,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Soft(primary_hue="teal", font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )
    return address
