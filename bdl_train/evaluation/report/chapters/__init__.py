"""What the report draws of each chapter: the module `_<key>` has one function, `draw(section)`.

A chapter without a module is shown by its words and its tables.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable

from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import Html
from bdl_train.evaluation.section import Section

Block = Figure | Html


def drawing_of(key: str) -> Callable[[Section], Iterable[Block]] | None:
    """The function that draws this chapter; None if there is none."""
    if f"_{key}" not in {module.name for module in pkgutil.iter_modules(__path__)}:
        return None
    return importlib.import_module(f"{__name__}._{key}").draw
