"""A recipe whose responses end where a file says: of each prompt of a step the lengths of its responses.

python tools/trl/ours.py LENGTHS.json recipes/train_grpo.py ...
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)


def main() -> None:
    from megatron_ext.rollouts.sampler import MegatronSource

    wanted = json.loads(Path(sys.argv[1]).read_text())
    sample = MegatronSource.sample

    def limited(self, requests):
        return sample(self, [r.limited(lengths) for r, lengths in zip(requests, wanted, strict=True)])

    MegatronSource.sample = limited
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
