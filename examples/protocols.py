"""Published settings without a Gymnasium id:

    python dreamerv3.py --env-id examples.protocols:PongFull-v5

PongFull-v5 has all 18 actions. WalkerPixels-v0 is DeepMind Control from pixels
(pip install "shimmy[dm-control]" imageio "mujoco<4"; MUJOCO_GL=egl or another name chooses the
renderer). MiniGridPixels-v0 is MiniGrid from pixels (pip install minigrid).
"""

import gymnasium as gym


def pixels(task, **kwargs):
    import shimmy  # noqa: F401, registers dm_control/*

    view = {"width": 64, "height": 64, "camera_id": 0}
    env = gym.make(f"dm_control/{task}", render_mode="rgb_array", render_kwargs=view)
    return gym.wrappers.AddRenderObservation(env)


def grid(task, **kwargs):
    import minigrid.wrappers  # registers MiniGrid-*

    env = gym.make(task, **kwargs)
    env = minigrid.wrappers.RGBImgPartialObsWrapper(env)
    return minigrid.wrappers.ImgObsWrapper(env)


full = {
    "game": "pong",
    "repeat_action_probability": 0.25,
    "full_action_space": True,
    "max_num_frames_per_episode": 108_000,
}
gym.register("PongFull-v5", "ale_py.env:AtariEnv", kwargs=full)
gym.register("WalkerPixels-v0", pixels, kwargs={"task": "walker-walk-v0"})
gym.register("MiniGridPixels-v0", grid, kwargs={"task": "MiniGrid-Empty-8x8-v0"})
