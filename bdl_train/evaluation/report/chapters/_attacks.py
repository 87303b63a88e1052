"""Adversarial attacks: what they do to scores and uncertainty, and whether uncertainty notices."""

from collections.abc import Iterator

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.chapters._sweeps import panel_a_metric
from bdl_train.evaluation.section import Section


def draw(section: Section) -> Iterator[Block]:
    """A panel a metric, and the detection of attacked rows."""
    yield panel_a_metric(section.tables["curves"], "Scores under attack")
    detection = section.tables["detection"]
    if len(detection):
        yield panel_a_metric(
            detection, "Are attacked rows more uncertain? AUROC, 0.5 is chance", "score", 0.5
        )
