"""Runs GRPO in one process and writes the rows of every call of layer 1 on a prefix-grouped stream.

python -m tests.programs.count_rows CONFIG.json ROWS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_ext.attention.core import PrefixGroupedCoreAttention
from megatron_ext.grouping import PrefixGroups
from recipes import train_grpo
from recipes.run.log_process import LogProcess

rows: list[int] = []
forward = PrefixGroupedCoreAttention.forward


def counted(self, query, *args, packed_seq_params=None, **kwargs):
    if self.layer_number == 1 and isinstance(packed_seq_params.record, PrefixGroups):  # in a RotatedStream
        rows.append(query.size(0))
    return forward(self, query, *args, packed_seq_params=packed_seq_params, **kwargs)


if __name__ == "__main__":
    PrefixGroupedCoreAttention.forward = counted
    train_grpo.main(json.loads(Path(sys.argv[1]).read_text()), LogProcess.start())
    Path(sys.argv[2]).write_text(json.dumps(rows))
