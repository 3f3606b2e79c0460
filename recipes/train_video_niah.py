"""Needle in a video haystack: which position scheme finds things in videos longer than those it was trained on?

    python recipes/train_video_niah.py --config-name video_niah

The same data and the same initial weights for every scheme; only the positions differ. The task: recipes/niah/task.py.
The metric: recipes/niah/report.py. One result file for each scheme and seed, then a table and a heat map.
"""

import sys
from pathlib import Path


def main(cfg: dict) -> None:
    from recipes.cli.config import build
    from recipes.niah.settings import NiahConfig
    from recipes.niah.trainer import NiahTrainer
    from recipes.run.inputs import Inputs
    from recipes.run.session import Session

    with Session.start(Inputs.check(build(NiahConfig, cfg))) as session:
        NiahTrainer(session).fit()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch

    launch.run(main, __file__)
