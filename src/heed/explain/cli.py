"""`heed explain`: the heads of vision transformers from the command line, a thin skin over `heed.explain.heads`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def explain(
    model: Annotated[
        str, typer.Argument(help="A ViT: a saved model's folder, or a name of heed, timm or transformers.")
    ],
    images: Annotated[Path, typer.Argument(help="A folder of pictures; class folders in it give labels.")],
    out: Annotated[Path, typer.Option(help="Folder for heads.html and the tables.")] = Path("runs/explain"),
    against: Annotated[list[str] | None, typer.Option(help="Another model to show beside it. Repeatable.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Of importance, with commas: prob,jsd,flip,acc_drop,loss,cls_l2,sensitivity.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many pictures.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Pictures at once.")] = 32,
    curves: Annotated[bool, typer.Option(help="Draw pruning curves, which takes most of the time.")] = True,
    clusters: Annotated[int, typer.Option(help="Attention patterns to summarise the heads by.")] = 8,
    projection: Annotated[str, typer.Option(help="Of the patterns in the plane: pca or tsne.")] = "pca",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    untrained: Annotated[bool, typer.Option("--untrained", help="Take timm's models without their weights.")] = False,
) -> None:
    """Show which heads of a vision transformer matter, how far each looks, and which pattern it has learned."""
    from dataclasses import replace

    from heed.explain.heads import PatternOptions, analyse, write_tables
    from heed.explain.heads.page import write_heads_page
    from heed.explain.models import load_model, read_pictures

    patterns = PatternOptions(clusters=clusters, projection=projection)
    chosen = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    reports = []
    for name in (model, *(against or ())):
        loaded = load_model(name, untrained=untrained)
        pictures = read_pictures(images, loaded, limit)
        report = analyse(
            loaded.model.to(device), pictures.images, pictures.labels, name=loaded.name, metrics=chosen,
            curves=curves, patterns=patterns, batch_size=batch_size,
            on_step=lambda step, name=loaded.name: typer.echo(f"{name}: {step}"),
        )  # fmt: skip
        reports.append(replace(report, notes=pictures.notes))
    page = write_heads_page(reports, out / "heads.html")
    write_tables(reports, out)
    typer.echo(f"report: {page}")
