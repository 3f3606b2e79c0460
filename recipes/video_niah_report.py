"""One report on several run folders of train_video_niah.py.

    python recipes/video_niah_report.py runs/niah-1 runs/niah-2 --out runs/niah_report

The metric and what is written: recipes/niah/report.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from recipes.niah.report import main

    main()
