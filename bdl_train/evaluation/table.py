"""Metrics as a table for the terminal."""

from collections.abc import Sequence

from bdl_train.evaluation.metrics import Metric


def show_metrics(title: str, metrics: Sequence[Metric]) -> None:
    """Print one row a metric: name, value, interval over resampled rows, unit, which way is better, meaning."""
    from rich.console import Console
    from rich.table import Table

    arrows = {"lower": "↓", "higher": "↑", "": " "}
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    for header, justify in (
        ("metric", "left"),
        ("value", "right"),
        ("95 % interval", "left"),
        ("", "left"),
        ("unit", "left"),
        ("meaning", "left"),
    ):
        table.add_column(header, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    for metric in metrics:
        value = "undefined" if metric.value is None else f"{metric.value:.4g}"
        table.add_row(
            metric.key, value, _interval(metric), arrows[metric.better], metric.unit, metric.meaning
        )
    Console(highlight=False).print(table)


def _interval(metric: Metric) -> str:
    return "" if metric.low is None or metric.high is None else f"{metric.low:.3g} .. {metric.high:.3g}"
