"""`python -m fastmoco`, also under torchrun, and the console script."""

import sys

from fastmoco.process import interrupt


def start() -> None:
    """Run the command line of this process and exit with its code."""
    interrupt.end_silently()
    from fastmoco.cli import main  # now that Ctrl-C may come

    sys.exit(main())


if __name__ == "__main__":
    start()
