"""Metrics as a table for the terminal."""

from collections.abc import Sequence

from bdl_train.evaluation.metrics import Metric


def show_metrics(title: str, metrics: Sequence[Metric]) -> None:
    """Print one row a metric: name, value, unit, which way is better, meaning."""
    from rich.console import Console
    from rich.table import Table

    arrows = {"lower": "↓", "higher": "↑", "": " "}
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    for header, justify in (
        ("metric", "left"),
        ("value", "right"),
        ("", "left"),
        ("unit", "left"),
        ("meaning", "left"),
    ):
        table.add_column(header, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    for metric in metrics:
        value = "undefined" if metric.value is None else f"{metric.value:.4g}"
        table.add_row(metric.key, value, arrows[metric.better], metric.unit, metric.meaning)
    Console(highlight=False).print(table)
