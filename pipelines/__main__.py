"""The entry point of `python -m pipelines`, which is the command `datatools`."""

import sys

from pipelines.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
