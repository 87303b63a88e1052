"""Print constraints: the version of everything that bdl_train and its dev extra need in this environment.

Packages that merely lie in the environment are left out, and so are local versions (`+cpu`).
"""

import re
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.version import Version

HEADER = "# Versions tested together; written by `make constraints`."


def closure(name: str, extras: frozenset[str]) -> dict[str, str]:
    """Canonical name to public version of everything that a package with these extras needs here."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            if needed.marker and not any(needed.marker.evaluate({"extra": one}) for one in {"", *extras}):
                continue
            canonical = re.sub(r"[-_.]+", "-", needed.name).lower()
            try:
                found[canonical] = Version(distribution(canonical).version).public
            except PackageNotFoundError as error:
                raise SystemExit(f"{name} needs {text}, which is not installed: run `make test`.") from error
            waiting.append((canonical, frozenset(needed.extras)))
    return found


if __name__ == "__main__":
    versions = closure("bdl-train", frozenset({"dev"}))
    print(HEADER, *(f"{name}=={version}" for name, version in sorted(versions.items())), sep="\n")
