"""Takes a run folder and holds it until it is killed.

python -m tests.programs.hold_folder FOLDER
"""

import sys
import time
from pathlib import Path

from recipes.run.lock import FolderLock

if __name__ == "__main__":
    FolderLock.take(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(600)
