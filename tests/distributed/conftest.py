"""The command, in this process."""

from command_line import bdl, on_ray, train

__all__ = ["bdl", "on_ray", "train"]
