"""Replay buffer of DreamerV3: a FIFO of single time steps in NumPy, sampled as sequences.

One row of slots per environment; all environments write the same slot at once. Time is an absolute step count per
environment, the slot of time t is t % slots. One step holds what arrived (observation, reward, flags), the action
chosen on it and the latent state (deter, stoch) the agent had then; latents start sampled sequences and are refreshed
by training.
"""

import os
import shutil
from pathlib import Path

import numpy as np

FLAGS = {"is_first": ((), bool), "is_last": ((), bool), "is_terminal": ((), bool)}


class Replay:
    """FIFO replay with two window layouts, an online queue and latent write-back (paper: "Experience replay").

    capacity: steps over all environments. fields: name -> (shape, dtype) of one step, "reward", "action", "deter" and
    "stoch" among them; observation keys start with "obs/", the flags come by themselves. length: T, steps per sampled
    sequence. windows: "episode" begins at a uniformly drawn step, follows its episode and starts it over where it ends;
    "stream" takes T consecutive steps of one environment. folder: where memory-mapped files keep the steps between
    runs; None: in RAM. Raises ValueError when the capacity is below T + 1 steps per environment or the files are
    damaged or of another buffer, and OSError, leaving no files behind, when there is no room for them: their space is
    reserved here.
    """

    def __init__(self, capacity, num_envs, fields, length, windows="episode", seed=0, folder: Path | None = None):
        if capacity // num_envs < length + 1:
            raise ValueError(f"a capacity of {capacity} is less than {length + 1} for each of {num_envs} environments")
        self.capacity, self.kept = capacity, capacity // num_envs  # steps in all, and per environment
        self.slots = self.kept + 1  # one more, never sampled: a kill while it is written tears no stored step
        self.length, self.windows, self.num_envs = length, windows, num_envs
        self.rng = np.random.default_rng(seed)
        shapes = {name: ((num_envs, self.slots, *shape), dtype) for name, (shape, dtype) in {**fields, **FLAGS}.items()}
        shapes["clock"] = ((1,), np.int64)  # the last file made: without it a folder holds nothing
        new = folder and not (folder / "clock.npy").exists()
        try:
            self.data = {name: self._allocate(name, *what, folder, new) for name, what in shapes.items()}
        except OSError:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self.clock = self.data.pop("clock")  # (1,) complete steps per environment: the one number that commits a step
        self.unused = np.zeros(num_envs, np.int64)  # steps so far of the next online window
        self.online = {}  # environment -> first step of its newest complete window, not yet sampled
        self._index_episodes()

    @staticmethod
    def bytes_per_step(fields) -> int:
        """Bytes that one step takes, flags and episode index included."""
        return sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for shape, dtype in {**fields, **FLAGS}.values()) + 20

    def __len__(self) -> int:
        """Steps stored, over all environments."""
        return min(self.now, self.kept) * self.num_envs

    @property
    def now(self) -> int:
        """Steps ever added per environment."""
        return int(self.clock[0])

    def add(self, step: dict[str, np.ndarray]) -> None:
        """Store one step of every environment: name -> (num_envs, *shape), for all fields and flags."""
        now, slot = self.now, self.now % self.slots
        for name, array in self.data.items():
            array[:, slot] = step[name]
        self._extend_episodes(now, step["is_first"])
        self.clock[0] = now + 1
        self.unused += 1
        if self.windows == "episode":
            self.unused[step["is_first"]] = 1
        for env in np.flatnonzero(self.unused == self.length):
            self.online[int(env)] = now + 1 - self.length
            self.unused[env] = 0

    def sample(self, batch_size: int) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
        """Draw sequences. Returns (batch, index); index goes to update_latents.

        batch: every field (B, T, …) but action and latents; prev_action (B, T, …), the action before each step; deter
        and stoch (B, …), the latents of the step before the first one. Where prev_action or latents do not exist, or
        belong to another episode, is_first is set. Arrays are copies.
        """
        env, time, restart = self._draw(batch_size)
        for row, which in enumerate(list(self.online)[:batch_size]):
            start = self.online.pop(which)
            if start >= self._oldest()[which]:  # the newest stretch of an environment replaces a drawn one, once
                env[row], time[row], restart[row] = which, start + np.arange(self.length), False
        env = env[:, None]  # (B, 1)
        slot, before = time % self.slots, (time - 1) % self.slots
        batch = {k: v[env, slot] for k, v in self.data.items() if k not in ("action", "deter", "stoch")}
        batch["prev_action"] = self.data["action"][env, before]
        batch |= {k: self.data[k][env[:, 0], before[:, 0]] for k in ("deter", "stoch")}
        batch["is_first"] |= restart
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]  # seams: the next step is not this one's successor
        return batch, (env, time)

    def update_latents(self, index, deter: np.ndarray, stoch: np.ndarray) -> None:
        """Write latents deter (B, T, D), stoch (B, T, S) back to those steps of a sampled batch that still exist."""
        env, time = index
        row, col = np.nonzero(time >= self.now - self.kept)
        env, slot = env[row, 0], time[row, col] % self.slots
        self.data["deter"][env, slot] = deter[row, col]
        self.data["stoch"][env, slot] = stoch[row, col]

    def flush(self) -> None:
        """Write to the disk what the operating system still holds of the files, so that a crash of it loses nothing."""
        for array in (*self.data.values(), self.clock):
            if isinstance(array, np.memmap):
                array.flush()

    def state_dict(self) -> dict:
        """Everything besides the stored steps that the next sample depends on."""
        rng = self.rng.bit_generator.state
        return {"now": self.now, "unused": self.unused.tolist(), "online": self.online, "rng": rng}

    def load_state_dict(self, state: dict) -> None:
        """Continue the random stream, and the online queue unless steps were added since the state was taken."""
        self.rng.bit_generator.state = state["rng"]
        if state["now"] == self.now:
            self.unused, self.online = np.array(state["unused"], np.int64), dict(state["online"])

    def _draw(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """n uniform windows: env (n,), time (n, T), and where a row starts its episode over (n, T)."""
        oldest, steps = self._oldest(), np.arange(self.length)
        count = self.now - oldest - (self.length - 1 if self.windows == "stream" else 0)
        count = np.maximum(count, 0)  # (num_envs,) to draw from
        total = np.cumsum(count)
        if total[-1] == 0:
            raise ValueError(f"nothing to sample: {self.now} steps per environment are stored")
        draw = self.rng.integers(total[-1], size=n)
        env = np.searchsorted(total, draw, side="right")
        start = oldest[env] + draw - (total - count)[env]
        if self.windows == "stream":
            return env, start[:, None] + steps, np.zeros((n, self.length), bool)
        episode = self.episode[env, start % self.slots] % self.slots
        first = np.maximum(self.first[env, episode], oldest[env])
        offset = (start - first)[:, None] + steps
        offset = offset % (self.end[env, episode] - first)[:, None]  # the episode starts over where it ends
        return env, first[:, None] + offset, (offset == 0) & (steps > 0)

    def _oldest(self) -> np.ndarray:
        """(num_envs,) first step to train on: one whose predecessor is gone serves only as a starting latent."""
        oldest = max(0, self.now - self.kept)
        return np.where(self.data["is_first"][:, oldest % self.slots], oldest, oldest + 1)

    def _extend_episodes(self, now: int, is_first: np.ndarray) -> None:
        """Index step `now`: its episode's number; at number % slots, its first and one-past-last time."""
        rows = np.arange(self.num_envs)
        self.number += is_first
        self.episode[:, now % self.slots] = self.number
        self.first[rows[is_first], self.number[is_first] % self.slots] = now
        self.end[rows, self.number % self.slots] = now + 1

    def _index_episodes(self) -> None:
        """Build the episode index from the stored flags; it is derived, so it is never saved."""
        self.number = np.zeros(self.num_envs, np.int32)
        self.episode = np.zeros((self.num_envs, self.slots), np.int32)
        self.first = np.zeros((self.num_envs, self.slots), np.int64)
        self.end = np.zeros((self.num_envs, self.slots), np.int64)
        for time in range(max(0, self.now - self.kept), self.now):
            self._extend_episodes(time, self.data["is_first"][:, time % self.slots])

    @staticmethod
    def _allocate(name: str, shape: tuple, dtype, folder: Path | None, new: bool) -> np.ndarray:
        if folder is None:
            return np.zeros(shape, dtype)
        path = folder / f"{name.replace('.', '..').replace('/', '.')}.npy"  # a.b and a/b are different files
        if new:
            os.makedirs(folder, exist_ok=True)
            array = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk must be an error here, not a SIGBUS at some later step
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return array
        np.load(path, mmap_mode="r")  # ValueError when the file is shorter than its header says; "r+" would extend it
        array = np.lib.format.open_memmap(path, "r+")
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise ValueError(f"{path} holds {array.dtype} {array.shape}, this run needs {np.dtype(dtype)} {shape}")
        return array
