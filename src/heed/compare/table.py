"""The ranked table of a comparison, for the terminal; and how its numbers are written there and in the report."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heed.compare.results import Cost, MethodResult, Metric, Results, Score

NOTHING = "–"
MANY = 10  # tied pairs that a terminal can still list


def print_results(results: Results, console: Console | None = None) -> None:
    """Print who won, and one line per method in order of rank; failed methods say why.

    Args:
        results: of a comparison.
        console: where to; None for the terminal.
    """
    console = console or Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    metrics = [metric.title for metric in results.metrics]
    for title in ("", "method", *metrics, *(cost.short for cost in results.costs)):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for row in results.methods:
        if row.status == "ok":
            style = "bold" if row.rank == 1 else ""
            table.add_row(
                str(row.rank),
                Text(row.method, style=style),
                *(Text(score(metric, row.scores[metric.name]), style=style) for metric in results.metrics),
                *(amount(cost, row) for cost in results.costs),
            )
    console.print(Text(headline(results), style="bold"))
    console.print(table)
    place = {row.method: index for index, row in enumerate(results.methods)}
    pairs = [
        (row.method, other) for row in results.methods for other in row.tied_with if place[row.method] < place[other]
    ]
    if len(pairs) > MANY:
        console.print(Text(f"{len(pairs)} pairs are tied; the report names them", style="dim"))
    elif pairs:
        console.print(Text(f"tied: {', '.join(f'{one} = {other}' for one, other in pairs)}", style="dim"))
    for row in results.methods:
        if row.status == "failed":
            console.print(Text.assemble((f"{row.method} failed: ", "red"), row.error or ""))


def headline(results: Results) -> str:
    """One sentence: which method won, or that it is a tie."""
    leaders = [row for row in results.methods if row.status == "ok" and row.rank == 1]
    finished = [row for row in results.methods if row.status == "ok"]
    task = f"on {results.data.name}"
    if not leaders:
        return f"No method finished {task}."
    first, metric = leaders[0], results.metrics[0]
    reached = score_in_words(metric, first.scores[metric.name].mean)
    if len(finished) == 1:
        return f"{first.method} reaches {reached} {task}; there is nothing to compare it with."
    if len(leaders) == 1:
        return f"{first.method} wins {task}: it reaches {reached}."
    names = [row.method for row in leaders]
    if len(leaders) == len(finished):
        return f"It is a tie {task}: {join(names)} differ by no more than their spread."
    return f"It is a tie at the top {task}: {join(names)} lead, and differ by no more than their spread."


def amount(cost: Cost, row: MethodResult) -> str:
    """A cost of a method: "143 k"."""
    return quantity(row.costs.get(cost.name), cost.unit)


def score(metric: Metric, value: Score) -> str:
    """Mean and spread: "97.8 ± 0.3 %", "0.984 ± 0.012"."""
    if value.mean is None:
        return NOTHING
    scale, digits, unit = (100, 1, " %") if metric.form == "percent" else (1, 3, "")
    spread = "" if value.spread is None else f" ± {value.spread * scale:.{digits}f}"
    return f"{value.mean * scale:.{digits}f}{spread}{unit}"


def score_in_words(metric: Metric, value: float | None) -> str:
    """ "accuracy 97.8 %" """
    return f"{metric.title} {score(metric, Score(value, None, ()))}"


def beginning(title: str) -> str:
    """A title at the beginning of a sentence: "accuracy" is "Accuracy", "AUC" stays."""
    return title[:1].upper() + title[1:]


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits with k, M, G or T: 143_210 is "143 k"."""
    if value is None:
        return NOTHING
    power = 0
    while abs(value) >= 999.5 and power < 4:
        value /= 1000
        power += 1
    digits = 0 if abs(value) >= 99.95 or (power == 0 and value == int(value)) else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def join(names: list[str]) -> str:
    """Empty, "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
