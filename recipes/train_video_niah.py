"""Needle in a video haystack: which position scheme finds things in videos longer than those it was trained on?

    python recipes/train_video_niah.py --config-name video_niah

The same data and the same initial weights for every scheme; only the positions differ. The task: recipes/video_niah.py.
The metric: recipes/video_niah_report.py. One result file for each scheme and seed, then a table and a heat map.
"""

import sys
from pathlib import Path


def main(cfg: dict) -> None:
    from recipes.config import build
    from recipes.niah_trainer import NiahConfig, NiahTrainer

    NiahTrainer(build(NiahConfig, cfg), cfg).fit()


if __name__ == "__main__":
    # The repository instead of recipes/, whose modules would hide a user's own; theirs lies in the working directory.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.path.append(str(Path.cwd()))
    from recipes import launch

    launch.run(main, __file__, default_config="video_niah")
