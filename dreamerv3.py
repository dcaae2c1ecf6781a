r"""DreamerV3 in one file (Hafner et al., "Mastering diverse control tasks through world models", Nature 2025).

    python dreamerv3.py --env-id ALE/Pong-v5

The algorithm in short. The agent acts in the environment and stores every step in a replay buffer. An update
samples B sequences of T steps. The world model encodes each observation x_t, runs a recurrent state-space model over
the sequence (deterministic h_t, discrete stochastic z_t) and learns to reconstruct x_t, to predict reward and
continuation, and to predict z_t before seeing x_t. From every one of the B*T states the model then imagines H steps
with actions of the actor. The critic learns the lambda-returns of these trajectories (and of the replayed ones), the
actor learns by REINFORCE to increase them, with advantages scaled by the range of the returns' 5th to 95th percentile.
One optimizer, one learning rate, the same hyperparameters for every environment.

Symbols: B batch, T sequence length, N = B*T, H imagination horizon, D deter (h), S groups and K classes of stoch (z),
F = D + S*K features, E embedding, A action, V bins. Scalars per step are (B, T). Everything is batch-major.

Time line. Step t holds what arrived at t and the action chosen on it; reward[t] was earned by action[t-1].

      step             0          1          2         3          4
      obs              x0 ------> x1 ------> x2        x3 ------> x4        x3 comes from a reset: no arrow into it,
      action              \_ a0 _/  \_ a1 _/  (a2)      \_ a3 _/            a2 is stored but never executed
      reward           0          r1         r2        0          r4        r1 was earned by a0
      is_first         1          0          0         1          0         h, z, a of the step before are zeroed here
      is_last          0          0          1         0          0         the episode ended, for either reason
      is_terminal      0          0          1 or 0    0          0         0 when it was cut by a time limit

Contents: 1 Args · 2 environments · 3 agent and policy · 4 world-model loss · 5 imagination · 6 lambda-return and return
normalization · 7 actor and critic losses · 8 optimizer · 9 update · 10 evaluation, dreams, checkpoints · 11 main, alone
or under torchrun
"""

import copy
import ctypes
import difflib
import io
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial, reduce
from importlib import import_module
from operator import getitem
from pathlib import Path
from types import ModuleType
from typing import Literal, NoReturn

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import networks
from networks import RSSM, ActionSpec, Actor, Decoder, Encoder, ObsSpec, OneHot, Size, TwoHot, head, one_hot, symlog
from replay import Replay

# === 1. Args ==========================================================================================================


@dataclass
class Args:
    exp_name: str = "dreamerv3"
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment; environment i of several gets seed + i, process r of torchrun 1000 r more"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """if toggled, CUDA is used when it is present"""
    track: bool = False
    """if toggled, everything that TensorBoard gets goes to Weights & Biases too"""
    wandb_project_name: str = "dreamerv3"
    """the project of the run there"""
    wandb_entity: str = ""
    """the entity (team) of the project; empty means your default one"""
    capture_video: bool = False
    """record episodes of the first environment, and all of evaluations, into `videos/{run_name}`"""
    save_model: bool = False
    """whether to save the weights alone too, into `runs/{run_name}/model.pt`"""

    # Environment
    env_id: str = "ALE/Pong-v5"
    """any Gymnasium id, `module:Id-v0` included"""
    total_timesteps: int = 400_000
    """agent steps of the run, over all environments of all processes"""
    num_envs: int = 1
    """parallel environments per training process; more than one run in worker processes"""
    action_repeat: int = 0
    """environment steps per agent step; 0 means 4 (with max-pooling) for Atari and 1 for everything else"""
    image_size: int = 64
    """height and width to which images are resized, a multiple of 16 from 48 to 256"""

    # World model
    size: Literal["auto", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "auto"
    """model size by parameters; auto means 12m on CUDA and 1m on a CPU"""
    batch_size: int = 16
    """B, sequences per update and training process"""
    batch_length: int = 64
    """T, steps per sequence"""
    pred_scale: float = 1.0
    """beta_pred, weight of the reconstruction, reward and continue losses"""
    dyn_scale: float = 1.0
    """beta_dyn, weight of the prior's KL loss (0.5 in the 2023 preprint)"""
    rep_scale: float = 0.1
    """beta_rep, weight of the posterior's KL loss"""
    free_nats: float = 1.0
    """KL below which neither KL loss has a gradient"""
    unimix: float = 0.01
    """uniform probability mixed into the latent categoricals"""
    twohot: Literal["symexp", "symlog"] = "symexp"
    """symexp-spaced bins with targets in raw space, or evenly spaced bins with symlog targets (2023 preprint)"""
    bins: int = 255
    """V, bins of the reward and critic distributions, odd"""

    # Actor and critic
    imagination_horizon: int = 15
    """H, imagined steps per start state"""
    gamma: float = 1 - 1 / 333
    """the discount, learned into the continue predictor"""
    return_lambda: float = 0.95
    """lambda of the lambda-returns"""
    ent_coef: float = 3e-4
    """eta, coefficient of the actor's entropy bonus"""
    actor_unimix: float = 0.01
    """uniform probability mixed into a discrete actor (0 in the official code's current head)"""
    tau: float = 0.02
    """rate at which the slow critic follows the critic"""
    slow_critic_scale: float = 1.0
    """weight of the critic's regularization towards the slow critic"""
    replay_critic_scale: float = 0.3
    """weight of the critic loss on replayed trajectories"""

    # Optimization
    learning_rate: float = 4e-5
    """the learning rate of the optimizer"""
    warmup_updates: int = 1000
    """updates over which the learning rate rises linearly from 0"""
    clip: float = 0.3
    """adaptive gradient clipping: largest ratio of a tensor's gradient norm to its own norm"""
    train_ratio: float = 256.0
    """replayed steps per agent step; an update replays batch_size * batch_length steps"""
    learning_starts: int = 1024
    """agent steps collected before the first update"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of matrix products in updates; auto means bfloat16 where the processor has it natively"""
    compile: bool = True
    """compile the small functions that an update spends its time in; falls back to eager where that fails"""
    cudagraphs: bool = True
    """on CUDA, launch the policy and the update as one graph of kernels each; not under torchrun"""

    # Replay
    buffer_size: int = 1_000_000
    """steps the replay buffer of a training process holds; never more than its share of total_timesteps"""
    replay_windows: Literal["episode", "stream"] = "episode"
    """sequences inside one episode, or consecutive steps across episodes (official code)"""
    persist_replay: bool = True
    """keep the replay buffer in memory-mapped files of the run folder; a run resumed without collects anew first"""

    # Logging
    log_frequency: int = 100
    """agent steps between two records of losses in TensorBoard"""
    video_frequency: int = 1000
    """updates between two dreams, open-loop predictions into TensorBoard and `runs/{run_name}/dreams`; 0 draws none"""
    checkpoint_frequency: int = 10_000
    """agent steps between two checkpoints; 0 writes only the final one"""
    resume: str = ""
    """run folder `runs/{run_name}` to go on with, under its stored flags"""

    # Evaluation
    eval_only: bool = False
    """play eval_episodes with the agent of `--resume`, a run folder, checkpoint or model.pt, and exit"""
    eval_episodes: int = 10
    """whole episodes of one evaluation"""
    eval_frequency: int = 0
    """agent steps between two evaluations during training; 0 means never"""


SIZES = {  # deter, hidden, units, classes, depth
    "1m": Size(512, 64, 64, 4, 4),
    "12m": Size(2048, 256, 256, 16, 16),
    "25m": Size(3072, 384, 384, 24, 24),
    "50m": Size(4096, 512, 512, 32, 32),  # 32 x 32 = 1024-dimensional stochastic state
    "100m": Size(6144, 768, 768, 48, 48),
    "200m": Size(8192, 1024, 1024, 64, 64),
    "400m": Size(12288, 1536, 1536, 96, 96),
}


