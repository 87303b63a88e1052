"""Finding the file that a setting names, and reading arrays from it."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from bdl_train.errors import UsageError, nearest


def find_file(path: str, root: str, *, key: str) -> Path:
    """The file that `path` names, from here or from inside the folder of data sets.

    Args:
        path: Absolute, or relative to the working directory or to `root`.
        root: The folder of data sets (`data.root`).
        key: The config key to name in an error.

    Raises:
        UsageError: there is no such file; names the nearest one beside it.
    """
    asked = Path(path).expanduser()
    places = [asked] if asked.is_absolute() else [asked, Path(root) / asked]
    for place in places:
        if place.is_file():
            return place
    beside = [one.name for place in places if place.parent.is_dir() for one in place.parent.iterdir()]
    looked = (
        f"neither {' nor '.join(str(place) for place in places)} is a file"
        if len(places) > 1
        else "there is no such file"
    )
    raise UsageError(f"{key}={path}: {looked}.{nearest(asked.name, beside)}")


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of an npz file; nothing is unpickled.

    Raises:
        UsageError: not an npz file, cut short, or with Python objects in it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as an npz file of plain arrays: {error}.") from error
