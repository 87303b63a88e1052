"""Metrics as a table for the terminal."""

from collections.abc import Sequence

from bdl_train.evaluation.metrics import Metric

HEADLINE = frozenset({
    "nll", "accuracy", "balanced_accuracy", "brier", "ece", "ace", "auroc", "aurc", "coverage_at_5_risk",
    "entropy", "mutual_information",
    "rmse", "mae", "crps", "coverage_50", "coverage_80", "coverage_90", "coverage_95", "interval_width_95",
    "total_std", "epistemic_std", "pit_distance",
    "best_member_nll", "mean_member_nll", "gain_nll",
})  # fmt: skip
"""What the terminal shows; the files hold all."""


def show_metrics(title: str, metrics: Sequence[Metric]) -> None:
    """Print one row a headline metric: name, value, interval over resampled rows, unit, better direction, meaning."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    arrows = {"lower": "↓", "higher": "↑", "": " "}
    table = Table(
        title=escape(title), title_justify="left", show_edge=False, pad_edge=False, header_style="bold"
    )
    for header, justify in (
        ("metric", "left"),
        ("value", "right"),
        ("95 % interval", "left"),
        ("", "left"),
        ("unit", "left"),
        ("meaning", "left"),
    ):
        narrow = header != "meaning"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=narrow)  # pyright: ignore[reportArgumentType]
    shown = [metric for metric in metrics if metric.key in HEADLINE]
    for metric in shown:
        value = "undefined" if metric.value is None else f"{metric.value:.4g}"
        table.add_row(
            escape(metric.key),
            value,
            _interval(metric),
            arrows[metric.better],
            escape(metric.unit),
            escape(metric.meaning),
        )
    console = Console(highlight=False)
    console.print(table)
    if len(shown) < len(metrics):
        console.print(f"and {len(metrics) - len(shown)} more in metrics_detail.parquet")


def _interval(metric: Metric) -> str:
    return "" if metric.low is None or metric.high is None else f"{metric.low:.3g} .. {metric.high:.3g}"