def fail(message: str) -> NoReturn:
    """A user error: one line, exit status 2."""
    print(f"dreamerv3.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def require(package: str, flag: str) -> ModuleType:
    """A package that only this flag needs; exits with one line where it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        fail(f"{flag} needs a package that is not installed ({error}); try: pip install {package}")


# === 2. Environments ==================================================================================================

PACKAGES = {  # id prefix -> the module that registers these ids, how to install it
    "ALE/": ("ale_py", 'pip install "gymnasium[atari,other]"'),
    "dm_control/": ("shimmy", 'pip install "shimmy[dm-control]" imageio "mujoco<4"'),
    "MinAtar/": ("minatar.gym", "pip install minatar"),
}


class Adapter(gym.ObservationWrapper):
    """Any supported environment as flat arrays. Raises ValueError for other spaces.

    Observations become one dict, nested keys joined by "/" (a space without keys is "obs"): images uint8 (image_size,
    image_size, C), discrete spaces int32 class indices, everything else float32 (n,). Actions come as class indices
    (components,) or as real numbers (A,), which are clipped to [-1, 1] and rescaled to the bounds of the space.
    repeat: environment steps (frames) per agent step, for the record.
    """

    def __init__(self, env: gym.Env, image_size: int, repeat: int = 1):
        super().__init__(env)
        self.image_size, self.repeat = image_size, repeat
        self.leaves = {"/".join(map(str, path)) or "obs": (path, s) for path, s in self.flatten(env.observation_space)}
        self.specs = {key: self.spec(key, space) for key, (_, space) in self.leaves.items()}
        self.observation_space = spaces.Dict({key: self.flat_space(spec) for key, spec in self.specs.items()})
        space = env.action_space
        counts = self.class_counts(space)
        if counts is not None:
            nvec = tuple(counts.ravel().tolist())
            self.action_spec, self.action_space = ActionSpec(nvec, sum(nvec)), spaces.MultiDiscrete(nvec)
        elif isinstance(space, spaces.Box):
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            self.low = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 2, -1))
            self.high = np.where(np.isfinite(high), high, self.low + 2)  # an open side is 2 away from the other
            size = math.prod(space.shape)
            self.action_spec, self.action_space = ActionSpec((), size), spaces.Box(-1, 1, (size,))
        else:
            raise ValueError(f"action space {space}; supported are Discrete, MultiDiscrete, MultiBinary and Box")

    @staticmethod
    def class_counts(space: gym.Space) -> np.ndarray | None:
        """Classes of every component of a discrete space, None for others."""
        if isinstance(space, spaces.MultiDiscrete):
            return space.nvec
        if isinstance(space, (spaces.Discrete, spaces.MultiBinary)):
            return np.full(space.shape, space.n if isinstance(space, spaces.Discrete) else 2)
        return None

    @staticmethod
    def flatten(space: gym.Space, path: tuple = ()):
        """(path, space) of every leaf of nested Dict and Tuple spaces."""
        if not isinstance(space, (spaces.Dict, spaces.Tuple)):
            return [(path, space)]
        items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        return [leaf for key, child in items for leaf in Adapter.flatten(child, (*path, key))]

    def spec(self, key: str, space: gym.Space) -> ObsSpec:
        """What the networks need to know of one leaf. Raises ValueError for other spaces."""
        counts = self.class_counts(space)
        if counts is not None:
            return ObsSpec(space.shape, int(counts.max()))
        if not isinstance(space, spaces.Box):
            supported = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these"
            raise ValueError(f"observation space {space} under the key '{key}'; supported are {supported}")
        if space.dtype == np.uint8 and len(space.shape) == 3 and min(space.shape[:2]) >= 16:
            return ObsSpec((self.image_size, self.image_size, space.shape[2]))
        return ObsSpec((math.prod(space.shape),))

    @staticmethod
    def flat_space(spec: ObsSpec) -> spaces.Box:
        """The space that arrays of this spec come from."""
        if spec.dtype == "float32":
            return spaces.Box(-np.inf, np.inf, spec.shape)
        return spaces.Box(0, spec.classes - 1 if spec.classes else 255, spec.shape, np.dtype(spec.dtype))

    def observation(self, observation) -> dict[str, np.ndarray]:
        """One flat array per key. Raises ValueError for a wrong shape, a class that does not exist, images that are not
        uint8, and numbers that are not finite; those outside the bounds of a Box pass."""
        out = {}
        for key, (path, space) in self.leaves.items():
            x, spec = np.asarray(reduce(getitem, path, observation)), self.specs[key]
            integer = x.dtype.kind in "iub"
            if spec.classes:
                good = integer and space.contains(x)
            else:
                finite = integer or x.dtype.kind == "f" and (abs(x) <= np.finfo(np.float32).max).all()
                good = x.dtype == np.uint8 if spec.is_image else finite
            if not good or x.shape != space.shape:
                declared = space if spec.classes else f"finite {space.dtype} {space.shape}"
                values = np.array2string(x.ravel(), threshold=9, max_line_width=999)
                raise ValueError(f"observation '{key}' is declared {declared} and came as {x.dtype} {x.shape} {values}")
            if spec.is_image and x.shape[:2] != spec.shape[:2]:
                parts = np.split(x, range(4, x.shape[2], 4), 2)  # OpenCV's limit is 4 channels
                parts = [cv2.resize(part, spec.shape[1::-1], interpolation=cv2.INTER_AREA) for part in parts]
                x = np.concatenate([part.reshape(*spec.shape[:2], -1) for part in parts], 2)
            elif spec.classes:
                x = x - getattr(space, "start", 0)
            out[key] = x.astype(spec.dtype).reshape(spec.shape)
        return out

    def step(self, action: np.ndarray):
        """As Gymnasium's, for an action (components,) or (A,). Raises ValueError for what is not finite."""
        obs, reward, *rest = self.env.step(self.native_action(action))
        if not np.isfinite(np.float32(reward)):
            raise ValueError(f"reward {reward} is not a finite number")
        return self.observation(obs), reward, *rest

    def native_action(self, action: np.ndarray):
        """The inner environment's form of an action (components,) or (A,)."""
        space = self.env.action_space
        if self.action_spec.nvec:
            x = action.reshape(space.shape) + getattr(space, "start", 0)
            return int(x) if isinstance(space, spaces.Discrete) else x.astype(space.dtype)
        x = self.low + (np.clip(action, -1, 1).reshape(space.shape) + 1) / 2 * (self.high - self.low)
        return (x.round() if np.issubdtype(space.dtype, np.integer) else x).astype(space.dtype)


def make_env(env_id: str, image_size: int = 64, action_repeat: int = 0, film: bool = False) -> Adapter:
    """One environment as flat arrays (see Adapter), with episode statistics; with film, one that `record` can take.

    Atari ids get frame skip 4 (or action_repeat) with max-pooling exactly once, whatever skip the id has, RGB images
    and up to 30 no-ops after a reset; no reward clipping, no end at lost lives, stickiness as the id says.
    Exits with one line when the id, its package, its spaces or what filming needs are not there.
    """
    kwargs = {"render_mode": "rgb_array"} if film else {}
    module, _, name = env_id.rpartition(":")
    package, install = next((entry for prefix, entry in PACKAGES.items() if name.startswith(prefix)), ("ale_py", ""))
    if package == "shimmy" and not film:
        os.environ.setdefault("MUJOCO_GL", "disabled")  # state observations need no renderer
    try:
        getattr(import_module(package), "register_envs", lambda: None)()
        if module:
            import_module(module)
        if install and not any(key.startswith(name.split("/")[0] + "/") for key in gym.registry):
            raise ImportError(f"{package} registered no environments")
        spec = gym.spec(name)
        atari = str(spec.entry_point).startswith("ale_py") and spec.kwargs.get("obs_type") != "ram"
        if atari:
            env = gym.make(name, frameskip=1, disable_env_checker=True, **kwargs)
            options = {"noop_max": 30, "frame_skip": action_repeat or 4, "screen_size": image_size}
            env = gym.wrappers.AtariPreprocessing(env, grayscale_obs=False, **options)
        else:
            env = gym.make(name, disable_env_checker=True, **kwargs)
            env = gym.wrappers.RepeatAction(env, action_repeat) if action_repeat > 1 else env
        if film:
            require("moviepy", "--capture-video")
            env.reset(seed=0)
            assert isinstance(env.render(), np.ndarray), "its renderer gives no image"
        return Adapter(gym.wrappers.RecordEpisodeStatistics(env), image_size, action_repeat or (4 if atari else 1))
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        if install or "pip install" not in str(error):  # Gymnasium's own errors name the command
            error = f"{error}; try: {install or 'pip install it, or put its file beside dreamerv3.py'}"
        fail(f"--env-id {env_id} needs a package that is not installed: {error}")
    except gym.error.UnregisteredEnv as error:
        close = ", ".join(difflib.get_close_matches(name, gym.registry, 3, cutoff=0.5))
        fail(f"--env-id {env_id} is unknown: {error} Closest: {close or 'see gymnasium.pprint_registry()'}")
    except Exception as error:  # spaces that are not supported, and whatever constructors and renderers raise
        fail(f"--env-id {env_id} is not supported{' with --capture-video' * film}: {str(error) or repr(error)}")


def record(env: Adapter, folder: Path | None, **options) -> gym.Env:
    """The environment, made with film=True, recording episodes to folder/*.mp4; as it is when folder is None."""
    if folder is None:
        return env
    fps = max(1, env.metadata.get("render_fps", 30) // env.repeat)  # a frame per agent step, in real time
    return gym.wrappers.RecordVideo(env, str(folder), fps=fps, **options)


def make_envs(args: Args, first: Adapter, videos: Path | None) -> gym.vector.VectorEnv:
    """All environments of a run, in processes when more than one, else the given one; videos: of the first one."""

    def worker(videos: Path | None = None):
        if multiprocessing.parent_process():  # not so when it is made for its spaces
            os.setpgid(0, 0)  # Ctrl-C and launchers signal the whole process group; main decides
        return record(make_env(args.env_id, args.image_size, args.action_repeat, videos is not None), videos)

    if args.num_envs == 1:
        envs = gym.vector.SyncVectorEnv([lambda: record(first, videos)])
    else:
        first.close()
        gym.logger.min_level = gym.logger.ERROR + 1  # no traceback of a worker: what it raised is raised here too
        envs = gym.vector.AsyncVectorEnv([lambda: worker(videos), *[worker] * (args.num_envs - 1)])
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP, "see the time line above"
    return envs


# === 3. Agent =========================================================================================================


class Agent(nn.Module):
    """All networks: world model (encoder, rssm, decoder, reward, cont), actor, critic, slow critic, return range.

    specs: observation key -> ObsSpec. action: ActionSpec. size: a row of SIZES. args: unimix, actor_unimix,
    bins and twohot are read.
    """

    def __init__(self, specs: dict[str, ObsSpec], action: ActionSpec, size: Size, args: Args):
        super().__init__()
        self.specs, self.action, self.size = specs, action, size
        feat = size.deter + size.groups * size.classes
        self.encoder = Encoder(specs, size)
        self.rssm = RSSM(self.encoder.embed_size, action.size, size, args.unimix)
        self.decoder = Decoder(specs, size)
        self.reward = head(feat, size.units, 1, args.bins, outscale=0.0)
        self.cont = head(feat, size.units, 1, 1)
        self.actor = Actor(feat, size.units, action, args.actor_unimix)
        self.critic = head(feat, size.units, 3, args.bins, outscale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.twohot = TwoHot(args.bins, args.twohot)
        self.return_norm = ReturnNorm()

    def trained(self) -> list[nn.Parameter]:
        """The parameters the optimizer changes: all but the slow critic's."""
        return [p for p in self.parameters() if p.requires_grad]


def get_feat(deter: Tensor, stoch: Tensor) -> Tensor:
    """(…, D), (…, S, K) -> (…, F), what every head but the decoder sees, cast once, to bfloat16 under autocast."""
    parts, device = [deter, stoch.flatten(-2)], deter.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        parts = [x.bfloat16() for x in parts]
    return torch.cat(parts, -1)


def flat_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Stored action (…, components) as the networks see it, (…, A): one-hot vectors side by side, or real numbers."""
    if not spec.nvec:
        return action.float()
    return torch.cat([one_hot(action[..., i], n) for i, n in enumerate(spec.nvec)], -1)


def stored_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """The inverse of flat_action: (…, A) -> (…, components), class indices or unclipped real numbers."""
    if not spec.nvec:
        return action
    return torch.stack([x.argmax(-1) for x in action.split(spec.nvec, -1)], -1)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # small batches, float32: compiling again for them does not pay
def policy(agent: Agent, obs: dict[str, Tensor], state: tuple, is_first: Tensor) -> tuple[Tensor, tuple]:
    """Act in N environments: obs key -> (N, …), is_first (N,) bool, state (deter, stoch, action) of the step before.

    Returns the sampled action (N, A) and the new state. `agent.rssm.initial(N)` and zeros (N, A) are a first state.
    """
    deter, stoch, action = state
    u = torch.rand(*stoch.shape[:2], device=stoch.device)  # (N, S)
    deter, stoch, _ = agent.rssm.observe_step(deter, stoch, action, agent.encoder(obs), is_first, u)
    action = agent.actor(get_feat(deter, stoch)).sample(agent.actor.noise(len(deter)))
    return action, (deter, stoch, action)


# === 4. World-model loss (paper: equations 2 to 5) ====================================================================


def world_model_loss(agent: Agent, batch: dict, args: Args) -> tuple[dict[str, Tensor], Tensor, Tensor, dict]:
    """Losses of the world model on replayed sequences.

    batch: obs key -> (B, T, …), prev_action (B, T, A), reward and flags (B, T), deter (B, D) and stoch (B, S, K) of
    the step before. Returns the losses, each (B, T), the posterior deter (B, T, D) and stoch (B, T, S, K) with
    gradient, and further outputs: features, embedding, logits, reconstructions, entropies.
    """
    embed = agent.encoder(batch["obs"])  # (B, T, E)
    deter, stoch, post_logits = agent.rssm.observe(
        batch["deter"], batch["stoch"], batch["prev_action"], embed, batch["is_first"]
    )  # (B, T, D), (B, T, S, K), (B, T, S, K)
    prior_logits = agent.rssm.logits(agent.rssm.prior, deter)  # (B, T, S, K)
    feat = get_feat(deter, stoch)  # (B, T, F)
    reward_logits = agent.reward(feat)  # (B, T, V)
    cont_logits = agent.cont(feat).squeeze(-1).float()  # (B, T)
    recon, maps = agent.decoder(deter, stoch)  # key -> (B, T, …), and what images are made of

    recon_loss = sum(vector_loss(recon[key], batch["obs"][key]) for key in recon)
    if maps is not None:
        recon_loss = recon_loss + image_loss(maps, networks.split_phases(agent.encoder.stack(batch["obs"])))
    losses = {
        "recon": recon_loss,
        "reward": agent.twohot.loss(reward_logits, batch["reward"]),
        "continue": F.binary_cross_entropy_with_logits(
            cont_logits, (~batch["is_terminal"]).float() * args.gamma, reduction="none"
        ),  # predicts the discount too: imagination needs no other
    }
    kl, entropy = kl_losses(post_logits, prior_logits, args)
    outputs = {"feat": feat, "embed": embed, "post": post_logits, "prior": prior_logits, "entropy": entropy}
    outputs |= {"reward": reward_logits, "cont": cont_logits, "recon": recon, "maps": maps}
    return losses | kl, deter, stoch, outputs


def kl_losses(post_logits: Tensor, prior_logits: Tensor, args: Args) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dynamics and representation loss (B, T) between posterior and prior, from their logits (B, T, S, K), and metrics.

    fixed: without gradient. KL is summed over the S groups, then floored: free nats are per step.
    """
    post, prior = OneHot(post_logits, args.unimix), OneHot(prior_logits, args.unimix)
    fixed_post, fixed_prior = OneHot(post_logits.detach(), args.unimix), OneHot(prior_logits.detach(), args.unimix)
    losses = {
        "dyn": fixed_post.kl(prior).sum(-1).clamp(min=args.free_nats),  # trains the prior
        "rep": post.kl(fixed_prior).sum(-1).clamp(min=args.free_nats),  # trains the posterior
    }
    entropies = {"prior": fixed_prior.entropy(), "posterior": fixed_post.entropy()}  # (B, T, S) each
    return losses, {f"world_model/{name}_entropy": x.sum(-1).mean() for name, x in entropies.items()}


def vector_loss(recon: Tensor, target: Tensor) -> Tensor:
    """Squared error in symlog space, or cross-entropy where recon has one axis more, the logits: -> (B, T)."""
    if recon.ndim > target.ndim:
        loss = F.cross_entropy(recon.flatten(0, -2), target.flatten().long(), reduction="none").view(target.shape)
    else:
        loss = (recon - symlog(target)).square()
    return loss.flatten(2).sum(-1) if loss.ndim > 2 else loss


def image_loss(maps: Tensor, target: Tensor) -> Tensor:
    """Squared error of the decoder's maps (N, 4C, h, w) against all images, split into the same phases
    (B, T, h, w, 4C), summed over pixels: -> (B, T)."""
    error = torch.sigmoid(maps.permute(0, 2, 3, 1).float()).view(target.shape) - target.float() / 255
    return error.square().flatten(2).sum(-1)


# === 5. Imagination ===================================================================================================


@torch.no_grad()
def imagine(agent: Agent, deter: Tensor, stoch: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Roll the model forward with the actor: states (N, D), (N, S, K) -> feat (N, H+1, F), action (N, H+1, A).

    action[:, h] is the one taken in state h; nothing here carries a gradient.
    """
    u = torch.rand(horizon, *stoch.shape[:2], device=stoch.device)  # (H, N, S)
    noise = agent.actor.noise(horizon + 1, len(deter))
    feats = [get_feat(deter, stoch)]
    actions = [agent.actor(feats[0]).sample(noise[0])]
    for h in range(horizon):
        deter, stoch, feat, action = imagine_step(agent, deter, stoch, actions[-1], u[h], noise[h + 1])
        feats.append(feat)
        actions.append(action)
    torch.clear_autocast_cache()  # some releases give the actor's loss its weights as cast here, without gradient
    return torch.stack(feats, 1), torch.stack(actions, 1)


def imagine_step(agent: Agent, deter: Tensor, stoch: Tensor, action: Tensor, u: Tensor, noise: Tensor):
    """State (N, D), (N, S, K) and action (N, A) -> deter, stoch, feat (N, F) and action (N, A) of the next step."""
    deter, stoch = agent.rssm.imagine_step(deter, stoch, action, u)
    feat = get_feat(deter, stoch)
    return deter, stoch, feat, agent.actor(feat).sample(noise)


# === 6. Lambda-return and return normalization (paper: equations 6 and 7) =============================================


def lambda_return(
    last: Tensor, term: Tensor, reward: Tensor, boot: Tensor, disc: float | Tensor = 1.0, lam: float = 0.95
) -> Tensor:
    """Lambda-returns of trajectories of length L: all arguments (N, L) -> (N, L-1).

    R[t] = reward[t+1] + live[t+1] * ((1 - cont[t+1]) * boot[t+1] + cont[t+1] * R[t+1]), R[L-1] = boot[L-1], where
    live = (1 - term) * disc ends the return at terminations, cont = (1 - last) * lam bootstraps at any episode end.
    """
    live = (1 - term.float()) * disc
    cont = (1 - last.float()) * lam
    returns = [boot[:, -1]]
    for t in reversed(range(reward.shape[1] - 1)):
        future = (1 - cont[:, t + 1]) * boot[:, t + 1] + cont[:, t + 1] * returns[-1]
        returns.append(reward[:, t + 1] + live[:, t + 1] * future)
    return torch.stack(returns[:0:-1], 1)


class ReturnNorm(nn.Module):
    """Running 5th and 95th percentile of the returns; advantages are divided by their distance, at least 1."""

    def __init__(self, rate: float = 0.01):
        super().__init__()
        self.rate = rate
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Move towards the percentiles of returns (any shape), interpolated between neighbors."""
        ordered = returns.flatten().sort().values  # (n,); torch.quantile compares on the host in torch 2.6
        for running, q in ((self.lo, 0.05), (self.hi, 0.95)):
            rank = q * (len(ordered) - 1)
            percentile = ordered[int(rank)].lerp(ordered[math.ceil(rank)], rank % 1)  # ()
            running.lerp_(percentile, self.rate)

    @property
    def scale(self) -> Tensor:
        """S = max(1, hi - lo), a scalar."""
        return (self.hi - self.lo).clamp(min=1)


# === 7. Actor and critic losses (paper: "Critic learning", "Actor learning") ==========================================


def actor_critic_loss(agent: Agent, feat: Tensor, action: Tensor, args: Args) -> tuple[dict[str, Tensor], Tensor, dict]:
    """Losses on imagined trajectories feat (N, H+1, F), action (N, H+1, A), neither with gradient.

    Returns the losses (N,), the lambda-returns R (N, H), and metrics.
    """
    with torch.no_grad():
        reward = agent.twohot.mean(agent.reward(feat))  # (N, H+1)
        cont = agent.cont(feat).squeeze(-1).float().sigmoid()  # (N, H+1), the discount is in it
        slow_value = agent.twohot.mean(agent.slow_critic(feat))  # (N, H+1)
    value_logits = agent.critic(feat)  # (N, H+1, V)
    value = agent.twohot.mean(value_logits.detach())  # (N, H+1)
    weight = cont.cumprod(1)[:, :-1]  # (N, H) probability that the episode is still running
    returns = lambda_return(torch.zeros_like(cont), 1 - cont, reward, value, 1.0, args.return_lambda)  # (N, H)

    agent.return_norm.update(returns)
    advantage = (returns - value[:, :-1]) / agent.return_norm.scale  # (N, H)
    pi = agent.actor(feat[:, :-1])
    entropy = pi.entropy()  # (N, H)
    actor_loss = -weight * (pi.log_prob(action[:, :-1]) * advantage + args.ent_coef * entropy)
    value_logits = value_logits[:, :-1]
    critic_loss = agent.twohot.loss(value_logits, returns)
    critic_loss = critic_loss + args.slow_critic_scale * agent.twohot.loss(value_logits, slow_value[:, :-1])
    losses = {"actor": actor_loss.mean(1), "critic": (weight * critic_loss).mean(1)}
    metrics = {
        "behavior/return_mean": returns.mean(),
        "behavior/return_scale": agent.return_norm.scale,
        "behavior/advantage_mag": advantage.abs().mean(),
        "behavior/value_mean": value.mean(),
        "behavior/reward_mean": reward.mean(),
        "behavior/continue_mean": cont.mean(),
        "behavior/actor_entropy": entropy.detach().mean(),
    }
    return losses, returns, metrics


def replay_critic_loss(agent: Agent, feat: Tensor, batch: dict, boot: Tensor, args: Args) -> Tensor:
    """Critic loss on replayed trajectories: feat (B, T, F) with gradient into the world model, boot (B, T) the imagined
    return from every state -> (B, T-1)."""
    feat = feat[:, :-1]  # the last step of a sequence has no return
    value_logits = agent.critic(feat)  # (B, T-1, V)
    with torch.no_grad():
        slow_value = agent.twohot.mean(agent.slow_critic(feat))  # (B, T-1)
    returns = lambda_return(
        batch["is_last"], batch["is_terminal"], batch["reward"], boot, args.gamma, args.return_lambda
    )  # (B, T-1)
    loss = agent.twohot.loss(value_logits, returns)
    loss = loss + args.slow_critic_scale * agent.twohot.loss(value_logits, slow_value)
    return (~batch["is_last"][:, :-1]).float() * loss  # a last step has no successor in its episode


# === 8. Optimizer: LaProp with adaptive gradient clipping =============================================================


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al., 2020): RMSProp-normalized gradients, then momentum; after per-tensor adaptive clipping.

    lr rises linearly from 0 at the first update over `warmup` updates. clip: a gradient's norm is limited to clip times
    the norm of its tensor (that norm being at least 1e-3). All state lives on the parameters' device; no host sync.
    """

    def __init__(
        self, params, lr: float, warmup: int = 1000, clip: float = 0.3, betas=(0.9, 0.999), eps: float = 1e-20
    ):
        options = {"lr": lr, "warmup": warmup, "clip": clip, "betas": betas, "eps": eps}
        super().__init__(params, options | {"capturable": True})  # by which torch restores `step` on the device, too
        for group in self.param_groups:
            for p in group["params"]:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p] = {"step": torch.zeros((), device=p.device), "mean": zeros, "square": zeros.clone()}

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """One update; every parameter needs a gradient. Returns the metrics of the last parameter group."""
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            state = [self.state[p] for p in params]
            means, squares = [s["mean"] for s in state], [s["square"] for s in state]
            steps = [s["step"] for s in state]
            done = steps[0].clone()  # updates before this one
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]

            grad_norms = torch.stack(torch._foreach_norm(grads))  # (tensors,)
            norms = torch.stack(torch._foreach_norm(params))
            limit = (group["clip"] * norms.clamp(min=1e-3) / grad_norms).clamp(max=1)
            grads = torch._foreach_mul(grads, list(limit.unbind()))
            # square = EMA(g^2); update u = g / sqrt(square); mean = EMA(u); both averages bias-corrected
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            scale = torch._foreach_div(squares, 1 - beta2 ** (done + 1))
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_div_(grads, scale)
            torch._foreach_lerp_(means, grads, 1 - beta1)
            rate = group["lr"] * (done / max(1, group["warmup"])).clamp(max=1)
            updates = torch._foreach_mul(means, -rate / (1 - beta1 ** (done + 1)))
            torch._foreach_add_(params, updates)

        count = sum(p.numel() for p in params)
        return {
            "optim/grad_norm": grad_norms.norm(),
            "optim/update_rms": torch.stack(torch._foreach_norm(updates)).norm() / count**0.5,
            "optim/param_rms": norms.norm() / count**0.5,
            "charts/learning_rate": rate,
        }


# === 9. One update ====================================================================================================


def loss(agent: Agent, batch: dict, args: Args) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The sum of all losses on one batch, shaped as for world_model_loss.

    Returns the total (), the posterior latents deter (B, T, D) and stoch (B, T, S, K), and metrics, both detached.
    """
    half = args.precision == "bfloat16"
    with torch.autocast(batch["reward"].device.type, torch.bfloat16) if half else nullcontext():
        losses, deter, stoch, outputs = world_model_loss(agent, batch, args)
        # imagination starts from all B*T posterior states, detached: behavior learning does not shape the world model
        starts = deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1)
        feat, action = imagine(agent, *starts, args.imagination_horizon)
        behavior_losses, returns, metrics = actor_critic_loss(agent, feat, action, args)
        boot = returns[:, 0].unflatten(0, deter.shape[:2])  # (B, T)
        losses |= behavior_losses
        losses["replay_critic"] = replay_critic_loss(agent, outputs["feat"], batch, boot, args)
    losses = {name: value.mean() for name, value in losses.items()}
    scales = {"recon": args.pred_scale, "reward": args.pred_scale, "continue": args.pred_scale}
    scales |= {"dyn": args.dyn_scale, "rep": args.rep_scale, "replay_critic": args.replay_critic_scale}
    total = sum(scales.get(name, 1.0) * value for name, value in losses.items())
    metrics |= {f"losses/{name}": value.detach() for name, value in (losses | {"total": total}).items()}
    return total, (deter.detach(), stoch.detach()), metrics | outputs["entropy"]


def train_step(agent: Agent, optimizer: LaProp, batch: dict, args: Args) -> tuple[tuple[Tensor, Tensor], dict]:
    """One update on one batch: -> fresh latents deter (B, T, D) and stoch (B, T, S, K), and metrics, on the device."""
    total, latents, metrics = loss(agent, batch, args)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    metrics |= optimizer.step()
    with torch.no_grad():  # the slow critic follows
        torch._foreach_lerp_(list(agent.slow_critic.parameters()), list(agent.critic.parameters()), args.tau)
    return latents, metrics


def batch_to_device(batch: dict[str, np.ndarray], agent: Agent, device: torch.device) -> dict:
    """A sampled batch as train_step takes it. Copies to a GPU are asynchronous, from pinned memory."""

    def copy_over(x: np.ndarray) -> Tensor:
        x = torch.from_numpy(x)
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    out = {key: copy_over(x) for key, x in batch.items()}
    out["obs"] = {key[4:]: out.pop(key) for key in batch if key.startswith("obs/")}
    out["prev_action"] = flat_action(out["prev_action"], agent.action)  # (B, T, A)
    out["deter"], out["stoch"] = out["deter"].float(), one_hot(out["stoch"], agent.size.classes)  # (B, D), (B, S, K)
    return out


THIS = sys.modules[__name__]
# small functions only: an unrolled 64-step loop would compile for ten minutes
COMPILED = [(networks.RSSM, "tapped_steps"), (networks.RSSM, "observe_step"), (networks.RMSNorm, "maps")]
COMPILED += [(networks, name) for name in ("pixels_to_maps", "split_phases")]
COMPILED += [(THIS, name) for name in ("kl_losses", "image_loss", "imagine_step", "actor_critic_loss")]


def fork_rng() -> AbstractContextManager:
    """A block that leaves torch's random state as it was, on the GPUs too if they are in use."""
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def compile_functions(agent: Agent, batch: dict, args: Args) -> None:
    """Compile the functions that an update spends its time in, once per process, by computing the loss of a batch.

    Halves the time of an update. Where it fails (no compiler, unsupported platform) everything goes on in eager mode.
    In torch's default mode on CUDA too: others make graphs of single functions, `capture` makes one of the update.
    """

    def replace(functions):
        for (owner, name), function in zip(COMPILED, functions, strict=True):
            setattr(owner, name, function)

    plain = [getattr(owner, name) for owner, name in COMPILED]
    torch._dynamo.config.cache_size_limit = 64  # shapes per function; beyond the limit it would be eager silently
    start, return_norm = time.time(), copy.deepcopy(agent.return_norm.state_dict())
    print("compiling the inner functions of an update, a minute or two the first time", flush=True)
    try:
        replace([torch.compile(function, dynamic=False) for function in plain])
        with fork_rng():
            loss(agent, batch, args)[0].backward()
        print(f"compiled in {time.time() - start:.0f} s", flush=True)
    except Exception as error:  # compilers fail in many ways
        replace(plain)
        print(f"cannot compile, going on in eager mode: {type(error).__name__}: {str(error)[:200]!r}", flush=True)
    finally:
        agent.zero_grad(set_to_none=True)
        agent.return_norm.load_state_dict(return_norm)


def capture(function: Callable, *inputs) -> Callable:
    """A function of tensors on a GPU, or nested dicts and tuples of them, as one CUDA graph for inputs of these shapes.

    Launching a kernel takes longer than most kernels of an update run; the graph launches all of them at once. The
    function has to have run before, which loads its kernels; it does not run here. What a call returns is overwritten
    by the next one. Where capturing fails, the function itself is returned.
    """
    buffers = tree_map(torch.clone, inputs)
    try:
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            outputs = function(*buffers)
    except RuntimeError as error:
        print(f"cannot capture a CUDA graph, going on without: {str(error)[:200]!r}", flush=True)
        return function

    def replay(*inputs):
        tree_map(Tensor.copy_, buffers, inputs)
        graph.replay()
        return outputs

    return replay


# === 10. Evaluation, dreams, checkpoints ==============================================================================


def evaluate(agent: Agent, args: Args, episodes: int, seed: int, videos: Path | None = None) -> list[float]:
    """Undiscounted returns of whole episodes in an environment of its own, whose first reset takes the seed.

    The policy samples as in training. videos: a folder for one mp4 per episode. Prints a line; changes neither the
    agent nor torch's random state.
    """
    env = make_env(args.env_id, args.image_size, args.action_repeat, videos is not None)
    env = record(env, videos, episode_trigger=lambda episode: True)
    device, returns = agent.return_norm.lo.device, []
    with fork_rng():
        torch.manual_seed(seed)
        while len(returns) < episodes:
            obs, _ = env.reset(seed=None if returns else seed)
            state = (*agent.rssm.initial(1), torch.zeros(1, agent.action.size, device=device))
            is_first, over = True, False
            while not over:
                tensors = {key: torch.as_tensor(x[None]).to(device) for key, x in obs.items()}
                action, state = policy(agent, tensors, state, torch.tensor([is_first], device=device))
                action = stored_action(action, agent.action)[0].cpu().numpy()
                obs, _, terminated, truncated, info = env.step(action)
                is_first, over = False, terminated or truncated
            returns.append(float(info["episode"]["r"]))
    env.close()
    spread = f"mean {np.mean(returns):.1f}, std {np.std(returns):.1f}, min {min(returns):g}, max {max(returns):g}"
    show = tqdm.write if sys.stderr.isatty() else print  # beside a progress bar
    show(f"evaluation: {episodes} episodes of {args.env_id}, return {spread}")
    return returns


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def open_loop(agent: Agent, batch: dict, context: int = 5) -> dict[str, Tensor]:
    """Predict the first n = min(4, B) sequences of a batch (as for world_model_loss) from their first steps alone.

    The posterior filters `context` steps, then the prior goes on under the batch's actions; an episode that starts
    there starts from zeros. Returns for images truth, prediction and error (0.5 is none) on top of each other,
    (n, T, 3h, w, C) in [0, 1]; for vectors truth and prediction (n, T, 2, d) in raw units, discrete keys as classes.
    """
    obs = {key: x[:4] for key, x in batch["obs"].items()}
    deter, stoch, action, is_first = (batch[key][:4] for key in ("deter", "stoch", "prev_action", "is_first"))
    embed = agent.encoder({key: x[:, :context] for key, x in obs.items()})
    seen = agent.rssm.observe(deter, stoch, action[:, :context], embed, is_first[:, :context])
    states = list(zip(*(x.unbind(1) for x in seen[:2]), strict=True))  # per step (n, D), (n, S, K)
    u = torch.rand(*is_first.shape, stoch.shape[1], device=stoch.device)  # (n, T, S)
    for t in range(context, is_first.shape[1]):
        deter, stoch = states[-1]
        keep = ~is_first[:, t, None]
        states.append(agent.rssm.imagine_step(deter * keep, stoch * keep.unsqueeze(-1), action[:, t] * keep, u[:, t]))
    vectors, maps = agent.decoder(*(torch.stack(x, 1) for x in zip(*states, strict=True)))
    out = {} if maps is None else agent.decoder.pixels(maps, *is_first.shape)
    for key, x in out.items():
        truth = obs[key].float() / 255
        out[key] = torch.cat([truth, x, (x - truth + 1) / 2], 2)
    for key, x in vectors.items():
        x = x.argmax(-1) if agent.specs[key].classes else networks.symexp(x)
        out[key] = torch.stack([y.reshape(*is_first.shape, -1).float() for y in (obs[key], x)], 2)
    return out


def write_dream(agent: Agent, batch: dict, folder: Path, writer: SummaryWriter, step: int, updates: int) -> None:
    """Draw open_loop of a batch: images into folder/dreams/{updates}.gif, vectors into .png, both into TensorBoard.

    Borders are green while the model sees the frames, red when it does not, white where an episode starts.
    """
    context, is_first = 5, batch["is_first"].cpu()
    with fork_rng():  # training goes on as if there had been no dream
        dream = {key: x.cpu() for key, x in open_loop(agent, batch, context).items()}
    # images that are not RGB are shown by their last channel: the newest of stacked frames
    images = [x if x.shape[-1] == 3 else x[..., -1:].expand(*x.shape[:-1], 3) for x in dream.values() if x.ndim == 5]
    lines = [(f"{key}[{i}]", x[..., i]) for key, x in dream.items() if x.ndim == 4 for i in range(x.shape[-1])]
    path = folder / "dreams" / str(updates)
    try:
        path.parent.mkdir(exist_ok=True)
        if images:
            x = torch.cat(images, 3)  # (n, T, 3h, w, 3)
            kind = torch.where(is_first[: len(x)], 2, (torch.arange(x.shape[1]) >= context).long())  # (n, T)
            colors = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
            video = colors[kind][:, :, None, None].repeat(1, 1, x.shape[2] + 4, x.shape[3] + 4, 1)
            video[:, :, 2:-2, 2:-2] = x
            video = (video * 255).byte().numpy()
            strip = np.concatenate([np.concatenate(row[:: math.ceil(len(row) / 16)], 1) for row in video])
            writer.add_image("dream/images", strip, step, dataformats="HWC")
            frames = [Image.fromarray(np.concatenate(x, 1)).quantize(method=2) for x in video.swapaxes(0, 1)]  # 2: fast
            frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=100, loop=0)
        if lines:
            from matplotlib.figure import Figure  # here, because it takes half a second

            lines = lines[:: math.ceil(len(lines) / 8)]  # at most 8 components, of all keys
            figure = Figure((16, 1.5 * len(lines)), dpi=80)
            figure.subplots_adjust(0.05, 0.3 / len(lines), 0.99, 1 - 0.1 / len(lines), 0, 0.1)
            begin = np.arange(len(lines[0][1])) * (is_first.shape[1] + 1)  # of the sequences, side by side
            row, start = is_first[: len(begin)].nonzero().T.numpy()
            marks = {"lightgray": begin[row] + start, "green": begin + context - 0.5, "black": begin - 1}
            grid = figure.subplots(len(lines), sharex=True, squeeze=False)[:, 0]
            for ax, (name, x) in zip(grid, lines, strict=True):  # x (n, T, 2)
                ax.plot(F.pad(x, (0, 0, 0, 1), value=math.nan).flatten(0, 1), label=["true", "predicted"])
                ax.set(ylabel=name, xlim=(-1, begin[-1] + is_first.shape[1]))
                for color, at in marks.items():
                    ax.vlines(at, 0, 1, color, transform=ax.get_xaxis_transform())
            grid[0].legend(loc="upper right")
            figure.savefig(path.with_suffix(".png"))
            plot = np.asarray(Image.open(path.with_suffix(".png")).convert("RGB"))
            writer.add_image("dream/vectors", plot, step, dataformats="HWC")
    except OSError as error:
        print(f"warning: no dream after {updates:,} updates, {error}: training goes on", flush=True)


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write folder/checkpoint.pt so that at every moment it or checkpoint_previous.pt is whole."""
    path, temporary = folder / "checkpoint.pt", folder / "checkpoint.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, folder / "checkpoint_previous.pt")
    os.replace(temporary, path)


CHECKPOINT = "agent optimizer replay capacity torch_rng cuda_rng seconds global_step updates owed".split()


def load_checkpoint(path: Path, keys: list[str] = CHECKPOINT) -> tuple[Path, Args, dict]:
    """A run folder, or a checkpoint in one -> the folder, its flags, and the newest readable checkpoint, on the CPU.

    Tries the given file first; a good one has these keys. weights_only: a stranger's file cannot run code. Exits with
    one line when none is good.
    """
    folder = path.parent if path.is_file() else path
    newest, problems = folder / "checkpoint.pt", []
    for file in filter(Path.is_file, dict.fromkeys([path, newest, folder / "checkpoint_previous.pt"])):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            args, state = Args(**state["args"]), {key: state[key] for key in keys}
        except Exception as error:  # truncated, corrupt or foreign: torch raises many kinds
            problems.append(f"{file} is unreadable ({type(error).__name__})")
            continue
        if problems:
            print(f"warning: {problems[0]}, using {file.name}", flush=True)
            if keys is CHECKPOINT and newest.exists() and file != newest:
                with suppress(FileNotFoundError):  # another rank was faster
                    os.replace(newest, newest.with_suffix(".unreadable"))  # it must not become the previous good one
        return folder, args, state
    fail(f"--resume {path} holds no good checkpoint: {', '.join(problems) or 'give the folder runs/... of a run'}")


def restore(state: dict, **parts) -> None:
    """Load these parts of a checkpoint; exits with one line when they differ from it."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as error:  # torch names the tensors
        fail(f"--resume names a run of other spaces or another size: {str(error)[:300]}")


def restore_agent(args: Args, state: dict, device: str | torch.device) -> Agent:
    """The agent of a checkpoint, on the device; an environment is made, to ask it for its spaces."""
    env = make_env(args.env_id, args.image_size, args.action_repeat)
    env.close()
    agent = Agent(env.specs, env.action_spec, SIZES[args.size], args).to(device)
    restore(state, agent=agent)
    return agent


def load_agent(path: str | Path, device: str | torch.device = "cpu") -> tuple[Agent, Args]:
    """The agent of a run folder, a checkpoint file or a model.pt, on the device, and the flags it was trained with.

    Reads files as load_checkpoint does. Exits with one line when there is no good file or its environment is missing.
    """
    _, args, state = load_checkpoint(Path(path), ["agent"])
    return restore_agent(args, state, device), args


def check_finite(names: Iterable[str], window: list[Tensor], step: int, folder: Path) -> None:
    """Stop the program when one of these metrics is not finite; window: their values (metrics,) of every update."""
    if window and not torch.stack(window).isfinite().all():
        name = next(n for n, x in zip(names, torch.stack(window).T, strict=True) if not x.isfinite().all())
        sys.exit(f"dreamerv3.py: {name} is not finite at step {step}; the last good checkpoint is in {folder}")


# === 11. Main =========================================================================================================


def parse_args(argv: list[str] | None = None) -> tuple[Args, dict | None]:
    """Flags from the command line, checked; with --resume the stored ones, and the checkpoint."""

    def parse(default: Args) -> Args:
        out = io.StringIO()
        try:
            with redirect_stderr(out):
                return tyro.cli(Args, args=argv, default=default, description=(__doc__ or "").split("\n\n")[0])
        except SystemExit as stop:
            if stop.code:  # tyro draws a box with a title: keep its words
                fail(re.sub(r"[─-╿]+", " ", out.getvalue().partition("\n")[2]))
            raise

    args, state = parse(Args()), None
    if args.eval_only and not args.resume:
        fail("--eval-only needs --resume and a run folder, a checkpoint or a model.pt")
    if args.resume:
        folder, stored, state = load_checkpoint(Path(args.resume), ["agent"] if args.eval_only else CHECKPOINT)
        args = parse(stored)
        args.resume = str(folder)
        free = "resume total_timesteps checkpoint_frequency log_frequency compile cuda save_model capture_video track"
        free += " cudagraphs wandb_project_name wandb_entity eval_only eval_episodes eval_frequency video_frequency"
        free += " seed" * args.eval_only
        for name, old in asdict(stored).items():
            flag, new = f"--{name.replace('_', '-')}", getattr(args, name)
            if name not in free.split():
                if new not in (old, "auto"):
                    fail(f"{flag} {new} disagrees with {old} of the run to resume; leave it out or start a new run")
                setattr(args, name, old)
            elif name == "total_timesteps" and new < old:
                fail(f"{flag} {new} is less than the {old} of the run to resume; it may only grow")
    check_args(args)
    return args, state


def check_args(args: Args) -> None:
    """Exit with one line when a flag has an impossible value: it names the value, the limit and so the fix."""
    numbers = " ".join(name for name, value in asdict(args).items() if not isinstance(value, str))
    positive = "total_timesteps num_envs batch_size learning_rate train_ratio log_frequency imagination_horizon clip"
    positive = f"{positive} eval_episodes"
    world = dist.get_world_size() if dist.is_initialized() else 1
    window, batch = args.batch_length * args.num_envs * world, args.batch_size * args.batch_length
    more, per_env = (args.batch_length + 1) * args.num_envs, "--batch-length + 1 per environment"
    rules = [
        (numbers, lambda x: 0 <= x < math.inf, "at least 0"),
        (positive, lambda x: x > 0, "more than 0"),
        ("batch_length", lambda x: x >= 2, "at least 2"),
        ("gamma unimix actor_unimix", lambda x: 0 <= x < 1, "in [0, 1)"),
        ("return_lambda tau", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("bins", lambda x: x >= 3 and x % 2, "odd, so that one bin is exactly 0, and at least 3"),
        ("image_size", lambda x: x % 16 == 0 and 48 <= x <= 256, "a multiple of 16 from 48 to 256"),
        ("seed", lambda x: x < 2**32, "less than 2^32"),
        ("learning_starts", lambda x: x <= args.total_timesteps, f"at most --total-timesteps {args.total_timesteps}"),
        ("learning_starts", lambda x: x >= window, f"at least {window}, --batch-length per environment"),
        ("total_timesteps", lambda x: x >= more * world, f"at least {more * world}, {per_env}"),
        ("buffer_size", lambda x: x >= more, f"at least {more}, {per_env}"),
        ("buffer_size", lambda x: x >= batch, f"at least {batch}, --batch-size * --batch-length, one batch"),
    ]
    for names, good, limit in rules:
        for name in names.split():
            if not good(getattr(args, name)):
                fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be {limit}")


def choose_device(args: Args) -> torch.device:
    """The device, which it prints; resolves the `auto` flags for it, sets torch's switches and all seeds."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.size == "auto":
        args.size = "12m" if device.type == "cuda" else "1m"
    if args.precision == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bfloat16" if native else "float32"
    if device.type == "cuda" and args.precision == "bfloat16":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    torch.backends.cudnn.allow_tf32 = args.precision == "bfloat16"  # in convolutions; torch's default is True
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else f" ({torch.cuda.get_device_name()})"
    mode = "compiled" if args.compile and not args.eval_only else "eager"
    absent = ", CUDA is not available" if args.cuda and device.type == "cpu" else ""
    print(f"device: {device}{threads}, {args.precision}, {mode}{absent}")
    if device.type == "cpu":
        keep_memory()
    torch.backends.cudnn.deterministic = args.torch_deterministic
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return device


def keep_memory() -> None:
    """Let glibc keep what an update frees for the next one: the kernel would clear all these pages anew.

    An image update takes 7 % less time at 1m and 19 % less at 12m.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def make_replay(args: Args, adapter: Adapter, folder: Path, capacity: int, rank: int, videos: Path | None) -> Replay:
    """The replay buffer of one process of a run, in the run folder or in RAM; makes the folder, and that of videos.

    Exits with one line, leaving nothing behind, when the buffer does not fit or a folder cannot be written.
    """
    size, action = SIZES[args.size], adapter.action_spec
    layout = {f"obs/{key}": (spec.shape, spec.dtype) for key, spec in adapter.specs.items()}
    layout["action"] = ((len(action.nvec),), np.int32) if action.nvec else ((action.size,), np.float32)
    layout |= {"reward": ((), np.float32), "deter": ((size.deter,), np.float16), "stoch": ((size.groups,), np.uint8)}
    step = Replay.bytes_per_step(layout)
    where = folder / f"replay{rank or ''}" if args.persist_replay else None
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that share this machine
    free = (shutil.disk_usage(existing).free if where else free_memory()) // ranks
    kind = "disk" if where else "memory"
    print(f"replay: {capacity:,} steps take {capacity * step / 1e9:.2f} GB of {free / 1e9:.1f} GB free {kind}")
    if not (where and where.exists()) and capacity * step > 0.8 * free:
        most = int(0.8 * free / step)
        fail(f"the replay buffer would take more than 80 % of what is free; --buffer-size {most} or less would fit")
    try:
        folder.mkdir(parents=True, exist_ok=bool(args.resume) or dist.is_initialized())
        seed = args.seed + 1000 * rank
        replay = Replay(capacity, args.num_envs, layout, args.batch_length, args.replay_windows, seed, where)
        if videos:
            videos.mkdir(parents=True, exist_ok=True)
        return replay
    except (OSError, ValueError, EOFError) as error:
        taken = isinstance(error, FileExistsError) and str(error.filename) == str(folder)
        if taken:
            error = "another run began in it in the same second; start again, or choose an --exp-name"
        elif not args.resume:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                os.removedirs(folder.parent)  # those that are empty
        fail(f"cannot write the run folder {folder}: {error}")


def free_memory() -> int:
    """Bytes of RAM that are free to use."""
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def track(args: Args, name: str) -> None:
    """Send what TensorBoard gets, and the three source files, to Weights & Biases; a resumed run goes on there."""
    wandb = require("wandb", "--track")
    settings = {"project": args.wandb_project_name, "entity": args.wandb_entity or None, "config": vars(args)}
    settings |= {"name": name, "id": re.sub("[:;,#?/']", "-", name), "resume": "allow"}
    try:  # no monitor_gym: its patch of RecordVideo.close raises with Gymnasium 1.x
        wandb.init(**settings, sync_tensorboard=True, save_code=True)
    except Exception as error:  # not logged in, no network
        fail(f"--track cannot start: {error}")
    for file in ("dreamerv3.py", "networks.py", "replay.py"):
        wandb.save(str(Path(__file__).with_name(file)), base_path=Path(__file__).parent, policy="now")


class Progress:
    """Records in TensorBoard and episodes.csv, and a progress bar: a line per 20 s when the output is a file.

    A disk that takes no more records costs the records, not the run.
    """

    def __init__(self, folder: Path, args: Args, step: int, seconds: float):
        self.begin, self.returns, self.lost, self.writer = time.time() - seconds, [], False, SummaryWriter(folder)
        table = "|param|value|\n|-|-|\n" + "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", table, step)
        self.file = open(folder / "episodes.csv", "a", buffering=1)
        if not self.file.tell():
            self.file.write("global_step,frames,return,length,seconds\n")
        terminal = sys.stderr.isatty()
        layout = "{percentage:3.0f}% {n_fmt}/{total_fmt} steps | {rate_fmt}, {remaining} left | {desc}"
        wait = {"mininterval": 0.5 if terminal else 20, "maxinterval": 20, "miniters": 1, "smoothing": 0.1}
        self.bar = tqdm(
            total=args.total_timesteps, initial=step, unit=" steps", bar_format=layout + "\n" * (not terminal), **wait
        )

    def record(self, step: int, values: dict[str, float], row: str = "") -> None:
        """Scalars of this agent step, and a row of episodes.csv."""
        try:
            self.file.write(row)
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:
            if not self.lost:
                print(f"warning: nothing is recorded from step {step:,} on, {error}: training goes on", flush=True)
            self.lost = True

    def episode(self, step: int, frames: int, score: float, length: int) -> None:
        """A finished episode, its length in agent steps."""
        self.returns = [*self.returns[-19:], score]
        row = f"{step},{frames},{score:g},{length},{time.time() - self.begin:.1f}\n"
        self.record(step, {"charts/episodic_return": score, "charts/episodic_length": length}, row)

    def update(self, step: int, updates: int, first_update: int) -> None:
        """Move the progress bar."""
        last, mean = (self.returns[-1], np.mean(self.returns)) if self.returns else (math.nan, math.nan)
        doing = f"{updates:,} updates" if updates else f"collecting {first_update:,} steps before the first update"
        self.bar.set_description_str(f"return last {last:.1f} mean {mean:.1f} | {doing}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Flush all records."""
        self.bar.close()
        with suppress(OSError):
            self.writer.close()
            self.file.close()


class Interrupt:
    """SIGINT and SIGTERM let the current step finish and the run be saved; a second one exits at once."""

    def __init__(self):
        self.code, self.agreed = 0, 0  # exit status: 128 + signal number
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.code and not dist.is_initialized():  # launchers signal more than once
            os._exit(128 + number)
        self.code = 128 + number
        print("\nstopping: finishing this step and saving; once more to exit at once", flush=True)

    def now(self) -> int:
        """The exit status as soon as any rank is to stop, else 0."""
        self.agreed = self.agreed or largest(self.code)
        return self.agreed


def join_ranks() -> tuple[int, int]:
    """Under torchrun: rank and number of the processes that train together; else 0 and 1."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    gpus, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < ranks:
        fail(f"--nproc-per-node {ranks} is more than the {gpus} GPUs here; CUDA_VISIBLE_DEVICES= hides them")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a day: the others wait while rank 0 evaluates
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    return dist.get_rank(), dist.get_world_size()


def largest(value: int) -> int:
    """The largest value of all ranks, which wait for each other here."""
    if dist.is_initialized():
        value = torch.tensor(value)
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def update_together(agent: Agent, optimizer: LaProp) -> None:
    """Make every update one of all ranks: the same weights, averaged gradients, the range of everyone's returns.

    Losses are means over a rank's batch, so the average of the gradients is the gradient on all batches joined.
    """

    @torch.compiler.disable
    def update_range(returns: Tensor) -> None:
        returns = returns.contiguous()  # compiled code may choose another order
        parts = [torch.empty_like(returns) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, returns)
        ReturnNorm.update(agent.return_norm, torch.cat(parts))

    def average_gradients(*_) -> None:
        grads = [p.grad for p in agent.trained()]
        flat = torch.cat([g.flatten() for g in grads]) / dist.get_world_size()
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [x.view(g.shape) for x, g in zip(parts, grads, strict=True)])

    for x in agent.state_dict().values():
        dist.broadcast(x, 0)
    agent.return_norm.update = update_range
    optimizer.register_step_pre_hook(average_gradients)  # before clipping


def main(argv: list[str] | None = None) -> None:
    """Train: act, store, step, update, log, checkpoint, evaluate. With --eval-only, only that."""
    rank, world = join_ranks()
    args, resumed = parse_args(argv)
    device = choose_device(args)
    names = [args.resume or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"]
    if world > 1:
        dist.broadcast_object_list(names)  # the clocks may differ
    folder = Path(names[0])
    videos = Path("videos", folder.name) if args.capture_video and not rank else None
    if args.eval_only:
        agent = restore_agent(args, resumed, device)
        try:
            evaluate(agent, args, args.eval_episodes, args.seed, videos and videos / "eval-only")
        except Exception as error:  # whatever the environment raises
            sys.exit(f"dreamerv3.py: {args.env_id} failed: {type(error).__name__}: {' '.join(str(error).split())}")
        sys.exit()
    adapter = make_env(args.env_id, args.image_size, args.action_repeat, videos is not None)
    specs, action_spec, repeat = adapter.specs, adapter.action_spec, adapter.repeat
    wanted = min(args.buffer_size, args.total_timesteps // world)
    capacity = resumed["capacity"] if resumed else wanted
    if capacity < wanted:
        print(f"warning: the replay buffer stays at {capacity:,} steps; a new run of this length would keep {wanted:,}")
    if args.track and not rank:
        track(args, folder.name)
    replay = make_replay(args, adapter, folder, capacity, rank, videos)
    envs = make_envs(args, adapter, videos and videos / f"train-{resumed['global_step'] if resumed else 0}")
    agent = Agent(specs, action_spec, SIZES[args.size], args).to(device)
    optimizer = LaProp(agent.trained(), args.learning_rate, args.warmup_updates, args.clip)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in agent.named_children()}
    parts = " · ".join(f"{name} {n:,}" for name, n in counts.items() if n and name != "slow_critic")
    print(f"environment: {args.env_id}, {specs} -> {action_spec}")
    print(f"size: {args.size}, {sum(p.numel() for p in agent.trained()):,} parameters: {parts}")
    num_envs = args.num_envs * world
    update_steps = args.batch_size * args.batch_length * world / args.train_ratio  # agent steps per update
    print(f"schedule: 1 update every {update_steps:g} agent steps, after the first {args.learning_starts:,}")
    print(f"run folder: {folder}", flush=True)

    global_step, updates, owed = 0, 0, 0.0
    stored = -largest(-replay.now) * num_envs  # by all ranks
    missing = max(0, args.learning_starts - stored)
    if resumed:
        restore(resumed, agent=agent, optimizer=optimizer, **({} if rank else {"replay": replay}))
        torch.set_rng_state(resumed["torch_rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state_all(resumed["cuda_rng"][: torch.cuda.device_count()])
        global_step, updates, owed = resumed["global_step"], resumed["updates"], resumed["owed"]
        if args.persist_replay and stored > global_step:  # killed after its last checkpoint: the steps are there
            owed += max(0, stored - max(global_step, args.learning_starts)) / update_steps
            global_step = stored
        refill = f": TOO FEW, collecting {missing:,} before the next update" if missing else ""
        done = f"step {global_step:,} after {updates:,} updates, {int(owed):,} owed"
        print(f"resumed at {done}, {len(replay):,} steps in the replay buffer{refill}", flush=True)
    first_update = global_step + missing
    seed = args.seed + 1000 * rank + global_step  # of the environments, and of the noise of other ranks
    if world > 1:
        update_together(agent, optimizer)
    if rank:
        torch.manual_seed(seed)

    def save() -> bool:
        check_finite(metrics, window, global_step, folder)  # a broken network never replaces a good checkpoint
        state = {"args": asdict(args), "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"replay": replay.state_dict(), "capacity": capacity, "seconds": time.time() - progress.begin}
        state["torch_rng"] = torch.get_rng_state()
        state["cuda_rng"] = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
        try:
            save_checkpoint(folder, state | {"global_step": global_step, "updates": updates, "owed": owed})
            if args.save_model:
                torch.save({"args": state["args"], "agent": state["agent"]}, folder / "model.pt")
            return True
        except (OSError, RuntimeError) as error:  # a full disk may be either in torch.save
            (folder / "checkpoint.tmp").unlink(missing_ok=True)  # it needs the space
            print(f"warning: no checkpoint at step {global_step:,}, {error}: training goes on", flush=True)
            return False

    def attempt(call, *inputs, **options):
        """What the environments return; whatever they raise ends the run, saved, with one line."""
        try:
            return call(*inputs, **options)
        except Exception as error:
            stop.code = stop.code or 1
            stop.now()  # what the other ranks wait for, if there are any
            saved = rank or save()
            if not rank:
                progress.close()
            envs.closed = True  # closing what is broken may fail again; worker processes end with this one
            why = f"{type(error).__name__}: {' '.join(str(error).split()) or 'its process is gone'}"
            done = f"failed at step {global_step}, {'saved' if saved else 'could not save'} {folder}"
            sys.exit(f"dreamerv3.py: {args.env_id} {done}: {why}")

    stop = Interrupt()
    progress = None if rank else Progress(folder, args, global_step, resumed["seconds"] if resumed else 0.0)
    act, update = partial(policy, agent), partial(train_step, agent, optimizer, args=args)
    to_compile, to_capture = args.compile, args.cudagraphs and device.type == "cuda" and world == 1
    metrics, window, updating, began = {}, [], 0.0, (time.time(), global_step, updates)

    obs, _ = attempt(envs.reset, seed=seed)
    reward = np.zeros(args.num_envs, np.float32)
    terminated = truncated = np.zeros(args.num_envs, bool)
    is_first = np.ones(args.num_envs, bool)
    state = (*agent.rssm.initial(args.num_envs), torch.zeros(args.num_envs, action_spec.size, device=device))
    while not stop.now() and global_step < args.total_timesteps:
        # act on what arrived, and store it with the action and the latent
        tensors = {key: torch.as_tensor(x).to(device) for key, x in obs.items()}
        first = torch.as_tensor(is_first).to(device)
        action, state = act(tensors, state, first)
        action = stored_action(action, action_spec).cpu().numpy()
        step = {f"obs/{key}": x for key, x in obs.items()}
        step |= {"action": action, "reward": reward, "is_first": is_first}
        step |= {"is_last": terminated | truncated, "is_terminal": terminated}
        step |= {"deter": state[0].half().cpu().numpy(), "stoch": state[1].argmax(-1).byte().cpu().numpy()}
        replay.add(step)
        global_step += num_envs

        # the environment's turn; after a last step it ignores the action and resets
        is_first = step["is_last"]
        obs, reward, terminated, truncated, infos = attempt(envs.step, action)

        # train what is owed
        start = time.time()
        if global_step > first_update:
            owed += num_envs / update_steps
        while owed >= 1 and not stop.now():
            batch, index = replay.sample(args.batch_size)
            batch = batch_to_device(batch, agent, device)
            if to_compile:
                compile_functions(agent, batch, args)
                to_compile = False
            (deter, stoch), metrics = update(batch)
            replay.update_latents(index, deter.half().cpu().numpy(), stoch.argmax(-1).byte().cpu().numpy())
            window.append(torch.stack([*metrics.values()]))  # (metrics,)
            if to_capture:  # now that an update has loaded all kernels
                act, update, to_capture = capture(act, tensors, state, first), capture(update, batch), False
            updates += 1
            owed -= 1
            if args.video_frequency and updates % args.video_frequency == 0 and not rank:
                write_dream(agent, batch, folder, progress.writer, global_step, updates)
            if owed > 1 + num_envs / update_steps and updates % 500 == 0 and not rank:
                save()  # making up for many steps after a kill: another one must not undo it
                progress.update(global_step, updates, first_update)
        updating += time.time() - start

        # log, save, evaluate: rank 0 does
        if rank:
            window = []
            continue
        for i in np.flatnonzero(infos.get("_episode", [])):
            score, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            progress.episode(global_step, global_step * repeat, score, length)
        progress.update(global_step, updates, first_update)
        if window and global_step % args.log_frequency < num_envs:
            check_finite(metrics, window, global_step, folder)
            now = time.time()
            seconds = now - began[0]
            values = dict(zip(metrics, torch.stack(window).mean(0).tolist(), strict=True))
            values |= {"charts/SPS": (global_step - began[1]) / seconds, "charts/updates": updates}
            values |= {"charts/updates_per_second": (updates - began[2]) / seconds}
            values |= {"charts/frames": global_step * repeat, "charts/time_share_update": updating / seconds}
            values |= {"charts/train_ratio": updates * args.batch_size * args.batch_length * world / global_step}
            progress.record(global_step, values)
            window, updating, began = [], 0.0, (now, global_step, updates)
        if args.checkpoint_frequency and global_step % args.checkpoint_frequency < num_envs:
            save()
        if args.eval_frequency and global_step % args.eval_frequency < num_envs:
            save()  # evaluations may take minutes, and who stops the program may not wait for their end
            films = videos and videos / f"eval-{global_step}"
            returns = attempt(evaluate, agent, args, args.eval_episodes, args.seed + global_step, films)
            progress.record(global_step, {"eval/episodic_return": np.mean(returns)})

    saved = rank or save()
    with suppress(Exception):  # nothing is lost with them any more
        envs.close()
    if rank:
        sys.exit(stop.agreed)
    progress.close()
    if args.track and videos:
        require("wandb", "--track").save(f"{videos}/*/*.mp4", policy="now")
    if stop.agreed:
        print(f"stopped at step {global_step:,}; go on with: python dreamerv3.py --resume {folder}")
    sys.exit(stop.agreed or int(not saved))  # wandb wants no bool


if __name__ == "__main__":
    main()
