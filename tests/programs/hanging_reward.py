"""Asks a reward that prints the process that it is in, and never comes back."""

import sys

from recipes.data.rows import Prompt
from recipes.rewards.several import rewards_for

if __name__ == "__main__":
    rewards_for("tests.programs.own_rewards.says_and_hangs", {}).score([sys.argv[1:]], [Prompt((1,), {}, 1)])
