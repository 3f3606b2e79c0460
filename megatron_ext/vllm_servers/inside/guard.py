"""Runs a command for as long as the process that asked for it lives, and leaves nothing of it behind.

    python guard.py PARENT FOLDER COMMAND...     PARENT: the asking process; FOLDER: removed at the end if PARENT has died

Standard library only. It leads a process group of its own, which ends with it: when the command ends, when PARENT is gone,
however it went, and on SIGTERM. If the guard itself is killed, the kernel ends the command.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

__all__ = ["main"]

PR_SET_PDEATHSIG = 1  # prctl(2)
PAUSE = 0.2  # seconds
GRACE = 5.0  # seconds to end by itself


def main() -> None:
    parent, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    process = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    while process.poll() is None and not asked and os.getppid() == parent:
        time.sleep(PAUSE)
    if asked and process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    if os.getppid() != parent and folder:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
