"""An environment that never answers."""

import threading

from recipes.environments.environment import Environment


class Hanging(Environment):
    def step(self, talk):
        threading.Event().wait()
