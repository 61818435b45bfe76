"""The command line: a thin skin over the public functions, which do all checking and all work."""

from __future__ import annotations

import importlib
import inspect
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from heed.diffusion import cli as edit_commands
from heed.explain import cli as explain_commands
from heed.multimodal import cli as ask_commands

if TYPE_CHECKING:
    from heed.compare import Settings

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
compare = typer.Typer(no_args_is_help=True, help="Put methods side by side on your data, at the same budget.")
app.add_typer(compare, name="compare")
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


@compare.command()
def classify(
    methods: Annotated[str, typer.Option(help="Attention layers or models, with commas: softmax,neighborhood.")],
    data: Annotated[
        str, typer.Option(help="digits, a folder with one folder of images per class, or a dataset.")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for everything the run writes.")] = Path("runs/classify"),
    epochs: Annotated[int | None, typer.Option(help="Budget: passes over the training images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget: optimiser steps per trial.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget: minutes of training, for all trials together.")] = None,
    seeds: Annotated[int, typer.Option(help="Trials per method.")] = 3,
    host: Annotated[str, typer.Option(help="The vision transformer that layers are put into.")] = "vit_micro",
    image_size: Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")] = None,
    augment: Annotated[str, typer.Option(help="none, shift or flip.")] = "shift",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one-cycle schedule.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.05,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    jobs: Annotated[int, typer.Option(help="Trials that run at the same time on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to run the trials on.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per trial.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run in the folder.")] = False,
) -> None:
    """Compare methods on classifying images: a ranked table, report.html and the winner as a model."""
    given = {**locals(), "methods": [name.strip() for name in methods.split(",") if name.strip()], "out": str(out)}

    from heed.compare import ClassifySettings

    _run(ClassifySettings(**given))


@compare.command()
def pretrain(
    methods: Annotated[str, typer.Option(help="Objectives, with commas: mae-random,mae-green,scratch.")],
    data: Annotated[
        str, typer.Option(help="digits, a folder with one folder of images per class, or a dataset.")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for everything the run writes.")] = Path("runs/pretrain"),
    epochs: Annotated[int | None, typer.Option(help="Budget: passes of pre-training over the images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget: optimiser steps of pre-training.")] = None,
    finetune_epochs: Annotated[int, typer.Option(help="Passes of fine-tuning over the labelled images.")] = 15,
    labels: Annotated[int | None, typer.Option(help="Labelled images per class; all when not given.")] = None,
    neighbours: Annotated[int, typer.Option(help="Of the k-NN classifier.")] = 10,
    seeds: Annotated[int, typer.Option(help="Trials per method.")] = 3,
    host: Annotated[str, typer.Option(help="The vision transformer that is pre-trained.")] = "vit_micro",
    mask_ratio: Annotated[float, typer.Option(help="Share of masked patches.")] = 0.75,
    norm_pix: Annotated[bool, typer.Option("--norm-pix", help="Predict pixels normalised per patch.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")] = None,
    augment: Annotated[str, typer.Option(help="none, shift or flip.")] = "shift",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak of pre-training's one-cycle schedule.")] = 3e-3,
    finetune_learning_rate: Annotated[float, typer.Option(help="Peak of fine-tuning's schedule.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.05,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    jobs: Annotated[int, typer.Option(help="Trials that run at the same time on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to run the trials on.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per trial.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run in the folder.")] = False,
) -> None:
    """Compare objectives on pre-training without labels: k-NN, linear probe and fine-tuning, against no pre-training."""
    given = {**locals(), "methods": [name.strip() for name in methods.split(",") if name.strip()], "out": str(out)}

    from heed.compare import PretrainSettings

    _run(PretrainSettings(**given))


@compare.command()
def slides(
    methods: Annotated[
        str, typer.Option(help="Classifiers of bags, with commas: abmil,stkim,acmil-ga,acmil-mha.")
    ] = "abmil,stkim,acmil-ga,acmil-mha",
    data: Annotated[
        str, typer.Option(help="digits, or a folder of feature files (.pt, .h5, .npy, .safetensors), one per slide.")
    ] = "digits",
    labels: Annotated[
        str | None, typer.Option(help="csv with the columns slide, label and perhaps patient, split; else labels.csv.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything the run writes.")] = Path("runs/slides"),
    epochs: Annotated[int | None, typer.Option(help="Passes over the training bags.")] = None,
    seeds: Annotated[int, typer.Option(help="Trials per method.")] = 3,
    learning_rate: Annotated[float | None, typer.Option(help="At the start of the cosine.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Bags per step.")] = 1,
    dim: Annotated[int | None, typer.Option(help="Width that features are reduced to.")] = None,
    n_token: Annotated[int, typer.Option(help="Attention branches.")] = 5,
    n_masked_patch: Annotated[int, typer.Option(help="How many of the strongest instances may be masked.")] = 10,
    mask_drop: Annotated[float, typer.Option(help="Share of them that is masked.")] = 0.6,
    split_seed: Annotated[int, typer.Option(help="Of the split by patients, where the table has none.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Trials that run at the same time on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to run the trials on.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per trial.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run in the folder.")] = False,
) -> None:
    """Compare methods on classifying bags of features, such as the patches of a slide: AUC, F1, and where they look."""
    given = {**locals(), "methods": [name.strip() for name in methods.split(",") if name.strip()], "out": str(out)}

    from heed.compare import SlidesSettings

    _run(SlidesSettings(**given))


@compare.command()
def hallucination(
    methods: Annotated[str, typer.Option(help="plain and steering methods, with commas.")] = "plain,var",
    model: Annotated[
        str, typer.Option(help="Folder or Hub id of an image-text model; tiny is trained on drawn scenes first.")
    ] = "tiny",
    data: Annotated[str, typer.Option(help="JSON file of questions as POPE has them, or scenes.")] = "scenes",
    images: Annotated[str | None, typer.Option(help="Folder of the images the JSON file names.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything the run writes.")] = Path("runs/hallucination"),
    questions: Annotated[int | None, typer.Option(help="How many to ask at most.")] = None,
    seeds: Annotated[int, typer.Option(help="Tiny models, or draws where answers are sampled.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="Sample answers; greedy when not given.")] = None,
    tiny_steps: Annotated[int | None, typer.Option(help="Training steps of the tiny model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Trials that run at the same time on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to run the trials on.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per trial.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run in the folder.")] = False,
) -> None:
    """Compare steering methods on what a vision-language model sees that is not there: yes-or-no questions, CHAIR."""
    given = {**locals(), "methods": [name.strip() for name in methods.split(",") if name.strip()], "out": str(out)}

    from heed.compare import HallucinationSettings

    _run(HallucinationSettings(**given))


def _run(settings: Settings) -> None:
    """Carry out a comparison with a live display, print its table and write its report."""
    from heed import compare
    from heed.compare.progress import LiveProgress
    from heed.compare.report import write_report
    from heed.compare.table import print_results

    with LiveProgress(settings.methods, settings.seeds) as show:
        results = compare.run(settings, on_progress=show)
    print_results(results)
    typer.echo(f"report: {write_report(results, settings.out)}")


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
