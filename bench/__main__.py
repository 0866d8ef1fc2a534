"""`python -m fastmoco.bench ...`, which is `fastmoco bench ...`."""

import sys

from fastmoco.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
