"""The `bdl` command: find the verb, compose its config, call it, turn what happens into an exit status."""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from bdl_train import __version__, manual
from bdl_train.build import allowed_packages, allowing
from bdl_train.config import Options, compose, expand_multirun, to_yaml
from bdl_train.errors import WORSE, Exit, UsageError, guarded, nearest, unknown_choice

LOG_ENV = "BDL_LOG"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bdl` with these words (default: of the process) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = [word for word in words if word in manual.verb_names()]
    label = f"bdl {named[0]}" if named else "bdl"
    try:
        status = guarded(label, lambda: _logged(words))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output is gone (`bdl runs | head`). Nothing is left to say, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.FAILED)
    return int(status)


def _logged(words: list[str]) -> Exit:
    with _logging():
        return _dispatch(words)


def _dispatch(words: list[str]) -> Exit:
    given = _parser(words).parse_intermixed_args(words)
    if given.shell_completion is not None:
        from bdl_train.completion import answer

        print(answer(given.shell_completion), end="")
        return Exit.DONE
    if given.version:
        print(f"bdl_train {__version__}")
        return Exit.DONE
    if not given.words:
        print(manual.overview())
        return Exit.DONE
    verb, *overrides = given.words
    if verb not in manual.verb_names():
        raise UsageError(unknown_choice("verb", verb, manual.verb_names()))
    config_dir = None if given.config_dir is None else Path(given.config_dir)
    if given.help:
        print(manual.explain(verb, config_dir))
        return Exit.DONE
    if given.multirun and not manual.verb(verb).multirun:
        raise UsageError(f"-m is not for this verb: call bdl {verb} once for each value.")
    jobs = expand_multirun(overrides, config_dir) if given.multirun else [overrides]
    if given.cfg is not None:
        print("---\n".join(to_yaml(verb, job, config_dir) for job in jobs), end="")
        return Exit.DONE
    options = Options(
        verb=verb,
        overrides=tuple(overrides),
        config_dir=config_dir,
        multirun=given.multirun,
        jobs=tuple(tuple(job) for job in jobs),
    )
    # Every job is composed before the first one starts: wrong usage is known before any work.
    return _run(options, [compose(verb, job, config_dir) for job in jobs])


def _run(options: Options, configs: list[dict[str, Any]]) -> Exit:
    packages = dict.fromkeys(package for config in configs for package in _allowed(config))
    with allowing(packages):
        if allowed_packages() and os.getcwd() not in sys.path:
            # A package that the user trusts may lie in the current folder. Last: it must not hide others.
            sys.path.append(os.getcwd())
        module = importlib.import_module(f"bdl_train.verbs.{options.verb}")
        if not options.multirun:
            return Exit(module.run(configs[0], options))
        if hasattr(module, "run_many"):
            return Exit(module.run_many(configs, options))
        return _run_each(module, options, configs)


def _run_each(module: ModuleType, options: Options, configs: list[dict[str, Any]]) -> Exit:
    worst = Exit.DONE
    for index, (job, config) in enumerate(zip(options.jobs, configs, strict=True)):
        label = f"bdl {options.verb} [{index + 1}/{len(configs)}] {' '.join(job)}"
        logging.getLogger(__name__).info(label)
        one = Options(
            verb=options.verb,
            overrides=job,
            config_dir=options.config_dir,
            multirun=True,
            multirun_index=index,
            jobs=options.jobs,
        )
        status = guarded(label, lambda config=config, one=one: Exit(module.run(config, one)))
        worst = max(worst, status, key=WORSE.index)
        if status is Exit.STOPPED:
            break
    return worst


def _allowed(config: dict[str, Any]) -> list[str]:
    packages = config.get("allow", [])
    if not isinstance(packages, list) or not all(isinstance(package, str) for package in packages):
        raise UsageError(f"allow must be a list of packages, allow=[package], got {packages!r}.")
    return packages


@contextmanager
def _logging() -> Iterator[None]:
    """Plain lines on stderr: ours from the level in BDL_LOG on, of libraries only errors (DEBUG: all)."""
    level = os.environ.get(LOG_ENV, "INFO").upper()
    if level not in LEVELS:
        raise UsageError(
            f"The environment variable {LOG_ENV} is '{level}', expected one of: {', '.join(LEVELS)}."
        )
    ours, root = logging.getLogger("bdl_train"), logging.getLogger()
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if level != "DEBUG":
        handler.addFilter(
            lambda record: record.levelno >= logging.ERROR or record.name.startswith("bdl_train")
        )
    before = ours.level
    ours.setLevel(level)
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if level != "DEBUG" and not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(before)


class _Stderr(logging.StreamHandler):
    """Writes to whatever stderr is now: a live view puts a stream of its own there, to draw itself below the line."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: it would print its own usage text and leave the process."""

    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise UsageError(message)
        flags = [flag for action in self._actions for flag in action.option_strings]
        word = unknown.split()[0]
        override = _override_of(word, self.given)
        hint = f" Did you mean {override}?" if override else nearest(word, flags)
        raise UsageError(f"Unknown flag '{word}'.{hint} `bdl --help` lists the flags.")


def _override_of(flag: str, words: Sequence[str]) -> str:
    """The override `key=value` that was written as a flag, `--key=value` or `--key = value`, or nothing."""
    after = [*words[words.index(flag) + 1 :], "", ""] if flag in words else ["", ""]
    if "=" not in flag and after[0].startswith("="):
        flag += after[0] if after[0] != "=" else f"={after[1]}"
    key, equals, value = flag.lstrip("-").partition("=")
    return f"{key.replace('-', '_')}={value}" if key and equals else ""


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="bdl", add_help=False, allow_abbrev=False)
    parser.given = words
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--shell-completion", "-sc")
    return parser
