"""`heed compare TRACK`: the tracks from the command line, a thin skin over `heed.compare.run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Put methods side by side on your data, at the same budget.")

# Options that several tracks have.
Out = Annotated[Path, typer.Option(help="Folder for everything the run writes.")]
Images = Annotated[str, typer.Option(help="digits, a folder with one folder of images per class, or a dataset.")]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")]
Augment = Annotated[str, typer.Option(help="none, shift or flip.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")]
Seeds = Annotated[int, typer.Option(help="Trials per method.")]
WeightDecay = Annotated[float, typer.Option(help="Of AdamW.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Jobs = Annotated[int, typer.Option(help="Trials that run at the same time on this machine.")]
Ray = Annotated[str | None, typer.Option(help="Address of a Ray cluster to run the trials on.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads per trial.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run in the folder.")]


@app.command()
def classify(
    methods: Annotated[str, typer.Option(help="Attention layers or models, with commas: softmax,neighborhood.")],
    data: Images = "digits",
    out: Out = Path("runs/classify"),
    epochs: Annotated[int | None, typer.Option(help="Budget: passes over the training images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget: optimiser steps per trial.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget: minutes of training, for all trials together.")] = None,
    seeds: Seeds = 3,
    host: Annotated[str, typer.Option(help="The vision transformer that layers are put into.")] = "vit_micro",
    image_size: ImageSize = None,
    augment: Augment = "shift",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one-cycle schedule.")] = 3e-3,
    weight_decay: WeightDecay = 0.05,
    device: Device = "auto",
    precision: Precision = "fp32",
    jobs: Jobs = 1,
    ray: Ray = None,
    threads: Threads = None,
    strict: Strict = False,
    fresh: Fresh = False,
) -> None:
    """Compare methods on classifying images: a ranked table, report.html and the winner as a model."""
    _run("ClassifySettings", locals())


@app.command()
def pretrain(
    methods: Annotated[str, typer.Option(help="Objectives, with commas: mae-random,mae-green,scratch.")],
    data: Images = "digits",
    out: Out = Path("runs/pretrain"),
    epochs: Annotated[int | None, typer.Option(help="Budget: passes of pre-training over the images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget: optimiser steps of pre-training.")] = None,
    finetune_epochs: Annotated[int, typer.Option(help="Passes of fine-tuning over the labelled images.")] = 15,
    labels: Annotated[int | None, typer.Option(help="Labelled images per class; all when not given.")] = None,
    neighbours: Annotated[int, typer.Option(help="Of the k-NN classifier.")] = 10,
    seeds: Seeds = 3,
    host: Annotated[str, typer.Option(help="The vision transformer that is pre-trained.")] = "vit_micro",
    mask_ratio: Annotated[float, typer.Option(help="Share of masked patches.")] = 0.75,
    norm_pix: Annotated[bool, typer.Option("--norm-pix", help="Predict pixels normalised per patch.")] = False,
    image_size: ImageSize = None,
    augment: Augment = "shift",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak of pre-training's one-cycle schedule.")] = 3e-3,
    finetune_learning_rate: Annotated[float, typer.Option(help="Peak of fine-tuning's schedule.")] = 1e-3,
    weight_decay: WeightDecay = 0.05,
    device: Device = "auto",
    precision: Precision = "fp32",
    jobs: Jobs = 1,
    ray: Ray = None,
    threads: Threads = None,
    strict: Strict = False,
    fresh: Fresh = False,
) -> None:
    """Compare objectives on pre-training without labels: k-NN, linear probe and fine-tuning, against no pre-training."""
    _run("PretrainSettings", locals())


@app.command()
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
    out: Out = Path("runs/slides"),
    epochs: Annotated[int | None, typer.Option(help="Passes over the training bags.")] = None,
    seeds: Seeds = 3,
    learning_rate: Annotated[float | None, typer.Option(help="At the start of the cosine.")] = None,
    weight_decay: WeightDecay = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Bags per step.")] = 1,
    dim: Annotated[int | None, typer.Option(help="Width that features are reduced to.")] = None,
    n_token: Annotated[int, typer.Option(help="Attention branches.")] = 5,
    n_masked_patch: Annotated[int, typer.Option(help="How many of the strongest instances may be masked.")] = 10,
    mask_drop: Annotated[float, typer.Option(help="Share of them that is masked.")] = 0.6,
    split_seed: Annotated[int, typer.Option(help="Of the split by patients, where the table has none.")] = 0,
    device: Device = "auto",
    jobs: Jobs = 1,
    ray: Ray = None,
    threads: Threads = None,
    fresh: Fresh = False,
) -> None:
    """Compare methods on classifying bags of features, such as the patches of a slide: AUC, F1, and where they look."""
    _run("SlidesSettings", locals())


@app.command()
def language(
    methods: Annotated[str, typer.Option(help="Kinds of attention, with commas: softmax,window,hip.")],
    data: Annotated[
        str, typer.Option(help="topics (English that comes with Python), a text file, a folder of them, or a dataset.")
    ] = "topics",
    out: Out = Path("runs/language"),
    epochs: Annotated[int | None, typer.Option(help="Budget: passes over the training text.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget: optimiser steps per trial.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget: minutes of training, for all trials together.")] = None,
    seeds: Seeds = 3,
    width: Annotated[int, typer.Option(help="Of the decoder.")] = 128,
    layers: Annotated[int, typer.Option(help="Of the decoder.")] = 4,
    heads: Annotated[int, typer.Option(help="Of its attention.")] = 4,
    context: Annotated[int, typer.Option(help="Bytes that a model sees at once.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Stretches of text per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one-cycle schedule.")] = 3e-3,
    weight_decay: WeightDecay = 0.1,
    device: Device = "auto",
    precision: Precision = "fp32",
    jobs: Jobs = 1,
    ray: Ray = None,
    threads: Threads = None,
    fresh: Fresh = False,
) -> None:
    """Compare kinds of attention in small language models trained on the same text: bits per byte, speed, memory."""
    _run("LanguageSettings", locals())


@app.command()
def cache(
    methods: Annotated[
        str, typer.Option(help="Caches and sparse attention, with commas: full,zipcache,razor.")
    ] = "full,recent,h2o,razor,zipcache,hip,seer",
    model: Annotated[
        str, typer.Option(help="Folder or Hub id of a language model of transformers, or tiny: one trained first.")
    ] = "tiny",
    data: Annotated[
        str,
        typer.Option("--text", help="topics (English that comes with Python), a text file, a folder, or a dataset."),
    ] = "topics",
    out: Out = Path("runs/cache"),
    seeds: Annotated[int, typer.Option(help="Of the tiny model and of the pass keys.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens that are read at once.")] = 480,
    following: Annotated[int, typer.Option(help="Tokens after them, whose perplexity counts.")] = 32,
    texts: Annotated[int, typer.Option(help="Prompts for perplexity.")] = 32,
    keys: Annotated[int, typer.Option(help="Prompts with a pass key.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    tiny_steps: Annotated[int | None, typer.Option(help="Training steps of the tiny model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a given model: auto, float32, float16 or bfloat16.")] = "auto",
    device: Device = "auto",
    jobs: Jobs = 1,
    ray: Ray = None,
    threads: Threads = None,
    fresh: Fresh = False,
) -> None:
    """Compare caches and sparse attention in a language model: perplexity, pass keys found, memory, speed."""
    _run("CacheSettings", locals())


@app.command()
def hallucination(
    methods: Annotated[str, typer.Option(help="plain and steering methods, with commas.")] = "plain,var",
    model: Annotated[
        str, typer.Option(help="Folder or Hub id of an image-text model; tiny is trained on drawn scenes first.")
    ] = "tiny",
    data: Annotated[str, typer.Option(help="JSON file of questions as POPE has them, or scenes.")] = "scenes",
    images: Annotated[str | None, typer.Option(help="Folder of the images the JSON file names.")] = None,
    out: Out = Path("runs/hallucination"),
    questions: Annotated[int | None, typer.Option(help="How many to ask at most.")] = None,
    seeds: Annotated[int, typer.Option(help="Tiny models, or draws where answers are sampled.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="Sample answers; greedy when not given.")] = None,
    tiny_steps: Annotated[int | None, typer.Option(help="Training steps of the tiny model.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    jobs: Jobs = 1,
    ray: Ray = None,
    threads: Threads = None,
    fresh: Fresh = False,
) -> None:
    """Compare steering methods on what a vision-language model sees that is not there: yes-or-no questions, CHAIR."""
    _run("HallucinationSettings", locals())


def _run(kind: str, given: dict[str, Any]) -> None:
    """Carry out a comparison with a live display, print its table and write its report.

    Args:
        kind: name of the track's settings in `heed.compare`.
        given: the options of its command.
    """
    from heed import compare
    from heed.compare.progress import LiveProgress
    from heed.compare.report import write_report
    from heed.compare.table import print_results

    methods = tuple(name.strip() for name in given["methods"].split(",") if name.strip())
    settings = getattr(compare, kind)(**{**given, "methods": methods, "out": str(given["out"])})
    with LiveProgress(settings.methods, settings.seeds) as show:
        results = compare.run(settings, on_progress=show)
    print_results(results)
    typer.echo(f"report: {write_report(results, settings.out)}")
