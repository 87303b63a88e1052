"""The verbs of the `bdl` command, a short module each."""
