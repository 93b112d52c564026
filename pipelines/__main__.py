"""`python -m pipelines` is `datatools`."""

import sys

from pipelines.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
