"""The command, in this process."""

from command_line import bdl, train

__all__ = ["bdl", "train"]
