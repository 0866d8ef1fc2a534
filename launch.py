"""Start a fastmoco command with one process per GPU.

    python launch.py pretrain demo                       every GPU of this machine, or its CPU
    python launch.py --nproc 4 pretrain v2 --data ...    four processes
    python launch.py --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29400 pretrain v2 ...

Flags before the command are --nproc and torchrun's own (--nnodes, --rdzv-*, --max-restarts ...). On one GPU or a CPU
the command runs in this process; and so it does under torchrun, where RANK is set.
"""

import os
import signal
import sys

from fastmoco import environment
from fastmoco.process import interrupt

if __name__ == "__main__":
    interrupt.end_silently()

from fastmoco.cli import complain, main, parse
from fastmoco.options import UsageError

FLAG_WITHOUT_VALUE = {"--standalone", "--no-python", "--no_python", "--run-path", "--run_path"}


def split(argv: list[str]) -> tuple[str, list[str], list[str]]:
    """`--nproc`, torchrun's flags and the command of a command line."""
    nproc, flags, rest = "auto", [], list(argv)
    while rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help", "-V", "--version"):
        name, equals, value = rest.pop(0).partition("=")
        if not equals and name not in FLAG_WITHOUT_VALUE:
            if not rest:
                raise UsageError(f"{name} needs a value: python launch.py {name} VALUE COMMAND")
            value = rest.pop(0)
        if name in ("--nproc", "--nproc-per-node", "--nproc_per_node"):
            nproc = value
        else:
            flags.append(f"{name}={value}" if value else name)
    if nproc != "auto" and not (nproc.isdecimal() and int(nproc) >= 1):
        raise UsageError(f"--nproc is {nproc}: use auto, or a whole number of at least 1")
    return nproc, flags, rest


def launch(nproc: int, flags: list[str], command: list[str], patience: float) -> int:
    """Run `command` in `nproc` processes of this machine, none stopped for more than `patience` seconds; exit code."""
    from fastmoco.process import supervise

    alone = [] if any(flag.startswith(("--nnodes", "--rdzv", "--master")) for flag in flags) else ["--standalone"]
    numbers = ",".join(signal.Signals(number).name for number in interrupt.not_ignored(interrupt.SIGNALS))
    own = [f"--nproc-per-node={nproc}", f"--signals-to-handle={numbers}", *alone, *flags, __file__, *command]
    return supervise.torchrun(own, patience)


def start(argv: list[str]) -> int:
    """Check the command here, where a mistake is reported once, then run it."""
    environment.spin_briefly()
    try:
        nproc, flags, command = split(argv)
        row, settings = parse(command) if "RANK" not in os.environ else (None, None)
    except SystemExit as stop:
        return stop.code
    except ValueError as error:
        return complain(error)
    if row is None:
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(main)(command)  # what ends it is left where the launcher looks
    if not row.distributed:
        return main(command)
    import torch

    count = max(1, torch.cuda.device_count()) if nproc == "auto" else int(nproc)
    alone, options = count == 1 and not flags, getattr(settings, "options", settings)
    return main(command) if alone else launch(count, flags, command, options.timeout_seconds)


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
