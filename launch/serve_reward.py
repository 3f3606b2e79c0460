"""Serve a reward over HTTP; training asks it as trainer.grpo.reward=http.

    python launch/serve_reward.py --reward exact_answer --port 8000
    python launch/serve_reward.py --reward '{name: my_package.my_module.my_reward, alpha: 2}' --url-file /shared/runs/mine.url

Runs until it is ended; SIGUSR1, which asks a job to stop, is not for it: trainers need their rewards until they have saved.
--url-file is written when it listens, for others to find it.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from recipes.cli.errors import user_errors
from recipes.rewards.registry import get_reward
from recipes.rewards.server import reward_server


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True, help="as trainer.grpo.reward in the YAML")
    parser.add_argument("--host", default="0.0.0.0", help="interface to listen on (default: all)")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument(
        "--name", default=socket.gethostname(), help="by which others reach this machine (default: its hostname)"
    )
    parser.add_argument("--url-file", type=Path)
    args = parser.parse_args()
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port {args.port} is no port: give 0 to 65535")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.path.append(str(Path.cwd()))  # a reward of one's own lies in the working directory
    server = reward_server(get_reward(yaml.safe_load(args.reward)), args.reward, args.host, args.port)
    url = f"http://{args.name}:{server.server_address[1]}"
    print(f"reward {args.reward} at {url}", flush=True)
    if args.url_file:
        write_whole(args.url_file, url)
    server.serve_forever()


if __name__ == "__main__":
    main()
