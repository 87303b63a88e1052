"""Data sets of openml.org, through scikit-learn's fetcher and its cache."""

import http.client
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from bdl_train.data import Data
from bdl_train.data._source import TableSource
from bdl_train.data._splits import random_split
from bdl_train.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Openml(TableSource):
    """One OpenML set, by number or by name and version, with a random split by number.

    Attributes:
        name: OpenML's name; null = by `data_id`.
        version: Of the set with that name; `active` = the only one that is active.
        data_id: OpenML's number of the set; null = by `name`.
        cache: Folder of scikit-learn's cache; null = its usual one.
        target: The target column; null = the set's own.
    """

    name: str | None
    version: Annotated[int, Field(ge=1)] | Literal["active"]
    data_id: Annotated[int, Field(ge=1)] | None
    cache: str | None
    target: str | None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.data_id is None):
            raise ValueError(
                f"expected either data.name or data.data_id, got name={self.name} and data_id={self.data_id}"
            )

    def load(self, root: str, seed: int) -> Data:
        fetched = self._fetch()
        target = self.target or _own_target(fetched)
        table = _frame(fetched)
        return self.from_table(
            name=self.name or f"openml-{self.data_id}",
            table=table,
            target=target,
            parts=random_split(len(table), self.split, self.test_fraction),
            declared=False,
            untyped=False,
            seed=seed,
        )

    def table(self, root: str) -> pd.DataFrame:
        return _frame(self._fetch())

    def _fetch(self) -> Any:
        from sklearn.datasets import fetch_openml, get_data_home

        which: dict[str, Any] = {"data_id": self.data_id}
        if self.name is not None:
            which = {"name": self.name, "version": self.version}
        said = ", ".join(f"data.{key}={value}" for key, value in which.items())
        try:
            return fetch_openml(**which, data_home=self.cache, as_frame=True, parser="auto", n_retries=1)
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            raise UsageError(
                f"OpenML could not be reached ({error}) and the cache has no copy of the set. Tried {said}, "
                f"cache folder {self.cache or get_data_home()} (data.cache). Fetch it once on a machine with "
                "network, or use data=csv with a file of your own."
            ) from error
        except ValueError as error:
            raise UsageError(f"OpenML refused {said}: {error}") from error


def _frame(fetched: Any) -> pd.DataFrame:
    table = fetched.frame.reset_index(drop=True)
    return table.set_axis([str(name) for name in table.columns], axis=1)


def _own_target(fetched: Any) -> str:
    names = list(fetched.target_names)
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise UsageError(
            f"The OpenML set declares {len(names)} targets ({listed}): choose one with data.target."
        )
    return str(names[0])
