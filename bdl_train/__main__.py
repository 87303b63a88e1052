"""`python -m bdl_train` is `bdl`: for jobs on other machines, where an interpreter is named by its path."""

import sys

from bdl_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
