"""Runs a script with several command lines, each in a fork of one process that has imported NeMo, which takes seconds.

    python -m tests.programs.fork_script SCRIPT "NAME ARGUMENT ..." ...

leaves NAME.out, NAME.err and NAME.code in the working directory.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

import nemo.core.config
import nemo.lightning.callback_group  # noqa: F401  hydra_runner imports it at the end of every run


def run(script: str, name: str, arguments: list[str]) -> int:
    for stream, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{ending}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:  # noqa: BLE001  as Python itself ends
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    script, *commands = sys.argv[1:]
    for name, *arguments in map(str.split, commands):
        child = os.fork()
        if child == 0:
            code = run(script, name, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # taking NeMo's modules down would take seconds
        Path(f"{name}.code").write_text(str(os.waitstatus_to_exitcode(os.wait()[1])))
