"""`heed ask`: a question about a picture, plain and steered, a thin skin over `heed.multimodal.ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ask(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="Local folder or Hub id of an image-text model with its processor.")],
    method: Annotated[str, typer.Option(help="The steering method, such as var.")] = "var",
    out: Annotated[Path, typer.Option(help="Folder for the drawing of where it looks.")] = Path("ask"),
    tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
) -> None:
    """Ask a vision-language model about a picture, as it is and steered, side by side."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    from heed.multimodal.ask import ask as carry_out

    looks, picture = carry_out(
        image, question, model=model, method=method, out=out, device=device, dtype=dtype, max_new_tokens=tokens
    )
    console = Console(highlight=False)
    width = max(24, (console.width - 4) // len(looks))
    console.print(Columns([Panel(Text(seen.text), title=name, width=width) for name, seen in looks.items()]))
    if picture is None:
        typer.echo("no drawing: this model's image tokens have no places in the image")
    else:
        typer.echo(f"picture: {picture}")
