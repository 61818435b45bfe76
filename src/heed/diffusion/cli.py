"""`heed edit` and `heed edit-page`: DesignEdit from the command line, a thin skin over `heed.diffusion.designedit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Two = tuple[float, float]


def edit(
    image: Annotated[Path, typer.Argument(help="The picture to edit; with --plan, it is in the plan.")] = Path(),
    mask: Annotated[
        list[str] | None,
        typer.Option(help="The object: a grey picture, box:L,T,R,B or polygon:X,Y X,Y X,Y. Repeatable."),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is under the masks.")] = False,
    move: Annotated[Two | None, typer.Option(help="Move right and up, fractions of width and height.")] = None,
    copy: Annotated[Two | None, typer.Option(help="Paste the object again, this far to the right and up.")] = None,
    swap: Annotated[bool, typer.Option("--swap", help="Exchange the objects of two masks.")] = False,
    resize: Annotated[float | None, typer.Option(help="Factor of the object's size; joins --move and --copy.")] = None,
    flip: Annotated[
        str | None, typer.Option(help="left-right, up-down or both; joins --move, --copy and --resize.")
    ] = None,
    zoom_out: Annotated[Two | None, typer.Option(help="Scales of height and width, in (0, 1].")] = None,
    pan: Annotated[Two | None, typer.Option(help="Move everything right and up.")] = None,
    plan: Annotated[Path | None, typer.Option(help="JSON file with a background and layers.")] = None,
    refine_mask: Annotated[str | None, typer.Option(help="Where artifacts are to be suppressed.")] = None,
    prompt: Annotated[str, typer.Option(help="Text for the inversion and the edit.")] = "",
    model: Annotated[
        str, typer.Option(help="Local folder or Hub id of a Stable Diffusion pipeline; 'tiny' is a random one.")
    ] = "stabilityai/stable-diffusion-xl-base-1.0",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("edited.png"),
    trajectory: Annotated[
        Path | None, typer.Option(help="Safetensors file with the inversion: used where it exists, else written.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the inversion and of the edit.")] = 50,
    size: Annotated[int | None, typer.Option(help="Side in pixels the edit runs at.")] = None,
    rows_per_pass: Annotated[int | None, typer.Option(help="Rows of latents at once; fewer need less memory.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
) -> None:
    """Edit a picture: remove, move, resize, flip, copy and swap objects, zoom out, pan, or carry out a plan."""
    from heed.diffusion.designedit import EditPlan, operations
    from heed.diffusion.inversion import Trajectory
    from heed.diffusion.masks import parse_mask

    masks = [parse_mask(text) for text in mask or ()]
    if plan is not None:
        todo = EditPlan.load(plan)
    else:
        todo = operations.requested(
            image,
            masks,
            remove_it=remove,
            move_by=move,
            copy_by=copy,
            swap_them=swap,
            resize=resize,
            mirror=flip,  # type: ignore[arg-type]
            zoom=zoom_out,
            pan_by=pan,
            refine_mask=None if refine_mask is None else parse_mask(refine_mask),
        )
    kept = Trajectory.load(trajectory) if trajectory is not None and trajectory.is_file() else None
    edited = _editor(model, steps, size, rows_per_pass, device, dtype).run(todo, prompt=prompt, trajectory=kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    edited.image.save(out)
    if trajectory is not None:
        edited.trajectory.save(trajectory)
    typer.echo(f"picture: {out}")


def page(
    model: Annotated[
        str, typer.Option(help="Local folder or Hub id of a Stable Diffusion pipeline; 'tiny' is a random one.")
    ] = "stabilityai/stable-diffusion-xl-base-1.0",
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 7860,
    steps: Annotated[int, typer.Option(help="Steps of the inversion and of the edit.")] = 50,
    size: Annotated[int | None, typer.Option(help="Side in pixels the edit runs at.")] = None,
    rows_per_pass: Annotated[int | None, typer.Option(help="Rows of latents at once; fewer need less memory.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
) -> None:
    """Open a page on this machine to draw masks and edit pictures with."""
    from heed.diffusion.app import build_page, serve

    serve(build_page(_editor(model, steps, size, rows_per_pass, device, dtype), tiny=model == "tiny"), port)


def _editor(model: str, steps: int, size: int | None, rows_per_pass: int | None, device: str, dtype: str) -> Any:
    from heed.diffusion.designedit import DesignEdit, DesignEditSettings
    from heed.diffusion.host import load_pipeline
    from heed.diffusion.inversion import ddim

    settings = DesignEditSettings(steps=steps)
    pipeline = load_pipeline(model, device, dtype)
    return DesignEdit(pipeline, settings, size=size, scheduler=ddim(pipeline.scheduler), rows_per_pass=rows_per_pass)
