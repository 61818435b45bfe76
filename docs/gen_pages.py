"""Pages that follow from the code: one per built system, the table of all systems, the reference, the benchmark tables.

mkdocs-gen-files runs this while `mkdocs build` collects its pages; nothing is written into docs/.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import mkdocs_gen_files

from heed.catalogue import System, systems
from heed.demos.registry import demos

ROOT = Path(__file__).parents[1] if "__file__" in globals() else Path.cwd()
SOURCE = ROOT / "src"
REFERENCE = {
    "heed": ("The public face", ["heed"]),
    "engine": ("Attention under a pattern: patterns, plans, backends", ["heed.engine"]),
    "layers": ("Drop-in modules that mix tokens", ["heed.layers"]),
    "vision": ("Image backbones", ["heed.vision"]),
    "language": ("Language models and methods on them", ["heed.language"]),
    "pretrain": ("Mask generators and objectives", ["heed.pretrain"]),
    "diffusion": ("Editing and attention processors for diffusers", ["heed.diffusion"]),
    "multimodal": ("Steering of vision-language models", ["heed.multimodal"]),
    "predict": ("Systems with structured output", ["heed.predict"]),
    "methods": ("Methods on host models", ["heed.methods", "heed.hosts"]),
    "models": (
        "Models by name, configurations, checkpoints",
        ["heed.models", "heed.checkpoint", "heed.registry", "heed.timm"],
    ),
    "explain": ("What a layer or a model attends to", ["heed.explain"]),
    "compare": ("Methods side by side", ["heed.compare"]),
    "data": ("Loading real data", ["heed.data"]),
    "catalogue": ("The systems as data, and their demos", ["heed.catalogue", "heed.demos.registry"]),
}

README_LINKS = {
    "docs/": "",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}


def readme_links() -> dict[str, str]:
    """Where the README's links lead on these pages: the file of a system to the system's page."""
    files = {
        f"src/{module.replace('.', '/')}.py": f"systems/{entry.slug}.md"
        for entry in systems(built=True)
        for module in by_module(entry.names)
    }
    return {**files, **README_LINKS}


def write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text)


def copy_of(name: str, links: dict[str, str]) -> str:
    """A file of the root as a page, its links adapted."""
    text = (ROOT / name).read_text()
    for before, after in links.items():
        text = text.replace(f"]({before}", f"]({after}")
    return text


def opening(module: str) -> str:
    """A module's docstring, as it stands in the file."""
    doc = inspect.getdoc(import_module(module))
    return f"```text\n{doc}\n```\n" if doc else ""


def by_module(names: list[str]) -> dict[str, list[str]]:
    """Dotted names, gathered by their modules, in the order of the files."""
    gathered: dict[str, list[str]] = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        gathered.setdefault(module, []).append(attribute)
    return gathered


def picture(entry: System) -> str:
    image = f"images/{entry.slug}.png"
    if not (ROOT / "docs" / image).is_file():
        return ""
    return f"![What the demo of {entry.title} draws](../{image})\n\n"


def system_page(entry: System) -> str:
    lines = [f"# {entry.title}\n", f"Paper: {entry.paper}\n", f"Room: `{entry.room}` · system `{entry.slug}`\n"]
    if entry.slug in demos.names():
        lines.append(f"```bash\nheed demo {entry.slug}\n```\n")
    lines.append(picture(entry))
    for module, names in by_module(entry.names).items():
        lines.append(f"## `{module}`\n")
        lines.append(opening(module))
        lines += [f"::: {module}.{name}\n" for name in names]
    return "\n".join(lines)


