"""vLLM servers on a machine of their own for a run elsewhere, which tells it what to serve in a folder that both see.

    mkdir -m 700 /shared/meet && printf '%s\n' serving1 serving2 > /shared/meet/machines
    python launch/serve_vllm.py --rendezvous /shared/meet --name serving1 --address 10.0.0.5     # on each of them
    # and the run: trainer.grpo.rollout.source=vllm trainer.grpo.rollout.start=1 trainer.grpo.rollout.rendezvous=/shared/meet

It waits for the run, serves its weights as trainer.grpo.rollout says, starts servers again that die, and ends with the run.
Any Python from 3.11 on runs it: it needs no package, only the interpreter with vLLM in it that trainer.grpo.rollout.python names.
On Slurm, launch/submit.py --vllm-nodes does all of this.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError, of_system
from megatron_ext.vllm_servers import serve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rendezvous", type=Path, required=True, help="folder that all machines see, the user's alone")
    parser.add_argument(
        "--name", default=os.environ.get("SLURMD_NODENAME"), help="of this machine, as in the file `machines`"
    )
    parser.add_argument("--address", help="by which the run reaches this machine")
    parser.add_argument("--addresses", help="instead: lines NAME=ADDRESS of all machines")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks a job to stop; the run needs its servers until it has
    try:
        if not args.name:
            raise UserError("--name is missing: say which line of the file `machines` is this one")
        address = args.address or dict(line.split("=", 1) for line in (args.addresses or "").split()).get(args.name)
        if not address:
            raise UserError(f"no address of {args.name}: give --address, by which the run reaches it")
        serve(args.rendezvous, args.name, address, args.rendezvous / f"{args.name}.logs", lambda: bool(asked))
    except (UserError, OSError) as error:
        print(f"error: {of_system(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
