"""The command line: a thin skin over the public functions, which do all checking and all work."""

from __future__ import annotations

import importlib
import inspect
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from heed.compare import cli as compare_commands
from heed.diffusion import cli as edit_commands
from heed.explain import cli as explain_commands
from heed.multimodal import cli as ask_commands

# What is heavy is imported by the command that needs it, so that `heed --help` answers at once.


class _Group(TyperGroup):
    """Says what went wrong in one line, unless --debug asks for the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = shlex.join(["heed", *(arg for arg in sys.argv[1:] if arg != "--fresh")])
            typer.echo(f"\nstopped. What is finished is kept; this goes on from there:\n  {again}", err=True)
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, ImportError) as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"heed: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Choose what a model pays attention to.",
)
app.add_typer(compare_commands.app, name="compare")
app.command("edit")(edit_commands.edit)
app.command("edit-page")(edit_commands.page)
app.command("ask")(ask_commands.ask)
app.command("explain")(explain_commands.explain)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Choose what a model pays attention to."""


@app.command("list")
def list_systems(
    room: Annotated[str | None, typer.Option(help="Only the systems of this room, such as vision.")] = None,
    built: Annotated[bool, typer.Option("--built", help="Only the systems that are built.")] = False,
) -> None:
    """List the systems."""
    from rich.console import Console
    from rich.table import Table

    from heed.catalogue import systems

    found = systems(room=room, built=True if built else None)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("system", "room", "", "title"):
        table.add_column(title, no_wrap=title != "title")
    for entry in found:
        table.add_row(entry.slug, entry.room, "built" if entry.built else "planned", entry.title)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{len(found)} systems, {sum(entry.built for entry in found)} of them built", style="dim")


@app.command()
def show(slug: Annotated[str, typer.Argument(help='A system: "23-hilo", "hilo" or 23.')]) -> None:
    """Show one system: its paper, its public names and its demo."""
    from heed.catalogue import system
    from heed.demos.registry import demos

    entry = system(slug)
    typer.echo(f"{entry.slug}  {entry.title}")
    typer.echo(f"paper   {entry.paper}")
    typer.echo(f"room    {entry.room}")
    typer.echo(f"state   {'built' if entry.built else 'planned'}")
    for name in entry.names:
        typer.echo(f"  {name}\n      {_summary(name)}")
    if entry.slug in demos.names():
        typer.echo(f"demo    heed demo {entry.slug}")


def _summary(name: str) -> str:
    """The first line of the docstring of a public name."""
    module, _, attribute = name.rpartition(".")
    doc = inspect.getdoc(getattr(importlib.import_module(module), attribute))
    return doc.splitlines()[0] if doc else ""


@app.command()
def demo(
    slug: Annotated[str, typer.Argument(help='A system: "13-fna", "fna" or 13.')],
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo"),
) -> None:
    """Run a system on a small real input: print its figures and draw a picture."""
    from heed.demos.registry import run_demo

    picture, figures = run_demo(slug, out)
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        typer.echo(f"{name:<{width}}  {value}")
    typer.echo(f"picture: {picture}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a comparison.")]) -> None:
    """Print the table of a comparison again and rebuild its report.html."""
    from heed.compare.report import write_report
    from heed.compare.results import Results
    from heed.compare.table import print_results

    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results.json; a comparison writes it when all its trials have ended")
    results = Results.read(path)
    print_results(results)
    typer.echo(f"report: {write_report(results, folder)}")