def table_of_systems() -> str:
    everything = systems()
    built = sum(entry.built for entry in everything)
    lines = [
        "# Systems\n",
        f"{len(everything)} published systems have a place in heed; {built} of them are built. `heed list` prints this "
        "table, `heed show SYSTEM` one entry.\n",
        "| system | title | room | state | paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in everything:
        title = f"[{entry.title}]({entry.slug}.md)" if entry.built else entry.title
        state = "built" if entry.built else "planned"
        lines.append(f"| {entry.slug} | {title} | {entry.room} | {state} | {entry.paper} |")
    return "\n".join(lines) + "\n"


def modules_of(name: str) -> Iterator[str]:
    """The modules of a package, or the module itself."""
    path = SOURCE.joinpath(*name.split("."))
    if not path.is_dir():
        yield name
        return
    for file in sorted(path.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_names(module: str) -> list[str]:
    """Documented functions and classes that a module defines, without those whose names start with an underscore."""
    path = SOURCE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    nodes = ast.parse(file.read_text()).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [node.name for node in nodes if isinstance(node, kinds) and ast.get_docstring(node)]
    return [name for name in dict.fromkeys(found) if not name.startswith("_")]


def reference_page(room: str, owners: dict[str, System]) -> str:
    title, packages = REFERENCE[room]
    lines = [f"# heed.{room}\n" if room != "heed" else "# heed\n", f"{title}.\n"]
    if room == "heed":
        return "\n".join(lines) + "\n" + face()
    for package in packages:
        for module in modules_of(package):
            names = public_names(module)
            described = opening(module)
            if not names and not (described and module.count(".") > 1):
                continue
            lines.append(f"## `{module}`\n")
            lines.append(described)
            for name in names:
                owner = owners.get(f"{module}.{name}")
                if owner is None:
                    lines.append(f"::: {module}.{name}\n")
                else:
                    lines.append(
                        f"- [`{name}`](../systems/{owner.slug}.md#{module}.{name}), system {owner.slug}: {owner.title}"
                    )
            lines.append("")
    return "\n".join(lines)


def face() -> str:
    """The names of `import heed`, with the first line of each docstring and a link to the whole."""
    import heed

    lines = ["| name | what it is |", "| --- | --- |"]
    for name in heed.__all__:
        thing: Any = getattr(heed, name)
        doc = (inspect.getdoc(thing) or "").splitlines()[0]
        if inspect.ismodule(thing):
            room = thing.__name__.split(".")[1]
            target = f"{room}.md#{re.sub(r'[^a-z]', '', thing.__name__)}"
        else:
            room = thing.__module__.split(".")[1]
            room = room if room in ("layers", "engine", "methods") else "models"
            target = f"{room}.md#{thing.__module__}.{name}"
        lines.append(f"| [`heed.{name}`]({target}) | {doc} |")
    return "\n".join(lines) + "\n"


def benchmark_table(name: str) -> str:
    """The figures in docs/benchmarks/NAME.json, or the command that measures them."""
    command = f"python benchmarks/{name}.py --out docs/benchmarks/{name}.json"
    path = ROOT / "docs" / "benchmarks" / f"{name}.json"
    if not path.is_file():
        return f"*Not measured in this version of the pages. The command is `{command}`.*\n"
    content = json.loads(path.read_text())
    columns = list(content["rows"][0]) if content["rows"] else []
    lines = [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' if i == 0 else '---:' for i in range(len(columns)))} |",
    ]
    lines += [f"| {' | '.join(cell(row[column]) for column in columns)} |" for row in content["rows"]]
    machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    return "\n".join(lines) + f"\n\n`{command}`. Measured on: {machine}.\n"


def cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None or value == "nan" else str(value)


def benchmarks_page() -> str:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    return re.sub(r"<!-- table: (\w+) -->", lambda match: benchmark_table(match[1]), text)


def schema() -> str:
    """The layout of results.json, from the dataclasses that make it."""
    from heed.compare import results

    lines = [f"This is version {results.SCHEMA}, which the file names as `schema`.\n"]
    for cls in (results.Results, results.Machine, results.DataSummary, results.Metric, results.Cost,
                results.MethodResult, results.Score, results.Curve, results.Best):  # fmt: skip
        doc = inspect.getdoc(cls) or ""
        lines.append(f"### {cls.__name__}\n\n{doc.splitlines()[0]}\n")
        lines += ["| field | type | what it is |", "| --- | --- | --- |"]
        described = arguments(doc)
        for field in dataclasses.fields(cls):
            kind = str(field.type).replace("|", "\\|")
            lines.append(f"| `{field.name}` | {kind} | {described[field.name]} |")
        lines.append("")
    return "\n".join(lines)


def arguments(doc: str) -> dict[str, str]:
    """The names under Args of a docstring; "a, b: text" describes both."""
    described: dict[str, str] = {}
    _, _, args = doc.partition("Args:\n")
    for entry in re.split(r"\n(?= {4}\S)", args.rstrip()):
        names, _, text = entry.strip().partition(": ")
        described |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return described


def main() -> None:
    write("index.md", copy_of("README.md", readme_links()))
    write("contributing.md", copy_of("CONTRIBUTING.md", {"docs/": "", "README.md": "index.md"}))
    write("changelog.md", copy_of("CHANGELOG.md", {}))
    write("license.md", f"# Licence\n\n```text\n{(ROOT / 'LICENSE').read_text().rstrip()}\n```\n")
    write("benchmarks.md", benchmarks_page())
    compare = (ROOT / "docs" / "guide" / "compare.md").read_text()
    write("guide/compare.md", compare.replace("<!-- results schema -->", schema()))

    built = systems(built=True)
    write("systems/index.md", table_of_systems())
    for entry in built:
        write(f"systems/{entry.slug}.md", system_page(entry))

    owners = {name: entry for entry in built for name in entry.names}
    for room in REFERENCE:
        write(f"reference/{room}.md", reference_page(room, owners))
    listed = "\n".join(f"- [{name}]({name}.md): {title}" for name, (title, _) in REFERENCE.items())
    write("reference/index.md", f"# Reference\n\n{listed}\n")

    sections = {
        "Systems": [f"systems/{entry.slug}.md" for entry in built],
        "Reference": [{name: f"reference/{name}.md"} for name in REFERENCE],
    }
    nav: list[Any] = mkdocs_gen_files.config["nav"]
    for item in nav:
        for title, pages in sections.items():
            if isinstance(item, dict) and title in item:
                item[title] = [*item[title][:1], *pages]


main()
