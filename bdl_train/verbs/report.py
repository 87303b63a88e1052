"""Write the report of an evaluation: one HTML file that opens in any browser, without a network.

Examples:
    bdl report run=runs/energy/20260101-120000-a1b2c3
    bdl report run=runs/energy/20260101-120000-a1b2c3 name=val
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.build import settings_of
from bdl_train.config import Options
from bdl_train.errors import Exit
from bdl_train.evaluation.report.page import write_report
from bdl_train.runs import RunDir


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/report.yaml`."""

    run: str
    name: Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]


def run(config: dict[str, Any], options: Options) -> Exit:
    """Write `<run>/evaluation/<name>/report.html`."""
    settings = settings_of(Settings, config, key="")
    print(f"written: {write_report(RunDir.open(settings.run), settings.name)}")
    return Exit.DONE
