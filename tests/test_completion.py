"""Shell completion: a script of every command, which bash really runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fastmoco.cli import COMMANDS, main

ASKED = """
source {script}
try() {{ COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=(); _tyro_fastmoco; echo "${{COMPREPLY[*]}}"; }}
try fastmoco ""
try fastmoco pretrain ""
try fastmoco pretrain v2 --batch
try fastmoco embed --features ""
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_and_values(tmp_path: Path, capsys) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    code = ASKED.format(script=tmp_path / "script")
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    commands, presets, flags, values = (line.split() for line in done.stdout.splitlines())
    assert {name.split()[0] for name in COMMANDS} <= set(commands)
    assert {"v1", "v2", "cifar", "demo"} <= set(presets) and "--batch-size" in flags
    assert {"backbone", "projection"} <= set(values)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(shell: str, capsys) -> None:
    assert main(["completion", shell]) == 0
    assert "fastmoco" in capsys.readouterr().out
