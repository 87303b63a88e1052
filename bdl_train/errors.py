"""The errors that reach a user, and the exit status each one means."""

import difflib
import select
import sys
import traceback
from collections.abc import Callable, Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of `bdl` (75 is EX_TEMPFAIL of sysexits.h: stopped on request, resume me)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    STOPPED = 75


# Of several jobs the worst decides, in this order: a stopped multirun has to be taken up again whatever else
# happened, wrong usage is to be mended by hand, a failure weighs more than a partial run.
WORSE = (Exit.DONE, Exit.PARTIAL, Exit.FAILED, Exit.USAGE, Exit.STOPPED)


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


def guarded(label: str, action: Callable[[], Exit]) -> Exit:
    """The status of an action; what it raises becomes a message on stderr and the status that this means."""
    try:
        return action()
    except UsageError as error:
        print(f"{label}: {error}", file=sys.stderr)
        return Exit.USAGE
    except RunFailedError as error:
        print(f"{label}: {error}", file=sys.stderr)
        return Exit.FAILED
    except KeyboardInterrupt:
        print(f"{label}: interrupted.", file=sys.stderr)
        return Exit.STOPPED
    except BrokenPipeError:
        if _stdout_is_gone():
            raise
        traceback.print_exc()
        return Exit.FAILED
    except Exception:
        traceback.print_exc()
        return Exit.FAILED


def _stdout_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))
