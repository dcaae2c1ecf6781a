"""Crafter (pip install crafter):

    python dreamerv3.py --env-id examples.crafter_env:Crafter-v0 --train-ratio 512

Crafter follows the interface of the old Gym; this class translates it.
"""

import crafter
import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Crafter(gym.Env):
    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Discrete(17)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.game = crafter.Env()

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.game = crafter.Env(seed=seed)
        return self.game.reset(), {}

    def step(self, action):
        obs, reward, done, info = self.game.step(action)
        terminated = info["discount"] == 0  # else the episode was cut at 10,000 steps
        truncated = done and not terminated
        return obs, reward, terminated, truncated, {}

    def render(self):
        return self.game.render((576, 576))


gym.register("Crafter-v0", Crafter)
