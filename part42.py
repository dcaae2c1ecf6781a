"""What real users' environments and machines do (issue 42): a section of test_dreamerv3.py."""

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from filelock import FileLock
from gymnasium import spaces

import dreamerv3
from dreamerv3 import Args
from test_dreamerv3 import (
    QUICK,
    ROOT,
    TINY,
    Program,
    cartpole,  # noqa: F401
    counters,
    episodes,
    evaluate_only,
    files,
    finished,  # noqa: F401
    finished_once,  # noqa: F401
    make_agent,
    program,  # noqa: F401
    read_until,
    refused,
    saved,
    seeded,  # noqa: F401
    start_process,
    stored,
)


# === what real environments and machines do =======================================================
class Short(gym.Env):
    """Five steps of reward 1, then a time limit."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-1, 1, (8,))

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, False, self.left == 0, {}

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)


gym.register("DreamerShort-v0", Short)

# without updates: 20 steps and a checkpoint
ACT_ONLY = {
    "size": "1m",
    "compile": False,
    "batch_size": 2,
    "batch_length": 8,
    "learning_starts": 20,
    "total_timesteps": 20,
}


def register(environment) -> str:
    """An id for this class or function."""
    env_id = f"Dreamer{environment.__name__}-v0"
    gym.registry.pop(env_id, None)
    gym.register(env_id, environment)
    return env_id


def act(program: Program, **flags) -> Path:
    """A short run without updates: -> its folder."""
    return program.train(**{**ACT_ONLY, **flags})


# --- two processes, one run folder
def test_a_run_that_another_process_trains_is_not_resumed(program, finished):
    with FileLock(finished / "lock"):
        assert program.call(resume=finished) == 2
    error = program.err.strip()
    assert error == f"dreamerv3.py: error: another process trains the run {finished}; end it first"


def test_a_checkpoint_file_in_a_folder_that_another_process_trains_is_not_resumed(
    program, finished
):
    with FileLock(finished / "lock"):
        assert program.call(resume=finished / "checkpoint.pt") == 2


def test_a_refused_process_changes_no_file(program, finished):
    before = files(program.folder)
    with FileLock(finished / "lock"):
        program.call(resume=finished, total_timesteps=80)
    before.pop(finished / "lock", None)
    after = files(program.folder)
    after.pop(finished / "lock", None)
    assert after == before


def test_a_run_that_another_process_trains_can_be_evaluated(program, finished):
    with FileLock(finished / "lock"):
        assert program.call(resume=finished, eval_only=True, eval_episodes=1) == 0


def test_a_run_that_failed_can_be_resumed_in_the_same_program(program):
    with pytest.raises(ValueError):
        program.train(env_id="Dreamer-nan-v0", total_timesteps=80)
    folder = program.run_folder()
    program.resume(folder, env_id="DreamerChain-v0")
    assert counters(folder)[0] == 80


def workers_of(pid: int) -> list[int]:
    """Processes that descend from this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = []
    new = [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def wait_until_gone(pids: list[int]) -> None:
    """Wait until none of these processes runs."""
    for _ in range(3000):
        if not any(Path(f"/proc/{pid}/status").exists() for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"some of {pids} are still there")


@pytest.fixture(scope="module")
def doubled(tmp_path_factory) -> SimpleNamespace:
    """A run with two workers; `second`, a process that wants to resume it meanwhile; `workers`, the
    first one's processes before it was killed."""
    cwd = tmp_path_factory.mktemp("doubled")
    flags = dict(QUICK, env_id="CartPole-v1", num_envs=2, total_timesteps=1_000_000)
    flags.update(learning_starts=1_000_000, buffer_size=1000, checkpoint_frequency=100)
    first = start_process(cwd, **flags)
    try:
        read_until(first, "run folder")
        (folder,) = cwd.glob("runs/*")
        while not (folder / "checkpoint.pt").exists():
            assert first.poll() is None
            time.sleep(0.05)
        argv = [sys.executable, str(ROOT / "dreamerv3.py"), "--resume", str(folder)]
        second = subprocess.run(argv, cwd=cwd, capture_output=True, text=True)
        workers = workers_of(first.pid)
    finally:
        first.kill()
        first.wait()
    return SimpleNamespace(folder=folder, second=second, workers=workers)


def test_a_second_process_on_a_run_folder_exits_with_status_2(doubled):
    assert doubled.second.returncode == 2


def test_a_second_process_on_a_run_folder_prints_one_line(doubled):
    assert doubled.second.stderr.count("\n") == 1
    assert "another process trains the run" in doubled.second.stderr


def test_a_killed_process_leaves_no_lock(doubled):
    FileLock(doubled.folder / "lock").acquire(timeout=0)


def test_no_worker_outlives_a_killed_program(doubled):
    assert len(doubled.workers) >= 2
    wait_until_gone(doubled.workers)


# --- the environment changes process-wide state
WHERE = ["constructor", "reset", "step", "render", "close"]


def meddling(where: str, function) -> str:
    """The id of an environment that calls a function in one of its methods."""

    class Meddling(Short):
        def __init__(self, render_mode=None):
            super().__init__(render_mode)
            if where == "constructor":
                function()

        def reset(self, **options):
            if where == "reset":
                function()
            return super().reset(**options)

        def step(self, action):
            if where == "step":
                function()
            return super().step(action)

        def render(self):
            if where == "render":
                function()
            return super().render()

        def close(self):
            if where == "close":
                function()

    return register(Meddling)


@pytest.mark.parametrize("where", WHERE)
def test_an_environment_may_change_the_current_folder(where, program, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env_id = meddling(where, lambda: os.chdir(elsewhere))
    folder = act(program, env_id=env_id, capture_video=True)
    assert counters(folder)[0] == 20
    assert list((program.folder / "videos" / folder.name).rglob("*.mp4"))
    assert not list(elsewhere.iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run whose environment draws no random numbers and seeds nothing."""
    return act(Program(tmp_path_factory.mktemp("undisturbed")), env_id="DreamerShort-v0")


@pytest.mark.parametrize("where", WHERE)
def test_the_noise_of_the_agent_does_not_depend_on_the_seed_of_an_environment(
    where, program, undisturbed
):
    env_id = meddling(where, lambda: torch.manual_seed(0))
    folder = act(program, env_id=env_id, capture_video=where == "render")
    assert np.array_equal(stored(folder, "action"), stored(undisturbed, "action"))
    assert torch.equal(saved(folder)["torch_rng"], saved(undisturbed)["torch_rng"])


def test_the_noise_of_the_agent_does_not_depend_on_the_seed_of_a_module(
    program, undisturbed, monkeypatch
):
    """--env-id module:Id imports it."""
    (program.folder / "seeding.py").write_text("import torch\ntorch.manual_seed(0)\n")
    monkeypatch.syspath_prepend(program.folder)
    folder = act(program, env_id="seeding:DreamerShort-v0")
    assert np.array_equal(stored(folder, "action"), stored(undisturbed, "action"))


# observations are random numbers of the process: of torch, NumPy and Python; computes with threads
NOISY = """
import random
import gymnasium as gym
import numpy as np
import torch

class Noisy(gym.Env):
    observation_space = gym.spaces.Box(0, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        torch.set_num_threads(2)
        self.noise()

    def noise(self):
        torch.ones(512, 512) @ torch.ones(512, 512)
        numbers = [torch.rand(()).item(), np.random.rand(), random.random()]
        return np.array(numbers, np.float32)

    def reset(self, seed=None, options=None):
        return self.noise(), {}

    def step(self, action):
        return self.noise(), 0.0, False, False, {}

gym.register("Noisy-v0", Noisy)
"""


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """Observations (environments, steps, 3) of Noisy in one process, and in two workers twice."""
    program = Program(tmp_path_factory.mktemp("noises"))
    (program.folder / "noisy.py").write_text(NOISY)
    threads = torch.get_num_threads()
    observations = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(program.folder)
        for i, num_envs in enumerate([1, 2, 2]):
            folder = act(program, env_id="noisy:Noisy-v0", num_envs=num_envs, exp_name=f"{i}")
            steps = 20 // num_envs
            observations.append(stored(folder, "obs.obs")[:, :steps])
    torch.set_num_threads(threads)
    return observations


def test_random_numbers_of_an_environment_go_on_from_step_to_step(noises):
    assert all(len(np.unique(x)) == x.size for x in noises)


def test_random_numbers_of_an_environment_are_not_those_of_the_agent(noises):
    torch.manual_seed(1)
    assert not set(noises[0][0, :, 0]) & set(torch.rand(100_000).tolist())


def test_random_numbers_of_workers_follow_from_the_seed(noises):
    assert np.array_equal(noises[1], noises[2])


# --- libraries that do not survive fork: Noisy computes with threads in two workers
SCRIPT = """
import os, signal
import gymnasium as gym
import numpy as np
from dreamerv3 import Args, main

class Mine(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, False, self.steps == LENGTH, {}

LENGTH = 7
gym.register("Mine-v0", lambda length=7: Mine())
before = signal.getsignal(signal.SIGINT)
for name in ("first", "second"):
    main(Args(env_id="Mine-v0", num_envs=2, exp_name=name, size="1m", compile=False,
              batch_length=8, learning_starts=40, total_timesteps=40))
assert signal.getsignal(signal.SIGINT) is before
print("end", os.getpid())
"""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> SimpleNamespace:
    """A user's script that registers an id, trains it twice, and has no `if __name__`."""
    cwd = tmp_path_factory.mktemp("scripted")
    (cwd / "script.py").write_text(SCRIPT)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    argv = [sys.executable, "script.py"]
    process = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(folder=cwd, out=process.stdout)


def test_ids_that_a_script_registers_reach_the_workers(scripted):
    folders = list(scripted.folder.glob("runs/*"))
    assert len(folders) == 2
    assert all(set(episodes(folder)[:, 3]) == {7} for folder in folders)


def test_workers_do_not_run_the_script_again(scripted):
    assert scripted.out.count("\nend ") == 1


def test_only_a_worker_leaves_the_process_group(monkeypatch):
    """Ctrl-C must reach a program that is itself a process of multiprocessing."""
    become_worker = Mock()
    monkeypatch.setattr(multiprocessing, "parent_process", Mock())
    monkeypatch.setattr(dreamerv3, "become_worker", become_worker)
    dreamerv3.make_env("DreamerShort-v0")
    assert not become_worker.called


# --- looking through a user's wrappers
class Blanked(gym.Wrapper):
    """Black pixels, and 10 points a step."""

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        return obs * 0, info

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        return obs * 0, 10.0, *rest


def blanked_pong():
    return Blanked(gym.make("ALE/Pong-v5"))


def blanked_pong_with_kwargs(**kwargs):
    return Blanked(gym.make("ALE/Pong-v5", **kwargs))


@pytest.mark.parametrize("entry", [blanked_pong, blanked_pong_with_kwargs])
@pytest.mark.parametrize("repeat, reward", [(0, 10), (2, 20)])
def test_a_wrapper_of_the_user_around_atari_is_not_bypassed(entry, repeat, reward):
    env = dreamerv3.make_env(register(entry), action_repeat=repeat)
    obs, _ = env.reset(seed=0)
    assert not obs["obs"].any()
    obs, got, *_ = env.step(np.zeros(1, np.int64))
    assert not obs["obs"].any()
    assert got == reward


def test_a_wrapper_in_the_spec_of_an_atari_id_is_not_bypassed():
    wrapper = gym.envs.registration.WrapperSpec("Blanked", f"{__name__}:Blanked", {})
    kwargs = {"game": "pong"}
    gym.registry.pop("DreamerSpec-v0", None)
    gym.register(
        "DreamerSpec-v0", "ale_py.env:AtariEnv", kwargs=kwargs, additional_wrappers=(wrapper,)
    )
    env = dreamerv3.make_env("DreamerSpec-v0")
    obs, _ = env.reset(seed=0)
    assert not obs["obs"].any()


def test_a_subclass_of_the_atari_environment_is_taken_as_it_is():
    from ale_py.env import AtariEnv

    class Mine(AtariEnv):
        def __init__(self):
            super().__init__("pong", frameskip=7)

    assert dreamerv3.make_env(register(Mine)).repeat == 1


@pytest.mark.parametrize("entry", ["ale_py.env:AtariEnv", "ale_py:AtariEnv"])
def test_the_atari_environment_is_preprocessed_whoever_registers_it(entry):
    gym.registry.pop("DreamerPong-v0", None)
    gym.register("DreamerPong-v0", entry, kwargs={"game": "pong"})
    env = dreamerv3.make_env("DreamerPong-v0")
    assert env.repeat == 4
    assert env.specs["obs"].shape == (64, 64, 3)


def test_atari_memory_is_a_vector():
    env = dreamerv3.make_env("ALE/Pong-v5", env_kwargs={"obs_type": "ram"})
    assert env.specs["obs"].shape == (128,)


def test_gray_atari_has_one_channel():
    env = dreamerv3.make_env("ALE/Pong-v5", env_kwargs={"obs_type": "grayscale"})
    obs, _ = env.reset(seed=0)
    assert obs["obs"].shape == (64, 64, 1)


# --- names that belong to the user
INFOS = {
    "a counter": 3,
    "of Monitor": {"r": 5.0, "l": 2, "t": 0.1},
    "a text": "first",
    "nothing": None,
    "an array": np.arange(3),
}


@pytest.mark.parametrize(
    "name, kind",
    [("episode", kind) for kind in INFOS]
    + [("episode_return", "a text"), ("_episode", "a counter"), ("_episode_return", "nothing")],
)
def test_an_environment_may_use_any_info(name, kind, program):
    class Informing(Short):
        def step(self, action):
            obs, reward, terminated, truncated, _ = super().step(action)
            return obs, reward, terminated, truncated, {name: INFOS[kind]}

    folder = act(program, env_id=register(Informing))
    assert episodes(folder)[:, 2:4].tolist() == [[5, 5]] * 3


def test_an_environment_may_keep_statistics_of_gymnasium(program):
    def counted():
        return gym.wrappers.RecordEpisodeStatistics(Short())

    folder = act(program, env_id=register(counted))
    assert episodes(folder)[:, 2:4].tolist() == [[5, 5]] * 3


COLLISIONS = {
    "Dict": {"a/b": spaces.Discrete(2), "a": spaces.Dict(b=spaces.Discrete(3))},
    "Tuple": {"a/0": spaces.Discrete(2), "a": spaces.Tuple([spaces.Discrete(3)])},
}


@pytest.mark.parametrize("kind", COLLISIONS)
def test_two_observations_of_one_name_are_refused_by_name(kind, program):
    class Colliding(Short):
        observation_space = spaces.Dict(COLLISIONS[kind])

    error = refused(program, env_id=register(Colliding))
    assert re.search("two observations would be called 'a/[b0]'; rename one", error)


# --- recording is no part of the environment
def frame(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.full(shape, 7, dtype)


FRAMES = {
    "gray": [frame(32, 32)],
    "one channel": [frame(32, 32, 1)],
    "RGBA": [frame(32, 32, 4)],
    "odd": [frame(33, 35, 3)],
    "float": [frame(32, 32, 3, dtype=np.float64) / 9],
    "not a number": [np.full((32, 32, 3), math.nan)],
    "huge": [frame(3000, 2000, 3)],
    "one pixel": [frame(1, 1, 3)],
    "no pixels": [frame(0, 0, 3)],
    "two channels": [frame(32, 32, 2)],
    "varying": [frame(32, 32, 3), frame(64, 20, 3), frame(32, 32)],
    "none at all": [None],
    "none later": [frame(32, 32, 3), None],
    "a list": [[frame(32, 32, 3)]],
    "an empty list": [[]],
    "nested lists": [frame(32, 32, 3).tolist()],
    "a text": ["+--+"],
    "a tensor": [torch.zeros(32, 32, 3)],
    "channels first": [frame(3, 32, 32)],
    "an error": [ZeroDivisionError("broken")],
    "an error later": [frame(32, 32, 3), ZeroDivisionError("broken")],
}


def rendering(results: list) -> str:
    """The id of an environment that renders these in turn, and fails where one is an error."""

    class Rendering(Short):
        metadata = {"render_modes": ["rgb_array"]}  # no render_fps

        def render(self):
            result = results[self.left % len(results)]
            if isinstance(result, Exception):
                raise result
            return result

    return register(Rendering)


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_that_is_no_rgb_image_ends_no_run(kind, program):
    folder = act(program, env_id=rendering(FRAMES[kind]), capture_video=True)
    assert counters(folder)[0] == 20


VIDEOS = ["gray", "RGBA", "odd", "huge", "varying", "none later", "an error later"]


@pytest.mark.parametrize("kind", VIDEOS)
def test_frames_of_any_size_and_color_become_a_video(kind, program):
    act(program, env_id=rendering(FRAMES[kind]), capture_video=True)
    paths = sorted((program.folder / "videos").rglob("*.mp4"))
    assert len(paths) == 2
    assert cv2.VideoCapture(str(paths[0])).get(cv2.CAP_PROP_FRAME_COUNT) >= 5


@pytest.mark.parametrize("kind", ["none at all", "an error", "a text"])
def test_a_frame_that_cannot_be_made_costs_one_warning(kind, program):
    act(program, env_id=rendering(FRAMES[kind]), capture_video=True)
    assert program.out.count("warning: ") == 1


@pytest.mark.parametrize("fps", [None, 0, -5, "30", math.nan, math.inf, 1000])
def test_a_strange_render_fps_ends_no_run(fps, program):
    class Strange(Short):
        metadata = {"render_modes": ["rgb_array"], "render_fps": fps}

    folder = act(program, env_id=register(Strange), capture_video=True)
    assert counters(folder)[0] == 20


def test_a_video_that_cannot_be_written_costs_a_warning(program, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", Mock(side_effect=full))
    folder = act(program, env_id="DreamerShort-v0", capture_video=True)
    assert counters(folder)[0] == 20
    assert "warning: a video cannot be written, [Errno 28] No space left" in program.out


def test_a_folder_for_videos_that_cannot_be_made_costs_a_warning(program):
    (program.folder / "videos").write_text("a file")
    folder = act(program, env_id="DreamerShort-v0", capture_video=True)
    assert counters(folder)[0] == 20
    assert "warning: no videos, " in program.out


def test_a_recording_has_a_largest_length(tmp_path):
    env = gym.make("DreamerShort-v0", render_mode="rgb_array").unwrapped
    recorder = dreamerv3.Recorder(dreamerv3.Frames(env), tmp_path, 1, every_episode=True)
    recorder.video_length = 10
    recorder.reset(seed=0)
    for _ in range(50):
        recorder.step(env.action_space.sample())
        assert len(recorder.recorded_frames) <= 10
    recorder.close()
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_the_largest_length_of_a_recording_is_3000_frames(tmp_path):
    env = gym.make("DreamerShort-v0", render_mode="rgb_array")
    assert dreamerv3.Recorder(dreamerv3.Frames(env), tmp_path, 1, True).video_length == 3000


def test_every_episode_is_a_video_of_its_own(tmp_path):
    env = gym.make("DreamerShort-v0", render_mode="rgb_array")
    recorder = dreamerv3.Recorder(dreamerv3.Frames(env), tmp_path, 1, every_episode=True)
    for _ in range(2):
        recorder.reset(seed=0)
        for _ in range(5):
            recorder.step(env.action_space.sample())
    recorder.close()
    assert len(list(tmp_path.glob("*.mp4"))) == 2


# --- signals
@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    """A folder for `main`, with a tiny model and with real signals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dreamerv3.SIZES, "1m", TINY)
    return tmp_path


STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def interrupting(number: int) -> str:
    """The id of an environment in whose tenth step this process gets a signal."""

    class Interrupting(Short):
        steps = 0

        def step(self, action):
            self.steps += 1
            if self.steps == 10:
                os.kill(os.getpid(), number)
            return super().step(action)

    return register(Interrupting)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_a_run_with_its_status(number, in_folder):
    with pytest.raises(SystemExit) as stop:
        dreamerv3.main(Args(**ACT_ONLY, env_id=interrupting(number)))
    assert stop.value.code == 128 + number


@pytest.mark.parametrize("number", STOPS)
def test_a_run_is_saved_after_a_signal(number, in_folder):
    with pytest.raises(SystemExit):
        dreamerv3.main(Args(**ACT_ONLY, env_id=interrupting(number)))
    (folder,) = in_folder.glob("runs/*")
    assert 10 <= saved(folder)["step"] < 20


@pytest.mark.parametrize("number", STOPS)
def test_signal_handlers_are_restored_after_a_signal(number, in_folder):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit):
        dreamerv3.main(Args(**ACT_ONLY, env_id=interrupting(number)))
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "env_id", ["DreamerShort-v0", "Dreamer-reset-v0", "Dreamer-constructor-v0"]
)
def test_signal_handlers_are_restored_however_a_run_ends(env_id, in_folder):
    before = [signal.getsignal(number) for number in STOPS]
    try:
        dreamerv3.main(Args(**ACT_ONLY, env_id=env_id))
    except (AssertionError, dreamerv3.UserError):
        pass
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_sighup_that_nohup_ignores_stays_ignored(in_folder):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        dreamerv3.main(Args(**ACT_ONLY, env_id=interrupting(signal.SIGHUP)))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    (folder,) = in_folder.glob("runs/*")
    assert saved(folder)["step"] == 20


def test_an_update_that_the_same_ctrl_c_breaks_is_a_stop(in_folder, monkeypatch):
    """The compiler's processes get it too, and the update fails with their error."""

    def broken_update(*inputs, **options):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the compiler has been interrupted")

    monkeypatch.setattr(dreamerv3, "train_step", broken_update)
    with pytest.raises(SystemExit) as stop:
        dreamerv3.main(Args(**QUICK, env_id="DreamerShort-v0", total_timesteps=60))
    assert stop.value.code == 130
    (folder,) = in_folder.glob("runs/*")
    assert saved(folder)["step"] == 42


def test_main_runs_in_a_thread(in_folder):
    before = [signal.getsignal(number) for number in STOPS]
    args = Args(**QUICK, env_id="DreamerShort-v0", total_timesteps=60)
    thread = threading.Thread(target=dreamerv3.main, args=(args,))
    thread.start()
    thread.join()
    (folder,) = in_folder.glob("runs/*")
    assert saved(folder)["step"] == 60
    assert [signal.getsignal(number) for number in STOPS] == before


def test_main_leaves_the_flags_as_they_are(in_folder):
    """So that another run can be made with them, of another environment too."""
    args = Args(**ACT_ONLY, env_id="DreamerShort-v0")
    dreamerv3.main(args)
    assert args == Args(**ACT_ONLY, env_id="DreamerShort-v0")


# --- resources
class Once(Short):
    """A simulator that can exist once."""

    instances = 0

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        if Once.instances > 0:
            raise ConnectionError("port 2000\nis in use")
        Once.instances += 1

    def close(self):
        Once.instances -= 1


class OnceFromReset(Short):
    """A simulator that is started by the first reset, and can exist once."""

    owner = None

    def reset(self, **options):
        if OnceFromReset.owner not in (None, self):
            raise ConnectionError("port 2000\nis in use")
        OnceFromReset.owner = self
        return super().reset(**options)

    def close(self):
        if OnceFromReset.owner is self:
            OnceFromReset.owner = None


class OnceAndBroken(Once):
    """Fails in its tenth step."""

    def step(self, action):
        raise ZeroDivisionError("broken")


def test_eval_only_makes_one_environment(program):
    folder = act(program, env_id=register(Once))
    assert program.call(resume=folder, eval_only=True, eval_episodes=1) == 0
    assert Once.instances == 0


def test_an_agent_is_loaded_without_an_environment(program, monkeypatch):
    folder = act(program, env_id=register(Once))
    monkeypatch.setattr(dreamerv3, "make_env", None)
    with program.inside():
        agent, _ = dreamerv3.load_agent(folder)
    assert agent.specs["obs"].shape == (1,)


@pytest.mark.parametrize("environment", [Once, OnceFromReset])
def test_an_evaluation_that_cannot_have_an_environment_says_so_in_one_line(environment, program):
    env_id = register(environment)
    folder = act(program, env_id=env_id, eval_frequency=10, eval_episodes=1)
    assert counters(folder)[0] == 20
    needs = f"warning: an evaluation needs an environment of its own, {env_id} cannot be "
    lines = [line for line in program.out.splitlines() if line.startswith(needs)]
    assert len(lines) == 2
    assert "port 2000 is in use; training goes on without it" in lines[0]


@pytest.mark.parametrize("environment", [Once, OnceAndBroken])
def test_an_environment_is_closed_however_training_ends(environment, program):
    env_id = register(environment)
    flags = {**ACT_ONLY, "env_id": env_id}
    try:
        assert program.call(**flags) == 0
    except ZeroDivisionError:
        pass
    assert Once.instances == 0


def test_an_environment_with_a_space_that_is_not_supported_is_closed(program):
    class OnceUnsupported(Once):
        action_space = spaces.Text(3)

    refused(program, env_id=register(OnceUnsupported))
    assert Once.instances == 0


def test_an_environment_whose_flags_fail_later_is_closed(program):
    """A resumed run whose weights do not fit."""
    folder = act(program, env_id=register(Once))
    assert program.call(resume=folder, size="12m") == 2
    assert Once.instances == 0


def test_an_environment_is_closed_when_its_evaluation_fails(program):
    folder = act(program, env_id=register(Once))
    env_id = register(OnceAndBroken)
    with pytest.raises(ZeroDivisionError):
        program.call(resume=folder, env_id=env_id, eval_only=True)
    assert Once.instances == 0


# --- numbers
def rewarding(reward, terminated: bool = False) -> str:
    """The id of an environment with this reward."""

    class Rewarding(Short):
        def step(self, action):
            obs, _, _, truncated, info = super().step(action)
            return obs, reward, terminated, truncated, info

    return register(Rewarding)


REWARDS = {
    "float16": np.float16(1000),
    "of shape (1,)": np.array([1000.0]),
    "of shape (1, 1)": np.array([[1000]], np.int16),
    "of rank 0": np.array(1000, np.float16),
    "a list": [1000],
    "a tensor": torch.tensor([1000], dtype=torch.float16),
    "a tensor with gradient": torch.tensor(1000.0, requires_grad=True),
    "an integer": 1000,
}


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_of_one_element_are_added_up_exactly(kind, repeat, program):
    folder = act(program, env_id=rewarding(REWARDS[kind]), action_repeat=repeat)
    assert set(episodes(folder)[:, 2]) == {5000}


@pytest.mark.parametrize("reward", [None, [1, 2], "much", np.zeros(0), 1e39, math.nan, {}, 1j])
def test_a_reward_that_is_no_number_is_refused(reward):
    env = dreamerv3.make_env(rewarding(reward))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="is not a finite number"):
        env.step(np.zeros(8))


def test_a_return_is_added_up_in_float64():
    env = dreamerv3.make_env(rewarding(np.float32(0.1)))
    env.reset(seed=0)
    infos = [env.step(np.zeros(8))[-1] for _ in range(5)]
    assert infos[-1]["episode_return"] == pytest.approx(5 * np.float64(np.float32(0.1)), abs=1e-15)


class Endless(Short):
    """A task without ends."""

    steps = 0
    stop_at = math.inf

    def step(self, action):
        self.steps += 1
        if self.steps == Endless.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


def test_an_evaluation_says_what_it_waits_for_and_ends_on_a_signal(in_folder, monkeypatch, capsys):
    monkeypatch.setattr(Endless, "stop_at", 10_050)
    monkeypatch.setattr(dreamerv3, "policy", constant_policy(dreamerv3.policy))
    args = Args(**ACT_ONLY, env_id=register(Endless), eval_frequency=20)
    with pytest.raises(SystemExit):
        dreamerv3.main(args)
    (folder,) = in_folder.glob("runs/*")
    assert saved(folder)["step"] == 20
    line = "evaluation: 10,000 steps, 0 of 10 episodes have ended; Ctrl-C stops"
    assert line in capsys.readouterr().out


def constant_policy(policy):
    """A policy that is fast: after its first call it repeats what that has returned."""
    first = []

    def repeated(*inputs, **options):
        if not first:
            first.append(policy(*inputs, **options))
        return first[0]

    return repeated


# --- images that are not uint8 HWC
NOT_IMAGES = {
    "no channels": spaces.Box(0, 255, (84, 84), np.uint8),
    "channels first": spaces.Box(0, 255, (3, 84, 84), np.uint8),
    "float": spaces.Box(0, 1, (84, 84, 3)),
    "integer": spaces.Box(0, 255, (84, 84, 3), np.int64),
    "a stack": spaces.Box(0, 255, (4, 84, 84), np.uint8),
    "a stack of images": spaces.Box(0, 255, (4, 84, 84, 3), np.uint8),
    "bool": spaces.Box(0, 1, (84, 84), bool),
}


def notes(space: gym.Space) -> list[str]:
    """What an Adapter tells about an observation space."""
    env = Short()
    env.observation_space = space
    return dreamerv3.Adapter(env, 64).notes


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_an_observation_that_looks_like_an_image_is_noted(kind):
    (note,) = notes(NOT_IMAGES[kind])
    assert "'obs'" in note
    assert "taken as a vector" in note


IMAGES_AND_VECTORS = {
    "an image": spaces.Box(0, 255, (84, 84, 3), np.uint8),
    "a gray image": spaces.Box(0, 255, (84, 84, 1), np.uint8),
    "a vector": spaces.Box(-1, 1, (10_000,)),
    "a small board": spaces.Box(0, 1, (10, 10, 4), bool),
    "joints": spaces.Box(-1, 1, (24, 3)),
}


@pytest.mark.parametrize("kind", IMAGES_AND_VECTORS)
def test_images_and_vectors_are_not_noted(kind):
    assert notes(IMAGES_AND_VECTORS[kind]) == []


def test_a_note_is_one_printed_line_that_names_wrappers_of_gymnasium(program):
    class Gray(Short):
        observation_space = spaces.Box(0, 255, (20, 20), np.uint8)

        def reset(self, **options):
            super().reset(**options)
            return np.zeros((20, 20), np.uint8), {}

        def step(self, action):
            _, reward, terminated, truncated, info = super().step(action)
            return np.zeros((20, 20), np.uint8), reward, terminated, truncated, info

    act(program, env_id=register(Gray))
    notes = [line for line in program.out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    for name in re.findall("(ReshapeObservation|TransformObservation)", notes[0]):
        assert hasattr(gym.wrappers, name)
    assert "ReshapeObservation" in notes[0]


# --- Windows and module names
def test_a_worker_without_process_groups_follows_its_program(monkeypatch):
    ended = threading.Event()
    monkeypatch.delattr(os, "setpgid")
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(multiprocessing, "parent_process", Mock())
    dreamerv3.become_worker()
    assert ended.wait(60)


def test_a_machine_without_sighup_trains(in_folder, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    dreamerv3.main(Args(**ACT_ONLY, env_id="DreamerShort-v0"))
    (folder,) = in_folder.glob("runs/*")
    assert saved(folder)["step"] == 20


def test_a_machine_without_forkserver_spawns_its_workers(monkeypatch):
    vector_env = Mock()
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(gym.vector, "AsyncVectorEnv", vector_env)
    dreamerv3.start_workers([], seed=1)
    assert vector_env.call_args.kwargs["context"] == "spawn"


@pytest.mark.parametrize(
    "flags",
    [
        {"env_id": "gymnasium:CartPole-v1"},
        {"env_id": "CartPole-v1", "exp_name": 'a<b>c:d"e|f?g*h'},
        {"env_id": "CartPole-v1", "exp_name": "back\\slash"},
    ],
    ids=["module", "characters", "backslash"],
)
def test_folders_have_no_characters_that_a_file_system_refuses(flags, program):
    folder = act(program, **flags, capture_video=True)
    names = [str(path.relative_to(program.folder)) for path in files(program.folder)]
    assert not set('<>:"\\|?*') & set("".join(names))
    assert (program.folder / "videos" / folder.name).is_dir()


# --- keyword arguments of an environment, the mode of the action
def test_env_kwargs_reach_the_constructor(program):
    act(program, env_id="DreamerChain-v0", env_kwargs='{"terminal": false}')
    folder = program.run_folder()
    assert not stored(folder, "is_terminal").any()
    assert stored(folder, "is_last").any()


def test_env_kwargs_reach_workers_and_evaluations(program):
    kwargs = '{"sutton_barto_reward": true}'
    act(program, env_id="CartPole-v1", env_kwargs=kwargs, num_envs=2, learning_starts=20)
    folder = program.run_folder()
    assert set(episodes(folder)[:, 2]) == {-1}
    assert program.call(resume=folder, eval_only=True, eval_episodes=2) == 0
    assert "mean -1.0" in program.out


def test_env_kwargs_of_the_command_line_replace_those_of_the_run(program):
    folder = act(program, env_id="CartPole-v1", env_kwargs='{"sutton_barto_reward": true}')
    assert program.call(resume=folder, eval_only=True, eval_episodes=2, env_kwargs="{}") == 0
    assert "mean -1.0" not in program.out


@pytest.mark.parametrize(
    "kwargs", ['{"nonsense": 1}', '{"id": 1}', '{"spec": 2}', '{"disable_env_checker": true}']
)
def test_env_kwargs_that_do_not_fit_are_refused(kwargs, program):
    error = refused(program, env_id="CartPole-v1", env_kwargs=kwargs)
    assert f"--env-id CartPole-v1 --env-kwargs {kwargs} cannot be made: " in error


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_frameskip_beside_our_own_is_refused(num_envs, program):
    kwargs = '{"frameskip": 2}'
    error = refused(program, env_id="ALE/Pong-v5", env_kwargs=kwargs, num_envs=num_envs)
    assert "--action-repeat" in error


@pytest.mark.parametrize("kwargs", ["{", "", "[]", "3", "null", '"text"', "{'a': 1}", "a=1"])
def test_env_kwargs_that_are_no_json_object_are_refused(kwargs, program):
    error = refused(program, env_id="CartPole-v1", env_kwargs=kwargs)
    assert re.search("--env-kwargs .*must be a JSON object", error)


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
def test_the_mode_of_an_action_is_the_most_probable_one(discrete):
    action = dreamerv3.ActionSpec((3, 2), 5) if discrete else dreamerv3.ActionSpec((), 2)
    agent, _ = make_agent(action=action)
    torch.nn.init.normal_(list(agent.actor.parameters())[-2], std=3.0)
    state = agent.rssm.initial(4)
    obs = {"vector": torch.randn(4, 5)}
    chosen, (deter, stoch, _) = dreamerv3.policy(agent, obs, state, torch.ones(4).bool(), True)
    pi = agent.actor(dreamerv3.get_feat(deter, stoch))
    samples = torch.stack([pi.sample(agent.actor.noise(4)) for _ in range(200)])
    best = torch.stack([pi.log_prob(x) for x in samples]).max()
    assert pi.log_prob(chosen).max() >= best - 1e-4
    assert (pi.log_prob(chosen) >= pi.log_prob(samples[0]) - 1e-4).all()


@pytest.mark.parametrize("choice, mode", [("sample", False), ("mode", True)])
def test_eval_action_chooses_how_evaluations_act(choice, mode, cartpole, monkeypatch):
    policy = Mock(wraps=dreamerv3.policy)
    monkeypatch.setattr(dreamerv3, "policy", policy)
    evaluate_only(cartpole, cartpole.folder, eval_action=choice)
    assert {call.kwargs["mode"] for call in policy.call_args_list} == {mode}


def test_training_samples_its_actions_whatever_eval_action_says(program, monkeypatch):
    policy = Mock(wraps=dreamerv3.policy)
    monkeypatch.setattr(dreamerv3, "policy", policy)
    act(program, env_id="DreamerShort-v0", eval_action="mode")
    assert not any("mode" in call.kwargs for call in policy.call_args_list)


# --- the old Gym API, warnings, tasks without ends
class OldReset(Short):
    """reset returns an observation alone."""

    def reset(self, **options):
        return super().reset(**options)[0]


class OldResetOfTwo(Short):
    """That observation has two elements."""

    observation_space = spaces.Box(-1, 1, (2,))

    def reset(self, **options):
        super().reset(**options)
        return np.zeros(2, np.float32)


class OldStep(Short):
    """step returns four values."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or truncated, info


class OldSeed(Short):
    """reset takes no seed."""

    def reset(self):
        return super().reset()[0]


@pytest.mark.parametrize("environment", [OldReset, OldResetOfTwo, OldStep, OldSeed])
@pytest.mark.parametrize("repeat", [1, 2])
def test_the_old_gym_api_is_named(environment, repeat, program):
    with pytest.raises(ValueError, match="in Gymnasium reset returns"):
        act(program, env_id=register(environment), action_repeat=repeat)


def test_shimmy_does_not_switch_all_warnings_on(monkeypatch):
    shimmy = ModuleType("shimmy")
    shimmy.__getattr__ = lambda name: warnings.simplefilter("always")
    monkeypatch.setitem(sys.modules, "shimmy", shimmy)
    monkeypatch.setattr(dreamerv3, "import_module", lambda name: warnings.simplefilter("always"))
    with warnings.catch_warnings():
        before = list(warnings.filters)
        dreamerv3.find_spec("CartPole-v1")
        assert warnings.filters == before


def quiet_log() -> tuple[dreamerv3.Log, SimpleNamespace]:
    """A log that writes no files, and its run."""
    run = SimpleNamespace(
        step=0, all_envs=2, writes=False, updates=0, began=0.0, folder=Path("none")
    )
    return dreamerv3.Log(Args(), run), run


def test_a_task_without_ends_is_noted_once(capsys):
    log, run = quiet_log()
    for step in range(39_996, 40_010, 2):
        run.step = step
        log.episodes({})
    out = capsys.readouterr().out
    assert out.count("note: no episode has ended yet") == 1


def test_a_task_with_ends_is_not_noted(capsys):
    log, run = quiet_log()
    infos = {"_episode_return": [True], "episode_return": [1.0], "episode_length": [5]}
    log.episodes(infos)
    run.step = 50_000
    log.episodes({})
    assert "note" not in capsys.readouterr().out
