"""Serve a reward over HTTP; training asks it as trainer.grpo.reward=http.

    export MEGATRON_EXT_REWARD_TOKEN=...      # here, and where the run is started
    python launch/serve_reward.py --reward exact_answer --port 8000
    python launch/serve_reward.py --reward '{name: my_package.my_module.my_reward, alpha: 2}' --url-file /shared/runs/mine.url

Runs until it is ended; SIGUSR1, which asks a job to stop, is not for it: trainers need their rewards until they have saved.
--url-file is written when it listens, for others to find it. Without a token it listens to its own machine alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
import yaml

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from recipes.cli.errors import user_errors
from recipes.rewards.client import TOKEN_VARIABLE
from recipes.rewards.registry import get_reward
from recipes.rewards.server import ServerLimits, reward_app


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True, help="as trainer.grpo.reward in the YAML")
    parser.add_argument("--host", help="interface to listen on (default: all with a token, else 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--name", help="by which others reach this machine (default: its hostname)")
    parser.add_argument("--url-file", type=Path)
    limits = ServerLimits()
    parser.add_argument(
        "--timeout", type=float, default=limits.timeout, help="seconds for the responses to one prompt (%(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=limits.processes, help="that score at the same time (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=limits.batch, help="responses of a request, at most (%(default)s)")
    parser.add_argument("--waiting", type=int, default=limits.waiting, help="requests that may wait (%(default)s)")
    args = parser.parse_args()
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port {args.port} is no port: give 0 to 65535")
    token = os.environ.get(TOKEN_VARIABLE)
    host = args.host or ("0.0.0.0" if token else "127.0.0.1")
    alone = host in ("127.0.0.1", "localhost", "::1")
    if not token and not alone:
        raise UserError(
            f"--host {host} lets others ask, and {TOKEN_VARIABLE} is not set: set it, here and where runs are started"
        )
    limits = ServerLimits(args.timeout, args.processes, args.batch, waiting=args.waiting)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.path.append(str(Path.cwd()))  # a reward of one's own lies in the working directory
    reward = get_reward(yaml.safe_load(args.reward))
    reward.check_here()
    app = reward_app(reward, token, limits)
    listening = socket.create_server((host, args.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    url = f"http://{args.name or (host if alone else socket.gethostname())}:{listening.getsockname()[1]}"
    print(f"reward {args.reward} at {url}", flush=True)
    if args.url_file:
        write_whole(args.url_file, url)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
