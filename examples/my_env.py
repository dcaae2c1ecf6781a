"""An environment of your own, to start from: python dreamerv3.py --env-id examples.my_env:MyEnv-v0

A camera beside numbers, two discrete actions at once, an end by termination and one by a time
limit.
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class MyEnv(gym.Env):
    """Drive to the red square that the camera sees, without leaving the field; then there is a new
    one."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # for --capture-video
    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "state": spaces.Box(-2, 2, (4,), np.float32),
        }
    )
    action_space = spaces.MultiDiscrete([3, 3])  # push left, not, right; push down, not, up

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)  # makes self.np_random
        self.position = np.zeros(2)
        self.speed = np.zeros(2)
        self.goal = self.np_random.uniform(-1, 1, 2)
        return self.observe(), {}

    def step(self, action):
        self.speed = 0.9 * self.speed + 0.02 * (action - 1)
        self.position = self.position + self.speed
        reached = np.abs(self.position - self.goal).max() < 0.2
        if reached:
            self.goal = self.np_random.uniform(-1, 1, 2)
        terminated = np.abs(self.position).max() > 1  # nothing can be earned any more
        return self.observe(), float(reached), bool(terminated), False, {}

    def render(self):
        return self.observe()["camera"]

    def observe(self):
        image = np.zeros((32, 32, 3), np.uint8)
        x, y = (14 * (self.goal + 1)).astype(int)
        image[y : y + 4, x : x + 4, 0] = 255
        return {"camera": image, "state": np.float32([*self.position, *self.speed])}


# the limit is a truncation: returns bootstrap there
gym.register("MyEnv-v0", MyEnv, max_episode_steps=200)
