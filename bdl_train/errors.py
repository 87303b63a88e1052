"""The errors that reach a user, and the exit status each one means."""

import difflib
from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of `bdl` (75 is EX_TEMPFAIL of sysexits.h: stopped on request, resume me)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    STOPPED = 75


class UsageError(ValueError):
    """Wrong usage: a bad setting, an unknown key, a missing file. One message, no traceback, status 2."""


class RunFailedError(RuntimeError):
    """The run ended without a usable posterior. Status 1."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or an empty string when nothing is close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""


def unknown_choice(what: str, word: str, choices: Iterable[str]) -> str:
    """One sentence for an unknown choice: what came, the nearest spelling, and the list."""
    listed = sorted(choices)
    return f"Unknown {what} '{word}'.{nearest(word, listed)} Choose one of: {', '.join(listed)}."
