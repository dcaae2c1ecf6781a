"""Tests: equations by hand, the official code's numbers, layers, replay, environments, the program.

pytest -k closed_form    equations against numbers of a pocket calculator, in seconds
pytest -k golden         numbers of the official code; GOLDEN_DIR: a folder of other files
pytest -m slow           what the default leaves out: minutes of compiling, twenty kills of a run
"""

import ast
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock, Mock

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from filelock import FileLock
from gymnasium import spaces
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter

import dreamerv3
import networks
from dreamerv3 import SIZES, Agent, Args
from networks import ActionSpec, ObsSpec, Size, TwoHot
from replay import Replay

torch.set_num_threads(1)  # the models are tiny: a second thread would only wait
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"

TINY = Size(deter=32, hidden=16, units=16, classes=4, depth=4, groups=4, blocks=4)
VECTOR = {"vector": ObsSpec((5,))}
SPECS = {
    "image": ObsSpec((48, 64, 3)),
    "gray": ObsSpec((48, 64, 1)),
    "vector": ObsSpec((5,)),
    "kind": ObsSpec((2,), classes=3),
}
THREE = ActionSpec((3,), 3)

# a short run: an update replays 32 steps, one is due every 2 agent steps from step 40 on
QUICK = {
    "compile": False,
    "size": "1m",
    "precision": "float32",
    "learning_starts": 40,
    "batch_size": 4,
    "batch_length": 8,
    "train_ratio": 16,
    "imagination_horizon": 2,
}


# === helpers ======================================================================================
@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, and in eager mode."""
    torch.manual_seed(0)
    torch.compiler.set_stance("force_eager")


@pytest.fixture
def argmax_sampling(monkeypatch):
    """Samples as in the golden files: argmax of categoricals, mean + 0.5 std of normals."""

    def argmax(probs: Tensor, u: Tensor) -> Tensor:
        return probs.argmax(-1)

    def half(actor: networks.Actor, *shape: int) -> Tensor:
        return torch.full((*shape, actor.action.size), 0.5)

    monkeypatch.setattr(networks, "sample_index", argmax)
    monkeypatch.setattr(networks.Actor, "noise", half)
    torch._dynamo.reset()  # compiled functions must not remember another sampling


def make_agent(specs=None, action: ActionSpec = THREE, **flags) -> tuple[Agent, Args]:
    """An agent of size TINY, for a vector of 5 numbers if there are no specs, and its flags."""
    flags.setdefault("precision", "float32")
    flags.setdefault("imagination_horizon", 3)
    args = Args(**flags)
    agent = Agent(specs or VECTOR, action, TINY, args)
    for head in (agent.reward, agent.critic, agent.slow_critic):
        nn.init.normal_(head[1].weight)  # outscale 0 would pass nothing on
    return agent, args


def random_obs(rng: np.random.Generator, spec: ObsSpec, lead: tuple) -> np.ndarray:
    """Random observations of one key, (*lead, *spec.shape)."""
    shape = (*lead, *spec.shape)
    if spec.is_image:
        return rng.integers(0, 256, shape, np.uint8)
    if spec.classes:
        return rng.integers(0, spec.classes, shape, np.int32)
    return rng.normal(size=shape).astype(np.float32)


def random_action(rng: np.random.Generator, spec: ActionSpec, lead: tuple) -> np.ndarray:
    """Random actions as the replay buffer stores them, (*lead, components)."""
    if spec.nvec:
        return rng.integers(0, spec.nvec, (*lead, len(spec.nvec)), np.int32)
    return rng.normal(size=(*lead, spec.size)).astype(np.float32)


def make_batch(agent: Agent, batch: int = 2, length: int = 6) -> dict:
    """A random batch as train_step takes it."""
    rng = np.random.default_rng(0)
    lead = (batch, length)
    arrays = {
        "is_first": rng.random(lead) < 0.2,
        "is_last": rng.random(lead) < 0.2,
        "is_terminal": rng.random(lead) < 0.2,
        "reward": rng.normal(size=lead).astype(np.float32),
        "prev_action": random_action(rng, agent.action, lead),
        "deter": rng.normal(size=(batch, TINY.deter)).astype(np.float16),
        "stoch": rng.integers(0, TINY.classes, (batch, TINY.groups), np.uint8),
    }
    for key, spec in agent.specs.items():
        arrays[f"obs/{key}"] = random_obs(rng, spec, lead)
    return dreamerv3.batch_to_device(arrays, agent, torch.device("cpu"))


class Chain(gym.Env):
    """Walks from position 0 to 5; the reward is the new position. Ends there, by termination or
    truncation.

    fault: how it fails. "constructor": there. "worker": there, in a worker process. "reset": at the
    first reset. In its 50th step: "nan", by a wrong observation; "raises", by an exception that
    cannot be sent to another process; "dies", by the end of its process; "signalled", by that,
    after one environment has interrupted all processes as Ctrl-C does.
    """

    def __init__(self, terminal: bool = True, fault: str = ""):
        self.terminal = terminal
        self.fault = fault
        self.steps = 0
        self.odd = None
        self.observation_space = spaces.Box(-1, 99, (1,))
        self.action_space = spaces.Discrete(4, start=3)
        in_worker = torch.multiprocessing.parent_process() is not None
        assert fault != "constructor", "broken"
        assert fault != "worker" or not in_worker, "broken"

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        assert self.fault != "reset", "two\nlines"
        if seed is not None:
            self.odd = 1 if seed % 2 else None  # infos that Gymnasium cannot join
        self.position = 0
        return np.zeros(1, np.float32), {"odd": self.odd}

    def step(self, action):
        assert action in self.action_space
        assert self.position < 5
        self.position += 1
        self.steps += 1
        obs = np.full(1, self.position, np.float32)
        if self.steps == 50 and os.environ.get("RANK") != "0":
            self.fail(obs)
        end = self.position == 5
        terminated = end and self.terminal
        truncated = end and not self.terminal
        return obs, self.position, terminated, truncated, {"odd": self.odd}

    def fail(self, obs: np.ndarray) -> None:
        if self.fault == "nan":
            obs[:] = math.nan
        if self.fault == "raises":

            class LocalError(Exception):
                pass

            raise LocalError("broken")
        if self.fault == "signalled" and self.odd:
            os.killpg(os.getpgid(os.getppid()), signal.SIGINT)  # as a terminal does
        if self.fault in ("dies", "signalled"):
            os._exit(1)


gym.register("DreamerChain-v0", Chain)
gym.register("DreamerTruncatedChain-v0", Chain, kwargs={"terminal": False})
for name in ("constructor", "worker", "reset", "nan", "raises", "dies", "signalled"):
    gym.register(f"Dreamer-{name}-v0", Chain, kwargs={"fault": name}, order_enforce=False)


class Everything(gym.Env):
    """Every kind of space, nested. Ends by truncation after five steps."""

    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (20, 30, 1), np.uint8),
        tuple=spaces.Tuple((spaces.Discrete(3, start=5), spaces.MultiBinary(4))),
        deep=spaces.Dict(
            multi=spaces.MultiDiscrete([2, 7]),
            bool=spaces.Box(0, 1, (), bool),
        ),
        small=spaces.Box(0, 255, (10, 10, 3), np.uint8),
        double=spaces.Box(-1, 1, (2, 2), np.float64),
    )

    def __init__(self, action_space: gym.Space | None = None):
        if action_space is None:
            action_space = spaces.MultiDiscrete([2, 3])
        self.action_space = action_space
        self.actions = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.actions.append(action)
        truncated = len(self.actions) % 5 == 0
        return self.observation_space.sample(), 1.0, False, truncated, {}


gym.register("DreamerEverything-v0", Everything)


def as_flags(flags: dict) -> list[str]:
    """{"num_envs": 2, "compile": False} -> ["--num-envs", "2", "--no-compile"]"""
    argv = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is True:
            argv.append(f"--{flag}")
        elif value is False:
            argv.append(f"--no-{flag}")
        else:
            argv.append(f"--{flag}")
            argv.append(str(value))
    return argv


class Program:
    """The program in this process, with a tiny model, in a folder of its own. `out` and `err` are
    what its last call printed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.out = ""
        self.err = ""

    @contextmanager
    def inside(self):
        """What the program sees: its folder, the tiny model."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(signal, "signal", Mock())  # Ctrl-C stays pytest's
            patch.setitem(dreamerv3.SIZES, "1m", TINY)
            yield

    def call(self, *argv: str, **flags) -> int:
        """Run it with these arguments: -> its exit status."""
        out = io.StringIO()
        err = io.StringIO()
        try:
            with self.inside(), redirect_stdout(out), redirect_stderr(err):
                dreamerv3.command_line([*argv, *as_flags(flags)])
        except SystemExit as stop:
            return stop.code
        finally:
            self.out = out.getvalue()
            self.err = err.getvalue()
        return 0

    def train(self, **flags) -> Path:
        """A run with these flags, else QUICK and the defaults: -> its folder."""
        assert self.call(**dict(QUICK, **flags)) == 0, self.err
        return self.run_folder()

    def resume(self, path: Path, **flags) -> Path:
        """Go on with a run, under its stored flags and these: -> its folder."""
        assert self.call(resume=path, **flags) == 0, self.err
        return self.run_folder()

    def run_folder(self) -> Path:
        """The folder that the last call printed."""
        return self.folder / re.search("run folder: (.*)", self.out)[1]


@pytest.fixture
def program(tmp_path) -> Program:
    return Program(tmp_path)


# === closed form: numbers that a pocket calculator can check ======================================
def rounded(tensor: Tensor, digits: int = 5) -> list:
    """As nested lists of numbers with a few digits, to be read and compared."""
    return np.round(tensor.detach().double().numpy(), digits).tolist()


SYMLOG = [
    (0.0, 0.0),
    (1.0, 0.69314718),  # ln 2
    (-1.0, -0.69314718),
    (1.71828183, 1.0),  # e - 1
    (10_000.0, 9.21044037),  # ln 10,001
    (-1e-6, -1e-6),
]


@pytest.mark.parametrize("x, y", SYMLOG)
def test_closed_form_symlog(x, y):
    assert networks.symlog(torch.tensor(x)).item() == pytest.approx(y, rel=1.3e-6)


@pytest.mark.parametrize("x, y", SYMLOG)
def test_closed_form_symexp_is_its_inverse(x, y):
    assert networks.symexp(torch.tensor(y)).item() == pytest.approx(x, rel=1.3e-6)


def encode(twohot: TwoHot, target: float) -> Tensor:
    """The twohot encoding (V,) of a target, read off the loss: its gradient is softmax(logits)
    minus the encoding."""
    logits = torch.zeros(len(twohot.bins), requires_grad=True)
    twohot.loss(logits, torch.tensor(target)).backward()
    return logits.softmax(0) - logits.grad


def predict(twohot: TwoHot, weights: list[float]) -> float:
    """The mean of a distribution that has these probabilities."""
    logits = torch.tensor(weights).add(1e-30).log()
    return twohot.mean(logits).item()


def test_closed_form_a_target_halfway_between_two_bins_has_half_of_its_weight_on_each():
    """The bin after the middle one, 0, is e^(20/127) - 1 = 0.1705577."""
    weights = encode(TwoHot(), 0.0852789)
    assert rounded(weights[126:130]) == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize(
    "target, weights",
    [
        (0.0, [0, 0, 1, 0, 0]),
        (22025.4658, [0, 0, 0, 1, 0]),
        (11012.7329, [0, 0, 0.5, 0.5, 0]),
        (5506.36645, [0, 0, 0.75, 0.25, 0]),
        (-11012.7329, [0, 0.5, 0.5, 0, 0]),
        (1e12, [0, 0, 0, 0, 1]),
        (-1e12, [1, 0, 0, 0, 0]),
    ],
)
def test_closed_form_twohot_interpolates_between_symexp_bins(target, weights):
    """Five bins: 0, e^10 - 1 = 22025.4658, e^20 - 1, and these two with the other sign."""
    assert rounded(encode(TwoHot(bins=5), target)) == weights


@pytest.mark.parametrize(
    "target, weights",
    [
        (0.0, [0, 0, 1, 0, 0]),
        (22025.4658, [0, 0, 0, 1, 0]),  # e^10 - 1
        (147.413159, [0, 0, 0.5, 0.5, 0]),  # e^5 - 1
        (11.1824940, [0, 0, 0.75, 0.25, 0]),  # e^2.5 - 1
        (-147.413159, [0, 0.5, 0.5, 0, 0]),
        (1e12, [0, 0, 0, 0, 1]),
        (-1e12, [1, 0, 0, 0, 0]),
    ],
)
def test_closed_form_twohot_interpolates_symlog_of_the_target(target, weights):
    """With --twohot symlog: five bins at -20, -10, 0, 10, 20."""
    assert rounded(encode(TwoHot(bins=5, space="symlog"), target)) == weights


@pytest.mark.parametrize(
    "space, target",
    [("symexp", 11012.7329), ("symlog", 147.413159)],
)
def test_closed_form_twohot_loss_is_the_cross_entropy(space, target):
    """Halfway between bins of probability 0.4 and 0.2: -(ln 0.4 + ln 0.2) / 2 = 1.262864."""
    logits = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1]).log()
    loss = TwoHot(bins=5, space=space).loss(logits, torch.tensor(target))
    assert loss.item() == pytest.approx(1.262864, rel=1e-5)


@pytest.mark.parametrize("mean", ["rounded", "exact"])
@pytest.mark.parametrize(
    "space, weights, expected",
    [
        ("symexp", [0, 0, 0.5, 0.5, 0], 11012.7329),
        ("symexp", [0, 0.25, 0.75, 0, 0], -5506.36645),
        ("symlog", [0, 0, 0.5, 0.5, 0], 147.413159),
        ("symlog", [0, 0.25, 0.75, 0, 0], -11.1824940),
    ],
)
def test_closed_form_twohot_mean_is_the_target_of_the_encoding(space, weights, expected, mean):
    twohot = TwoHot(bins=5, space=space, mean=mean)
    assert predict(twohot, weights) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("space", ["symexp", "symlog"])
@pytest.mark.parametrize("logit", [0.0, 0.37, -5.0])
def test_closed_form_exact_mean_of_uniform_logits_is_0(space, logit):
    twohot = TwoHot(space=space, mean="exact")
    assert (twohot.mean(torch.full((7, 255), logit)) == 0).all()


# one trajectory of four states; the rewards and values 99 of the first must not be used
REWARD = torch.tensor([[99.0, 1, 2, 4]])
VALUE = torch.tensor([[99.0, 8, 16, 32]])


def test_closed_form_lambda_return():
    """With discount 1/2 and lambda 1/2, from the last state, whose return is its value 32:

    R[2] = 4 + 1/2 * (1/2 * 32 + 1/2 * 32) = 4 + 16 = 20
    R[1] = 2 + 1/2 * (1/2 * 16 + 1/2 * 20) = 2 + 9 = 11
    R[0] = 1 + 1/2 * (1/2 * 8 + 1/2 * 11) = 1 + 4.75 = 5.75
    """
    discount = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    returns = dreamerv3.lambda_return(REWARD, VALUE, discount, lam=0.5)
    assert returns.tolist() == [[5.75, 11, 20]]


def test_closed_form_lambda_return_ends_at_a_termination():
    """State 2 is terminal, so that its discount is 0 and nothing after it counts:

    R[1] = 2 + 0 = 2
    R[0] = 1 + 1/2 * (1/2 * 8 + 1/2 * 2) = 1 + 2.5 = 3.5
    """
    discount = torch.tensor([[0.5, 0.5, 0, 0.5]])
    is_last = torch.tensor([[False, False, True, False]])
    returns = dreamerv3.lambda_return(REWARD, VALUE, discount, 0.5, is_last)
    assert returns.tolist() == [[3.5, 2, 20]]


def test_closed_form_lambda_return_bootstraps_where_an_episode_was_cut():
    """State 2 is the last one of an episode that a time limit cut: only its value counts.

    R[1] = 2 + 1/2 * 16 = 10
    R[0] = 1 + 1/2 * (1/2 * 8 + 1/2 * 10) = 1 + 4.5 = 5.5
    """
    discount = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    is_last = torch.tensor([[False, False, True, False]])
    returns = dreamerv3.lambda_return(REWARD, VALUE, discount, 0.5, is_last)
    assert returns.tolist() == [[5.5, 10, 20]]


def test_closed_form_return_range_moves_one_percent_towards_the_percentiles():
    """Of 0, 10, ... 200 the 5th percentile is 10, the 95th 190."""
    norm = dreamerv3.ReturnNorm()
    norm.update(torch.arange(0.0, 201, 10))
    assert rounded(torch.stack([norm.lo, norm.hi])) == [0.1, 1.9]
    norm.update(torch.arange(0.0, 201, 10))
    assert rounded(torch.stack([norm.lo, norm.hi])) == [0.199, 3.781]
    assert norm.scale.item() == pytest.approx(3.781 - 0.199)


def test_closed_form_percentiles_are_interpolated():
    """Of 0 and 100 the 5th percentile is 5, the 95th 95."""
    norm = dreamerv3.ReturnNorm()
    norm.update(torch.tensor([100.0, 0.0]))
    assert rounded(torch.stack([norm.lo, norm.hi])) == [0.05, 0.95]


def test_closed_form_return_scale_is_at_least_1():
    norm = dreamerv3.ReturnNorm()
    assert norm.scale == 1
    norm.update(torch.tensor([100.0, 0.0]))  # hi - lo is 0.9
    assert norm.scale == 1


def kl_losses(post: list, prior: list, groups: int, **flags):
    """kl_losses of one step with this number of equal groups, of these probabilities."""
    shape = (1, 1, groups, len(post))
    post_logits = torch.tensor(post).log().expand(shape).clone().requires_grad_()
    prior_logits = torch.tensor(prior).log().expand(shape).clone().requires_grad_()
    flags.setdefault("unimix", 0.0)
    losses = dreamerv3.kl_losses(post_logits, prior_logits, Args(**flags))
    return *losses, post_logits, prior_logits


def test_closed_form_kl_is_summed_over_the_groups():
    """0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) = 0.346574 - 0.202733 = 0.143841, ten times."""
    dyn, rep, *_ = kl_losses([0.5, 0.5], [0.25, 0.75], groups=10)
    assert rounded(dyn) == [[1.43841]]
    assert rounded(rep) == [[1.43841]]


def test_closed_form_free_nats_are_a_floor_under_the_sum():
    """The KL is 5 * 0.143841 = 0.719205: below one nat, above half a nat."""
    dyn, rep, *_ = kl_losses([0.5, 0.5], [0.25, 0.75], groups=5)
    assert rounded(dyn) == rounded(rep) == [[1.0]]
    dyn, rep, *_ = kl_losses([0.5, 0.5], [0.25, 0.75], groups=5, free_nats=0.5)
    assert rounded(dyn) == rounded(rep) == [[0.71921]]


def test_closed_form_kl_below_the_free_nats_has_no_gradient():
    dyn, rep, _, post, prior = kl_losses([0.5, 0.5], [0.25, 0.75], groups=5)
    (dyn + rep).sum().backward()
    assert not post.grad.any()
    assert not prior.grad.any()


def test_closed_form_dyn_trains_the_prior_alone():
    """The gradient of KL(q || p) in the logits of p is p - q."""
    dyn, _, _, post, prior = kl_losses([0.5, 0.5], [0.25, 0.75], groups=10)
    dyn.sum().backward()
    assert post.grad is None
    assert rounded(prior.grad[0, 0, 0]) == [-0.25, 0.25]


def test_closed_form_rep_trains_the_posterior_alone():
    """The gradient of KL(q || p) in the logits of q is q * (ln(q / p) - KL):
    0.5 * (0.693147 - 0.143841) = 0.274653."""
    _, rep, _, post, prior = kl_losses([0.5, 0.5], [0.25, 0.75], groups=10)
    rep.sum().backward()
    assert prior.grad is None
    assert rounded(post.grad[0, 0, 0]) == [0.27465, -0.27465]


def test_closed_form_entropies_are_summed_over_the_groups():
    """Of (0.5, 0.5): ln 2 = 0.693147; of (0.25, 0.75): 0.346574 + 0.215762 = 0.562335."""
    *_, metrics, _, _ = kl_losses([0.5, 0.5], [0.25, 0.75], groups=10)
    assert metrics["world_model/posterior_entropy"].item() == pytest.approx(6.93147)
    assert metrics["world_model/prior_entropy"].item() == pytest.approx(5.62335)


def test_closed_form_unimix_is_mixed_into_posterior_and_prior():
    """Half of uniform makes (1, 0) to (0.75, 0.25) and (0, 1) to (0.25, 0.75), whose KL is
    0.75 ln 3 - 0.25 ln 3 = 0.549306."""
    dyn, *_ = kl_losses([1.0, 0.0], [0.0, 1.0], groups=2, unimix=0.5)
    assert rounded(dyn) == [[1.09861]]


def test_closed_form_image_loss_is_a_squared_error_between_0_and_1():
    """Pixels 255 and 0, predicted 0.5 and 0.1: 0.25 + 0.01."""
    target = torch.tensor([255, 0], dtype=torch.uint8).view(1, 1, 1, 1, 2)
    recon = torch.tensor([0.5, 0.1]).view(1, 1, 1, 1, 2)
    assert rounded(dreamerv3.recon_loss(recon, target)) == [[0.26]]


def test_closed_form_vector_loss_is_a_squared_error_of_symlogs():
    """symlog(e - 1) = 1, predicted 3, and symlog(0) = 0, predicted 0.5: 4 + 0.25."""
    target = torch.tensor([[[1.71828183, 0.0]]])
    recon = torch.tensor([[[3.0, 0.5]]])
    assert rounded(dreamerv3.recon_loss(recon, target)) == [[4.25]]


def test_closed_form_loss_of_a_discrete_key_is_its_cross_entropy():
    """Two values whose class has probability 1/4 and 1/2: ln 4 + ln 2 = 3 ln 2."""
    target = torch.tensor([[[3, 0]]], dtype=torch.int32)
    probs = [[0.25, 0.25, 0.25, 0.25], [0.5, 0.3, 0.1, 0.1]]
    recon = torch.tensor(probs).log().view(1, 1, 2, 4)
    assert rounded(dreamerv3.recon_loss(recon, target)) == [[2.07944]]


def parameter(values: list[float], grad: list[float]) -> nn.Parameter:
    """A parameter that has a gradient."""
    param = nn.Parameter(torch.tensor(values))
    param.grad = torch.tensor(grad)
    return param


def test_closed_form_a_gradient_is_clipped_to_a_share_of_its_tensor():
    """|p| = 5, so that 0.3 of it is 1.5; |g| = 3 is too much by a factor of 2."""
    param = parameter([3.0, 4.0], grad=[0.0, -3.0])
    dreamerv3.clip_gradients([param], clip=0.3)
    assert rounded(param.grad) == [0, -1.5]


def test_closed_form_a_gradient_below_its_limit_stays_as_it_is():
    param = parameter([3.0, 4.0], grad=[0.0, -1.25])
    dreamerv3.clip_gradients([param], clip=0.3)
    assert param.grad.tolist() == [0, -1.25]


def test_closed_form_a_tensor_of_zeros_counts_as_one_of_norm_0_001():
    param = parameter([0.0, 0.0], grad=[3.0, 4.0])
    dreamerv3.clip_gradients([param], clip=0.5)
    assert rounded(param.grad) == [0.0003, 0.0004]


def test_closed_form_every_tensor_is_clipped_on_its_own():
    """The limits are 1.5 and 15."""
    small = parameter([3.0, 4.0], grad=[0.0, 3.0])
    large = parameter([30.0, 40.0], grad=[4.0, 0.0])
    dreamerv3.clip_gradients([small, large], clip=0.3)
    assert rounded(small.grad) == [0, 1.5]
    assert large.grad.tolist() == [4, 0]


def test_closed_form_the_first_step_of_laprop_is_lr_whatever_the_gradient():
    param = parameter([1.0, 1.0, 1.0], grad=[1e-6, -500.0, 0.0])
    _, change = dreamerv3.LaProp([param], lr=0.1).step()
    assert rounded(param) == [0.9, 1.1, 1.0]
    assert change.item() == pytest.approx(0.1 * math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize(
    "second, expected",
    [(0.0, -0.04737), (1.0, -0.1), (-1.0, 0.00526)],
)
def test_closed_form_the_second_step_of_laprop(second, expected):
    """After gradients 1 and g: m = (0.9 * 0.1 + 0.1 * g) / (1 - 0.9^2), since g / sqrt(v) is
    0, 1 or -1; lr * 0.09 / 0.19 = 0.04737, lr * 0.19 / 0.19 = 0.1, lr * -0.01 / 0.19 = -0.00526."""
    param = parameter([0.0], grad=[1.0])
    optimizer = dreamerv3.LaProp([param], lr=0.1)
    optimizer.step()
    before = param.item()
    param.grad.fill_(second)
    optimizer.step()
    assert param.item() - before == pytest.approx(expected, abs=1e-5)


def test_closed_form_laprop_divides_by_the_root_mean_square_of_gradients():
    """Gradients 1, then 3: v = (0.999 * 0.001 * 1 + 0.001 * 9) / (1 - 0.999^2) = 5.002,
    u = 3 / 2.23652 = 1.34137, m = (0.09 + 0.134137) / 0.19 = 1.17967."""
    param = parameter([0.0], grad=[1.0])
    optimizer = dreamerv3.LaProp([param], lr=1.0)
    optimizer.step()
    param.grad.fill_(3.0)
    optimizer.step()
    assert param.item() == pytest.approx(-1 - 1.17967, rel=1e-4)


@pytest.mark.parametrize(
    "updates, expected",
    [(0, 0.0), (1, 0.1), (2, 0.2), (4, 0.4), (5, 0.4)],
)
def test_closed_form_the_learning_rate_rises_from_0(updates, expected):
    """Over 4 updates to 0.4."""
    optimizer = dreamerv3.LaProp([parameter([1.0], grad=[1.0])], lr=0.4, warmup=4)
    for _ in range(updates + 1):
        rate, _ = optimizer.step()
    assert rate.item() == pytest.approx(expected)


def test_closed_form_mean_of_mirrored_bins_that_differ_a_little():
    """(0.2501 - 0.25) * 22025.4658 = 2.20255, though the difference is 0.04 %."""
    weights = [0, 0.25, 0.4999, 0.2501, 0]
    mean = predict(TwoHot(bins=5, mean="exact"), weights)
    assert mean == pytest.approx(2.20255, rel=2e-3)


def test_closed_form_lambda_is_0_95_if_it_is_not_told():
    discount = torch.full((1, 4), 0.5)
    returns = dreamerv3.lambda_return(REWARD, VALUE, discount)
    expected = dreamerv3.lambda_return(REWARD, VALUE, discount, lam=0.95)
    assert torch.equal(returns, expected)


# === golden: numbers computed by the official JAX code (golden/README.md) =========================
FILES = sorted(Path(os.environ.get("GOLDEN_DIR", ROOT / "golden")).glob("*.npz"))
assert FILES, "no .npz file in GOLDEN_DIR"


def linear_names(name: str, layer: nn.Module) -> dict[str, nn.Parameter]:
    """Of a linear, block-linear or convolutional layer."""
    return {f"{name}/kernel": layer.weight, f"{name}/bias": layer.bias}


def dense_names(name: str, norm: str, layer: nn.Sequential) -> dict[str, nn.Parameter]:
    """Of [Linear, RMSNorm, SiLU]."""
    names = linear_names(name, layer[0])
    names[f"{norm}/scale"] = layer[1].scale
    return names


def mlp_names(name: str, layers: nn.Sequential) -> dict[str, nn.Parameter]:
    names = {}
    for i, layer in enumerate(layers):
        names.update(dense_names(f"{name}/mlp/linear{i}", f"{name}/mlp/norm{i}", layer))
    return names


def head_names(name: str, output: str, head: nn.Sequential) -> dict[str, nn.Parameter]:
    names = mlp_names(name, head[0])
    names.update(linear_names(f"{name}/head/{output}", head[1]))
    return names


def encoder_names(encoder: networks.Encoder) -> dict[str, nn.Parameter]:
    names = {}
    if encoder.vectors:
        for i, layer in enumerate(encoder.mlp):
            names.update(dense_names(f"enc/mlp{i}", f"enc/mlp{i}norm", layer))
    if encoder.images:
        for i, conv in enumerate(encoder.convs):
            names.update(linear_names(f"enc/cnn{i}", conv))
            names[f"enc/cnn{i}norm/scale"] = encoder.norms[i].scale
    return names


def rssm_names(rssm: networks.RSSM) -> dict[str, nn.Parameter]:
    names = {}
    names.update(dense_names("dyn/dynin0", "dyn/dynin0norm", rssm.in_deter))
    names.update(dense_names("dyn/dynin1", "dyn/dynin1norm", rssm.in_stoch))
    names.update(dense_names("dyn/dynin2", "dyn/dynin2norm", rssm.in_action))
    names.update(linear_names("dyn/dynhid0", rssm.hid))
    names["dyn/dynhid0norm/scale"] = rssm.hid_norm.scale
    names.update(linear_names("dyn/dyngru", rssm.gru))
    names.update(dense_names("dyn/obs0", "dyn/obs0norm", rssm.post[0]))
    names.update(linear_names("dyn/obslogit", rssm.post[1]))
    names.update(dense_names("dyn/prior0", "dyn/prior0norm", rssm.prior[0]))
    names.update(dense_names("dyn/prior1", "dyn/prior1norm", rssm.prior[1]))
    names.update(linear_names("dyn/priorlogit", rssm.prior[2]))
    return names


def decoder_names(decoder: networks.Decoder) -> dict[str, nn.Parameter]:
    names = {}
    if decoder.vectors:
        names.update(mlp_names("dec", decoder.mlp))
        for key, out in zip(decoder.vectors, decoder.outs, strict=True):
            kind = "logits" if decoder.specs[key].classes else "pred"
            names.update(linear_names(f"dec/vec/{key}/{kind}", out))
    if decoder.images:
        names.update(linear_names("dec/sp0", decoder.from_deter))
        names.update(dense_names("dec/sp1", "dec/sp1norm", decoder.from_stoch[0]))
        names.update(linear_names("dec/sp2", decoder.from_stoch[1]))
        for name, conv in zip(["conv2", "conv1", "conv0", "imgout"], decoder.convs, strict=True):
            names.update(linear_names(f"dec/{name}", conv))
        for name, norm in zip(["sp", "conv2", "conv1", "conv0"], decoder.norms, strict=True):
            names[f"dec/{name}norm/scale"] = norm.scale
    return names


def official_names(agent: Agent) -> dict[str, nn.Parameter]:
    """Official name -> our parameter, for every parameter."""
    names = {}
    names.update(encoder_names(agent.encoder))
    names.update(rssm_names(agent.rssm))
    names.update(decoder_names(agent.decoder))
    names.update(head_names("rew", "logits", agent.reward))
    names.update(head_names("con", "logit", agent.cont))
    names.update(head_names("val", "logits", agent.critic))
    names.update(head_names("slowval", "logits", agent.slow_critic))
    names.update(mlp_names("pol", agent.actor.mlp))
    outputs = ["logits"] if agent.action.nvec else ["mean", "stddev"]
    for output, layer in zip(outputs, agent.actor.outs, strict=True):
        names.update(linear_names(f"pol/head/action/{output}", layer))
    return names


def golden_obs_spec(value: tuple) -> ObsSpec:
    """meta/hyper has a shape, or ("discrete", classes, shape)."""
    if "discrete" in value:
        return ObsSpec(tuple(value[2]), value[1])
    return ObsSpec(tuple(value))


class Golden:
    """One golden file: a network with the official weights, and the official numbers."""

    def __init__(self, path: Path):
        self.data = dict(np.load(path))
        self.hyper = ast.literal_eval(str(self.data["meta/hyper"]))
        specs = {key: golden_obs_spec(value) for key, value in self.hyper["obs"].items()}
        kind, n = self.hyper["act"][:2]
        action = ActionSpec((n,) if kind == "discrete" else (), n)
        dims = self.hyper["dims"]
        size = Size(
            deter=dims["deter"],
            hidden=dims["hidden"],
            units=dims["units"],
            classes=dims["classes"],
            depth=dims["depth"],
            groups=dims["stoch"],
            blocks=dims["blocks"],
        )
        self.args = Args(
            imagination_horizon=self.hyper["imag_length"],
            actor_unimix=0.0,
            precision="float32",
            learning_rate=self.hyper["lr"],
            warmup_updates=self.hyper["warmup"],
        )
        self.agent = Agent(specs, action, size, self.args)
        self.names = official_names(self.agent)
        self.load_weights()

    @torch.no_grad()
    def load_weights(self) -> None:
        """Set all weights and the return range to those of the file."""
        for name, param in self.names.items():
            param.copy_(self.as_ours(f"params/{name}", param.shape))
        norm = self.agent.return_norm
        norm.lo.fill_(float(self.data["params/retnorm/lo/value"]))
        norm.hi.fill_(float(self.data["params/retnorm/hi/value"]))

    def as_ours(self, key: str, shape: torch.Size) -> Tensor:
        """An official array in the layout of our parameter of this shape."""
        x = self.tensor(key)
        if key.endswith("kernel") and len(shape) == 4:
            return x.permute(3, 2, 0, 1)
        if key.endswith("kernel") and len(shape) == 2:
            return x.reshape(x.shape[0], -1).T
        return x.reshape(shape)

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self.data[key]))

    def batch(self) -> dict:
        """The training steps 1..T; step 0 gives the first action and latent."""
        batch = {"obs": {}}
        for key in self.agent.specs:
            batch["obs"][key] = self.tensor(f"batch/{key}")[:, 1:]
        for key in ("reward", "is_first", "is_last", "is_terminal"):
            batch[key] = self.tensor(f"batch/{key}")[:, 1:]
        action = self.tensor("batch/action")[:, :-1]
        if self.agent.action.nvec:
            action = action.unsqueeze(-1)  # one component
        batch["prev_action"] = dreamerv3.encode_action(action, self.agent.action)
        # contiguous, as a sampled batch is: compiled functions are compiled for strides
        batch["deter"] = self.tensor("batch/dyn/deter")[:, 0].contiguous()
        batch["stoch"] = self.tensor("batch/dyn/stoch")[:, 0].contiguous()
        return batch

    def posterior(self) -> tuple[Tensor, Tensor]:
        """The official deter (B, T, D) and stoch (B, T, S, K)."""
        return self.tensor("out/deter"), self.tensor("out/stoch").float()

    def feat(self) -> Tensor:
        """The features (B, T, F) of the official posterior."""
        return dreamerv3.get_feat(*self.posterior())

    def start(self) -> tuple[Tensor, Tensor]:
        """The official posterior as states (N, D) and (N, S, K) to imagine from."""
        deter, stoch = self.posterior()
        return deter.flatten(0, 1), stoch.flatten(0, 1)

    def by_step(self, x: Tensor) -> Tensor:
        """(N, …) -> (B, T, …)."""
        return x.unflatten(0, (self.hyper["B"], self.hyper["T"]))

    def check(self, key: str, value: Tensor) -> None:
        """Our value is the official one."""
        value = value.detach().numpy()
        np.testing.assert_allclose(value, self.data[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.fixture(
    params=[pytest.param(path, id=path.stem, marks=pytest.mark.golden) for path in FILES]
)
def golden(request, argmax_sampling) -> Golden:
    return Golden(request.param)


def test_golden_files_have_every_weight_of_ours_and_no_other(golden):
    official = set()
    for key in golden.data:
        if key.startswith("params/") and "retnorm" not in key:
            official.add(key.removeprefix("params/"))
    assert set(golden.names) == official
    ours = {id(p) for p in golden.agent.parameters()}
    assert {id(p) for p in golden.names.values()} == ours


def test_golden_encoder(golden):
    golden.check("out/tokens", golden.agent.encoder(golden.batch()["obs"]))


def test_golden_filter(golden):
    """Deter, posterior and its sample, from the official embedding."""
    batch = golden.batch()
    deter, stoch, post = golden.agent.rssm.observe(
        batch["deter"],
        batch["stoch"],
        batch["prev_action"],
        golden.tensor("out/tokens"),
        batch["is_first"],
    )
    golden.check("out/deter", deter)
    golden.check("out/post_logit", post)
    golden.check("out/stoch", stoch)


def test_golden_latents_of_acting_are_those_of_training(golden):
    """The policy, step by step, sees what the filter sees, over the resets inside."""
    agent = golden.agent
    batch = golden.batch()
    deter = batch["deter"]
    stoch = batch["stoch"]
    for t in range(golden.hyper["T"]):
        obs = {key: x[:, t] for key, x in batch["obs"].items()}
        state = (deter, stoch, batch["prev_action"][:, t])
        action, state = dreamerv3.policy(agent, obs, state, batch["is_first"][:, t])
        deter, stoch, acted = state
        expected = golden.tensor("out/deter")[:, t]
        torch.testing.assert_close(deter, expected, rtol=1e-4, atol=1e-5)
        expected = golden.tensor("out/stoch")[:, t].float()
        torch.testing.assert_close(stoch, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(acted, action)


def test_golden_prior(golden):
    deter, _ = golden.posterior()
    golden.check("out/prior_logit", golden.agent.rssm.prior(deter))


def test_golden_reward_head(golden):
    logits = golden.agent.reward(golden.feat())
    golden.check("out/reward_logits", logits)
    golden.check("out/reward_pred", golden.agent.twohot.mean(logits))


def test_golden_continue_head(golden):
    logit = golden.agent.cont(golden.feat()).squeeze(-1)
    golden.check("out/continue_prob", logit.sigmoid())


def test_golden_critic(golden):
    value = golden.agent.twohot.mean(golden.agent.critic(golden.feat()))
    golden.check("out/value_pred", value)


def test_golden_actor(golden):
    actor = golden.agent.actor
    feat = golden.feat()
    if golden.agent.action.nvec:
        golden.check("out/policy_logits", actor.outs[0](actor.mlp(feat)))
    else:
        golden.check("out/policy_mean", actor(feat).mean)
        golden.check("out/policy_std", actor(feat).std)


def test_golden_decoder(golden):
    recon = golden.agent.decoder(*golden.posterior())
    assert recon.keys() == golden.agent.specs.keys()
    for key, value in recon.items():
        golden.check(f"out/recon_{key}", value)


def test_golden_reconstruction_losses(golden):
    recon = golden.agent.decoder(*golden.posterior())
    obs = golden.batch()["obs"]
    for key, value in recon.items():
        golden.check(f"out/loss/{key}", dreamerv3.recon_loss(value, obs[key]))


def test_golden_world_model_loss(golden):
    batch = golden.batch()
    losses, deter, stoch, feat, _ = dreamerv3.world_model_loss(golden.agent, batch, golden.args)
    golden.check("out/deter", deter)
    golden.check("out/stoch", stoch)
    assert torch.equal(feat, dreamerv3.get_feat(deter, stoch))
    golden.check("out/loss/rew", losses["reward"])
    golden.check("out/loss/con", losses["continue"])
    golden.check("out/loss/dyn", losses["dyn"])
    golden.check("out/loss/rep", losses["rep"])
    recon = sum(golden.tensor(f"out/loss/{key}") for key in golden.agent.specs)
    torch.testing.assert_close(losses["recon"].detach(), recon, rtol=1e-4, atol=1e-5)


def test_golden_latents_are_stored_as_class_indices(golden):
    deter, stoch = golden.posterior()
    stored = dreamerv3.stored_latents(deter, stoch)
    np.testing.assert_array_equal(stored["stoch"], golden.data["out/stoch"].argmax(-1))
    np.testing.assert_allclose(stored["deter"], deter, rtol=1e-3, atol=1e-6)


def test_golden_imagined_states(golden):
    agent = golden.agent
    feat, _ = dreamerv3.imagine(agent, *golden.start(), golden.args.imagination_horizon)
    deter = feat[:, 1:, : agent.size.deter]
    stoch = feat[:, 1:, agent.size.deter :]
    groups = (agent.size.groups, agent.size.classes)
    golden.check("out/imag_deter", deter)
    golden.check("out/imag_stoch", stoch.unflatten(-1, groups))


def test_golden_imagined_actions(golden):
    """The file has all but the last one, as they are stored."""
    agent = golden.agent
    _, action = dreamerv3.imagine(agent, *golden.start(), golden.args.imagination_horizon)
    stored = dreamerv3.decode_action(action[:, :-1], agent.action).float()
    if agent.action.nvec:
        stored = stored.squeeze(-1)
    golden.check("out/imag_action", stored)


def imagined_losses(golden: Golden):
    """actor_critic_loss on what is imagined from the official posterior."""
    horizon = golden.args.imagination_horizon
    feat, action = dreamerv3.imagine(golden.agent, *golden.start(), horizon)
    return dreamerv3.actor_critic_loss(golden.agent, feat, action, golden.args)


def test_golden_actor_loss(golden):
    actor, *_ = imagined_losses(golden)
    golden.check("out/loss/policy", golden.by_step(actor.mean(1)))


def test_golden_critic_loss(golden):
    _, critic, *_ = imagined_losses(golden)
    golden.check("out/loss/value", golden.by_step(critic.mean(1)))


def test_golden_critic_loss_on_replayed_trajectories(golden):
    _, _, returns, _ = imagined_losses(golden)
    value = golden.by_step(returns[:, 0])
    loss = dreamerv3.replay_critic_loss(
        golden.agent, golden.feat(), golden.batch(), value, golden.args
    )
    golden.check("out/loss/repval", loss)


def test_golden_return_range(golden):
    _, _, returns, _ = imagined_losses(golden)
    norm = golden.agent.return_norm
    golden.check("out/retnorm/lo", norm.lo)
    golden.check("out/retnorm/hi", norm.hi)
    golden.check("out/metrics/ret", ((returns - norm.lo) / norm.scale).mean())


def test_golden_metrics_of_the_behavior(golden):
    *_, metrics = imagined_losses(golden)
    golden.check("out/metrics/tar", metrics["behavior/return_mean"])
    golden.check("out/metrics/rew", metrics["behavior/reward_mean"])
    golden.check("out/metrics/con", metrics["behavior/continue_mean"])
    golden.check("out/metrics/val", metrics["behavior/value_mean"])
    golden.check("out/metrics/adv_mag", metrics["behavior/advantage_mag"])
    golden.check("out/metrics/ent/action", metrics["behavior/actor_entropy"])


def test_golden_loss_from_end_to_end(golden):
    total, latents, metrics = dreamerv3.loss(golden.agent, golden.batch(), golden.args)
    golden.check("out/loss/total", total)
    golden.check("out/deter", latents[0])
    golden.check("out/stoch", latents[1])
    golden.check("out/metrics/dyn_ent", metrics["world_model/prior_entropy"])
    golden.check("out/metrics/rep_ent", metrics["world_model/posterior_entropy"])


def check_gradients(golden: Golden) -> None:
    """Of the total loss, before clipping."""
    total, *_ = dreamerv3.loss(golden.agent, golden.batch(), golden.args)
    total.backward()
    checked = 0
    for name, param in golden.names.items():
        if f"grad/{name}" in golden.data:
            official = golden.as_ours(f"grad/{name}", param.shape)
            error = (param.grad - official).norm()
            assert error <= 1e-3 * official.norm() + 1e-6, name
            checked += 1
    assert checked > 0


def check_updates(golden: Golden) -> None:
    """Losses and gradient norms of the file's updates, and all weights after them."""
    agent = golden.agent
    args = golden.args
    batch = golden.batch()
    start = {name: p.detach().clone() for name, p in golden.names.items()}
    optimizer = dreamerv3.LaProp(agent.trained(), args.learning_rate, args.warmup_updates)
    for step in range(1, golden.hyper["steps"] + 1):
        _, metrics = dreamerv3.train_step(agent, optimizer, batch, args)
        official = golden.data[f"step{step}/loss"]
        np.testing.assert_allclose(metrics["losses/total"], official, rtol=1e-4)
        official = golden.data[f"step{step}/grad_norm"]
        np.testing.assert_allclose(metrics["optim/grad_norm"], official, rtol=1e-4)
        norm = agent.return_norm
        golden.check(f"step{step}/retnorm", torch.stack([norm.lo, norm.hi]))
        if step == 1:
            golden.check("out/metrics/dyn_ent", metrics["world_model/prior_entropy"])
            golden.check("out/metrics/rep_ent", metrics["world_model/posterior_entropy"])
    for name, param in golden.names.items():
        official = golden.as_ours(f"after/{name}", param.shape)
        change = (official - start[name]).norm()
        assert (param - official).norm() <= 2e-3 * change + 1e-6, name


def test_golden_gradients(golden):
    check_gradients(golden)


def test_golden_updates(golden):
    check_updates(golden)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_compiled_updates_equal_the_official_ones(path, argmax_sampling):
    """Not part of `-k golden`: with a cold compiler cache it takes a minute."""
    torch.compiler.set_stance("default")
    golden = Golden(path)
    check_gradients(golden)
    golden.load_weights()
    check_updates(golden)


# === the mean of a twohot =========================================================================
def far_bins_fall() -> Tensor:
    """Logits (4096, 255) as in the first updates: the far bins of every row fall together, by an
    amount of its own, so that mirrored bins are equal and the mean is 0."""
    distance = (torch.arange(255) - 127).abs()
    amount = torch.linspace(0, 3, 4096).unsqueeze(-1)
    return torch.where(distance > 64, -amount, 0.0)


def mean_function(mean: str, compiled: bool):
    """TwoHot.mean, compiled or not."""
    twohot = TwoHot(mean=mean)
    if not compiled:
        return twohot.mean
    torch.compiler.set_stance("default")
    return torch.compile(twohot.mean)


eager_and_compiled = pytest.mark.parametrize(
    "compiled",
    [False, True],
    ids=["eager", "compiled"],
)


def test_rounded_mean_of_uniform_logits_is_a_rounding_error_of_the_far_bins():
    """0.17 in size, with a sign that depends on the last digit of the softmax."""
    mean = TwoHot().mean(torch.zeros(255))
    assert 0.05 < mean.abs() < 0.25


@eager_and_compiled
def test_exact_mean_is_0_where_mirrored_bins_are_equal(compiled):
    mean = mean_function("exact", compiled)
    assert (mean(far_bins_fall()) == 0).all()


@eager_and_compiled
def test_rounded_mean_is_noise_around_0_where_mirrored_bins_are_equal(compiled):
    mean = mean_function("rounded", compiled)
    noise = mean(far_bins_fall())
    assert noise.mean().abs() < 0.02
    assert 0.03 < noise.std() < 0.3


def one_unit_more() -> Tensor:
    """The logits of far_bins_fall with one unit in the last place more in the last 31 columns, the
    remainder of a vector loop."""
    logits = far_bins_fall()
    last = logits[:, 224:]
    logits[:, 224:] = torch.nextafter(last, torch.tensor(math.inf))
    return logits


@eager_and_compiled
def test_exact_mean_ignores_one_unit_in_the_last_place(compiled):
    mean = mean_function("exact", compiled)
    change = mean(one_unit_more()) - mean(far_bins_fall())
    assert change.abs().max() < 0.01


@eager_and_compiled
def test_one_unit_in_the_last_place_changes_the_rounded_mean_by_no_more_than_its_noise(compiled):
    """The difference of two independent draws of the noise has sqrt(2) of its standard deviation,
    and at most twice its size."""
    mean = mean_function("rounded", compiled)
    noise = mean(far_bins_fall())
    change = mean(one_unit_more()) - noise
    assert change.mean().abs() < 0.02
    assert change.std() <= math.sqrt(2) * noise.std()
    assert change.abs().max() <= 2 * noise.abs().max()


def two_bins(index: int, weight: float) -> list[float]:
    """Probabilities of 255 bins: all mass on this bin and, by its weight, on the next one."""
    weights = [0.0] * 255
    weights[index] = 1 - weight
    weights[index + 1] = weight
    return weights


@pytest.mark.parametrize("mean", ["rounded", "exact"])
@pytest.mark.parametrize("space", ["symexp", "symlog"])
@pytest.mark.parametrize("index", [0, 3, 100, 140, 200, 253])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0], ids=["one bin", "two bins", "the next bin"])
def test_mean_of_mass_on_one_or_two_bins_is_right(index, weight, space, mean):
    twohot = TwoHot(space=space, mean=mean)
    low, high = twohot.bins.double()[index : index + 2]
    expected = (1 - weight) * low + weight * high
    if space == "symlog":
        expected = networks.symexp(expected)
    value = predict(twohot, two_bins(index, weight))
    assert value == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("space", ["symexp", "symlog"])
def test_twohot_bins_are_exactly_symmetric(space):
    bins = TwoHot(space=space).bins
    assert len(bins) == 255
    assert bins[127] == 0
    assert torch.equal(bins, -bins.flip(0))


def test_symexp_bins_are_the_symexp_of_even_ones():
    expected = networks.symexp(torch.linspace(-20, 20, 255))
    torch.testing.assert_close(TwoHot().bins, expected, rtol=1e-4, atol=1e-6)


def test_symlog_bins_are_even():
    expected = torch.linspace(-20, 20, 255)
    torch.testing.assert_close(TwoHot(space="symlog").bins, expected, rtol=1e-4, atol=1e-6)


TARGETS = [0.0, 0.3, -2.5, 123.0, 1000.0, -1e5, TwoHot().bins[200].item(), 1e12, -1e12]


def expected_encoding(bins: Tensor, target: float) -> Tensor:
    """Twohot weights in float64, by their definition."""
    target = min(max(target, bins[0].item()), bins[-1].item())
    above = 1
    while above < len(bins) - 1 and bins[above] < target:
        above += 1
    low = bins[above - 1]
    high = bins[above]
    encoding = torch.zeros(len(bins), dtype=torch.float64)
    encoding[above - 1] = (high - target) / (high - low)
    encoding[above] = (target - low) / (high - low)
    return encoding


@pytest.mark.parametrize("space", ["symexp", "symlog"])
@pytest.mark.parametrize("value", TARGETS)
def test_twohot_loss_is_the_cross_entropy_with_the_two_bins_around_a_target(value, space):
    """Also of bfloat16 logits, as autocast gives them, and of targets beyond the bins."""
    twohot = TwoHot(space=space)
    logits = torch.randn(255).bfloat16()
    y = torch.tensor(value)
    target = networks.symlog(y) if space == "symlog" else y
    encoding = expected_encoding(twohot.bins.double(), target.item())
    expected = -(encoding * logits.double().log_softmax(0)).sum()
    assert twohot.loss(logits, y).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mean", ["rounded", "exact"])
@pytest.mark.parametrize("space", ["symexp", "symlog"])
@pytest.mark.parametrize("value", TARGETS)
def test_mean_of_the_encoding_is_the_target_cut_to_the_range_of_the_bins(value, space, mean):
    twohot = TwoHot(space=space, mean=mean)
    bins = twohot.bins.double()
    target = torch.tensor(value).double()
    target = networks.symlog(target) if space == "symlog" else target
    target = target.clamp(bins[0], bins[-1])
    encoding = expected_encoding(bins, target.item())
    expected = networks.symexp(target) if space == "symlog" else target
    value = predict(twohot, encoding.tolist())
    assert value == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


twohot_heads = pytest.mark.parametrize("name", ["reward", "critic", "slow_critic"])


@pytest.mark.parametrize("space", ["symexp", "symlog"])
@twohot_heads
def test_an_untrained_agent_predicts_0_with_the_exact_mean(name, space):
    """The last layer of reward and critic begins with outscale 0."""
    args = Args(twohot=space, twohot_mean="exact", bins=31)
    agent = Agent(VECTOR, THREE, TINY, args)
    logits = getattr(agent, name)(torch.randn(9, 48))
    assert logits.shape == (9, 31)
    assert (agent.twohot.mean(logits) == 0).all()


@twohot_heads
def test_an_untrained_agent_predicts_a_rounding_error_by_default(name):
    agent = Agent(VECTOR, THREE, TINY, Args())
    logits = getattr(agent, name)(torch.randn(9, 48))
    size = agent.twohot.mean(logits).abs()
    assert size.min() > 0.05
    assert size.max() < 0.25


# === distributions and layers: what the golden numbers do not reach ===============================
def test_uniform_noise_is_divided_in_proportion_to_the_probabilities():
    u = (torch.arange(10_000) + 0.5) / 10_000
    probs = torch.tensor([0.1, 0.6, 0.3]).expand(10_000, 3)
    assert networks.sample_index(probs, u).bincount().tolist() == [1000, 6000, 3000]


def test_a_class_of_probability_0_is_never_sampled():
    probs = torch.tensor([1.0, 0.0, 0.0])
    assert networks.sample_index(probs, torch.tensor(0.9999999)) == 0


def test_a_sample_exists_where_rounding_leaves_a_sum_below_1():
    probs = torch.tensor([0.2, 0.2, 0.2])
    assert networks.sample_index(probs, torch.tensor(0.99)) == 2


def two_categoricals() -> tuple:
    """Six pairs of random categoricals of 3 and 4 classes, ours and torch's, an action (6, 7) and
    its indices (6, 2)."""
    logits = [torch.randn(6, 3), torch.randn(6, 4)]
    ours = networks.MultiOneHot(logits, unimix=0.0)
    reference = [torch.distributions.Categorical(logits=x) for x in logits]
    index = torch.stack([torch.arange(6) % 3, torch.arange(6) % 4], -1)
    action = torch.cat([torch.eye(3)[index[:, 0]], torch.eye(4)[index[:, 1]]], -1)
    return ours, reference, action, index


def test_log_prob_of_independent_categoricals_is_that_of_torch():
    ours, (first, second), action, index = two_categoricals()
    expected = first.log_prob(index[:, 0]) + second.log_prob(index[:, 1])
    torch.testing.assert_close(ours.log_prob(action), expected)


def test_entropy_of_independent_categoricals_is_that_of_torch():
    ours, (first, second), _, _ = two_categoricals()
    torch.testing.assert_close(ours.entropy(), first.entropy() + second.entropy())


def test_independent_categoricals_are_sampled_with_noise_of_their_own():
    """The lowest noise gives the first class of the first one, the highest the last class of the
    second."""
    ours, *_ = two_categoricals()
    u = torch.tensor([0.0, 0.9999999]).expand(6, 2)
    expected = torch.tensor([[1.0, 0, 0, 0, 0, 0, 1]]).expand(6, 7)
    assert torch.equal(ours.sample(u), expected)


def test_a_normal_has_the_log_prob_and_entropy_of_torch():
    mean = torch.randn(6, 2)
    std = torch.rand(6, 2) + 0.1
    action = torch.randn(6, 2)
    ours = networks.Normal(mean, std)
    reference = torch.distributions.Normal(mean, std)
    torch.testing.assert_close(ours.log_prob(action), reference.log_prob(action).sum(-1))
    torch.testing.assert_close(ours.entropy(), reference.entropy().sum(-1))


def test_encode_action_makes_one_hot_vectors_side_by_side():
    _, _, action, index = two_categoricals()
    encoded = dreamerv3.encode_action(index, ActionSpec((3, 4), 7))
    torch.testing.assert_close(encoded, action)


def test_decode_action_is_the_inverse_of_encode_action():
    _, _, action, index = two_categoricals()
    decoded = dreamerv3.decode_action(action, ActionSpec((3, 4), 7))
    assert torch.equal(decoded, index)


def assert_independent(samples: Tensor) -> None:
    """One-hot samples (N, L, …, K) of nearly uniform categoricals: rows, and neighbors on axis 1,
    agree by chance only, in 1 of K cases, not always."""
    agree = (samples[:, 1:] * samples[:, :-1]).sum(-1)
    assert agree.mean(0).max() < 0.7
    rows_agree = (samples[1:] * samples[:-1]).sum(-1)
    assert rows_agree.mean() < 0.7


def agent_of_uniform_latents() -> Agent:
    return make_agent(unimix=1 - 1e-7)[0]


def test_every_imagined_action_has_noise_of_its_own():
    agent = agent_of_uniform_latents()
    _, action = dreamerv3.imagine(agent, *agent.rssm.initial(500)[:2], 3)
    assert_independent(action)


def test_every_step_and_group_of_imagination_has_noise_of_its_own():
    agent = agent_of_uniform_latents()
    feat, _ = dreamerv3.imagine(agent, *agent.rssm.initial(500)[:2], 3)
    stoch = feat[:, 1:, 32:].unflatten(-1, (4, 4))  # (N, H, S, K)
    assert_independent(stoch)
    assert_independent(stoch.swapaxes(1, 2))


def test_every_step_and_group_of_filtering_has_noise_of_its_own():
    agent = agent_of_uniform_latents()
    deter, stoch, _ = agent.rssm.initial(500)
    action = torch.zeros(500, 3, 3)
    embed = torch.zeros(500, 3, 16)
    is_first = torch.ones(500, 3, dtype=torch.bool)
    _, stoch, _ = agent.rssm.observe(deter, stoch, action, embed, is_first)
    assert_independent(stoch)
    assert_independent(stoch.swapaxes(1, 2))


def test_every_group_of_an_acting_agent_has_noise_of_its_own():
    agent = agent_of_uniform_latents()
    obs = {"vector": torch.zeros(500, 5)}
    is_first = torch.ones(500, dtype=torch.bool)
    _, state = dreamerv3.policy(agent, obs, agent.rssm.initial(500), is_first)
    assert_independent(state[1])


def test_every_component_of_a_continuous_action_has_noise_of_its_own():
    actor = networks.Actor(400, 300, ActionSpec((), 2), 0.0)
    noise = actor.noise(10_000)
    covariance = noise.T @ noise / 10_000
    assert (covariance - torch.eye(2)).abs().max() < 0.06


def test_linear_kernels_have_the_std_of_their_width_and_outscale():
    weight = networks.linear(400, 300, outscale=0.5).weight
    assert weight.std().item() == pytest.approx(0.5 / math.sqrt(400), rel=0.02)


def test_linear_kernels_are_cut_at_two_std():
    weight = networks.linear(400, 300, outscale=0.5).weight
    assert weight.abs().max() <= 0.5 * 2 * 1.1368 / math.sqrt(400)


def test_biases_are_0():
    assert not networks.linear(400, 300).bias.any()
    assert not networks.BlockLinear(256, 512, 8).bias.any()
    assert not networks.conv5(16, 64).bias.any()


def test_block_linear_kernels_have_the_std_of_the_full_input_width():
    weight = networks.BlockLinear(256, 512, 8, shared=96).weight
    expected = 1 / math.sqrt(256 + 8 * 96)
    assert weight.std().item() == pytest.approx(expected, rel=0.02)


def test_convolution_kernels_have_the_std_of_their_window():
    weight = networks.conv5(16, 64).weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(25 * 16), rel=0.02)


def test_upsampling_and_convolving_equals_its_definition():
    conv = networks.conv5(3, 4).double()
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)  # not square
    expected = conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(networks.upsample_conv(x, conv), expected)


@pytest.mark.golden
@pytest.mark.parametrize(
    "size, of_image, of_vector",
    [
        ("1m", 686_456, 640_477),
        ("12m", 10_492_616, 9_736_477),
        ("25m", 23_487_016, 21_780_637),
        ("50m", 41_646_984, 38_608_925),
        ("100m", 93_463_624, 86_617_885),
        ("200m", 165_942_536, 153_763_357),
        ("400m", 372_887_176, 345_463_837),
    ],
)
def test_parameter_counts_are_those_of_the_official_code(size, of_image, of_vector):
    """With 6 discrete actions and a 64x64x3 image, or a vector of 24 numbers."""
    assert count_parameters(size, ObsSpec((64, 64, 3))) == of_image
    assert count_parameters(size, ObsSpec((24,))) == of_vector


def count_parameters(size: str, spec: ObsSpec) -> int:
    with torch.device("meta"):
        agent = Agent({"obs": spec}, ActionSpec((6,), 6), SIZES[size], Args())
    return sum(p.numel() for p in agent.trained())


def test_every_size_is_counted():
    assert list(SIZES) == ["1m", "12m", "25m", "50m", "100m", "200m", "400m"]


def test_the_lowest_noise_does_not_sample_a_class_of_probability_0():
    probs = torch.tensor([0.0, 1.0])
    assert networks.sample_index(probs, torch.tensor(0.0)) == 1


def test_the_mode_of_independent_categoricals_is_their_most_probable_classes():
    ours, (first, second), *_ = two_categoricals()
    expected = [torch.eye(3)[first.probs.argmax(-1)], torch.eye(4)[second.probs.argmax(-1)]]
    assert torch.equal(ours.mode(), torch.cat(expected, -1))


def test_the_mode_of_a_normal_is_its_mean():
    mean = torch.randn(6, 2)
    assert torch.equal(networks.Normal(mean, torch.ones(6, 2)).mode(), mean)


def test_norms_are_computed_in_float32():
    norm = networks.NormSiLU(64)
    x = torch.randn(9, 64).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


@pytest.mark.parametrize("action", [THREE, ActionSpec((), 2)], ids=["discrete", "continuous"])
def test_the_last_layers_of_the_actor_begin_with_outscale_0_01(action):
    actor = networks.Actor(400, 300, action, 0.0)
    for out in actor.outs:
        assert out.weight.std().item() == pytest.approx(0.01 / math.sqrt(300), rel=0.15)


def even_noise(rows: int) -> Tensor:
    """Noise (N, S) that goes evenly through [0, 1)."""
    u = (torch.arange(rows) + 0.5) / rows
    return u.unsqueeze(-1).expand(rows, TINY.groups)


def test_states_are_predicted_with_unimix():
    """Which is all of the probability here, so that the logits do not matter."""
    agent = agent_of_uniform_latents()
    nn.init.normal_(agent.rssm.prior[2].bias, std=10)
    _, stoch = agent.rssm.predict_step(*agent.rssm.initial(400), even_noise(400))
    torch.testing.assert_close(stoch.sum(0), torch.full((4, 4), 100.0))


def test_states_are_filtered_with_unimix():
    agent = agent_of_uniform_latents()
    nn.init.normal_(agent.rssm.post[1].bias, std=10)
    embed = torch.zeros(400, TINY.units)
    is_first = torch.ones(400, dtype=torch.bool)
    state = agent.rssm.initial(400)
    _, stoch, _ = agent.rssm.observe_step(*state, embed, is_first, even_noise(400))
    torch.testing.assert_close(stoch.sum(0), torch.full((4, 4), 100.0))


def test_the_policy_can_take_the_most_probable_action():
    agent, _ = make_agent()
    obs = make_batch(agent, batch=100, length=1)["obs"]
    obs = {key: x[:, 0] for key, x in obs.items()}
    state = agent.rssm.initial(100)
    is_first = torch.ones(100, dtype=torch.bool)
    action, (deter, stoch, _) = dreamerv3.policy(agent, obs, state, is_first, mode=True)
    feat = dreamerv3.get_feat(deter, stoch)
    assert torch.equal(action, agent.actor(feat).mode())


# === returns, optimizer, flags ====================================================================
# 21 returns: the ranks of the percentiles are whole numbers
RETURN_SHAPES = [(1,), (2, 1), (21,), (16, 15)]


@pytest.mark.parametrize("shape", RETURN_SHAPES, ids=str)
def test_return_range_follows_the_percentiles_of_numpy(shape):
    returns = 1000 * torch.randn(shape)
    norm = dreamerv3.ReturnNorm()
    lo, hi = np.percentile(returns.numpy(), [5, 95])
    for share in (0.01, 0.0199):  # of the way from 0 to the percentile
        norm.update(returns)
        np.testing.assert_allclose(norm.lo, share * lo, rtol=1e-5)
        np.testing.assert_allclose(norm.hi, share * hi, rtol=1e-5)
    np.testing.assert_allclose(norm.scale, max(1, share * (hi - lo)), rtol=1e-5)


class Trajectory(NamedTuple):
    """Arrays of one length; value is the bootstrap."""

    reward: np.ndarray
    value: np.ndarray
    discount: np.ndarray
    is_last: np.ndarray


def random_trajectory(rng: np.random.Generator, length: int) -> Trajectory:
    """With terminations and truncations inside."""
    terminal = rng.random(length) < 0.15
    cut = rng.random(length) < 0.15
    reward = rng.normal(size=length)
    value = rng.normal(size=length)
    discount = np.where(terminal, 0.0, 0.97)
    return Trajectory(reward, value, discount, terminal | cut)


def n_step_return(x: Trajectory, t: int, n: int) -> float:
    """n discounted rewards after state t and then the value, or fewer where the episode ends."""
    if n == 0:
        return x.value[t]
    steps = 0 if x.is_last[t + 1] else n - 1
    return x.reward[t + 1] + x.discount[t + 1] * n_step_return(x, t + 1, steps)


def weighted_n_step_returns(x: Trajectory, t: int, lam: float) -> float:
    """The definition of the lambda-return of state t."""
    steps = len(x.reward) - 1 - t
    total = lam ** (steps - 1) * n_step_return(x, t, steps)
    for n in range(1, steps):
        total += (1 - lam) * lam ** (n - 1) * n_step_return(x, t, n)
    return total


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_lambda_return_equals_the_weighted_sum_of_n_step_returns(lam):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = random_trajectory(rng, length=7)
        row = Trajectory(*[torch.tensor(array)[None] for array in x])
        returns = dreamerv3.lambda_return(row.reward, row.value, row.discount, lam, row.is_last)
        expected = [weighted_n_step_returns(x, t, lam) for t in range(6)]
        np.testing.assert_allclose(returns[0], expected, rtol=1e-5, atol=1e-6)


class PlainOptimizer:
    """Adaptive clipping and LaProp of one tensor, in float64, as the paper writes them."""

    def __init__(self, param: Tensor):
        self.param = param.detach().double()
        self.exp_avg = 0.0
        self.exp_avg_sq = 0.0
        self.steps = 0

    def step(self, grad: Tensor, lr: float) -> None:
        self.steps += 1
        limit = 0.3 * max(1e-3, self.param.norm())
        grad = grad * min(1, limit / grad.norm())
        self.exp_avg_sq = 0.999 * self.exp_avg_sq + 0.001 * grad**2
        rms = (self.exp_avg_sq / (1 - 0.999**self.steps)).sqrt()
        self.exp_avg = 0.9 * self.exp_avg + 0.1 * grad / (rms + 1e-20)
        self.param = self.param - lr * self.exp_avg / (1 - 0.9**self.steps)


def test_optimizer_equals_a_plain_loop():
    """Over seven updates with gradients of very different sizes."""
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(5))]
    plain = [PlainOptimizer(p) for p in params]
    optimizer = dreamerv3.LaProp(params, lr=0.1, warmup=4)
    for step in range(7):
        lr = 0.1 * min(1, step / 4)
        for p, reference in zip(params, plain, strict=True):
            p.grad = torch.randn(p.shape) * 10 ** (step - 3)
            reference.step(p.grad.double(), lr)
        dreamerv3.clip_gradients(params, 0.3)
        optimizer.step()
        for p, reference in zip(params, plain, strict=True):
            torch.testing.assert_close(p.double(), reference.param, rtol=1e-3, atol=1e-5)


def first_change(optimizer: dreamerv3.LaProp) -> float:
    """How far the optimizer moves its one number when its gradient is 1."""
    (param,) = optimizer.param_groups[0]["params"]
    before = param.item()
    param.grad = torch.ones(1)
    optimizer.step()
    return before - param.item()


def test_lr_can_be_filled_between_updates():
    optimizer = dreamerv3.LaProp([parameter([1.0], grad=[1.0])], lr=0.1)
    optimizer.param_groups[0]["lr"].fill_(0.05)
    assert first_change(optimizer) == pytest.approx(0.05, rel=1e-5)


def test_lr_stays_the_tensor_that_a_graph_has_captured_when_a_scheduler_changes_it():
    optimizer = dreamerv3.LaProp([parameter([1.0], grad=[1.0])], lr=0.1)
    captured = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    assert first_change(optimizer) == pytest.approx(0.1, rel=1e-5)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is captured
    assert captured.item() == pytest.approx(0.05)
    assert first_change(optimizer) == pytest.approx(0.05, rel=1e-5)


def test_the_warm_up_multiplies_the_lr_of_a_scheduler():
    optimizer = dreamerv3.LaProp([parameter([1.0], grad=[1.0])], lr=0.1, warmup=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    changes = []
    for _ in range(3):
        changes.append(first_change(optimizer))
        schedule.step()
    assert changes == pytest.approx([0, 0.1 * 0.5 * 0.5, 0.1 * 0.25], abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lr_takes_effect_while_a_graph_is_replayed():
    param = nn.Parameter(torch.ones(1, device="cuda"))
    param.grad = torch.ones(1, device="cuda")
    optimizer = dreamerv3.LaProp([param], lr=0.1)

    def update(grad: Tensor) -> Tensor:
        param.grad.copy_(grad)
        return optimizer.step()[1]

    graph = dreamerv3.Graph(update)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    changes = []
    for _ in range(4):
        changes.append(graph(torch.ones(1, device="cuda")).item())
        schedule.step()
    assert changes == pytest.approx([0.1, 0.05, 0.025, 0.0125], rel=1e-4)


UPDATE_FLAGS = [
    ("free_nats", 3.0),
    ("ent_coef", 3.0),
    ("slow_critic_scale", 3.0),
    ("gamma", 0.5),
    ("return_lambda", 0.5),
    ("unimix", 0.5),
    ("actor_unimix", 0.5),
    ("twohot", "symlog"),
    ("imagination_horizon", 2),
    ("precision", "bfloat16"),
]


@cache
def update_once(**flags) -> tuple[Agent, dict[str, Tensor]]:
    """The agent after an update of learning rate 0, and metrics; equal but for these flags."""
    torch.manual_seed(0)
    agent, args = make_agent(**flags)
    optimizer = dreamerv3.LaProp(agent.trained(), lr=0.0)
    _, metrics = dreamerv3.train_step(agent, optimizer, make_batch(agent), args)
    return agent, metrics


@pytest.mark.parametrize("flag, value", UPDATE_FLAGS)
def test_flags_of_the_update_change_its_loss(flag, value):
    _, metrics = update_once()
    _, changed = update_once(**{flag: value})
    assert metrics["losses/total"] != changed["losses/total"]


@pytest.mark.parametrize("flag", ["gamma", "return_lambda"])
def test_the_flags_of_returns_change_the_loss_of_the_replay_critic(flag):
    torch.manual_seed(0)
    agent, args = make_agent()
    _, other_args = make_agent(**{flag: 0.5})
    batch = make_batch(agent)
    feat = torch.randn(2, 6, 48)  # (B, T, F)
    value = torch.randn(2, 6)  # (B, T)
    loss = dreamerv3.replay_critic_loss(agent, feat, batch, value, args)
    other_loss = dreamerv3.replay_critic_loss(agent, feat, batch, value, other_args)
    assert not torch.allclose(loss, other_loss)


def test_tau_changes_the_slow_critic():
    agent, _ = update_once()
    changed, _ = update_once(tau=0.5)
    assert not torch.equal(agent.slow_critic[1].weight, changed.slow_critic[1].weight)


@pytest.mark.parametrize("tau", [0.0, 0.02, 1.0])
def test_the_slow_critic_goes_tau_of_the_way_to_the_critic(tau):
    torch.manual_seed(0)
    before, _ = make_agent()
    after, _ = update_once(tau=tau)
    slow = before.slow_critic[1].weight
    fast = after.critic[1].weight
    expected = (1 - tau) * slow + tau * fast
    torch.testing.assert_close(after.slow_critic[1].weight, expected)


def test_the_slow_critic_begins_as_the_critic():
    agent = Agent(VECTOR, THREE, TINY, Args())
    for slow, fast in zip(agent.slow_critic.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(slow, fast)


def test_the_total_loss_is_the_sum_of_all_weighted_by_their_flags():
    _, metrics = update_once(
        pred_scale=2.0,
        dyn_scale=3.0,
        rep_scale=4.0,
        replay_critic_scale=5.0,
    )
    weights = {
        "recon": 2,
        "reward": 2,
        "continue": 2,
        "dyn": 3,
        "rep": 4,
        "actor": 1,
        "critic": 1,
        "replay_critic": 5,
    }
    total = sum(weight * metrics[f"losses/{name}"] for name, weight in weights.items())
    torch.testing.assert_close(metrics["losses/total"], total, rtol=1e-5, atol=0)


def test_gradients_are_clipped_as_the_flag_says(monkeypatch):
    clip = Mock(wraps=dreamerv3.clip_gradients)
    monkeypatch.setattr(dreamerv3, "clip_gradients", clip)
    update_once(clip=0.1)
    assert clip.call_args.args[1] == 0.1


def test_the_return_scale_is_recorded():
    agent, metrics = update_once()
    assert metrics["behavior/return_scale"] == agent.return_norm.scale


def root_mean_square(tensors: list[Tensor]) -> Tensor:
    """Of all numbers of these tensors."""
    return torch.cat([x.flatten() for x in tensors]).square().mean().sqrt()


def test_root_mean_squares_of_weights_and_of_their_change_are_recorded():
    agent, args = make_agent()
    params = agent.trained()
    before = [p.detach().clone() for p in params]
    optimizer = dreamerv3.LaProp(params, lr=0.1)
    _, metrics = dreamerv3.train_step(agent, optimizer, make_batch(agent), args)
    after = [p.detach() for p in params]
    changes = [x - y for x, y in zip(after, before, strict=True)]
    torch.testing.assert_close(metrics["optim/param_rms"], root_mean_square(after))
    expected = root_mean_square(changes)
    torch.testing.assert_close(metrics["optim/update_rms"], expected, rtol=1e-4, atol=0)


def test_the_learning_rate_is_recorded_with_its_warm_up():
    agent, args = make_agent()
    optimizer = dreamerv3.LaProp(agent.trained(), lr=0.4, warmup=4)
    rates = []
    for _ in range(3):
        _, metrics = dreamerv3.train_step(agent, optimizer, make_batch(agent), args)
        rates.append(metrics["charts/learning_rate"].item())
    assert rates == pytest.approx([0, 0.1, 0.2])


def test_latents_of_a_batch_have_one_vector_for_every_group():
    """Where there are not as many groups as classes."""
    size = TINY._replace(groups=6)
    agent = Agent(VECTOR, THREE, size, Args())
    arrays = {
        "prev_action": np.zeros((2, 5, 1), np.int32),
        "deter": np.zeros((2, 32), np.float16),
        "stoch": np.full((2, 6), 3, np.uint8),
    }
    batch = dreamerv3.batch_to_device(arrays, agent, torch.device("cpu"))
    expected = torch.tensor([0.0, 0, 0, 1]).expand(2, 6, 4)
    assert torch.equal(batch["stoch"], expected)


# === gradients, devices, graphs ===================================================================
class NoHostSync(TorchDispatchMode):
    """Fails on every operation that makes the host wait for the device or has a data-dependent
    shape."""

    FORBIDDEN = [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "item",
        "is_nonzero",
        "equal.",
        "lift_fresh",
    ]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for name in self.FORBIDDEN:
            assert name not in str(function), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


ACTION_SPECS = {
    "discrete": THREE,
    "multi-discrete": ActionSpec((3, 2), 5),
    "continuous": ActionSpec((), 2),
}
every_action = pytest.mark.parametrize("kind", ACTION_SPECS)
# on the meta device an operation that mixes devices raises, as it would on a GPU
every_device = pytest.mark.parametrize(
    "device, precision",
    [("cpu", "float32"), ("cpu", "bfloat16"), ("meta", "float32")],
)


class Updated(NamedTuple):
    agent: Agent
    latents: tuple[Tensor, Tensor]
    metrics: dict[str, Tensor]


@cache
def update_without_waiting(kind: str, device: str, precision: str) -> Updated:
    """One update; fails where it waits for the device."""
    agent, args = make_agent(SPECS, ACTION_SPECS[kind], free_nats=0.0, precision=precision)
    batch = tree_map(lambda x: x.to(device), make_batch(agent))
    agent = agent.to(device)
    optimizer = dreamerv3.LaProp(agent.trained(), args.learning_rate)
    with NoHostSync():
        latents, metrics = dreamerv3.train_step(agent, optimizer, batch, args)
    return Updated(agent, latents, metrics)


@every_device
@every_action
def test_an_update_stays_on_the_device(kind, device, precision):
    update = update_without_waiting(kind, device, precision)
    for x in (*update.latents, *update.metrics.values()):
        assert x.device.type == device


@every_device
@every_action
def test_latents_and_metrics_of_an_update_are_detached(kind, device, precision):
    update = update_without_waiting(kind, device, precision)
    for x in (*update.latents, *update.metrics.values()):
        assert not x.requires_grad


@every_device
@every_action
def test_latents_and_metrics_of_an_update_are_float32(kind, device, precision):
    update = update_without_waiting(kind, device, precision)
    for x in (*update.latents, *update.metrics.values()):
        assert x.dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@every_action
def test_an_update_reaches_every_parameter(kind, precision):
    update = update_without_waiting(kind, "cpu", precision)
    for name, p in update.agent.named_parameters():
        if p.requires_grad:
            assert p.grad.any(), name


@every_device
@every_action
def test_the_policy_stays_on_the_device(kind, device, precision):
    agent, _ = make_agent(SPECS, ACTION_SPECS[kind], precision=precision)
    batch = tree_map(lambda x: x[:, 0].to(device), make_batch(agent)["obs"])
    agent = agent.to(device)
    is_first = torch.tensor([True, False]).to(device)
    with NoHostSync():
        action, _ = dreamerv3.policy(agent, batch, agent.rssm.initial(2), is_first)
    assert action.shape == (2, agent.action.size)
    assert action.device.type == device
    assert not action.requires_grad


def three_updates_on_cuda(precision: str, wrap) -> list:
    """Latents and metrics of three updates, and the weights after them; wrap: dreamerv3.Graph or
    nothing."""
    torch.manual_seed(0)
    agent, args = make_agent(SPECS, precision=precision)
    batches = [tree_map(Tensor.cuda, make_batch(agent)) for _ in range(3)]
    batches[2]["reward"] += 1  # what a graph has to be told
    optimizer = dreamerv3.LaProp(agent.cuda().trained(), 1e-3)
    update = wrap(partial(dreamerv3.train_step, agent, optimizer, args=args))
    results = [update(batch) for batch in batches]
    return [*results, agent.state_dict()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_updates_are_the_updates(precision):
    plain = three_updates_on_cuda(precision, lambda update: update)
    captured = three_updates_on_cuda(precision, dreamerv3.Graph)
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-4)


def test_a_graph_runs_its_function_plainly_and_then_captures_it_once(monkeypatch):
    monkeypatch.setattr(torch, "cuda", MagicMock())
    graph = dreamerv3.Graph(Mock(side_effect=lambda x: x))
    results = [graph(torch.tensor(i)) for i in range(5)]
    assert graph.function.call_count == 2
    assert graph.graph.replay.call_count == 4
    assert results == [0, 1, 2, 3, 4]  # not overwritten by the next call


def test_a_graph_that_cannot_be_captured_ends_the_program_with_the_cause(monkeypatch):
    cuda = MagicMock()
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("a consequence")
    monkeypatch.setattr(torch, "cuda", cuda)
    graph = dreamerv3.Graph(Mock(side_effect=[0, RuntimeError("the cause")]))
    assert graph(torch.ones(1)) == 0
    message = "cannot capture a CUDA graph, add --no-cudagraphs: the cause"
    with pytest.raises(dreamerv3.UserError, match=message):
        graph(torch.ones(1))


def working_backend(graph, inputs):
    return graph


def broken_backend(graph, inputs):
    raise ZeroDivisionError("no compiler")


def test_functions_are_compiled_if_a_compiler_works(capsys, monkeypatch):
    compiler = partial(torch.compile, backend=working_backend)
    monkeypatch.setattr(torch, "compile", compiler)
    dreamerv3.use_compiler(True, torch.device("cpu"))
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert "cannot compile" not in capsys.readouterr().out


def test_no_compile_compiles_nothing():
    torch.compiler.set_stance("default")
    dreamerv3.use_compiler(False, torch.device("cpu"))
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"


def test_without_a_compiler_the_program_goes_on_in_eager_mode(capsys, monkeypatch):
    compiler = partial(torch.compile, backend=broken_backend)
    monkeypatch.setattr(torch, "compile", compiler)
    dreamerv3.use_compiler(True, torch.device("cpu"))
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    assert "cannot compile, going on in eager mode: " in capsys.readouterr().out


# === the time line ================================================================================
class ChainRun(NamedTuple):
    """A short run on the chain environment, and what it sampled."""

    terminal: bool  # how its episodes end
    windows: str
    batches: list[dict[str, np.ndarray]]
    buffer_windows: list[str]  # of the buffer, at every update
    learned: list[dict[str, np.ndarray]]  # the latents of every update
    written: list[dict[str, np.ndarray]]  # what was written back
    stored: list[int]  # the actions of steps that were stored and are not last ones
    taken: list[int]  # the actions that the environment got
    records: list[dict[str, np.ndarray]]  # every stored step
    given_first: list[np.ndarray]  # the policy's input is_first, at every step
    given_state: list[tuple]  # its input deter, stoch, action
    new_state: list[tuple]  # the state that it returned

    def rows(self, name: str) -> np.ndarray:
        """(all rows, T, …) of all batches."""
        return np.concatenate([batch[name] for batch in self.batches])

    @property
    def position(self) -> np.ndarray:
        return self.rows("obs/obs")[..., 0]


CHAIN_RUNS = [
    ("DreamerChain-v0", "episode"),
    ("DreamerChain-v0", "stream"),
    ("DreamerTruncatedChain-v0", "episode"),
    ("DreamerTruncatedChain-v0", "stream"),
]


@pytest.fixture(scope="module", params=CHAIN_RUNS, ids="-".join)
def chain(request, tmp_path_factory) -> ChainRun:
    env_id, windows = request.param
    lists = {name: [] for name in ChainRun._fields[2:]}
    run = ChainRun(env_id == "DreamerChain-v0", windows, **lists)
    policy = dreamerv3.policy
    convert = dreamerv3.batch_to_device
    train_step = dreamerv3.train_step
    write = Replay.update_latents
    add = Replay.add
    step = Chain.step

    def record_batch(batch, *rest):
        run.batches.append(batch)
        return convert(batch, *rest)

    def record_train_step(*inputs, **options):
        latents, metrics = train_step(*inputs, **options)
        run.learned.append(dreamerv3.stored_latents(*latents))
        return latents, metrics

    def record_write(replay, index, **latents):
        run.buffer_windows.append(replay.windows)
        run.written.append(latents)
        return write(replay, index, **latents)

    def record_add(replay, record):
        if not record["is_last"][0]:
            run.stored.append(int(record["action"][0, 0]))
        run.records.append(record)
        add(replay, record)

    def record_policy(agent, obs, state, is_first):
        run.given_state.append(state)
        run.given_first.append(is_first.numpy().copy())
        action, state = policy(agent, obs, state, is_first)
        run.new_state.append(state)
        return action, state

    def record_step(env, action):
        run.taken.append(action)
        return step(env, action)

    program = Program(tmp_path_factory.mktemp("chain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreamerv3, "batch_to_device", record_batch)
        patch.setattr(dreamerv3, "train_step", record_train_step)
        patch.setattr(Replay, "update_latents", record_write)
        patch.setattr(Replay, "add", record_add)
        patch.setattr(Chain, "step", record_step)
        patch.setattr(dreamerv3, "policy", record_policy)
        program.train(env_id=env_id, replay_windows=windows, total_timesteps=90)
    return run


def test_a_chain_run_makes_one_update_every_two_steps(chain):
    """From step 40 to step 90."""
    assert len(chain.batches) == 25


def test_the_windows_of_the_flag_are_those_of_the_buffer(chain):
    assert chain.buffer_windows == [chain.windows] * 25


def test_the_latents_of_an_update_are_written_back(chain):
    np.testing.assert_equal(chain.written, chain.learned)


def test_the_agent_acts_on_the_state_of_the_step_before(chain):
    assert len(chain.given_state) == 90
    for given, before in zip(chain.given_state[1:], chain.new_state[:-1], strict=True):
        assert tree_map(torch.equal, given, before) == (True, True, True)


def test_the_agent_is_told_where_an_episode_starts(chain):
    np.testing.assert_array_equal(chain.given_first, [x["is_first"] for x in chain.records])
    assert sum(chain.given_first) == 15  # five steps and a reset each


def test_a_step_is_stored_with_the_latent_that_the_agent_had_when_it_acted(chain):
    assert len(chain.records) == 90
    for record, (deter, stoch, _) in zip(chain.records, chain.new_state, strict=True):
        np.testing.assert_array_equal(record["deter"], deter.half())
        np.testing.assert_array_equal(record["stoch"], stoch.argmax(-1))


def test_a_step_is_stored_with_the_action_that_the_environment_takes_on_it(chain):
    """The action of a last step is never taken. The chain's actions begin at 3."""
    assert [action + 3 for action in chain.stored] == chain.taken
    assert len(set(chain.taken)) == 4


def test_a_reset_is_a_first_step(chain):
    """A reset shows position 0. A row may also start over elsewhere."""
    assert (chain.rows("is_first") >= (chain.position == 0)).all()


def test_a_reward_arrives_with_the_observation_that_it_was_earned_for(chain):
    """The chain's reward is its new position, and there is none at a reset."""
    np.testing.assert_array_equal(chain.rows("reward"), chain.position)


def test_the_end_of_an_episode_is_a_last_step(chain):
    assert (chain.rows("is_last") >= (chain.position == 5)).all()


def test_a_step_is_terminal_if_the_episode_ends_there_by_termination(chain):
    expected = (chain.position == 5) & chain.terminal
    np.testing.assert_array_equal(chain.rows("is_terminal"), expected)


def test_steps_follow_each_other_unless_the_second_one_is_a_first_step(chain):
    follows = chain.position[:, 1:] == chain.position[:, :-1] + 1
    np.testing.assert_array_equal(follows, ~chain.rows("is_first")[:, 1:])


def test_the_step_before_a_first_step_is_a_last_step_and_no_other_is(chain):
    np.testing.assert_array_equal(chain.rows("is_last")[:, :-1], chain.rows("is_first")[:, 1:])


# === replay =======================================================================================
FIELDS = {
    "obs/x": ((3,), np.float32),
    "obs/a./b": ((), np.int32),
    "obs/a/.b": ((), np.int32),
    "action": ((1,), np.int32),
    "reward": ((), np.float32),
    "deter": ((3,), np.float16),
    "stoch": ((2,), np.uint8),
}


def fill(replay: Replay, steps: int, lengths: list[int]) -> None:
    """Add steps, in episodes of these lengths, the last one cut. The observation is (environment,
    time, steps left in the episode)."""
    rng = np.random.default_rng(0)
    envs = np.arange(replay.num_envs)
    is_first = np.ones(replay.num_envs, bool)
    left = rng.choice(lengths, replay.num_envs)
    for now in range(replay.now, replay.now + steps):
        time = np.full(replay.num_envs, now)
        is_last = left == 1
        step = {
            "obs/x": np.stack([envs, time, left], 1),
            "obs/a./b": time,
            "obs/a/.b": left,
            "action": time[:, None],
            "reward": time,
            "deter": np.zeros((replay.num_envs, 3)),
            "stoch": np.full((replay.num_envs, 2), now % 200),
            "is_first": is_first,
            "is_last": is_last,
            "is_terminal": is_last,
        }
        for array in step.values():
            array.flags.writeable = False  # add must not change its input
        replay.add(step)
        is_first = is_last
        left = np.where(is_last, rng.choice(lengths, replay.num_envs), left - 1)


class Rows(NamedTuple):
    """All rows, R, of the batches that were sampled while a buffer was filled."""

    batch: dict[str, np.ndarray]  # (R, T, …)
    env: np.ndarray  # (R, 1)
    time: np.ndarray  # (R, T)
    now: np.ndarray  # (R, 1), steps per environment when the row was sampled
    stored_first: np.ndarray  # (R,), is_first of the row's first step, as it was stored

    @property
    def oldest(self) -> np.ndarray:
        """(R, 1), the oldest step that the buffer held."""
        return np.maximum(0, self.now - 300)


@cache
def sample_rows(windows: str, lengths: tuple[int, ...]) -> Rows:
    """Fill a buffer of 300 steps of 2 environments until it is not full, just full, past the write
    head and far past it; sample 50 batches each time."""
    replay = Replay(600, 2, FIELDS, 8, windows)
    parts = []
    for steps in (20, 270, 37, 500):
        fill(replay, steps, list(lengths))
        for _ in range(50):
            batch, (env, time) = replay.sample(16)
            copies = {name: array.copy() for name, array in batch.items()}
            now = np.full((16, 1), replay.now)
            slot = time[:, 0] % replay.slots
            stored_first = replay.data["is_first"][env[:, 0], slot]
            parts.append(Rows(copies, env, time, now, stored_first))
            for array in batch.values():
                array[:] = 1  # a copy, or the next batches are wrong
    return tree_map(lambda *arrays: np.concatenate(arrays), *parts)


every_window = pytest.mark.parametrize("windows", ["episode", "stream"])
every_length = pytest.mark.parametrize(
    "lengths",
    [(1,), (3, 5), (8,), (7, 9, 30), (40, 50), (10_000,)],
    ids=["1", "3 or 5", "8", "7, 9 or 30", "40 or 50", "endless"],
)


def every_buffer(test):
    return every_window(every_length(test))


@every_buffer
def test_a_buffer_keeps_the_newest_steps_up_to_its_capacity(windows, lengths):
    replay = Replay(600, 2, FIELDS, 8, windows)
    for steps, kept in [(20, 20), (270, 290), (37, 300), (500, 300)]:
        fill(replay, steps, list(lengths))
        assert len(replay) == 2 * kept


@every_buffer
def test_a_row_is_of_the_environment_and_the_times_of_its_index(windows, lengths):
    rows = sample_rows(windows, lengths)
    obs = rows.batch["obs/x"]
    np.testing.assert_array_equal(obs[..., 0], np.broadcast_to(rows.env, rows.time.shape))
    np.testing.assert_array_equal(obs[..., 1], rows.time)


@every_buffer
def test_a_reward_stays_with_the_observation_that_it_arrived_with(windows, lengths):
    rows = sample_rows(windows, lengths)
    np.testing.assert_array_equal(rows.batch["reward"], rows.time)


@every_buffer
def test_only_steps_that_are_kept_are_sampled(windows, lengths):
    rows = sample_rows(windows, lengths)
    assert (rows.time >= rows.oldest).all()
    assert (rows.time < rows.now).all()


@every_buffer
def test_a_step_follows_the_one_before_it_or_is_a_first_step(windows, lengths):
    rows = sample_rows(windows, lengths)
    follows = rows.time[:, 1:] == rows.time[:, :-1] + 1
    assert (follows | rows.batch["is_first"][:, 1:]).all()


@every_buffer
def test_a_last_step_stands_before_every_first_step(windows, lengths):
    """Also where an episode was cut."""
    rows = sample_rows(windows, lengths)
    is_first = rows.batch["is_first"]
    is_last = rows.batch["is_last"]
    np.testing.assert_array_equal(is_last[:, :-1], is_first[:, 1:])


@every_buffer
def test_steps_are_terminal_where_they_were_stored_as_such(windows, lengths):
    rows = sample_rows(windows, lengths)
    left = rows.batch["obs/x"][..., 2]
    np.testing.assert_array_equal(rows.batch["is_terminal"], left == 1)


@every_buffer
def test_prev_action_is_the_action_of_the_step_before(windows, lengths):
    """Where the state is not reset."""
    rows = sample_rows(windows, lengths)
    is_before = rows.batch["prev_action"][..., 0] == rows.time - 1
    assert (is_before | rows.batch["is_first"]).all()


@every_buffer
def test_a_row_starts_from_the_latent_of_the_step_before(windows, lengths):
    """Where the state is not reset."""
    rows = sample_rows(windows, lengths)
    is_before = rows.batch["stoch"][:, 0] == (rows.time[:, 0] - 1) % 200
    assert (is_before | rows.batch["is_first"][:, 0]).all()


@every_buffer
def test_the_step_before_a_row_is_still_kept(windows, lengths):
    """Where the state is not reset."""
    rows = sample_rows(windows, lengths)
    is_kept = rows.time[:, 0] > rows.oldest[:, 0]
    assert (is_kept | rows.batch["is_first"][:, 0]).all()


@every_buffer
def test_the_first_step_of_a_row_is_a_first_step_if_it_was_stored_as_one(windows, lengths):
    rows = sample_rows(windows, lengths)
    np.testing.assert_array_equal(rows.batch["is_first"][:, 0], rows.stored_first)


@every_length
def test_episode_windows_never_run_on_into_the_next_episode(lengths):
    rows = sample_rows("episode", lengths)
    follows = rows.time[:, 1:] == rows.time[:, :-1] + 1
    assert not (rows.batch["is_last"][:, :-1] & follows).any()


@every_window
def test_a_batch_is_a_copy(windows):
    replay = Replay(60, 2, FIELDS, 8, windows)
    fill(replay, 30, [5, 13])
    stored = {name: array.copy() for name, array in replay.data.items()}
    batch, _ = replay.sample(16)
    for array in batch.values():
        array[:] = 1
    for name, array in stored.items():
        np.testing.assert_array_equal(replay.data[name], array)


def fill_with_episodes(replay: Replay, lengths: list[int]) -> None:
    """One episode of each length, in both environments; nothing but the flags."""
    step = {name: np.zeros((2, *shape)) for name, (shape, _) in FIELDS.items()}
    for length in lengths:
        for t in range(length):
            is_last = np.full(2, t == length - 1)
            step["is_first"] = np.full(2, t == 0)
            step["is_last"] = is_last
            step["is_terminal"] = is_last
            replay.add(step)


def test_episode_windows_draw_every_step_equally_often():
    """Terminal steps and the newest ones too; within six standard deviations. A row shows a step of
    a short episode several times, so that rows are counted."""
    lengths = [3, 40, 64, 65, 100, 200, 1000]
    draws = 4000
    replay = Replay(2944, 2, FIELDS, 64)
    fill_with_episodes(replay, lengths)
    replay.online.clear()
    counts = np.zeros((2, 1472))
    for _ in range(draws):
        _, (env, time) = replay.sample(16)
        np.add.at(counts, (env, time), 1)
    frequency = counts / counts.mean()
    start = 0
    for length in lengths:
        episode = frequency[:, start : start + length]
        rows = 16 * draws * min(64, length)
        assert np.abs(episode - 1).max() < 6 * np.sqrt(2944 / rows), length
        start += length


def test_stream_windows_draw_every_start_equally_often():
    """The first and the newest one too; within six standard deviations."""
    replay = Replay(60, 2, FIELDS, 8, "stream")
    fill(replay, 17, [5])
    replay.online.clear()
    _, (env, time) = replay.sample(10_000)
    starts, counts = np.unique(10 * env[:, 0] + time[:, 0], return_counts=True)
    assert starts.tolist() == list(range(20))  # 0 to 9, in both environments
    assert np.abs(counts - 500).max() < 6 * np.sqrt(500)


def test_the_newest_stretch_of_every_environment_waits_to_be_used():
    replay = Replay(400, 2, FIELDS, 8, "stream")
    fill(replay, 16, [1000])
    assert replay.online == {0: 8, 1: 8}


def test_a_stretch_is_used_once():
    replay = Replay(400, 2, FIELDS, 8, "stream")
    fill(replay, 16, [1000])
    for batch_size, expected in [(1, 0), (3, 1)]:
        _, (env, time) = replay.sample(batch_size)
        assert env.shape == (batch_size, 1)
        assert env[0] == expected
        assert time[0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert not replay.online


def test_stretches_of_episode_windows_begin_with_their_episode():
    """After 30 steps of episodes of 12: the first eight steps of the second episode. Its last four
    are too few for another stretch, and the third episode is too young."""
    replay = Replay(400, 1, FIELDS, 8, "episode")
    fill(replay, 30, [12])
    assert replay.online == {0: 12}


def test_a_stretch_that_was_overwritten_is_not_used():
    replay = Replay(400, 1, FIELDS, 8, "episode")
    fill(replay, 30, [12])
    fill(replay, 500, [3])
    _, (_, time) = replay.sample(4)
    assert time.min() > replay.now - 400
    assert not replay.online


def sampled_index(replay: Replay) -> tuple[np.ndarray, np.ndarray]:
    """The index of five sequences of a buffer of 20 steps of 2 environments."""
    fill(replay, 20, [9])
    _, index = replay.sample(5)
    return index


def test_latents_are_written_back():
    replay = Replay(40, 2, FIELDS, 4)
    env, time = sampled_index(replay)
    slot = time % replay.slots
    deter = np.random.default_rng(0).normal(size=(5, 4, 3))
    replay.update_latents((env, time), deter, np.full((5, 4, 2), 7))
    assert (replay.data["stoch"][env, slot] == 7).all()
    stored = replay.data["deter"][env[-1], slot[-1]]
    np.testing.assert_allclose(stored, deter[-1], rtol=1e-3)


def test_latents_are_not_written_back_when_their_step_is_gone():
    replay = Replay(40, 2, FIELDS, 4)
    index = sampled_index(replay)
    fill(replay, 20, [9])
    deter = replay.data["deter"].copy()
    stoch = replay.data["stoch"].copy()
    replay.update_latents(index, np.ones((5, 4, 3)), np.full((5, 4, 2), 9))
    np.testing.assert_array_equal(replay.data["deter"], deter)
    np.testing.assert_array_equal(replay.data["stoch"], stoch)


def stored_replay(folder: Path, windows: str = "episode", seed: int = 0) -> Replay:
    """A buffer whose files are in this folder."""
    return Replay(60, 2, FIELDS, 8, windows, seed, folder)


@every_window
def test_a_buffer_goes_on_from_its_files_and_state(windows, tmp_path):
    first = stored_replay(tmp_path, windows)
    fill(first, 45, [5, 13])
    second = stored_replay(tmp_path, windows, seed=9)
    second.load_state_dict(first.state_dict())
    for _ in range(20):
        batch, _ = first.sample(6)
        same, _ = second.sample(6)
        for name in batch:
            np.testing.assert_array_equal(batch[name], same[name], err_msg=name)


@every_window
def test_keys_with_dots_and_slashes_have_different_files(windows, tmp_path):
    fill(stored_replay(tmp_path, windows), 45, [5, 13])
    batch, _ = stored_replay(tmp_path, windows).sample(6)
    np.testing.assert_array_equal(batch["obs/a./b"], batch["reward"])
    np.testing.assert_array_equal(batch["obs/a/.b"], batch["obs/x"][..., 2])


@every_window
def test_the_online_queue_of_another_moment_is_not_used(windows, tmp_path):
    first = stored_replay(tmp_path, windows)
    fill(first, 45, [5, 13])
    state = first.state_dict()
    state["online"] = {0: 1}
    fill(first, 9, [5, 13])
    second = stored_replay(tmp_path, windows)
    second.load_state_dict(state)
    assert not second.online


@every_window
def test_the_online_queue_of_other_windows_is_not_used(windows, tmp_path):
    first = stored_replay(tmp_path, windows)
    fill(first, 45, [5, 13])
    first.online = {0: 12}
    other = "stream" if windows == "episode" else "episode"
    second = stored_replay(tmp_path, other)
    second.load_state_dict(first.state_dict())
    assert not second.online


@pytest.mark.parametrize("length", [4, 16])
def test_the_online_queue_of_another_length_is_not_used(length, tmp_path):
    """Of a shorter window's 12 steps since the last one, or of a window that reaches too far."""
    first = stored_replay(tmp_path, "stream")
    fill(first, 20, [60, 60])
    first.online = {0: 12}
    second = Replay(60, 2, FIELDS, length, "stream", folder=tmp_path)
    second.load_state_dict(first.state_dict())
    assert not second.online
    fill(second, length, [60, 60])
    assert set(second.online) == {0, 1}
    _, (_, time) = second.sample(4)
    assert time.max() < second.now


@every_window
def test_files_of_another_buffer_are_refused(windows, tmp_path):
    stored_replay(tmp_path, windows)
    with pytest.raises(ValueError, match="this run needs"):
        Replay(80, 2, FIELDS, 8, windows, folder=tmp_path)


@every_window
def test_a_file_that_lost_its_end_is_refused(windows, tmp_path):
    """Never zeros for what was stored."""
    stored_replay(tmp_path, windows)
    file = tmp_path / "reward.npy"
    os.truncate(file, file.stat().st_size - 20)
    with pytest.raises(ValueError, match="shorter than|greater than file size"):
        stored_replay(tmp_path, windows)


@every_window
def test_a_missing_file_is_an_error(windows, tmp_path):
    stored_replay(tmp_path, windows)
    (tmp_path / "reward.npy").unlink()
    with pytest.raises(FileNotFoundError):
        stored_replay(tmp_path, windows)


def test_a_capacity_below_one_window_is_refused():
    with pytest.raises(ValueError, match="capacity of 16"):
        Replay(16, 2, FIELDS, 8)


def test_an_empty_buffer_cannot_be_sampled():
    with pytest.raises(ValueError, match="nothing to sample"):
        Replay(100, 1, FIELDS, 8).sample(1)


def test_bytes_per_step_count_fields_flags_and_index():
    obs = 3 * 4 + 4 + 4
    action = 4
    reward = 4
    latents = 3 * 2 + 2
    flags = 3
    index = 20
    assert Replay.bytes_per_step(FIELDS) == obs + action + reward + latents + flags + index


def test_a_stretch_goes_on_where_the_state_was_taken(tmp_path):
    """Of its 8 steps, 4 are stored before and 4 after."""
    first = stored_replay(tmp_path, "stream")
    fill(first, 12, [1000])
    second = stored_replay(tmp_path, "stream")
    second.load_state_dict(first.state_dict())
    fill(second, 4, [1000])
    assert second.online == {0: 8, 1: 8}


def test_latents_are_written_back_to_their_own_steps():
    """All 20 steps of both environments in turn, each with a number of its own."""
    replay = Replay(40, 2, FIELDS, 4)
    fill(replay, 20, [1000])
    env = np.array([[0], [1]]).repeat(5, 0)  # (10, 1)
    time = np.tile(np.arange(20).reshape(5, 4), (2, 1))  # (10, 4)
    number = np.arange(40).reshape(10, 4)
    deter = number[..., None].repeat(3, -1)
    stoch = number[..., None].repeat(2, -1)
    replay.update_latents((env, time), deter, stoch)
    expected = np.arange(40).reshape(2, 20)
    np.testing.assert_array_equal(replay.data["deter"][:, :20, 0], expected)
    np.testing.assert_array_equal(replay.data["stoch"][:, :20, 0], expected)


def test_files_of_another_type_are_refused(tmp_path):
    stored_replay(tmp_path)
    fields = dict(FIELDS, reward=((), np.float64))
    with pytest.raises(ValueError, match="this run needs float64"):
        Replay(60, 2, fields, 8, folder=tmp_path)


def test_a_step_that_is_written_in_part_tears_none_that_is_sampled():
    """A full buffer, and a kill while its next step is written."""
    replay = Replay(60, 2, FIELDS, 8, "stream")
    fill(replay, 80, [1])
    step = {name: array[:, 0] + 1 for name, array in replay.data.items()}
    del step["stoch"]
    with pytest.raises(KeyError):
        replay.add(step)
    for _ in range(50):
        batch, (_, time) = replay.sample(16)
        np.testing.assert_array_equal(batch["reward"], time)


def test_a_stretch_that_begins_with_the_oldest_step_is_used():
    """Of steps 0 to 24 a buffer of 9 keeps 16 to 24; 16 begins an episode."""
    replay = Replay(9, 1, FIELDS, 8)
    fill(replay, 24, [8])
    fill(replay, 1, [8])
    assert replay.online == {0: 16}
    _, (_, time) = replay.sample(1)
    assert time[0].tolist() == [16, 17, 18, 19, 20, 21, 22, 23]


def test_stream_windows_reach_the_newest_step():
    replay = Replay(60, 1, FIELDS, 8, "stream")
    fill(replay, 20, [1000])
    replay.online.clear()
    _, (_, time) = replay.sample(500)
    assert time.max() == 19
    assert time.min() == 0


# === environments =================================================================================
def test_adapter_flattens_every_space():
    assert dreamerv3.Adapter(Everything(), 48).specs == {
        "camera": ObsSpec((48, 48, 1)),
        "small": ObsSpec((300,)),
        "double": ObsSpec((4,)),
        "tuple/0": ObsSpec((), classes=3),
        "tuple/1": ObsSpec((4,), classes=2),
        "deep/multi": ObsSpec((2,), classes=7),
        "deep/bool": ObsSpec((1,)),
    }


def test_adapter_returns_observations_of_its_space():
    env = dreamerv3.Adapter(Everything(), 48)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)


@pytest.mark.parametrize("value, index", [(5, 0), (6, 1), (7, 2)])
def test_adapter_counts_classes_from_0(value, index):
    """The space is Discrete(3, start=5)."""
    env = dreamerv3.Adapter(Everything(), 48)
    obs = env.env.observation_space.sample()
    obs["tuple"] = (value, obs["tuple"][1])
    assert env.observation(obs)["tuple/0"] == index


def test_images_with_channels_first_are_vectors():
    space = spaces.Box(0, 255, (3, 64, 64), np.uint8)
    assert dreamerv3.obs_spec(space, 64) == ObsSpec((12288,))


def test_images_of_seven_channels_are_resized_channel_by_channel():
    """OpenCV refuses more than four."""
    env = Everything()
    env.observation_space = spaces.Box(0, 255, (84, 84, 7), np.uint8)
    stack = env.observation_space.sample()
    resized = dreamerv3.Adapter(env, 64).observation(stack)["obs"]
    for i in range(7):
        expected = cv2.resize(stack[..., i], (64, 64), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(resized[..., i], expected)


class ActionCase(NamedTuple):
    """An action space, its spec, an action of the agent and what the environment gets."""

    space: gym.Space
    spec: ActionSpec
    given: list
    expected: object


ACTIONS = {
    "discrete": ActionCase(
        space=spaces.Discrete(3, start=-1),
        spec=ActionSpec((3,), 3),
        given=[2],
        expected=1,
    ),
    "multi-discrete": ActionCase(
        space=spaces.MultiDiscrete([2, 3]),
        spec=ActionSpec((2, 3), 5),
        given=[1, 2],
        expected=[1, 2],
    ),
    "multi-discrete of two axes": ActionCase(
        space=spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spec=ActionSpec((2, 3, 4, 5), 14),
        given=[1, 2, 3, 4],
        expected=[[1, 2], [3, 4]],
    ),
    "multi-binary": ActionCase(
        space=spaces.MultiBinary(3),
        spec=ActionSpec((2, 2, 2), 6),
        given=[1, 0, 1],
        expected=[1, 0, 1],
    ),
    "clipped and scaled": ActionCase(
        space=spaces.Box(np.array([[0.0, -4.0]]), np.array([[1.0, 8.0]])),
        spec=ActionSpec((), 2),
        given=[-3.0, 0.5],
        expected=[[0.0, 5.0]],
    ),
    "rounding would exceed the bound": ActionCase(
        space=spaces.Box(-3.6, 2.2, (1,)),
        spec=ActionSpec((), 1),
        given=[1.0],
        expected=[np.float32(2.2)],
    ),
    "no bounds": ActionCase(
        space=spaces.Box(-3.4e38, np.inf, (2,)),
        spec=ActionSpec((), 2),
        given=[-3.0, 0.25],
        expected=[-1.0, 0.25],
    ),
    "open on one side": ActionCase(
        space=spaces.Box(np.array([0, -np.inf]), np.array([np.inf, 4])),
        spec=ActionSpec((), 2),
        given=[1.0, -1.0],
        expected=[2.0, 2.0],
    ),
    "bounds whose distance overflows": ActionCase(
        space=spaces.Box(-40_000, 40_000, (3,), np.float16),
        spec=ActionSpec((), 3),
        given=[-1.0, 0.0, 1.0],
        expected=[-40_000.0, 0.0, 40_000.0],
    ),
    "integers without bounds": ActionCase(
        space=spaces.Box(-np.inf, np.inf, (2,), np.int64),
        spec=ActionSpec((), 2),
        given=[-1.0, 1.0],
        expected=[-1, 1],
    ),
    "short integers open on one side": ActionCase(
        space=spaces.Box(-np.inf, 7, (2,), np.int32),
        spec=ActionSpec((), 2),
        given=[-1.0, 1.0],
        expected=[5, 7],
    ),
    "integers": ActionCase(
        space=spaces.Box(0, 10, (1,), np.int64),
        spec=ActionSpec((), 1),
        given=[0.1],
        expected=[6],
    ),
}
every_action_space = pytest.mark.parametrize("case", ACTIONS.values(), ids=ACTIONS.keys())


@every_action_space
def test_adapter_describes_the_action_space(case):
    assert dreamerv3.Adapter(Everything(case.space), 48).action_spec == case.spec


@every_action_space
def test_adapter_translates_actions(case):
    inner = Everything(case.space)
    env = dreamerv3.Adapter(inner, 48)
    env.reset(seed=0)
    env.step(np.array(case.given))
    np.testing.assert_array_equal(inner.actions[0], case.expected)


def env_with_keys_to_leave_out() -> Everything:
    """One key that can be learned from, and three that cannot."""
    env = Everything()
    env.observation_space = spaces.Dict(
        a=spaces.Discrete(2, dtype=np.int8),
        mission=spaces.Text(5),
        graph=spaces.Graph(spaces.Discrete(2), None),
        none=spaces.Box(0, 1, (0,)),
    )
    return env


def test_adapter_leaves_out_what_cannot_be_learned_from():
    env = dreamerv3.Adapter(env_with_keys_to_leave_out(), 64)
    assert list(env.specs) == ["a"]
    left_out = [note for note in env.notes if "is left out" in note]
    assert sorted(left_out) == [
        "observation 'graph' (Graph) is left out",
        "observation 'mission' (Text) is left out",
        "observation 'none' (Box) is left out",
    ]


@pytest.mark.parametrize("value", [1, True])
def test_adapter_takes_every_class_that_gymnasium_takes(value):
    env = dreamerv3.Adapter(env_with_keys_to_leave_out(), 64)
    obs = {"a": value, "mission": "go", "graph": None, "none": []}
    assert env.observation(obs) == {"a": 1}


def test_an_environment_with_nothing_to_learn_from_is_refused():
    env = env_with_keys_to_leave_out()
    del env.observation_space.spaces["a"]
    with pytest.raises(ValueError, match="no Box, .* space in Dict.*mission"):
        dreamerv3.Adapter(env, 64)


@pytest.mark.parametrize(
    "space",
    [spaces.Dict({"a": spaces.Discrete(2)}), spaces.Box(-1, 1, (0,))],
    ids=["Dict", "empty"],
)
def test_an_action_space_that_is_not_supported_is_refused(space):
    with pytest.raises(ValueError, match="action space .*; supported are"):
        dreamerv3.Adapter(Everything(space), 64)


@pytest.mark.parametrize(
    "key, value, name",
    [
        ("camera", np.zeros((20, 30, 1), np.float32), "camera"),
        ("camera", np.zeros((20, 30, 1), np.uint16), "camera"),
        ("camera", np.zeros((30, 20, 1), np.uint8), "camera"),
        ("tuple", (8, np.zeros(4, np.int8)), "tuple/0"),
        ("tuple", (5.5, np.zeros(4, np.int8)), "tuple/0"),
        ("tuple", (6, np.array([0, 1, 2, 0])), "tuple/1"),
        ("deep", {"multi": np.array([2, 0]), "bool": True}, "deep/multi"),
        ("deep", {"multi": np.array([1, 0]), "bool": None}, "deep/bool"),
        ("double", [[0, np.nan], [0, 0]], "double"),
        ("double", [[0, -np.inf], [0, 0]], "double"),
        ("double", [[0, 1e39], [0, 0]], "double"),
        ("double", np.zeros(4), "double"),
        ("double", [["a", "b"], ["c", "d"]], "double"),
    ],
    ids=[
        "float image",
        "image of two bytes",
        "image turned",
        "class too large",
        "class not whole",
        "not binary",
        "class of a vector too large",
        "no bool",
        "nan",
        "infinite",
        "infinite as float32",
        "wrong shape",
        "text",
    ],
)
def test_observations_that_leave_their_space_are_refused(key, value, name):
    env = dreamerv3.Adapter(Everything(), 48)
    obs = env.env.observation_space.sample()
    obs[key] = value
    with pytest.raises(ValueError, match=f"observation '{name}' is declared .* came as"):
        env.observation(obs)


@pytest.mark.parametrize(
    "reward, expected",
    [(True, 1.0), (np.float16(2.5), 2.5), (np.ones(1), 1.0), ([[3]], 3.0), (1e38, 1e38)],
    ids=str,
)
def test_a_reward_of_one_element_is_taken_whatever_its_shape_and_type(reward, expected):
    assert dreamerv3.scalar_reward(reward) == expected


every_pong = pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4"])


@pytest.mark.parametrize("env_id, sticky", [("ALE/Pong-v5", 0.25), ("PongNoFrameskip-v4", 0.0)])
def test_atari_actions_are_sticky_as_the_id_says(env_id, sticky):
    env = dreamerv3.make_env(env_id)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == sticky


@every_pong
def test_atari_games_begin_with_1_to_30_no_ops(env_id):
    env = dreamerv3.make_env(env_id)
    frames = []
    for seed in range(30):
        env.reset(seed=seed)
        frames.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert 1 <= min(frames) < 10
    assert 20 < max(frames) <= 30


@every_pong
def test_atari_skips_frames_exactly_once(env_id):
    env = dreamerv3.make_env(env_id)
    env.reset(seed=1)
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    env.step(np.array([0]))
    assert env.unwrapped.ale.getEpisodeFrameNumber() == before + 4
    assert env.repeat == 4


@every_pong
def test_atari_observations_are_color_images(env_id):
    env = dreamerv3.make_env(env_id)
    env.reset(seed=1)
    obs, *_ = env.step(np.array([0]))
    assert obs["obs"].shape == (64, 64, 3)
    assert obs["obs"].dtype == np.uint8


@every_pong
def test_atari_takes_the_flags_image_size_and_action_repeat(env_id):
    env = dreamerv3.make_env(env_id, image_size=96, action_repeat=2)
    env.reset(seed=1)
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    obs, *_ = env.step(np.array([0]))
    assert env.specs["obs"].shape == obs["obs"].shape == (96, 96, 3)
    assert env.unwrapped.ale.getEpisodeFrameNumber() == before + 2


def test_action_repeat_adds_up_the_rewards():
    env = dreamerv3.make_env("DreamerChain-v0", action_repeat=3)
    env.reset(seed=0)
    obs, reward, terminated, _, _ = env.step(np.array([0]))
    assert obs["obs"][0] == 3
    assert reward == 1 + 2 + 3
    assert not terminated


def test_action_repeat_stops_at_the_end_of_an_episode():
    env = dreamerv3.make_env("DreamerChain-v0", action_repeat=3)
    env.reset(seed=0)
    env.step(np.array([0]))
    obs, reward, terminated, _, info = env.step(np.array([0]))
    assert obs["obs"][0] == 5
    assert reward == 4 + 5
    assert terminated
    assert info["episode_return"] == 15


README = (ROOT / "README.md").read_text()
CSV_HEADER = "global_step,frames,return,length,seconds\n"


def saved(folder: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def counters(folder: Path) -> tuple[int, int]:
    """Agent steps and updates at the checkpoint."""
    state = saved(folder)
    return state["step"], state["updates"]


def stored(folder: Path, name: str) -> np.ndarray:
    """A field of the replay buffer in a run folder."""
    return np.load(folder / "replay" / f"{name}.npy")


def stored_steps(folder: Path) -> int:
    """Steps that the replay buffer has ever got, per environment."""
    return int(stored(folder, "clock")[0])


def episodes(folder: Path) -> np.ndarray:
    """The rows of episodes.csv: step, frames, return, length, seconds."""
    return np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1, ndmin=2)


def events(folder: Path) -> EventAccumulator:
    """What a run has sent to TensorBoard."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[float]]:
    """Key -> the values of a run in TensorBoard."""
    log = events(folder)
    return {tag: [e.value for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def files(folder: Path) -> dict[Path, int]:
    """All files and folders below a folder, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# === the program: what a run leaves ===============================================================
RUNS = {
    "vector": {"env_id": "CartPole-v1", "train_ratio": 16},
    "four environments": {
        "env_id": "CartPole-v1",
        "num_envs": 4,
        "replay_windows": "stream",
        "capture_video": True,
    },
    "continuous": {
        "env_id": "Pendulum-v1",
        "action_repeat": 2,
        "twohot": "symlog",
        "video_frequency": 0,
        "warmup_updates": 0,
    },
    "Atari": {
        "env_id": "ALE/Pong-v5",
        "env_kwargs": '{"max_num_frames_per_episode": 800}',
        "total_timesteps": 450,
        "train_ratio": 2,
        "save_model": True,
        "capture_video": True,
    },
    "every space": {
        "env_id": f"{__name__}:DreamerEverything-v0",
    },
}
every_run = pytest.mark.parametrize("kind", RUNS)

KEYS = [
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/SPS",
    "charts/updates_per_second",
    "charts/time_share_update",
    "charts/learning_rate",
    "charts/updates",
    "charts/frames",
    "charts/train_ratio",
    "losses/recon",
    "losses/reward",
    "losses/continue",
    "losses/dyn",
    "losses/rep",
    "losses/actor",
    "losses/critic",
    "losses/replay_critic",
    "losses/total",
    "world_model/prior_entropy",
    "world_model/posterior_entropy",
    "behavior/return_mean",
    "behavior/return_scale",
    "behavior/advantage_mag",
    "behavior/value_mean",
    "behavior/reward_mean",
    "behavior/continue_mean",
    "behavior/actor_entropy",
    "optim/grad_norm",
    "optim/update_rms",
    "optim/param_rms",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A kind of RUNS -> that run, made when it is first asked for."""

    @cache
    def run(kind: str) -> SimpleNamespace:
        flags = dict(QUICK, seed=7, total_timesteps=200, train_ratio=4)
        flags.update(RUNS[kind])
        program = Program(tmp_path_factory.mktemp("run"))
        folder = program.train(**flags)
        name = folder.relative_to(program.folder / "runs")
        return SimpleNamespace(
            flags=flags,
            folder=folder,
            out=program.out,
            seed=torch.initial_seed(),
            videos=list((program.folder / "videos" / name / "train-0").glob("*.mp4")),
        )

    return run


@every_run
def test_a_run_prints_what_it_is_about_to_do(kind, runs):
    out = runs(kind).out
    assert "trained parameters" in out
    assert " GB" in out
    assert "1 update every" in out
    assert "run folder: runs/" in out


@every_run
def test_a_run_prints_its_device(kind, runs):
    out = runs(kind).out
    if torch.cuda.is_available():
        assert "device: cuda" in out
    else:
        assert "device: cpu" in out
        assert "CUDA is not available" in out


@every_run
def test_a_run_lists_its_episodes_in_a_csv(kind, runs):
    folder = runs(kind).folder
    assert (folder / "episodes.csv").read_text().startswith(CSV_HEADER)
    assert len(episodes(folder)) > 0


@every_run
def test_episodes_have_a_return_and_a_length(kind, runs):
    rows = episodes(runs(kind).folder)
    assert (rows[:, 2] != 0).all()
    assert (rows[:, 3] > 0).all()


@pytest.mark.parametrize(
    "kind, repeat",
    [("vector", 1), ("four environments", 1), ("continuous", 2), ("Atari", 4), ("every space", 1)],
)
def test_frames_are_agent_steps_times_the_action_repeat(kind, repeat, runs):
    rows = episodes(runs(kind).folder)
    assert (rows[:, 1] == repeat * rows[:, 0]).all()


@every_run
def test_a_run_logs_these_keys(kind, runs):
    assert sorted(scalars(runs(kind).folder)) == sorted(KEYS)


@every_run
def test_a_run_logs_finite_numbers(kind, runs):
    for name, values in scalars(runs(kind).folder).items():
        assert np.isfinite(values).all(), name


@every_run
def test_the_seed_is_torchs(kind, runs):
    assert runs(kind).seed == 7


@every_run
def test_a_run_makes_all_steps(kind, runs):
    run = runs(kind)
    assert saved(run.folder)["step"] == run.flags["total_timesteps"]


@pytest.mark.parametrize(
    "kind, updates",
    [
        ("vector", 80),  # 160 steps after the first 40, times 16, over 4 * 8
        ("four environments", 20),  # 160 * 4 / 32
        ("continuous", 20),
        ("Atari", 25),  # 410 * 2 / 32 = 25.6
        ("every space", 20),
    ],
)
def test_updates_follow_from_the_train_ratio(kind, updates, runs):
    assert saved(runs(kind).folder)["updates"] == updates


@every_run
def test_save_model_alone_writes_the_weights_apart(kind, runs):
    run = runs(kind)
    assert (run.folder / "model.pt").exists() == ("save_model" in run.flags)


@every_run
def test_real_actions_are_stored_as_such(kind, runs):
    actions = stored(runs(kind).folder, "action")
    fractions = actions[actions % 1 != 0]
    assert (len(fractions) > 0) == (kind == "continuous")


@every_run
def test_capture_video_alone_records_episodes(kind, runs):
    run = runs(kind)
    assert bool(run.videos) == ("capture_video" in run.flags)


@pytest.mark.parametrize("kind", ["four environments", "Atari"])
def test_episodes_whose_number_is_a_cube_are_recorded(kind, runs):
    names = {path.name for path in runs(kind).videos}
    assert "rl-video-episode-0.mp4" in names
    assert names <= {f"rl-video-episode-{i}.mp4" for i in (0, 1, 8)}


def test_every_environment_has_a_seed_of_its_own(runs):
    first_obs = stored(runs("four environments").folder, "obs.obs")[:, 0]
    assert len(np.unique(first_obs, axis=0)) == 4


def test_every_environment_gets_actions_of_its_own(runs):
    actions = stored(runs("four environments").folder, "action")
    assert actions.std(axis=0).mean() > 0.2


def test_infos_that_gymnasium_cannot_join_do_no_harm():
    """Those of a Chain are {"odd": 1} with an odd seed and {"odd": None} with an even one."""
    makers = [lambda: dreamerv3.make_env("DreamerChain-v0")] * 2
    envs = gym.vector.SyncVectorEnv(makers)
    envs.reset(seed=1)
    _, rewards, _, _, infos = envs.step(np.zeros((2, 1), np.int64))
    assert rewards.tolist() == [1, 1]
    assert infos == {}


def test_an_interval_is_over_at_the_first_step_after_a_multiple_of_it():
    """With three environments, whose steps are counted together."""
    due = []
    for step in range(3, 33, 3):
        run = SimpleNamespace(step=step, all_envs=3)
        if dreamerv3.Run.due(run, 10):
            due.append(step)
    assert due == [12, 21, 30]


def test_a_resumed_run_counts_the_stored_steps_of_all_environments(program, monkeypatch):
    """60 steps of two environments are more than the 40 that it needs."""
    monkeypatch.setattr(dreamerv3, "start_workers", gym.vector.SyncVectorEnv)
    folder = program.train(env_id="DreamerChain-v0", num_envs=2, total_timesteps=60)
    program.resume(folder, total_timesteps=64)
    assert "collecting" not in program.out
    assert counters(folder) == (64, 12)


def quiet_log(step: int = 0) -> tuple[dreamerv3.Log, SimpleNamespace]:
    """A log that writes no files, and its run of two environments, at this step."""
    run = SimpleNamespace(
        step=step,
        updates=0,
        all_envs=2,
        num_processes=1,
        began=0.0,
        writes=False,
        folder=Path("none"),
        due=Mock(return_value=True),
    )
    return dreamerv3.Log(Args(), run), run


def test_speeds_are_those_since_the_last_record(monkeypatch):
    """20 steps and 4 updates in 8 seconds, then 10 steps and 3 updates in 2 seconds; updates take 2
    seconds and 1 second of them."""
    clock = Mock()
    monkeypatch.setattr(dreamerv3, "time", clock)
    clock.time.return_value = 100.0
    log, run = quiet_log()
    log.record = Mock()
    for now, step, updates, seconds in [(108.0, 20, 4, 2.0), (110.0, 30, 7, 1.0)]:
        clock.time.return_value = now
        run.step = step
        run.updates = updates
        log.updating += seconds
        log.update({})
        log.means()
    recorded = [call.args[0] for call in log.record.call_args_list]
    assert [x["charts/SPS"] for x in recorded] == [2.5, 5]
    assert [x["charts/updates_per_second"] for x in recorded] == [0.5, 1.5]
    assert [x["charts/time_share_update"] for x in recorded] == [0.25, 0.5]
    assert [x["charts/updates"] for x in recorded] == [4, 7]


def test_the_train_ratio_is_recorded_over_the_whole_run(program, finished):
    """12 and 14 updates of 32 steps, after 64 and 68 agent steps."""
    program.resume(finished, total_timesteps=68, log_frequency=4)
    ratios = scalars(finished)["charts/train_ratio"]
    assert ratios == pytest.approx([12 * 32 / 64, 14 * 32 / 68])


def test_frames_are_recorded_with_the_action_repeat(program):
    flags = {"env_id": "Pendulum-v1", "action_repeat": 2, "log_frequency": 20}
    folder = program.train(total_timesteps=60, **flags)
    assert scalars(folder)["charts/frames"] == [120]


def test_the_bar_shows_the_mean_return_of_20_episodes(program, monkeypatch):
    postfix = Mock()
    monkeypatch.setattr(dreamerv3.tqdm, "set_postfix_str", postfix)
    folder = program.train(env_id="CartPole-v1", total_timesteps=700, learning_starts=700)
    returns = episodes(folder)[:, 2]
    assert len(returns) > 20
    text = postfix.call_args.args[0]
    assert text.startswith(f"mean return {returns[-20:].mean():.1f}, ")


def test_the_warm_up_of_the_flags_is_that_of_the_updates(program, finished):
    """Updates 10 to 14, counted from 0, of 100."""
    more = {"learning_rate": 1e-3, "warmup_updates": 100, "log_frequency": 10}
    program.resume(finished, total_timesteps=70, **more)
    (rate,) = scalars(finished)["charts/learning_rate"]
    assert rate == pytest.approx(1e-3 * 12 / 100)


def test_dreams_are_counted_in_updates(program, finished):
    """Updates 11 to 15."""
    program.resume(finished, total_timesteps=70, video_frequency=3)
    assert sorted(path.stem for path in finished.glob("dreams/*")) == ["12", "15"]


def test_a_run_is_saved_before_every_evaluation(program, finished, monkeypatch):
    """Also when no checkpoint is due."""
    seen = []

    def evaluate(*args):
        seen.append(counters(finished))
        return []

    monkeypatch.setattr(dreamerv3, "evaluate", evaluate)
    program.resume(finished, total_timesteps=70, eval_frequency=5)
    assert seen == [(65, 12), (70, 15)]


def test_the_mean_return_of_an_evaluation_is_recorded(program, finished, monkeypatch):
    monkeypatch.setattr(dreamerv3, "evaluate", Mock(return_value=[1.0, 4.0, 4.0]))
    program.resume(finished, total_timesteps=70, eval_frequency=5, eval_episodes=3)
    assert scalars(finished)["eval/episodic_return"] == [3, 3]


def test_every_evaluation_has_a_seed_of_its_own(program, finished, monkeypatch):
    evaluate = Mock(return_value=[])
    monkeypatch.setattr(dreamerv3, "evaluate", evaluate)
    program.resume(finished, total_timesteps=70, eval_frequency=5, seed=3)
    assert [call.args[3] for call in evaluate.call_args_list] == [3 + 65, 3 + 70]


def test_a_signal_ends_the_updates_of_a_step(program, finished, monkeypatch):
    """Two are due after every step; the signal comes in the first one."""

    def stop(log, metrics):
        log.run.stopped = signal.SIGTERM

    monkeypatch.setattr(dreamerv3.Log, "update", stop)
    status = program.call(resume=finished, total_timesteps=70, train_ratio=64)
    assert status == 128 + signal.SIGTERM
    assert counters(finished) == (61, 11)


# === the program: input that it refuses ===========================================================
BAD_FLAGS = [
    ["--size", "3m"],
    ["--twohot", "log"],
    ["--replay-windows", "all"],
    ["--precision", "half"],
    ["--batch-size", "x"],
    ["--batch-size", "0"],
    ["--batch-size", "2.5"],
    ["--nonsense", "1"],
    ["--seed", "-1"],
    ["--seed", "4294967296"],
    ["--batch-length", "1"],
    ["--imagination-horizon", "0"],
    ["--num-envs", "0"],
    ["--total-timesteps", "0"],
    ["--total-timesteps", "20"],
    ["--train-ratio", "0"],
    ["--train-ratio", "nan"],
    ["--train-ratio", "inf"],
    ["--learning-rate", "0"],
    ["--warmup-updates", "-1"],
    ["--clip", "0"],
    ["--gamma", "1"],
    ["--gamma", "nan"],
    ["--return-lambda", "1.1"],
    ["--tau", "2"],
    ["--tau", "-0.1"],
    ["--unimix", "1"],
    ["--actor-unimix", "-1"],
    ["--bins", "254"],
    ["--bins", "1"],
    ["--dyn-scale", "-1"],
    ["--free-nats", "inf"],
    ["--free-nats", "-1"],
    ["--ent-coef", "nan"],
    ["--replay-critic-scale", "-1"],
    ["--image-size", "60"],
    ["--image-size", "32"],
    ["--image-size", "512"],
    ["--action-repeat", "-1"],
    ["--learning-starts", "10"],
    ["--learning-starts", "500000"],
    ["--buffer-size", "10"],
    ["--buffer-size", "500"],
    ["--buffer-size", "100", "--num-envs", "2"],
    ["--eval-only"],
    ["--eval-episodes", "0"],
    ["--eval-frequency", "-1"],
    ["--checkpoint-frequency", "-1"],
    ["--video-frequency", "-1"],
    ["--log-frequency", "0"],
    ["--total-timesteps", "1e6"],
    ["--gamma"],
    ["--resume"],
    ["--env-kwargs", "[1]"],
    ["--exp-name", "a/../b"],
]


def join(argv: list[str]) -> str:
    """The name of a test case."""
    return " ".join(argv)


@pytest.mark.parametrize("argv", BAD_FLAGS, ids=join)
def test_bad_flags_are_refused_before_an_environment_is_made(argv, program, monkeypatch):
    monkeypatch.setattr(dreamerv3, "make_env", None)
    assert program.call(*argv) == 2
    error = program.err.strip()
    assert error.startswith("dreamerv3.py: error: ")
    assert "\n" not in error
    assert argv[0] in error
    assert files(program.folder) == {}


def test_env_kwargs_nested_too_deeply_are_refused():
    assert not dreamerv3.is_json_object("[" * 100_000)


@pytest.mark.parametrize(
    "argv",
    [
        ["--env-id", "bad!"],
        ["--env-id", "Taxi-v3"],  # deprecated
        ["--env-id", "Pnog-v5"],
        ["--env-id", "ALE/Pongg-v5"],
        ["--env-id", "CartPole-v9"],
        ["--env-id", "nomodule:Thing-v0"],
        ["--resume", "nowhere"],
        ["--resume", "nowhere", "--eval-only"],
    ],
    ids=join,
)
def test_names_of_nothing_are_refused_in_one_line(argv, program):
    assert program.call(*argv) == 2
    error = program.err.strip()
    assert error.startswith(f"dreamerv3.py: error: {argv[0]}")
    assert "\n" not in error
    assert files(program.folder) == {}


# with 16 environments, and sequences of 64 steps of each
LEAST = {
    "buffer_size": 65 * 16,
    "learning_starts": 64 * 16,
    "total_timesteps": 65 * 16,
}


def test_the_least_values_are_accepted():
    dreamerv3.check_args(Args(num_envs=16, **LEAST))


@pytest.mark.parametrize("name", LEAST)
def test_limits_count_the_environments(name):
    flags = dict(LEAST)
    flags[name] -= 1
    flag = name.replace("_", "-")
    with pytest.raises(dreamerv3.UserError, match=flag):
        dreamerv3.check_args(Args(num_envs=16, **flags))


# === the program: starts that fail ================================================================
def run_files(program: Program) -> list[Path]:
    """Files, not folders, that the program has left."""
    return [path for path in files(program.folder) if path.is_file()]


def test_two_runs_never_share_a_folder(program, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 7.5)  # another run began in the same second
    (program.folder / "runs" / "CartPole-v1__same__1__7").mkdir(parents=True)
    error = refused(program, env_id="CartPole-v1", exp_name="same")
    assert re.search("run folder .* cannot be written: FileExistsError", error)


def test_a_full_disk_at_the_start_leaves_no_files(program, monkeypatch):
    full = OSError(28, "No space left on device")
    space_for_eight = [None] * 8 + [full]  # the replay buffer has nine files
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=space_for_eight))
    assert "No space left" in refused(program, env_id="CartPole-v1")


def test_too_large_a_buffer_in_ram_leaves_no_files(program):
    steps = 10**13
    error = refused(
        program,
        env_id="CartPole-v1",
        total_timesteps=steps,
        buffer_size=steps,
        persist_replay=False,
    )
    assert re.search("--buffer-size .*: MemoryError: Unable to allocate", error)


def refused(program: Program, **flags) -> str:
    """The one line with which the program refuses these flags, leaving no files."""
    flags = {**QUICK, "total_timesteps": 100, **flags}
    assert program.call(**flags) == 2
    error = program.err.strip()
    assert "\n" not in error
    assert run_files(program) == []
    return error


@pytest.mark.parametrize(
    "env_id, module",
    [("MinAtar/Breakout-v1", "minatar.gym"), ("dm_control/hopper-hop-v0", "shimmy")],
)
def test_an_environment_whose_package_is_absent_is_refused(env_id, module, program, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    error = refused(program, env_id=env_id)
    assert re.search(f"{env_id} cannot be made: .*{module} ", error)


def test_an_id_that_is_registered_is_not_registered_again(monkeypatch):
    package = Mock()
    monkeypatch.setitem(sys.modules, "minatar", Mock())
    monkeypatch.setitem(sys.modules, "minatar.gym", package)
    gym.register("MinAtar/DreamerTest-v1", entry_point=Chain)
    assert dreamerv3.find_spec("MinAtar/DreamerTest-v1").entry_point is Chain
    gym.registry.pop("MinAtar/DreamerTest-v1")
    package.register_envs.assert_not_called()


def test_an_environment_that_its_package_does_not_have_is_refused_without_advice(
    program, monkeypatch
):
    monkeypatch.setitem(sys.modules, "minatar", Mock())
    monkeypatch.setitem(sys.modules, "minatar.gym", Mock())
    gym.register("MinAtar/DreamerTest-v1", entry_point=Chain)
    error = refused(program, env_id="MinAtar/Unlike-v1")
    gym.registry.pop("MinAtar/DreamerTest-v1")
    assert "MinAtar/Unlike-v1 cannot be made: NameNotFound" in error
    assert "pip install" not in error


def test_without_moviepy_a_run_has_no_videos_but_a_warning(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    folder = program.train(env_id="CartPole-v1", total_timesteps=100, capture_video=True)
    assert re.search("warning: no videos, .*(?i:moviepy).*pip install", program.out)
    assert counters(folder)[0] == 100


def test_an_environment_that_cannot_render_has_no_videos_but_a_warning(program):
    folder = program.train(env_id="DreamerChain-v0", total_timesteps=100, capture_video=True)
    assert "warning: no videos, " in program.out
    assert counters(folder)[0] == 100


def test_a_misspelled_id_is_refused_with_the_right_one(program):
    error = refused(program, env_id="CartPoel-v1")
    assert re.search("--env-id CartPoel-v1 cannot be made: .*Did you mean: `CartPole`", error)


def test_an_environment_whose_constructor_fails_is_refused_with_its_error(program):
    error = refused(program, env_id="Dreamer-constructor-v0")
    assert "Dreamer-constructor-v0 cannot be made: AssertionError: broken" in error


def test_an_environment_that_fails_in_its_worker_is_refused(program):
    error = refused(program, env_id="Dreamer-worker-v0", num_envs=2)
    assert re.search("Dreamer-worker-v0 cannot be made: (EOF|Connection|BrokenPipe)", error)


# === faults in the middle of a run ================================================================
class Life(SimpleNamespace):
    """A process of the program, after its end: the `line` that says where it starts, its exit
    `status`, the steps `stored` by then, and the checkpoint's `state`."""


def start_process(cwd: Path, **flags) -> subprocess.Popen:
    """The program, in a process that prints to us."""
    argv = [sys.executable, str(ROOT / "dreamerv3.py"), *as_flags(flags)]
    return subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen, begin: str) -> str:
    """The next printed line that begins so."""
    for line in process.stdout:
        if line.startswith(begin):
            return line
    raise AssertionError(f"the program ended without a line that begins with {begin!r}")


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int) -> None:
    """Wait until the replay buffer has got so many steps."""
    while stored_steps(folder) < steps:
        assert process.poll() is None, "the program ended too early"
        time.sleep(0.01)


def end_process(process: subprocess.Popen, number: int) -> int:
    """Send a signal, when nobody reads any more, as if Ctrl-C had ended `| tee` too: -> its exit
    status."""
    process.stdout.close()
    process.send_signal(number)
    try:
        return process.wait(60)
    finally:
        process.kill()  # if it takes no notice


def live_and_die(cwd: Path, kills: int) -> tuple[Path, list[Life]]:
    """A run that is killed so many times, then stopped by SIGTERM: -> its folder, its lives. The
    first and the last life end between two checkpoints, the others at any moment: while starting,
    acting, training or saving."""
    rng = np.random.default_rng(0)
    flags = dict(QUICK, batch_size=2, learning_starts=64, train_ratio=8)
    flags.update(env_id="CartPole-v1", total_timesteps=100_000, buffer_size=20_000)
    flags.update(checkpoint_frequency=20)
    first = start_process(cwd, **flags)
    line = read_until(first, "run folder")
    (folder,) = cwd.glob("runs/*")
    lives = []
    for i in range(kills + 1):
        if i == 0:
            process = first
        else:
            process = start_process(cwd, resume=folder)
            line = read_until(process, "resumed")
        if i in (0, kills):
            wait_for_steps(process, folder, stored_steps(folder) + 87)
        else:
            time.sleep(rng.uniform(0, 4))
        number = signal.SIGTERM if i == kills else signal.SIGKILL
        status = end_process(process, number)
        steps = stored_steps(folder)
        lives.append(Life(line=line, status=status, stored=steps, state=saved(folder)))
    return folder, lives


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(20, marks=pytest.mark.slow)],
    ids=["killed once", "killed 20 times"],
)
def killed(request, tmp_path_factory) -> SimpleNamespace:
    """A killed run: its lives; `steps`, the fields of all steps in its replay buffer; `cuts`, the
    steps at which a new process began."""
    folder, lives = live_and_die(tmp_path_factory.mktemp("killed"), request.param)
    end = lives[-1].stored
    steps = {}
    for name in ("is_first", "is_last", "is_terminal", "reward", "obs.obs"):
        steps[name] = stored(folder, name)[0, :end]
    cuts = {life.stored for life in lives[:-1]} - {end}
    return SimpleNamespace(lives=lives, cuts=cuts, steps=steps)


def number_after(word: str, line: str) -> int:
    """The number that follows a word of a printed line."""
    return int(re.search(rf"{word} ([\d,]+)", line)[1].replace(",", ""))


def test_a_killed_run_goes_on_at_its_checkpoint(killed):
    for before, after in pairwise(killed.lives):
        assert number_after("step", after.line) == before.state["step"]
        assert number_after("after", after.line) == before.state["updates"]


def test_signals_end_the_program_with_their_exit_status(killed):
    statuses = [life.status for life in killed.lives]
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert statuses[-1] == 128 + signal.SIGTERM


def test_a_checkpoint_is_never_ahead_of_the_buffer(killed):
    for life in killed.lives:
        assert life.state["step"] <= life.stored


def test_every_checkpoint_of_a_killed_run_keeps_the_train_ratio(killed):
    """An update replays 2 * 8 steps at a ratio of 8: one every 2 agent steps from step 64 on."""
    for life in killed.lives:
        assert life.state["trained"] == 64 + 2 * life.state["updates"]


def first_steps(killed) -> set[int]:
    """Where episodes must begin: at 0, after every last step, and where a process began."""
    after_last = np.flatnonzero(killed.steps["is_last"][:-1]) + 1
    return {0, *after_last.tolist(), *killed.cuts}


def test_episodes_of_a_killed_run_begin_where_the_last_ended_or_was_cut(killed):
    first = np.flatnonzero(killed.steps["is_first"])
    assert set(first.tolist()) == first_steps(killed)


def test_episodes_of_a_killed_run_begin_differently(killed):
    begins = killed.steps["obs.obs"][killed.steps["is_first"]]
    assert len(np.unique(begins, axis=0)) == len(begins)


def test_rewards_of_a_killed_run_are_those_of_its_steps(killed):
    """CartPole gives 1 for every step, and a reset gives none."""
    np.testing.assert_array_equal(killed.steps["reward"], ~killed.steps["is_first"])


def test_observations_of_a_killed_run_follow_each_other(killed):
    """CartPole's position moves by 0.02 times its speed."""
    position = killed.steps["obs.obs"][:, 0]
    speed = killed.steps["obs.obs"][:, 1]
    follows = ~killed.steps["is_first"][1:]
    expected = position[:-1] + 0.02 * speed[:-1]
    np.testing.assert_allclose(position[1:][follows], expected[follows], atol=1e-5)


def test_terminal_steps_of_a_killed_run_are_last_ones(killed):
    assert not killed.steps["is_terminal"][~killed.steps["is_last"]].any()


# their 50th step fails; that is agent step 59, as every fifth step is followed by a reset
FAILURES = {
    "nan": {"env_id": "Dreamer-nan-v0"},
    "nan in a worker": {"env_id": "Dreamer-nan-v0", "num_envs": 2},
    "exception in a worker": {"env_id": "Dreamer-raises-v0", "num_envs": 2},
    "dead worker": {"env_id": "Dreamer-dies-v0", "num_envs": 2},
}
every_failure = pytest.mark.parametrize("kind", FAILURES)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """A kind of FAILURES -> the run that it ended, made when it is first asked for."""

    @cache
    def fail(kind: str) -> SimpleNamespace:
        program = Program(tmp_path_factory.mktemp("failure"))
        with pytest.raises(Exception) as raised:
            program.train(total_timesteps=200, **FAILURES[kind])
        return SimpleNamespace(
            error=raised.value,
            folder=program.run_folder(),
            num_envs=FAILURES[kind].get("num_envs", 1),
        )

    return fail


@pytest.mark.parametrize("kind", ["nan", "nan in a worker"])
def test_the_error_of_an_environment_ends_the_run(kind, failures):
    error = failures(kind).error
    assert isinstance(error, ValueError)
    assert re.search("observation 'obs' is declared .* came as .*nan", str(error))


def test_an_exception_in_a_worker_ends_the_run_with_its_name(failures):
    """Though its class is not known to the training process."""
    error = failures("exception in a worker").error
    assert isinstance(error, RuntimeError)
    assert str(error) == "LocalError: broken"


def test_the_death_of_a_worker_ends_the_run(failures):
    assert isinstance(failures("dead worker").error, EOFError)


@every_failure
def test_a_run_whose_environment_fails_is_saved(kind, failures):
    run = failures(kind)
    assert saved(run.folder)["step"] == 59 * run.num_envs


@every_failure
def test_steps_before_a_failure_are_stored(kind, failures):
    assert stored_steps(failures(kind).folder) == 59


@pytest.fixture(scope="module")
def signalled(tmp_path_factory) -> SimpleNamespace:
    """A run whose processes, workers too, are all ended by a signal at once."""
    cwd = tmp_path_factory.mktemp("signalled")
    flags = dict(QUICK, env_id=f"{__name__}:Dreamer-signalled-v0", num_envs=2, learning_starts=100)
    process = subprocess.run(
        [sys.executable, str(ROOT / "dreamerv3.py"), *as_flags(flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
        start_new_session=True,  # the signal must not reach pytest
    )
    (folder,) = cwd.glob("runs/*")
    return SimpleNamespace(process=process, folder=folder)


@pytest.mark.slow
def test_a_signal_to_all_processes_is_a_stop(signalled):
    assert signalled.process.returncode == 128 + signal.SIGINT
    assert "stopped at step 118" in signalled.process.stdout


@pytest.mark.slow
def test_a_signal_to_all_processes_is_no_failure_of_an_environment(signalled):
    """No traceback of the program: one that Gymnasium prints at the exit of Python is its own."""
    assert ", in main" not in signalled.process.stderr


@pytest.mark.slow
def test_a_run_is_saved_after_a_signal_to_all_processes(signalled):
    assert saved(signalled.folder)["step"] == 2 * 59


# === resuming =====================================================================================
@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Path:
    """A finished run: 60 steps and 10 updates in a Chain."""
    program = Program(tmp_path_factory.mktemp("finished"))
    return program.train(env_id="DreamerChain-v0", buffer_size=60, total_timesteps=60)


@pytest.fixture
def finished(finished_once, program) -> Path:
    """A copy of that run for one test, in the program's folder."""
    return shutil.copytree(finished_once, program.folder / "runs" / finished_once.name)


@pytest.fixture(scope="module")
def same_runs(tmp_path_factory) -> SimpleNamespace:
    """The same training of 91 steps in three ways: `plain`; `resumed` at step 60, from where on it
    draws dreams; `evaluated` three times. All start an episode after step 60, so that the
    environments agree. Updates are due every 32 / 12 = 2.667 steps."""
    program = Program(tmp_path_factory.mktemp("same"))
    flags = {"env_id": "DreamerChain-v0", "buffer_size": 60, "train_ratio": 12, "clip": 0.2}
    plain = program.train(exp_name="plain", total_timesteps=91, **flags)

    resumed = program.train(exp_name="resumed", total_timesteps=60, **flags)
    more = {"video_frequency": 6, "cudagraphs": False, "save_model": True}
    program.resume(resumed, total_timesteps=91, **more)

    flags.update(eval_frequency=30, eval_episodes=2)
    evaluated = program.train(exp_name="evaluated", total_timesteps=91, **flags)
    return SimpleNamespace(plain=plain, resumed=resumed, evaluated=evaluated, out=program.out)


def as_lists(state):
    """A part of a checkpoint without tensors, to be compared."""
    return tree_map(lambda x: x.tolist() if isinstance(x, Tensor) else x, state)


@pytest.mark.parametrize(
    "part",
    ["agent", "optimizer", "replay", "torch_rng", "step", "updates", "trained"],
)
@pytest.mark.parametrize("way", ["resumed", "evaluated"])
def test_checkpoints_are_bit_identical_to_that_of_a_plain_run(way, part, same_runs):
    plain = as_lists(saved(same_runs.plain)[part])
    other = as_lists(saved(getattr(same_runs, way))[part])
    equal = plain == other  # apart from the assertion, which would print all weights
    assert equal


@pytest.mark.parametrize("way", ["resumed", "evaluated"])
def test_replay_files_are_bit_identical_to_those_of_a_plain_run(way, same_runs):
    plain = same_runs.plain / "replay"
    other = getattr(same_runs, way) / "replay"
    assert len(list(plain.iterdir())) == 9
    for file in plain.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_a_checkpoint_has_the_return_range(same_runs):
    agent = saved(same_runs.plain)["agent"]
    assert "return_norm.lo" in agent
    assert "return_norm.hi" in agent


def test_a_checkpoint_has_the_flags(same_runs):
    assert saved(same_runs.plain)["args"]["clip"] == 0.2


def test_a_run_keeps_the_remainder_of_its_train_ratio(same_runs):
    """51 steps after the first 40 are 19 updates and a third of a step."""
    state = saved(same_runs.plain)
    assert state["updates"] == 19
    assert state["step"] - state["trained"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("way", ["plain", "resumed", "evaluated"])
def test_a_csv_has_every_episode_once(way, same_runs):
    """Walks end at steps 5, 11, 17, …; each has 5 steps and the return 1 + 2 + 3 + 4 + 5."""
    rows = episodes(getattr(same_runs, way))[:, :4]
    assert rows.tolist() == [[step, step, 15, 5] for step in range(5, 91, 6)]


@pytest.mark.parametrize("way", ["plain", "resumed", "evaluated"])
def test_seconds_of_a_csv_never_fall(way, same_runs):
    seconds = episodes(getattr(same_runs, way))[:, 4]
    assert (np.diff(seconds) >= 0).all()


def test_returns_of_episodes_are_in_tensorboard(same_runs):
    recorded = scalars(same_runs.resumed)
    assert recorded["charts/episodic_return"] == [15] * 15
    assert recorded["charts/episodic_length"] == [5] * 15


def test_returns_of_evaluations_are_in_tensorboard(same_runs):
    assert scalars(same_runs.evaluated)["eval/episodic_return"] == [15] * 3


def test_evaluations_print_their_returns(same_runs):
    line = "evaluation: 2 episodes of DreamerChain-v0, return mean 15.0, std 0.0, min 15, max 15"
    assert same_runs.out.splitlines().count(line) == 3


def test_flags_are_in_tensorboard(same_runs):
    (text,) = events(same_runs.evaluated).Tensors("hyperparameters/text_summary")
    assert b"|eval_frequency|30|" in text.tensor_proto.string_val[0]


def resume_error(program: Program, path: Path, **flags) -> str:
    """The one line with which the program refuses to go on."""
    assert program.call(resume=path, **flags) == 2
    assert program.err.startswith("dreamerv3.py: error: --resume ")
    assert len(program.err.splitlines()) == 1
    assert "resumed" not in program.out
    return program.err


def test_flags_that_do_not_fit_the_weights_are_refused(program, finished):
    error = resume_error(program, finished, bins=5)
    assert "does not fit: RuntimeError: Error(s) in loading" in error


def test_a_file_that_does_not_exist_is_not_resumed(program, finished):
    error = resume_error(program, finished / "foreign.pt")
    assert "FileNotFoundError" in error


def test_a_file_that_could_run_code_is_not_resumed(program, finished):
    torch.save({"model": Path()}, finished / "foreign.pt")  # weights_only refuses paths
    error = resume_error(program, finished / "foreign.pt")
    assert "UnpicklingError" in error


def test_a_damaged_checkpoint_is_not_resumed(program, finished):
    checkpoint = finished / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    error = resume_error(program, finished)
    assert "RuntimeError" in error


def test_a_file_of_another_program_is_not_resumed(program, finished):
    torch.save([1, 2], finished / "foreign.pt")
    error = resume_error(program, finished / "foreign.pt")
    assert "is not a checkpoint of this program" in error


def test_a_folder_that_cannot_be_written_is_not_resumed(program, finished):
    (finished / "episodes.csv").unlink()
    (finished / "episodes.csv").mkdir()
    assert program.call(resume=finished, total_timesteps=70) == 2
    assert "cannot be written: IsADirectoryError" in program.err
    assert counters(finished) == (60, 10)


@pytest.mark.parametrize("flags", [{"buffer_size": 50}, {"num_envs": 2}], ids=str)
def test_a_buffer_that_does_not_fit_is_not_resumed(flags, program, finished):
    assert program.call(resume=finished, **flags) == 2
    assert f"--resume {finished}: its replay buffer does not fit the flags" in program.err
    assert "this run needs" in program.err


def test_a_checkpoint_file_is_resumed_as_its_folder_is(program, finished):
    program.resume(finished / "checkpoint.pt", total_timesteps=70)
    assert "step 60 after 10 updates" in program.out
    assert counters(finished) == (70, 15)


def test_flags_override_those_of_the_run(program, finished):
    """At twice the train ratio, the 10 steps are 10 updates."""
    program.resume(finished, total_timesteps=70, train_ratio=32, learning_rate=1e-3)
    assert counters(finished) == (70, 20)
    assert saved(finished)["args"]["learning_rate"] == 1e-3


def test_steps_that_were_stored_after_a_checkpoint_are_told_once(program, finished):
    """Without the last checkpoint, of step 70, those of steps 61 to 70 are such."""
    checkpoint = (finished / "checkpoint.pt").read_bytes()
    program.resume(finished, total_timesteps=70)
    (finished / "checkpoint.pt").write_bytes(checkpoint)
    program.resume(finished, total_timesteps=80)
    assert "10 steps were stored after the checkpoint; they are kept" in program.out
    program.resume(finished, total_timesteps=90)
    assert "were stored after the checkpoint" not in program.out


def test_episodes_after_a_checkpoint_are_not_logged_twice(program, finished):
    """The run is killed after step 82, while it writes the row of the next episode."""
    checkpoint = (finished / "checkpoint.pt").read_bytes()
    program.resume(finished, total_timesteps=82)
    (finished / "checkpoint.pt").write_bytes(checkpoint)
    with open(finished / "episodes.csv", "a") as file:
        file.write("5")
    program.resume(finished, total_timesteps=90)
    steps = episodes(finished)[:, 0]
    assert steps[steps < 60].tolist() == list(range(5, 60, 6))
    assert steps[steps > 60].tolist() == [65, 71, 77, 83, 89]
    record = list(events(finished).Scalars("charts/episodic_return"))
    assert [scalar.step for scalar in record] == steps.tolist()


def test_the_learning_rate_of_the_flags_is_that_of_the_updates(program, finished):
    more = {"learning_rate": 1e-3, "warmup_updates": 1, "log_frequency": 10}
    program.resume(finished, total_timesteps=70, **more)
    assert scalars(finished)["charts/learning_rate"][-1] == pytest.approx(1e-3)


def test_environments_get_the_seed_and_after_resume_the_step_too(program, monkeypatch):
    seeds = []
    reset = Chain.reset

    def record(env, seed=None, options=None):
        seeds.append(seed)
        return reset(env, seed, options)

    monkeypatch.setattr(Chain, "reset", record)
    folder = program.train(env_id="DreamerChain-v0", total_timesteps=60, seed=7)
    program.resume(folder, total_timesteps=70)
    assert [seed for seed in seeds if seed is not None] == [7, 67]


@pytest.fixture
def aged(finished) -> Path:
    """The finished run as the program before December 2026 has left it: an update is due every 2
    steps, and a quarter of one was owed."""
    state = saved(finished)
    del state["specs"], state["action"], state["args"]["twohot_mean"]
    del state["trained"]
    state["capacity"] = state["args"]["buffer_size"]
    state["args"]["buffer_size"] = 1_000_000  # as the flag was
    state["global_step"] = state.pop("step")
    state["owed"] = 0.25
    for tensors in state["optimizer"]["state"].values():
        tensors["mean"] = tensors.pop("exp_avg")
        tensors["square"] = tensors.pop("exp_avg_sq")
    torch.save(state, finished / "checkpoint.pt")
    return finished


def test_an_older_run_goes_on_with_the_exact_mean(program, aged):
    program.resume(aged, total_timesteps=70)
    assert counters(aged) == (70, 15)
    assert saved(aged)["args"]["twohot_mean"] == "exact"
    assert saved(aged)["args"]["buffer_size"] == 60


def test_an_older_run_keeps_its_remainder_of_an_update(aged):
    assert dreamerv3.load_checkpoint(aged)["trained"] == 60 - 0.25 * 2


def test_an_older_run_without_updates_makes_them_after_learning_starts(aged):
    state = saved(aged)
    state["updates"] = 0
    torch.save(state, aged / "checkpoint.pt")
    assert dreamerv3.load_checkpoint(aged)["trained"] == 40


def test_the_agent_of_an_older_run_can_be_loaded(program, aged):
    with program.inside():
        agent, _ = dreamerv3.load_agent(aged)
    assert agent.specs == {"obs": ObsSpec((1,))}
    assert agent.action == ActionSpec((4,), 4)


def test_a_resumed_run_keeps_its_buffer_under_a_smaller_total(program):
    folder = program.train(env_id="DreamerChain-v0", total_timesteps=100, buffer_size=100)
    program.resume(folder, total_timesteps=70)
    assert saved(folder)["args"]["buffer_size"] == 100


@pytest.fixture(scope="module")
def refilled(tmp_path_factory) -> SimpleNamespace:
    """A run of 60 steps that keeps no replay files, and goes on to step 120."""
    program = Program(tmp_path_factory.mktemp("refilled"))
    folder = program.train(
        env_id="DreamerTruncatedChain-v0",
        total_timesteps=60,
        buffer_size=100,
        persist_replay=False,
        replay_windows="stream",
    )
    program.resume(folder, total_timesteps=120, eval_frequency=60, video_frequency=5)
    return SimpleNamespace(folder=folder, out=program.out)


def test_without_replay_files_a_resumed_run_begins_with_an_empty_buffer(refilled):
    assert "after 10 updates, 0 steps in the replay buffer" in refilled.out
    assert not (refilled.folder / "replay").exists()


def test_without_replay_files_a_resumed_run_fills_its_buffer_first(refilled):
    """The first 40 of 60 steps fill it, the other 20 are 10 updates."""
    assert counters(refilled.folder) == (120, 10 + 10)


def test_without_replay_files_a_resumed_run_keeps_its_buffer_size(refilled):
    """That was cut to the 60 steps of the first run."""
    assert "replay: 60 steps take 0.00 GB" in refilled.out


def test_a_run_that_is_stopped_while_it_fills_its_buffer_goes_on_filling_it(program, finished):
    """10 steps, then 30, and from step 100 on an update every 2 steps."""
    shutil.rmtree(finished / "replay")
    program.resume(finished, total_timesteps=70)
    program.resume(finished, total_timesteps=120)
    assert "10 steps in the replay buffer" in program.out
    assert counters(finished) == (120, 10 + 10)


# === checkpoints that are not written =============================================================
def make_third_update_nan(monkeypatch) -> None:
    """The rewards of the third update from now on are not a number."""
    train_step = dreamerv3.train_step
    batches = []

    def update(model, optimizer, batch, args):
        batches.append(batch)
        if len(batches) == 3:
            batch["reward"].fill_(math.nan)
        return train_step(model, optimizer, batch, args)

    monkeypatch.setattr(dreamerv3, "train_step", update)


def test_weights_that_are_not_finite_are_not_saved(program, finished, monkeypatch):
    """Updates 11, 12, 13 are those of steps 62, 64, 66; the checkpoint of step 64 is the last."""
    make_third_update_nan(monkeypatch)
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 66"):
        program.resume(finished, total_timesteps=70, checkpoint_frequency=2, cudagraphs=False)
    assert counters(finished) == (64, 12)


def test_a_model_that_diverged_leaves_no_trace_in_the_replay_buffer(program, finished, monkeypatch):
    """The run goes on from its last checkpoint."""
    with monkeypatch.context() as patch:
        make_third_update_nan(patch)
        with pytest.raises(FloatingPointError, match="a latent state is not finite"):
            program.resume(finished, total_timesteps=80, log_frequency=1000, cudagraphs=False)
    assert stored_steps(finished) == 66
    assert np.isfinite(stored(finished, "deter")).all()
    program.resume(finished, total_timesteps=80)
    assert counters(finished) == (80, 20)


def test_a_model_that_diverges_while_its_run_is_stopped_is_no_stop(program, finished, monkeypatch):
    def update(log, metrics):
        log.run.stopped = signal.SIGTERM
        raise dreamerv3.NotFinite("diverged")

    monkeypatch.setattr(dreamerv3.Log, "update", update)
    with pytest.raises(FloatingPointError, match="diverged"):
        program.resume(finished, total_timesteps=70)


def test_a_run_is_saved_before_its_environments_are_closed(program, finished, monkeypatch):
    """Closing a simulator may hang or crash."""
    steps = []

    def close(envs, **options):
        steps.append(saved(finished)["step"])

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "close", close)
    program.resume(finished, total_timesteps=70)
    assert steps[0] == 70


def test_a_stopped_run_that_cannot_be_saved_ends_with_the_error(program, finished, monkeypatch):
    def update(log, metrics):
        log.run.stopped = signal.SIGTERM

    monkeypatch.setattr(dreamerv3.Log, "update", update)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(dreamerv3, "save_atomically", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        program.resume(finished, total_timesteps=70)


def test_a_signal_before_a_run_has_begun_promises_no_checkpoint(program, monkeypatch):
    def make_replay(args, agent, run):
        run.stopped = signal.SIGTERM
        raise dreamerv3.UserError("no space")

    monkeypatch.setattr(dreamerv3, "make_replay", make_replay)
    status = program.call(**dict(QUICK, env_id="DreamerChain-v0"))
    assert status == 128 + signal.SIGTERM
    assert "continue with" not in program.out
    assert not list(program.folder.glob("runs/*"))


def test_a_signal_before_a_run_has_begun_is_the_first_of_two(program, monkeypatch):
    """The second one is to end the program: nothing of ours handles it."""
    make_replay = dreamerv3.make_replay
    handlers = []

    def stop(args, agent, run):
        handlers.append(signal.signal)  # a Mock
        run.stop(signal.SIGTERM, None)
        return make_replay(args, agent, run)

    monkeypatch.setattr(dreamerv3, "make_replay", stop)
    status = program.call(**dict(QUICK, env_id="DreamerChain-v0"))
    assert status == 128 + signal.SIGTERM
    calls = [call.args for call in handlers[0].call_args_list if call.args[0] == signal.SIGTERM]
    assert len(calls) == 3  # what `Run` sets, what `stop` sets, what there was before
    assert calls[1] == (signal.SIGTERM, signal.SIG_DFL)


def replace_metric(monkeypatch, name: str, values: list[float]) -> None:
    """Let the metric of successive updates have these values."""
    train_step = dreamerv3.train_step
    values = iter(values)

    def update(*args, **kwargs):
        latents, metrics = train_step(*args, **kwargs)
        metrics[name] = torch.tensor(next(values))
        return latents, metrics

    monkeypatch.setattr(dreamerv3, "train_step", update)


def test_metrics_are_recorded_as_means_over_updates(program, finished, monkeypatch):
    """An update every 2 steps, a record every 4."""
    replace_metric(monkeypatch, "losses/recon", [1.0, 3.0, 2.0, 6.0])
    program.resume(finished, total_timesteps=68, log_frequency=4, cudagraphs=False)
    assert scalars(finished)["losses/recon"] == [2, 4]


def test_a_metric_that_is_not_finite_ends_the_run_with_its_name(program, finished, monkeypatch):
    replace_metric(monkeypatch, "losses/recon", [math.inf, 1.0, 1.0, 1.0])
    with pytest.raises(FloatingPointError, match="losses/recon is not finite at step 64"):
        program.resume(finished, total_timesteps=68, log_frequency=4, cudagraphs=False)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(program, monkeypatch):
    """The checkpoint of step 100, and that at the end, are written in part."""
    save = torch.save

    def save_until_the_disk_is_full(state, file):
        if state["step"] > 50:
            save("a part", file)
            raise RuntimeError("PytorchStreamWriter failed writing file")  # torch's words
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_the_disk_is_full)
        with pytest.raises(RuntimeError, match="failed writing"):
            program.train(
                env_id="DreamerChain-v0",
                buffer_size=60,
                total_timesteps=110,
                train_ratio=4,
                checkpoint_frequency=50,
            )
    folder = program.run_folder()
    assert saved(folder)["step"] == 50
    assert not (folder / "checkpoint.tmp").exists()
    program.resume(folder)
    assert counters(folder) == (110, 8)  # (110 - 40) / 8


def test_replay_files_are_flushed_before_every_checkpoint(program, finished, monkeypatch):
    """At steps 65, 70 and at the end."""
    save = dreamerv3.save_atomically
    flushed = []
    flushed_before_saves = []

    def remember(array):
        flushed.append(Path(array.filename).name)

    def save_and_start_again(state, path):
        flushed_before_saves.append(sorted(flushed))
        flushed.clear()
        save(state, path)

    monkeypatch.setattr(np.memmap, "flush", remember)
    monkeypatch.setattr(dreamerv3, "save_atomically", save_and_start_again)
    program.resume(finished, total_timesteps=71, checkpoint_frequency=5)
    names = sorted(path.name for path in (finished / "replay").iterdir())
    assert flushed_before_saves == [names, names, names]


# === memory, devices ==============================================================================
@pytest.fixture(scope="module")
def measurements(tmp_path_factory) -> list[SimpleNamespace]:
    """Memory in bytes and live tensors at every checkpoint of a run whose buffer of 150 steps is
    soon full; it draws dreams and logs as it goes."""
    save = dreamerv3.save_atomically
    seen = []

    def measure(state, path) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        tensors = [x for x in gc.get_objects() if type(x) is Tensor]
        seen.append(SimpleNamespace(memory=memory, tensors=len(tensors)))
        save(state, path)

    program = Program(tmp_path_factory.mktemp("memory"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreamerv3, "save_atomically", measure)
        program.train(
            env_id="CartPole-v1",
            buffer_size=150,
            total_timesteps=600,
            train_ratio=3,
            checkpoint_frequency=60,
            log_frequency=60,
            video_frequency=15,
        )
    return seen


@pytest.mark.slow
def test_memory_is_constant_once_the_buffer_is_full(measurements):
    memory = [x.memory for x in measurements]
    assert len(memory) == 12  # 10 checkpoints, one at the start and one at the end
    assert memory[-1] - memory[5] < 4e6, memory


@pytest.mark.slow
def test_live_tensors_are_constant_once_the_buffer_is_full(measurements):
    tensors = [x.tensors for x in measurements[5:]]
    assert max(tensors) == min(tensors), tensors


def test_no_cuda_means_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = dreamerv3.set_up_torch(Args(cuda=False, compile=False))
    assert device.type == "cpu"


def test_no_cuda_leaves_a_gpu_alone(program, monkeypatch):
    """One that is counted but cannot start."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)
    folder = program.train(env_id="DreamerChain-v0", total_timesteps=60, cuda=False)
    assert "CUDA" not in program.out
    program.resume(folder, total_timesteps=70)
    assert "CUDA" not in program.out


@pytest.mark.parametrize("wanted", [True, False])
def test_convolutions_are_in_float32_and_deterministic_if_wanted(wanted, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not wanted)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    dreamerv3.set_up_torch(Args(compile=False, torch_deterministic=wanted))
    assert torch.backends.cudnn.deterministic == wanted
    assert not torch.backends.cudnn.allow_tf32


def test_more_classes_than_a_byte_holds_are_not_stored():
    agent, args = make_agent()
    agent.size = TINY._replace(classes=257)
    with pytest.raises(AssertionError, match="uint8"):
        dreamerv3.make_replay(args, agent, run=None)


# === dreams =======================================================================================
def make_dream_batch(agent: Agent) -> dict:
    """Five sequences of eight steps. An episode begins at step 1 of all, and at step 6 of the
    first, where the model has to predict."""
    batch = make_batch(agent, batch=5, length=8)
    batch["is_first"][:] = torch.arange(8) == 1
    batch["is_first"][0, 6] = True
    return batch


@torch.no_grad()
def posterior_then_prior(agent: Agent, batch: dict, context: int) -> dict[str, Tensor]:
    """What open_loop predicts, key -> (B, T, …), from whole sequences: the posterior's states for
    the first `context` steps, then the prior's from the state before."""
    action = batch["prev_action"]
    is_first = batch["is_first"]
    embed = agent.encoder(batch["obs"])
    deter, stoch, _ = agent.rssm.observe(batch["deter"], batch["stoch"], action, embed, is_first)
    deters = list(deter[:, :context].unbind(1))
    stochs = list(stoch[:, :context].unbind(1))
    u = torch.zeros(5, TINY.groups)  # argmax_sampling ignores it
    for t in range(context, 8):
        before = [deters[-1].clone(), stochs[-1].clone(), action[:, t].clone()]
        for x in before:
            x[is_first[:, t]] = 0
        deter, stoch = agent.rssm.predict_step(*before, u)
        deters.append(deter)
        stochs.append(stoch)
    return agent.decoder(torch.stack(deters, 1), torch.stack(stochs, 1))


@pytest.mark.parametrize("key", ["image", "gray"])
def test_a_dream_of_images_is_the_posterior_and_then_the_prior(key, argmax_sampling):
    """Truth, prediction and half of their difference are above each other."""
    agent, _ = make_agent(SPECS)
    batch = make_dream_batch(agent)
    truth = batch["obs"][key] / 255
    prediction = posterior_then_prior(agent, batch, context=3)[key]
    error = (prediction - truth + 1) / 2
    expected = torch.cat([truth, prediction, error], 2)
    dream = dreamerv3.open_loop(agent, batch, context=3)
    torch.testing.assert_close(dream[key], expected[:4], rtol=1e-4, atol=1e-5)


def test_a_dream_of_vectors_is_the_posterior_and_then_the_prior(argmax_sampling):
    agent, _ = make_agent(SPECS)
    batch = make_dream_batch(agent)
    prediction = posterior_then_prior(agent, batch, context=3)["vector"]
    expected = torch.stack([batch["obs"]["vector"], networks.symexp(prediction)], 2)
    dream = dreamerv3.open_loop(agent, batch, context=3)
    torch.testing.assert_close(dream["vector"], expected[:4], rtol=1e-4, atol=1e-5)


def test_a_dream_of_classes_is_the_posterior_and_then_the_prior(argmax_sampling):
    agent, _ = make_agent(SPECS)
    batch = make_dream_batch(agent)
    prediction = posterior_then_prior(agent, batch, context=3)["kind"].argmax(-1)
    expected = torch.stack([batch["obs"]["kind"], prediction], 2)
    dream = dreamerv3.open_loop(agent, batch, context=3)
    torch.testing.assert_close(dream["kind"], expected[:4].float())


def test_a_dream_has_every_key_of_the_observation(argmax_sampling):
    agent, _ = make_agent(SPECS)
    dream = dreamerv3.open_loop(agent, make_dream_batch(agent))
    assert dream.keys() == SPECS.keys()


def draw(agent: Agent, folder: Path) -> None:
    """Draw a dream, that of update 7, into a folder."""
    writer = dreamerv3.SummaryWriter(folder)
    dreamerv3.write_dream(agent, make_dream_batch(agent), folder, writer, 0, 7)
    writer.close()


def test_drawing_a_dream_takes_no_random_numbers_from_training(tmp_path):
    agent, _ = make_agent(SPECS)
    before = torch.get_rng_state()
    draw(agent, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_border_tells_what_the_model_sees_and_where_episodes_begin(tmp_path):
    green = (0, 255, 0)  # it sees the first five frames
    red = (255, 0, 0)  # it does not
    white = (255, 255, 255)  # an episode begins
    agent, _ = make_agent(SPECS)
    draw(agent, tmp_path)
    with Image.open(tmp_path / "dreams" / "7.gif") as gif:
        corners = [gif.convert("RGB").getpixel((0, 0)) for _ in ImageSequence.Iterator(gif)]
    expected = [green, white, green, green, green, red, white, red]
    np.testing.assert_allclose(corners, expected, atol=30)  # a gif has few colors


@pytest.fixture(scope="module")
def dreaming(tmp_path_factory) -> SimpleNamespace:
    """A run that draws dreams at updates 5 and 10, those of steps 50 and 60."""
    program = Program(tmp_path_factory.mktemp("dreaming"))
    folder = program.train(
        env_id="DreamerEverything-v0",
        total_timesteps=60,
        video_frequency=5,
        image_size=48,
    )
    return SimpleNamespace(program=program, folder=folder)


@pytest.mark.parametrize("updates", [5, 10])
def test_images_are_drawn_as_a_gif(updates, dreaming):
    """Eight frames of four sequences with a border of 2 pixels; three images above each other."""
    with Image.open(dreaming.folder / "dreams" / f"{updates}.gif") as gif:
        assert gif.n_frames == 8
        assert gif.size == (4 * (48 + 4), 3 * 48 + 4)


@pytest.mark.parametrize("updates", [5, 10])
def test_vectors_are_drawn_as_curves(updates, dreaming):
    """Eight plots below each other."""
    with Image.open(dreaming.folder / "dreams" / f"{updates}.png") as plot:
        assert plot.size == (1280, 8 * 120)


@pytest.mark.parametrize(
    "tag, size",
    [("dream/images", (8 * 52, 4 * 148)), ("dream/vectors", (1280, 8 * 120))],
)
def test_dreams_are_in_tensorboard(tag, size, dreaming):
    images = events(dreaming.folder).Images(tag)
    assert [(x.width, x.height) for x in images] == [size, size]
    assert [x.step for x in images] == [50, 60]


def test_an_agent_with_images_of_another_size_can_be_evaluated(dreaming):
    with dreaming.program.inside():
        agent, args = dreamerv3.load_agent(dreaming.folder)
        assert args.image_size == 48
        assert len(dreamerv3.evaluate(agent, args, episodes=1, seed=0)) == 1


# === evaluation, videos, tracking =================================================================
@pytest.fixture(scope="module")
def cartpole(tmp_path_factory) -> SimpleNamespace:
    """A run of CartPole with its weights apart and without its replay buffer."""
    program = Program(tmp_path_factory.mktemp("cartpole"))
    folder = program.train(
        env_id="CartPole-v1",
        total_timesteps=60,
        checkpoint_frequency=50,
        save_model=True,
        learning_rate=0.01,
        warmup_updates=1,
    )
    shutil.rmtree(folder / "replay")
    return SimpleNamespace(program=program, folder=folder)


def agent_paths(folder: Path) -> list[Path]:
    """All from which an agent can be loaded."""
    return [folder, folder / "checkpoint.pt", folder / "model.pt"]


def evaluate_only(run: SimpleNamespace, path: Path, **flags) -> str:
    """The last line that --eval-only prints, of 4 episodes."""
    assert run.program.call(resume=path, eval_only=True, eval_episodes=4, seed=3, **flags) == 0
    return run.program.out.splitlines()[-1]


def test_eval_only_prints_the_returns(cartpole):
    line = evaluate_only(cartpole, cartpole.folder)
    assert line.startswith("evaluation: 4 episodes of CartPole-v1, return mean ")


def test_an_evaluation_prints_mean_spread_and_range(cartpole, capsys):
    with cartpole.program.inside():
        agent, args = dreamerv3.load_agent(cartpole.folder)
        returns = dreamerv3.evaluate(agent, args, episodes=4, seed=3)
    assert min(returns) < max(returns)
    spread = f"mean {np.mean(returns):.1f}, std {np.std(returns):.1f}"
    ends = f"min {min(returns):g}, max {max(returns):g}"
    assert capsys.readouterr().out.endswith(f"return {spread}, {ends}\n")


def test_eval_only_plays_with_the_flags_that_are_given(cartpole):
    """A uniform actor does not play what the trained one does."""
    trained = evaluate_only(cartpole, cartpole.folder)
    assert evaluate_only(cartpole, cartpole.folder, actor_unimix=0.999) != trained


def test_eval_only_takes_a_folder_a_checkpoint_or_weights(cartpole):
    lines = [evaluate_only(cartpole, path) for path in agent_paths(cartpole.folder)]
    assert lines[0] == lines[1] == lines[2]


@pytest.mark.parametrize("file", ["", "checkpoint.pt", "model.pt"], ids=lambda x: x or "folder")
def test_evaluate_plays_what_eval_only_plays(file, cartpole, capsys):
    path = cartpole.folder / file
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with cartpole.program.inside():
        agent, args = dreamerv3.load_agent(path, device)
        dreamerv3.evaluate(agent, args, episodes=4, seed=3)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == evaluate_only(cartpole, path)


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "DreamerShort-v0"])
def test_eval_only_refuses_an_environment_with_other_spaces(env_id, cartpole):
    program = cartpole.program
    assert program.call(resume=cartpole.folder, eval_only=True, env_id=env_id) == 2
    error = program.err.strip()
    assert "\n" not in error
    assert re.search(f"--env-id {env_id} has .*, the agent was trained on ", error)


def test_eval_only_compiles_nothing(cartpole):
    evaluate_only(cartpole, cartpole.folder, compile=True)
    assert "compil" not in cartpole.program.out


def test_the_trained_agent_in_results_balances_the_pole():
    """For a whole episode, of 500 steps."""
    agent, args = dreamerv3.load_agent(RESULTS / "CartPole-v1.pt")
    assert dreamerv3.evaluate(agent, args, episodes=1, seed=0) == [500]


def test_evaluations_write_nothing(cartpole):
    before = files(cartpole.program.folder)
    evaluate_only(cartpole, cartpole.folder)
    with cartpole.program.inside():
        agent, args = dreamerv3.load_agent(cartpole.folder)
        dreamerv3.evaluate(agent, args, episodes=1, seed=3)
    assert files(cartpole.program.folder) == before


def test_episodes_of_an_evaluation_begin_differently(cartpole, monkeypatch):
    policy = Mock(wraps=dreamerv3.policy)
    monkeypatch.setattr(dreamerv3, "policy", policy)
    evaluate_only(cartpole, cartpole.folder)
    calls = [call.args for call in policy.call_args_list]
    begins = [obs["obs"] for _, obs, _, is_first in calls if is_first]
    assert len(begins) == 4
    assert len(torch.cat(begins).unique(dim=0)) == 4


def test_evaluations_keep_the_state_during_an_episode(cartpole, monkeypatch):
    policy = Mock(wraps=dreamerv3.policy)
    monkeypatch.setattr(dreamerv3, "policy", policy)
    evaluate_only(cartpole, cartpole.folder)
    for _, _, (deter, _, _), is_first in [call.args for call in policy.call_args_list]:
        assert is_first or deter.any()


@pytest.fixture(scope="module")
def filmed(tmp_path_factory) -> SimpleNamespace:
    """A run of CartPole in all ways that record videos, under the name `name`, and the `returns` of
    the three episodes that --eval-only has recorded."""
    program = Program(tmp_path_factory.mktemp("filmed"))
    folder = program.train(
        env_id="CartPole-v1",
        total_timesteps=100,
        action_repeat=2,
        capture_video=True,
        eval_frequency=100,
        eval_episodes=1,
    )
    program.resume(folder, total_timesteps=120)
    assert program.call(resume=folder, eval_only=True, eval_episodes=3) == 0
    with program.inside():
        agent, args = dreamerv3.load_agent(folder)
        returns = dreamerv3.evaluate(agent, args, episodes=3, seed=1)
    return SimpleNamespace(videos=program.folder / "videos", name=folder.name, returns=returns)


def test_videos_are_in_folders_for_what_they_show(filmed):
    folders = {path.parent for path in filmed.videos.rglob("*.mp4")}
    kinds = ["train-0", "train-100", "eval-100", "eval-only"]
    assert folders == {filmed.videos / filmed.name / kind for kind in kinds}


@pytest.mark.parametrize("episode", [0, 1, 2])
def test_a_video_has_a_frame_for_every_agent_step(episode, filmed):
    """CartPole's return is its number of steps, two of which are an agent step; and there is a
    frame before the first. The writer may drop the last one."""
    path = filmed.videos / filmed.name / "eval-only" / f"rl-video-episode-{episode}.mp4"
    frames = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)
    steps = math.ceil(filmed.returns[episode] / 2)
    assert steps <= frames <= steps + 1


@pytest.mark.parametrize("episode", [0, 1, 2])
def test_videos_play_at_the_speed_of_the_environment(episode, filmed):
    """50 environment steps a second are 25 agent steps."""
    path = filmed.videos / filmed.name / "eval-only" / f"rl-video-episode-{episode}.mp4"
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) == 25


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> SimpleNamespace:
    """A run that is tracked, and resumed with another name: the arguments of wandb.init for both,
    the paths that wandb.save got, and all calls of wandb.init and wandb.finish in their order."""
    wandb = Mock()
    program = Program(tmp_path_factory.mktemp("tracked"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        folder = program.train(
            env_id="ale_py:ALE/Pong-v5",
            total_timesteps=40,
            capture_video=True,
            track=True,
            wandb_project_name="project",
            wandb_entity="team",
        )
        program.resume(folder, total_timesteps=50, exp_name="another/name")
    assert wandb.init.call_count == 2
    first = wandb.init.call_args_list[0].kwargs
    second = wandb.init.call_args_list[1].kwargs
    paths = [Path(call.args[0]) for call in wandb.save.call_args_list]
    name = str(folder.relative_to(program.folder / "runs"))
    calls = [call for call in wandb.mock_calls if call[0] in ("init", "finish")]
    return SimpleNamespace(name=name, first=first, second=second, paths=paths, calls=calls)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/ALE/Pong-v5__a/b__1__2", "ALE/Pong-v5__a/b__1__2"),
        ("moved/Pong-v5__a__1__2", "Pong-v5__a__1__2"),
    ],
)
def test_the_name_of_a_run_is_the_part_of_its_path_below_runs(folder, name, in_folder):
    assert dreamerv3.run_name(Path(folder)) == name


def test_a_tracked_run_is_finished_before_another_one_begins(tracked):
    assert [call[0] for call in tracked.calls] == ["init", "finish", "init", "finish"]
    assert tracked.calls[1].kwargs == {"exit_code": 0}
    assert tracked.calls[3].kwargs == {"exit_code": 0}


def test_a_tracked_run_has_the_name_of_its_folder(tracked):
    assert tracked.first["name"] == tracked.name


def test_a_tracked_run_goes_on_when_it_is_resumed(tracked):
    """Ids of Weights & Biases have no colons and slashes."""
    run_id = re.sub("[:/]", "-", tracked.name)
    assert tracked.first["id"] == run_id
    assert tracked.second["id"] == run_id
    assert tracked.second["resume"] == "allow"


def test_a_tracked_run_belongs_to_the_project_and_team_of_the_flags(tracked):
    assert tracked.first["project"] == "project"
    assert tracked.first["entity"] == "team"


def test_a_tracked_run_sends_its_flags(tracked):
    assert tracked.first["config"]["batch_length"] == 8


def test_a_tracked_run_sends_what_tensorboard_gets_and_the_code(tracked):
    assert tracked.first["sync_tensorboard"]
    assert tracked.first["save_code"]


def test_a_tracked_run_sends_the_source_files(tracked):
    sources = tracked.paths[:3]
    assert [path.name for path in sources] == ["dreamerv3.py", "networks.py", "replay.py"]
    assert all(path.exists() for path in sources)


def test_a_tracked_run_sends_its_videos(tracked):
    assert tracked.paths[3].name == "*.mp4"


def test_a_tracked_run_that_raised_counts_as_failed(program, monkeypatch):
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError):
        program.train(total_timesteps=200, track=True, **FAILURES["nan"])
    wandb.finish.assert_called_once_with(exit_code=1)


def test_an_error_of_wandb_is_not_hidden(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Mock(init=Mock(side_effect=ConnectionError)))
    error = refused(program, env_id="CartPole-v1", track=True)
    assert "--track cannot start" in error
    assert "ConnectionError" in error


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


@pytest.mark.slow
def test_a_second_process_on_a_run_folder_exits_with_status_2(doubled):
    assert doubled.second.returncode == 2


@pytest.mark.slow
def test_a_second_process_on_a_run_folder_prints_one_line(doubled):
    assert doubled.second.stderr.count("\n") == 1
    assert "another process trains the run" in doubled.second.stderr


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(doubled):
    FileLock(doubled.folder / "lock").acquire(timeout=0)


@pytest.mark.slow
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


@pytest.mark.slow
def test_ids_that_a_script_registers_reach_the_workers(scripted):
    folders = list(scripted.folder.glob("runs/*"))
    assert len(folders) == 2
    assert all(set(episodes(folder)[:, 3]) == {7} for folder in folders)


@pytest.mark.slow
def test_workers_do_not_run_the_script_again(scripted):
    assert scripted.out.count("\nend ") == 1


def test_only_a_worker_leaves_the_process_group(monkeypatch):
    """AsyncVectorEnv makes one environment in the program too, which Ctrl-C must reach."""
    become_worker = Mock()
    seed_all = Mock()
    monkeypatch.setattr(dreamerv3, "become_worker", become_worker)
    monkeypatch.setattr(dreamerv3, "seed_all", seed_all)
    assert dreamerv3.make_in_worker(lambda: "made", os.getpid(), 7) == "made"
    assert not become_worker.called
    assert not seed_all.called
    assert dreamerv3.make_in_worker(lambda: "made", os.getpid() + 1, 7) == "made"
    assert become_worker.called
    seed_all.assert_called_once_with(7)


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


def test_atari_plays_whole_games_with_the_preprocessing_of_the_paper():
    env = dreamerv3.make_env("ALE/Breakout-v5")
    while not isinstance(env, gym.wrappers.AtariPreprocessing):
        env = env.env
    assert not env.terminal_on_life_loss
    assert env.noop_max == 30
    assert env.frame_skip == 4
    assert not env.scale_obs


def test_rewards_of_atari_are_not_clipped():
    """The invaders of the lowest row are worth 5 points, all others more."""
    env = dreamerv3.make_env("ALE/SpaceInvaders-v5")
    env.action_space.seed(0)
    env.reset(seed=0)
    best = 0.0
    for _ in range(100):
        _, reward, *_ = env.step(env.action_space.sample())
        best = max(best, reward)
    assert best >= 5


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


# --- what environments do to the run
def test_a_run_that_is_killed_before_its_first_checkpoint_goes_on(program):
    """The copy of its folder is what a kill in the tenth step leaves. Updates begin when 20 steps
    are stored, after 9 more."""

    class Copying(Short):
        steps = 0

        def step(self, action):
            self.steps += 1
            if self.steps == 10 and not Path("copy").exists():
                (folder,) = Path("runs").glob("*")
                shutil.copytree(folder, "copy")
            return super().step(action)

    act(program, env_id=register(Copying))
    folder = program.resume(program.folder / "copy")
    assert "resumed at step 0 after 0 updates" in program.out
    assert "11 steps were stored after the checkpoint; they are kept" in program.out
    assert counters(folder) == (20, 11)


@pytest.mark.parametrize("status", [None, 0, 3])
def test_an_environment_that_exits_has_failed(status, program):
    class Exiting(Short):
        def step(self, action):
            sys.exit(status)

    with pytest.raises(RuntimeError, match=f"the environment called sys.exit.{status}.$"):
        act(program, env_id=register(Exiting))


def test_an_environment_that_exits_in_its_constructor_is_refused(program):
    def exiting(render_mode=None):
        sys.exit(0)

    error = refused(program, env_id=register(exiting))
    assert "cannot be made: RuntimeError: the environment called sys.exit(0)" in error


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
def test_every_frame_becomes_an_image_that_a_video_can_have(kind):
    env = gym.make(rendering(FRAMES[kind]), render_mode="rgb_array", disable_env_checker=True)
    env = dreamerv3.Frames(env)
    env.reset()
    shapes = set()
    for _ in range(5):
        env.step(env.action_space.sample())
        frame = env.render()
        assert frame.dtype == np.uint8
        shapes.add(frame.shape)
    ((height, width, channels),) = shapes
    assert channels == 3
    assert height % 2 == width % 2 == 0
    assert 2 <= min(height, width)
    assert max(height, width) <= 320


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
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder for `main`, with a tiny model and with real signals, which `nohup` ignores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dreamerv3.SIZES, "1m", TINY)
    before = {}
    for number in STOPS:
        if signal.getsignal(number) is signal.SIG_IGN:
            before[number] = signal.signal(number, signal.SIG_DFL)
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


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
def test_a_signal_ends_a_run_which_is_saved_with_its_status(number, in_folder):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        dreamerv3.main(Args(**ACT_ONLY, env_id=interrupting(number)))
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) is before
    (folder,) = in_folder.glob("runs/*")
    assert 10 <= saved(folder)["step"] < 20


def test_the_second_signal_ends_the_program():
    before = signal.getsignal(signal.SIGTERM)
    run = SimpleNamespace(stopped=0)
    try:
        dreamerv3.Run.stop(run, signal.SIGTERM, None)
        assert run.stopped == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


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


def test_an_environment_that_takes_the_signals_does_not_keep_them(in_folder):
    class Taking(Short):
        def __init__(self, render_mode=None):
            super().__init__(render_mode)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        def step(self, action):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    with pytest.raises(SystemExit) as stop:
        dreamerv3.main(Args(**ACT_ONLY, env_id=register(Taking)))
    assert stop.value.code == 128 + signal.SIGTERM


def test_the_command_that_goes_on_is_quoted(in_folder, capsys):
    args = Args(**ACT_ONLY, env_id=interrupting(signal.SIGTERM), exp_name="my run")
    with pytest.raises(SystemExit):
        dreamerv3.main(args)
    assert "continue with: python dreamerv3.py --resume 'runs/" in capsys.readouterr().out


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
def test_rewards_of_one_element_are_added_up_exactly(kind, repeat):
    env = dreamerv3.make_env(rewarding(REWARDS[kind]), action_repeat=repeat)
    env.reset(seed=0)
    over = False
    while not over:
        *_, over, info = env.step(np.zeros(8))
    assert info["episode_return"] == 5000


@pytest.mark.parametrize(
    "reward", [None, [1, 2], "much", np.zeros(0), 1e39, math.nan, -math.inf, {}, 1j]
)
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


def test_an_evaluation_that_is_stopped_leaves_no_return(program, finished, monkeypatch):
    evaluate = dreamerv3.evaluate

    def stopped(agent, args, episodes, seed, videos, run):
        return evaluate(agent, args, episodes - 1, seed, videos, run)

    monkeypatch.setattr(dreamerv3, "evaluate", stopped)
    program.resume(finished, total_timesteps=70, eval_frequency=70, eval_episodes=2)
    assert "evaluation: 1 episodes" in program.out
    assert "eval/episodic_return" not in scalars(finished)


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
    steps = {"total_timesteps": 400, "learning_starts": 400}  # enough to end an episode
    act(program, env_id="CartPole-v1", env_kwargs=kwargs, num_envs=2, **steps)
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


def test_a_package_like_shimmy_does_not_switch_all_warnings_on(monkeypatch):
    monkeypatch.setattr(dreamerv3, "import_module", lambda name: warnings.simplefilter("always"))
    with warnings.catch_warnings():
        before = list(warnings.filters)
        dreamerv3.find_spec("CartPole-v1")
        assert warnings.filters == before


@pytest.mark.parametrize("begin", [0, 1_000_000])
def test_a_task_without_ends_is_noted_once(begin, capsys):
    """After 20,000 steps of each of two environments."""
    log, run = quiet_log(begin)
    run.step = begin + 39_998
    log.episodes({})
    assert capsys.readouterr().out == ""
    for _ in range(3):
        run.step += 2
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


# === data-parallel training =======================================================================
def three_updates(rank: int, processes: int, folder: Path) -> None:
    """Process `rank` of some: updates on its share of four sequences. Saves all weights and the
    last gradients."""
    # the same noise for every sequence, whichever process has it
    torch.rand = lambda *shape, device=None: torch.full(shape, 0.4, device=device)
    torch.manual_seed(rank)  # the weights of rank 0 count
    torch.compiler.set_stance("force_eager")
    # symlog: symexp's bins up to 5e8 would enlarge rounding errors
    agent, args = make_agent(SPECS, twohot="symlog")
    for p in agent.parameters():
        p.data += 0.05 * torch.randn_like(p)  # returns are not all 0
    optimizer = dreamerv3.LaProp(agent.trained(), 1e-3)
    model = agent
    if processes > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=processes)
        model = nn.parallel.DistributedDataParallel(agent)

    share = 4 // processes
    rows = slice(share * rank, share * (rank + 1))
    batch = tree_map(lambda x: x[rows], make_batch(agent, batch=4))
    for _ in range(3):
        dreamerv3.train_step(model, optimizer, batch, args)
    results = dict(agent.state_dict())
    for name, p in agent.named_parameters():
        if p.requires_grad:
            results[f"gradient of {name}"] = p.grad
    torch.save(results, folder / f"{rank}of{processes}.pt")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> SimpleNamespace:
    """The same three updates in one process, and in two, half of the batch each."""
    folder = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", torch.rand)  # put back afterwards
        three_updates(0, 1, folder)
    torch.multiprocessing.spawn(three_updates, (2, folder), nprocs=2)
    return SimpleNamespace(
        alone=torch.load(folder / "0of1.pt"),
        first=torch.load(folder / "0of2.pt"),
        second=torch.load(folder / "1of2.pt"),
    )


def test_two_processes_have_the_same_weights(parallel):
    assert parallel.first.keys() == parallel.second.keys()
    for name, x in parallel.first.items():
        assert torch.equal(x, parallel.second[name]), name


def test_two_processes_make_the_updates_of_one_on_the_joined_batch(parallel):
    assert parallel.first.keys() == parallel.alone.keys()
    for name, x in parallel.alone.items():
        difference = parallel.first[name] - x
        assert difference.norm() <= 1e-4 * x.norm() + 1e-6, name


def test_the_compared_updates_move_the_return_range(parallel):
    """Else the comparisons would not see how the returns of two processes are joined."""
    assert parallel.alone["return_norm.hi"] - parallel.alone["return_norm.lo"] > 1e-4


def test_every_process_samples_replay_with_a_seed_of_its_own(tmp_path):
    agent, args = make_agent(persist_replay=False, total_timesteps=4096)
    draws = []
    for rank in (0, 1):
        run = SimpleNamespace(rank=rank, num_processes=2, folder=tmp_path)
        replay = dreamerv3.make_replay(args, agent, run)
        draws.append(int(replay.rng.integers(2**60)))
    assert draws[0] != draws[1]


def test_the_first_process_alone_records_videos():
    run = SimpleNamespace(args=Args(capture_video=True), writes=True, video_folder=Path("videos"))
    assert dreamerv3.Run.videos(run, "train-0") == Path("videos/train-0")
    run.writes = False
    assert dreamerv3.Run.videos(run, "train-0") is None


def torchrun(cwd: Path, **flags) -> str:
    """What two processes of the program print on a CPU, errors too."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["--nproc-per-node", "2", str(ROOT / "dreamerv3.py")]
    result = subprocess.run(
        [*launcher, *program, *as_flags(flags)],
        cwd=cwd,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,  # processes that disagree wait for each other
    )
    return result.stdout


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> SimpleNamespace:
    """A run under torchrun, and what it was at its end: an update replays 2 * 4 * 16 steps, so that
    one is due every 8 agent steps from step 64 on. It goes on after one process has lost most of
    its buffer."""
    cwd = tmp_path_factory.mktemp("torchrun")
    flags = dict(QUICK, batch_length=16, learning_starts=64, imagination_horizon=3)
    flags.update(size="auto", precision="auto")
    out = torchrun(cwd, env_id="CartPole-v1", seed=3, total_timesteps=150, **flags)
    folders = list(cwd.glob("runs/*"))
    folder = folders[0]
    ended = SimpleNamespace(out=out, folders=folders, counters=counters(folder))
    for name in ("obs.obs", "action"):
        of_both = [np.load(folder / f"replay{i}" / f"{name}.npy")[0, :-1] for i in ("", 1)]
        setattr(ended, name.split(".")[0], of_both)

    np.save(folder / "replay1" / "clock.npy", np.array([20]))
    ended.resumed_out = torchrun(cwd, resume=folder, total_timesteps=200)
    ended.resumed_counters = counters(folder)
    return ended


@pytest.mark.slow
def test_a_run_can_be_resumed_by_more_processes(tmp_path):
    """Both collect --learning-starts steps, since one of them has no buffer yet."""
    alone = start_process(tmp_path, **QUICK, env_id="CartPole-v1", total_timesteps=60)
    assert alone.wait(300) == 0
    (folder,) = tmp_path.glob("runs/*")
    out = torchrun(tmp_path, resume=folder, total_timesteps=110)
    assert "resumed at step 60 after 10 updates" in out
    assert "collecting 40 steps before the next update" in out
    assert counters(folder) == (110, 10 + (110 - 100) // 4)


@pytest.mark.slow
def test_a_run_of_which_one_process_fails_ends_with_a_checkpoint(tmp_path):
    """The second process fails in its 59th step, the first one while it waits for it, in its 60th
    at the latest. A checkpoint is due every 50 steps of both."""
    flags = dict(QUICK, env_id=f"{__name__}:Dreamer-nan-v0", learning_starts=64)
    out = torchrun(tmp_path, **flags, total_timesteps=200, checkpoint_frequency=50)
    assert "observation 'obs' is declared" in out
    (folder,) = tmp_path.glob("runs/*")
    assert 100 <= counters(folder)[0] <= 120


def test_processes_share_a_run_folder(together):
    assert len(together.folders) == 1


def test_one_process_prints_for_all(together):
    assert together.out.count("run folder: ") == 1


def test_processes_share_the_train_ratio(together):
    assert "1 update every 8 agent steps" in together.out
    assert together.counters == (150, (150 - 64) // 8)


def test_the_default_size_on_a_cpu_is_1m(together):
    assert "size: 1m" in together.out


def test_the_default_precision_on_a_cpu_is_bfloat16_where_that_is_native(together):
    assert ("bfloat16" in together.out) == torch.cpu._is_avx512_bf16_supported()


def test_processes_store_observations_of_their_own(together):
    first, second = together.obs
    assert len(first) == 75
    assert not (first == second).all(-1).any()


def test_processes_store_actions_of_their_own(together):
    first, second = together.action
    assert (first != second).mean() > 0.2


def test_processes_resume_together_though_one_has_lost_steps(together):
    """Its 20 steps are 40 of both, 24 less than an update needs; from step 174 on one is due every
    8 steps."""
    assert together.resumed_out.count("resumed at step 150 after 10 updates") == 1
    assert "collecting 24 steps before the next update" in together.resumed_out
    assert together.resumed_counters == (200, 10 + (200 - 174) // 8)


# === the README: its environments, numbers, snippets and figures ==================================
PONG = "examples.protocols:PongFull-v5"
CRAFTER = "examples.crafter_env:Crafter-v0"


def readme_ids() -> list[str]:
    """All ids in commands of the README, and PONG, without CRAFTER, which is too slow to start."""
    ids = set(re.findall(r"--env-id (\S+?)`", README))
    ids.add(PONG)
    ids.discard(CRAFTER)
    return sorted(ids)


@pytest.mark.parametrize("env_id", readme_ids())
def test_environments_of_the_readme_can_be_stepped_or_say_what_is_missing(env_id):
    """With the packages of requirements.txt alone, some are missing."""
    try:
        env = dreamerv3.make_env(env_id)
    except (ImportError, gym.error.DependencyNotInstalled, dreamerv3.UserError) as error:
        assert re.search(r"minatar|shimmy|gymnasium\[|minigrid", str(error))
        return
    env.reset(seed=0)
    for _ in range(5):
        obs, *_ = env.step(env.action_space.sample())
        assert env.observation_space.contains(obs)


def test_the_example_of_pong_has_all_actions():
    assert dreamerv3.make_env(PONG).action_spec.size == 18


class Game:
    """Crafter's interface, that of the old Gym. Shows its seed; episodes have two steps, every
    second one is ended by death."""

    def __init__(self, seed=None):
        self.seed = seed
        self.time = 0

    def reset(self):
        return np.full((64, 64, 3), self.seed, np.uint8)

    def step(self, action):
        self.time += 1
        alive = self.time % 4 > 0
        return self.reset(), 0.1, self.time % 2 == 0, {"discount": float(alive)}


@pytest.fixture
def crafter(monkeypatch) -> dreamerv3.Adapter:
    """The example of Crafter with a Game."""
    monkeypatch.setitem(sys.modules, "crafter", Mock(Env=Game))
    return dreamerv3.make_env(CRAFTER)


def test_crafter_takes_a_seed_at_its_first_reset_and_keeps_it(crafter):
    for seed in (7, None):
        obs, _ = crafter.reset(seed=seed)
        assert (obs["obs"] == 7).all()


def ends_of_two_steps(env: gym.Env) -> list[tuple[bool, bool]]:
    """terminated and truncated of two steps."""
    ends = []
    for _ in range(2):
        _, _, terminated, truncated, _ = env.step(np.array([16]))
        ends.append((terminated, truncated))
    return ends


def test_crafter_tells_death_from_a_time_limit(crafter):
    crafter.reset(seed=7)
    assert ends_of_two_steps(crafter) == [(False, False), (False, True)]
    crafter.reset()
    assert ends_of_two_steps(crafter) == [(False, False), (True, False)]


def test_the_example_of_walker_shows_pixels(monkeypatch):
    """With CartPole in the place of DeepMind Control."""

    def make(env_id: str, render_kwargs: dict, **options) -> gym.Env:
        return gym.make("CartPole-v1", **options)

    monkeypatch.setitem(sys.modules, "shimmy", Mock())
    protocols = dreamerv3.import_module("examples.protocols")
    monkeypatch.setattr(protocols, "gym", Mock(wrappers=gym.wrappers, make=make))
    env = dreamerv3.make_env("examples.protocols:WalkerPixels-v0")
    assert env.specs == {"obs": ObsSpec((64, 64, 3))}


MY_ENV = "examples.my_env:MyEnv-v0"


def test_the_environment_of_your_own_has_a_camera_numbers_and_two_actions():
    env = dreamerv3.make_env(MY_ENV)
    assert env.specs == {"camera": ObsSpec((64, 64, 3)), "state": ObsSpec((4,))}
    assert env.action_spec.nvec == (3, 3)


@pytest.mark.parametrize(
    "push, steps, terminated",
    [
        pytest.param(1, 200, False, id="rest until the time limit"),
        pytest.param(2, 12, True, id="leave the field"),
    ],
)
def test_the_environment_of_your_own_ends_by(push, steps, terminated):
    env = dreamerv3.make_env(MY_ENV)
    env.reset(seed=0)
    for _ in range(steps - 1):
        _, _, *over, _ = env.step(np.array([push, push]))
        assert over == [False, False]
    _, _, *over, _ = env.step(np.array([push, push]))
    assert over == [terminated, not terminated]


def test_the_environment_of_your_own_trains(program):
    folder = program.train(env_id=MY_ENV, total_timesteps=60, capture_video=True)
    assert counters(folder) == (60, 10)


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("collects 1,024 steps", "learning_starts", 1024),
        ("ends after 400,000 agent steps", "total_timesteps", 400_000),
        ("one every 10,000 agent steps", "checkpoint_frequency", 10_000),
        ("plays 10 episodes", "eval_episodes", 10),
        ("(default 1,000) draws a dream", "video_frequency", 1000),
        ("an update (16 x 64 steps)", "batch_size", 16),
        ("an update (16 x 64 steps)", "batch_length", 64),
        ("`--buffer-size` | 256, 1, 12m or 1m, 1e6 |", "num_envs", 1),
        ("`--buffer-size` | 256, 1, 12m or 1m, 1e6 |", "train_ratio", 256),
        ("`--buffer-size` | 256, 1, 12m or 1m, 1e6 |", "buffer_size", 10**6),
    ],
)
def test_defaults_that_the_readme_tells_in_words(text, name, value):
    assert text in README
    assert getattr(Args(), name) == value


def test_defaults_in_the_table_of_the_readme_are_those_of_the_program():
    table = README.split("| paper | code | flag (default) |")[1].split("\n\n")[0]
    defaults = re.findall(r"--(\S+) ([\d.e-]+)", table)
    assert defaults != []
    for flag, value in defaults:
        assert getattr(Args, flag.replace("-", "_")) == float(value), flag


def snippet(text: str) -> str:
    """The first Python code of a Markdown text."""
    return re.search("```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_snippet_of_the_readme_plays_an_episode(program, capsys):
    folder = program.train(env_id="DreamerChain-v0", total_timesteps=50, save_model=True)
    shutil.move(folder / "model.pt", program.folder)
    with program.inside():
        exec(snippet(README), {})
    assert capsys.readouterr().out.splitlines()[-1] == "return 15.0"


@pytest.mark.parametrize("part", ["update", "training", "filter", "optimizer", "profile"])
def test_the_benchmark_runs_on_a_cpu(part, program, monkeypatch, capsys):
    """Its parts for a GPU are the same functions, captured."""
    bench = importlib.import_module("bench")
    monkeypatch.setattr(bench, "product", Mock())  # it takes seconds, and prints a line as theirs
    flags = as_flags({"size": "1m", "compile": False, "batch_size": 2, "batch_length": 4})
    monkeypatch.setattr(sys, "argv", ["bench.py", part, "--repeats", "1", *flags])
    with program.inside():
        bench.main()
    assert re.search(r"^\S.* +\d+\.\d\d ms", capsys.readouterr().out, re.MULTILINE)


sys.path.append(str(RESULTS))
compare = importlib.import_module("compare")
Results = compare.Results
extract = importlib.import_module("extract")
plot = importlib.import_module("plot")

PAGES = [ROOT / "README.md", *sorted(RESULTS.glob("*.md"))]
SUFFIX = r"_(losses|evals|advantage|pairs|actions)$"


# === The gate =====================================================================================
@pytest.mark.parametrize(
    ("names", "column"),
    [
        ([compare.ROUNDED[0], compare.EXACT[0]], "twohot_mean"),
        ([compare.FINGER[0], compare.FINGER_EXACT], "twohot_mean"),
        ([compare.CARTPOLE_OFFICIAL, compare.CARTPOLE_16[0]], "envs"),
        ([compare.CARTPOLE_16_OFFICIAL, compare.CARTPOLE_16_LOSSES], "returns"),
        ([compare.CARTPOLE_16_OFFICIAL, compare.CARTPOLE_16[0]], "other"),
        ([compare.CARTPOLE_OFFICIAL, compare.CARTPOLE_DEFAULT], "train_ratio"),
        ([compare.WALKER_OFFICIAL, compare.WALKER[0]], "twohot_mean"),
        ([compare.FINGER[0], compare.WALKER[0]], "environment"),
    ],
)
def test_the_gate_refuses_runs_of_different_protocols(names, column):
    results = Results()
    with pytest.raises(ValueError) as error:
        results.check(names, [])
    message = str(error.value)
    assert column in message
    for name in names:
        run = results.runs([name])[0]
        assert name in message
        assert repr(run[column]) in message


def test_the_gate_lets_pass_what_the_rule_tolerates():
    results = Results()
    names = [compare.ROUNDED[0], compare.EXACT[0]]
    runs = results.check(names, compare.ROUNDING_TOLERATES)
    assert [run["run"] for run in runs] == names


def test_the_gate_refuses_a_run_without_a_row():
    with pytest.raises(ValueError, match="no_such_run has no row in protocols.csv"):
        Results().check([compare.FINGER[0], "no_such_run"], [])


@pytest.mark.parametrize("column", compare.PROTOCOL)
def test_every_column_of_a_protocol_is_compared(column):
    (run,) = Results().runs([compare.ROUNDED[0]])
    other = {**run, column: "another value"}
    with pytest.raises(ValueError, match=column):
        compare.check([run, other], [])
    compare.check([run, other], [column])


@pytest.fixture
def wrong_results(tmp_path):
    """The results with another train ratio in every row of ours."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    results = Results(folder)
    for row in results.rows:
        if row["code"] == "ours":
            row["train_ratio"] = "999"
    return results


@pytest.mark.parametrize(
    "name", ["learning", "finger_spin", "cartpole_16envs", "walker_walk", "cartpole"]
)
def test_no_figure_has_official_curves_of_another_protocol(wrong_results, name):
    with pytest.raises(ValueError, match="train_ratio"):
        getattr(plot, name)(wrong_results)


@pytest.mark.parametrize(
    "comparison",
    [
        compare.compare_rounding,
        compare.compare_cartpole_16envs,
        compare.compare_walker,
        compare.compare_finger,
        compare.compare_same_state,
    ],
)
def test_no_table_compares_runs_of_another_protocol(wrong_results, comparison):
    with pytest.raises(ValueError, match="train_ratio"):
        comparison(wrong_results)


# === Statistics ===================================================================================
def test_the_permutation_test_counts_splits():
    # only the observed split and its mirror image differ as much
    three = [1, 2, 3]
    assert compare.permutation_test(three, [11, 12, 13]) == 2 / 20
    five = [1, 2, 3, 4, 5]
    assert compare.permutation_test(five, [11, 12, 13, 14, 15]) == 2 / 252
    assert compare.permutation_test(three, [3, 2, 1]) == 1


def test_the_permutation_test_is_two_sided():
    # differences of 1.5 for 1 against 2 and 3, 0 for 2 and 1.5 for 3
    assert compare.permutation_test([1], [2, 3]) == 2 / 3
    assert compare.permutation_test([3], [1, 2]) == 2 / 3
    assert compare.permutation_test([2], [1, 3]) == 1


def test_the_widened_range_is_three_times_as_wide():
    low, high = compare.widened_range(np.array([[48.5, 1.0], [37.5, 3.0], [48.0, 2.0]]))
    assert low.tolist() == [26.5, -1]
    assert high.tolist() == [59.5, 5]


def test_a_level_is_passed_by_the_mean_of_five_episodes():
    steps = np.arange(100, 800, 100)
    returns = np.array([300.0, 0, 0, 0, 0, 0, 251])
    assert compare.first_passing(steps, returns) == 500
    assert compare.first_passing(steps, returns, level=60) == np.inf
    assert compare.first_passing(steps[1:], returns[1:]) == 700


def test_means_by_steps_include_the_end_of_an_interval():
    steps = np.array([1, 10, 11, 31])
    means = compare.step_means(steps, np.array([1.0, 3, 5, 7]), width=10, count=4)
    np.testing.assert_array_equal(means, [2, 5, np.nan, 7])


def test_update_windows_average_the_records_whose_update_lies_in_them():
    updates = np.array([1.0, 250, 250.5, 500, 800])
    windows = compare.update_windows(updates, np.array([1.0, 2, 3, 5, 9]), count=4)
    np.testing.assert_array_equal(windows, [1.5, 4, np.nan, 9])


def test_the_largest_fall_is_measured_from_the_highest_value_before():
    assert compare.largest_fall(np.array([10.0, 20, 15, 18, 30])) == 0.25
    assert compare.largest_fall(np.array([10.0, 20, 30])) == 0


@pytest.mark.parametrize(
    "entropies, noises, expected",
    [
        ([8.2, 8.15], [0.001, 0.0], "exact"),
        ([8.2, 8.15], [0.001, 0.03], "undecided"),
        ([8.2, 8.12], [0.001, 0.0], "undecided"),
        ([7.9, 7.95], [0.03, 0.04], "rounded"),
    ],
    ids=["exact", "noise of the other", "entropy between them", "rounded"],
)
def test_the_form_of_official_runs_is_the_one_all_are_nearer_to(entropies, noises, expected):
    """Our forms: entropy 7.9 and noise 0.04 with the rounding, 8.2 and 0 without."""
    entropies = np.array(entropies)
    noises = np.array(noises)
    assert compare.nearer_form(entropies, noises, (7.9, 0.04), (8.2, 0.0)) == expected


def test_the_noise_of_the_advantage_is_its_size_without_its_mean(copied):
    updates = 250.0 * np.arange(1, 17)
    columns = {
        "updates": updates,
        "behavior/actor_entropy": np.where(updates <= 3750, 8.0, 9.0),
        "behavior/return_mean": np.full(16, 5.0),
        "behavior/value_mean": np.full(16, 2.0),
        "behavior/return_scale": np.full(16, 2.0),
        "behavior/advantage_mag": np.full(16, 1.75),
    }
    write_columns(copied.path(compare.WALKER_EXACT, "_losses"), columns)
    entropy, noise = compare.first_window(copied, compare.WALKER_EXACT)
    assert entropy == pytest.approx(8 + 58 / 3808)
    assert noise == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("values", "text", "expected"),
    [
        ([1.0, 2, 3], "3 of 3", "agrees"),
        ([1.0, 2, 9], "2 of 3", "agrees"),
        ([1.0, 8, 9], "1 of 3", "fails"),
        ([1.0, 2, np.nan], "2 of 2 so far", "incomplete"),
    ],
)
def test_a_verdict_needs_its_share_of_windows(values, text, expected):
    low = np.array([0.0, 0, 0, np.nan])
    count = compare.Count(np.array([*values, 7]), low, low + 5)
    assert str(count) == text
    assert compare.verdict([count], 2 / 3, "agrees", "fails") == expected
    assert compare.verdict([count, None], 2 / 3, "agrees", "fails") == "not yet"


# === Comparisons with runs made up from the official ones =========================================
def write_columns(path: Path, columns: dict) -> None:
    """Write a CSV from its columns."""
    extract.write(path, [list(columns), *zip(*columns.values(), strict=True)])


@pytest.fixture
def copied(tmp_path):
    """The results without runs of ours, and with one official seed of finger-spin."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    for pattern in ("*parity*.csv", "*first_steps*.csv", "same_state*.csv"):
        for path in folder.glob(pattern):
            path.unlink()
    for path in folder.glob("official/*official_seed[23]*.csv"):
        path.unlink()
    return Results(folder)


def verdict_of(text: str, statistic: str) -> str:
    """The last cell of the row of a statistic."""
    begin = text.index(f"\n| {statistic} |") + 1
    row = text[begin:].splitlines()[0]
    return row.split("|")[-2].strip()


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (0, "p = 1.000: equal"),
        (-100, "p = 0.008: not equal"),
    ],
)
def test_evaluations_equal_to_the_official_ones_are_called_equal(copied, shift, expected):
    statistic = "mean of the evaluations from 12,000 to 24,000 steps"
    assert compare.NOT_RUN in compare.compare_cartpole_16envs(copied)
    curves = compare.official_evaluations(copied)
    for name, (steps, returns) in zip(compare.CARTPOLE_16, curves, strict=True):
        columns = {"global_step": steps, "return": returns + shift}
        write_columns(copied.path(name, "_evals"), columns)
    text = compare.compare_cartpole_16envs(copied)
    assert verdict_of(text, statistic) == expected


def test_losses_with_16_environments_are_compared_as_means_over_our_seeds(copied):
    data = copied.read(compare.CARTPOLE_16_LOSSES, "_losses")
    updates = np.arange(250, 10_001, 250)
    borders = compare.CARTPOLE_16_BORDERS
    window = np.searchsorted(borders, updates - 125) - 1
    for i, name in enumerate(compare.CARTPOLE_16):
        columns = {"updates": updates}
        for ours, theirs in compare.CARTPOLE_16_METRICS.items():
            means = np.append(data["mean"][data["metric"] == theirs], 0)
            shift = 1000 * (i - 2)  # 0 in the mean over seeds
            columns[ours] = means[window] + shift
        columns["losses/dyn"] = columns["losses/dyn"] + 1
        write_columns(copied.path(name, "_losses"), columns)
    text = compare.compare_cartpole_16envs(copied)
    windows = "windows of 2,000 steps in range, by metric"
    assert verdict_of(text, windows) == "fails: dyn"
    copied.path(compare.CARTPOLE_16[2], "_losses").unlink()
    text = compare.compare_cartpole_16envs(copied)
    assert verdict_of(text, windows) == "not yet"
    assert "actor 10, critic 10, " in text
    assert "dyn 0, " in text
    assert "of 10 windows, seeds: 4 |" in text


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (1, "in range (weak)"),
        (2, "not in range"),
    ],
)
@pytest.mark.parametrize("pause", [0, 32])
def test_walker_returns_are_compared_by_groups_of_16(copied, factor, expected, pause):
    groups = factor * compare.official_groups(copied)[0, :4]
    ends = np.array([16_000, 32_016, 48_032 + pause, 64_048 + pause])
    for name, count in zip(compare.WALKER, (64, 32), strict=True):
        columns = {
            "global_step": np.repeat(ends, 16)[:count],
            "return": np.repeat(groups, 16)[:count],
        }
        write_columns(copied.path(name), columns)
    text = compare.compare_walker(copied)
    for end in ("16,016", "32,032", "48,048"):
        statistic = f"mean return of the 16 episodes that end at {end}"
        assert verdict_of(text, statistic) == expected


def test_a_group_whose_episodes_end_apart_is_left_out(copied):
    steps = np.repeat([16_000, 32_016], [15, 17])
    columns = {"global_step": steps, "return": np.full(32, 50.0)}
    write_columns(copied.path(compare.WALKER[0]), columns)
    groups = compare.our_groups(copied, compare.WALKER[0])
    assert np.isnan(groups).all()


def test_walker_windows_are_compared_seed_by_seed(copied):
    data = copied.read(compare.WALKER_OFFICIAL, "_losses")
    ends = (data["env_step"] - 2048).reshape(3, 7).mean(0)
    updates = np.arange(250, 29_001, 250)
    window = np.minimum(np.searchsorted(ends, updates - 125), 6)
    for seed, name in enumerate(compare.WALKER):
        columns = {"updates": updates}
        for ours, theirs in compare.WALKER_METRICS.items():
            values = sum(data[key].reshape(3, 7)[seed] for key in theirs)
            columns[ours] = values[window]
        if seed == 1:
            columns["losses/critic"] = 2 * columns["losses/critic"]
        write_columns(copied.path(name, "_losses"), columns)
    text = compare.compare_walker(copied)
    assert verdict_of(text, "losses/dyn") == "agrees"
    assert verdict_of(text, "losses/critic") == "fails"


def write_finger(results, name: str, delay: int, factor: float = 1) -> None:
    """A run on finger-spin like the official seed 1, `delay` agent steps later."""
    official = results.read(compare.FINGER[0])
    steps = official["global_step"]
    returns = factor * np.interp(steps - delay, steps, official["return"])
    write_columns(results.path(name), {"global_step": steps, "return": returns})
    losses = results.read(compare.FINGER[0], "_losses")
    updates = np.arange(250, 11_751, 250)
    if results.runs([name])[0]["code"] == "official":
        write_columns(results.path(name, "_losses"), losses)
        return
    columns = {"updates": updates}
    for ours, theirs in compare.FINGER_METRICS.items():
        columns[ours] = compare.update_windows(losses["opt_updates"], losses[theirs], 47)
    write_columns(results.path(name, "_losses"), columns)
    updates = np.arange(6, 2507, 50)
    advantage = np.interp(updates - 25, losses["opt_updates"], losses["adv_mag"])
    columns = {"updates": updates, "advantage_mag": advantage}
    write_columns(results.path(name, "_advantage"), columns)


@pytest.mark.parametrize(
    ("delay", "rises", "ends"),
    [
        (0, "not separated", "not separated"),
        (3000, "rounded rises earlier", "rounded ends higher"),
    ],
)
def test_rounded_and_exact_are_separated_only_if_all_seeds_are(copied, delay, rises, ends):
    for name in compare.ROUNDED:
        write_finger(copied, name, 0)
    for name in compare.EXACT:
        write_finger(copied, name, delay)
    text = compare.compare_rounding(copied)
    passes = "agent step at which the mean of 5 episodes passes 50: rounded"
    assert verdict_of(text, passes) == rises
    assert verdict_of(text, "mean return of the last 10 episodes: rounded") == ends
    for statistic in [
        "behavior/advantage_mag",
        "losses/critic",
        "behavior/actor_entropy",
        "first update after 500 with advantage_mag below 0.08",
    ]:
        assert verdict_of(text, statistic) == "holds"


@pytest.mark.parametrize(
    ("steps", "factor", "expected"),
    [
        (23_924, 1.0, "rounded ends higher"),  # at least 0.8 x the mean of 8 episodes
        (23_924, 0.75, "not yet"),
        (21_000, 1.0, "not yet"),
    ],
)
def test_episodes_that_a_rounded_run_has_not_come_to_count_0(copied, steps, factor, expected):
    """The exact runs have 0.7 times the returns."""
    for name in compare.ROUNDED:
        write_finger(copied, name, 0, factor)
    for name in compare.EXACT:
        write_finger(copied, name, 0, 0.7)
    run = copied.read(compare.ROUNDED[1])
    inside = run["global_step"] <= steps
    columns = {key: values[inside] for key, values in run.items()}
    write_columns(copied.path(compare.ROUNDED[1]), columns)
    text = compare.compare_rounding(copied)
    statistic = "mean return of the last 10 episodes: rounded"
    assert verdict_of(text, statistic) == expected
    bound = compare.least_end(copied, compare.ROUNDED[1])
    missing = int((run["global_step"] <= 25_000).sum()) - len(columns["return"])
    assert bound == pytest.approx(columns["return"][missing - 10 :].sum() / 10)
    assert f"at least {compare.number(bound)}" in text


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (1, "in range (weak)"),
        (0.4, "not in range"),
    ],
)
def test_finger_spin_is_compared_with_three_official_seeds(copied, factor, expected):
    assert compare.NOT_RUN in compare.compare_finger(copied)
    for name, other in zip(compare.FINGER[1:], (0.9, 1.1), strict=True):
        write_finger(copied, name, 0, other)
    for name in compare.ROUNDED:
        write_finger(copied, name, 0, factor)
    text = compare.compare_finger(copied)
    assert verdict_of(text, "mean returns by 2,500 agent steps") == expected
    assert verdict_of(text, "losses/critic") == "agrees"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ([1, 2, 3], [4, 5, 6], "yes"),
        ([1, 2, 4], [4, 5, 6], "not separated"),
        ([1, 2, None], [4, 5, 6], "not yet"),
        ([1, None, None], [None, 5, 6], "not yet"),
        ([5, None, None], [4, None, None], "not separated"),
    ],
)
def test_one_pair_in_the_wrong_order_shows_that_two_groups_are_not_separated(low, high, expected):
    assert compare.separation(low, high, "yes") == expected


@pytest.mark.parametrize(("level", "cell"), [(50, "not by step 15,000"), (51, "2,500")])
def test_an_official_run_that_does_not_pass_50_is_named_with_its_last_step(copied, level, cell):
    steps = np.arange(500, 15_001, 500)
    columns = {"global_step": steps, "return": np.full(len(steps), level)}
    write_columns(copied.path(compare.FINGER_EXACT), columns)
    text = compare.compare_rounding(copied)
    name = "agent step at which the mean of 5 episodes passes 50: exact"
    assert f"| {name} | {cell} |  | not yet |  |" in text
    assert f"| mean return of the last 10 episodes: exact | {level} at step 15,000, where" in text


def test_the_table_of_returns_has_a_row_for_every_run_that_exists(copied):
    steps = np.arange(500, 10_001, 500)
    returns = np.where(steps <= 5000, 0.0, 120.0)
    write_columns(copied.path(compare.EXACT[1]), {"global_step": steps, "return": returns})
    rows = compare.ablation_table(copied).splitlines()
    assert rows[-1] == "| ours, exact, seed 2 | 0 | 0 | 120 | 120 |  |  |  |  |  |  | 7,500 |  |"
    kinds = [row.split("|")[1].strip() for row in rows[2:]]
    assert kinds == ["official, rounded, seed 1", "official, exact, seed 1", "ours, exact, seed 2"]


def test_the_largest_component_of_the_mean_action_is_that_of_the_last_window(copied):
    text = compare.compare_rounding(copied)
    name = "walker-walk: largest component of the mean action, steps 3,585 to 4,096"
    assert f"| {name}: exact | not known | none | not yet | none |" in text
    columns = {
        "global_step": [3584, 4096, 4608],
        "reward": [9, 9, 9],
        "action_0": [0.8, 0.1, 0.9],
        "action_1": [0.2, -0.25, 0.9],
    }
    write_columns(copied.path(compare.WALKER_EXACT, "_actions"), columns)
    text = compare.compare_rounding(copied)
    assert f"| {name}: rounded | not known | none | not yet | none |" in text
    assert f"| {name}: exact | not known | none | 0.25 | none |" in text


def write_same_state(results: Results, run: str, **factors: float) -> None:
    """A run of 2 seeds with entropy 0.5 and 1 for the other metrics, times the factors; later
    updates and the seed that was known before the rule have other numbers."""
    columns = {"seed": [11, 12, 12, 13, 13], "updates": [400, 200, 401, 200, 400]}
    for name in list(Results().read(run, "_losses"))[2:]:
        value = 0.5 if name == compare.ENTROPY else 1.0
        value *= factors.get(name.split("/")[1], 1)
        columns[name] = [99, value - 0.1, 99, value, value + 0.1]
    write_columns(results.path(run, "_losses"), columns)


@pytest.mark.parametrize(
    ("factors", "equal"),
    [
        ({"recon": 0.96, "grad_norm": 1.04, "actor_entropy": 1.09}, 20),
        ({"recon": 0.94, "grad_norm": 1.04}, 19),
        ({"recon": 0.96, "grad_norm": 1.06}, 19),
        ({"recon": 0.96, "grad_norm": 1.04, "actor_entropy": 1.11}, 19),
        ({"recon": 0.96, "grad_norm": 1.04, "value_mean": 1.06}, 19),
    ],
)
def test_both_programs_are_equal_from_one_state_if_every_metric_is(copied, factors, equal):
    text = compare.compare_same_state(copied)
    assert verdict_of(text, "A") == "not yet"
    for official, ours in compare.SAME_STATE.values():
        write_same_state(copied, official)
        write_same_state(copied, ours, **factors)
    text = compare.compare_same_state(copied)
    assert verdict_of(text, "A") == ("equal" if equal == 20 else "not equal")
    assert f"| {equal} of 20 | " in text


def test_what_the_rule_leaves_out_of_state_b_is_not_compared(copied):
    for official, ours in compare.SAME_STATE.values():
        write_same_state(copied, official)
        factors = dict.fromkeys(["actor", "value_mean", "return_mean", "reward_mean"], 2)
        write_same_state(copied, ours, **factors)
    text = compare.compare_same_state(copied)
    assert "| 16 of 20 | 1.000 (" in text
    assert verdict_of(text, "A") == "not equal"
    assert "| 16 of 16 | " in text
    assert verdict_of(text, "B") == "equal"


# === Extraction ===================================================================================
def write_events(folder: Path, begin: int, records: list[tuple[int, float]]) -> None:
    """An event file of the program: (updates, value) of each record, the first after `begin`."""
    start = time.time()
    writer = SummaryWriter(folder)
    for i, (updates, value) in enumerate(records):
        now = start + 1000 * (i + 1)
        step = 1000 + 2 * updates
        scalars = {
            "losses/reward": value,
            "behavior/advantage_mag": value / 10,
            "charts/updates": updates,
            "charts/updates_per_second": (updates - begin) / 1000,
        }
        for name, scalar in scalars.items():
            writer.add_scalar(name, scalar, step, walltime=now)
    writer.close()


def numbers(path: Path) -> list[list[float]]:
    """The rows of a CSV without its header."""
    rows = path.read_text().splitlines()[1:]
    return [[float(value) for value in row.split(",")] for row in rows]


@pytest.fixture
def run(tmp_path):
    """A run folder without events."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = ["global_step,frames,return,length,seconds"]
    rows.append("500,1000,2,500,1.4")
    rows.append("1001,2002,0.5,500,3.0\n")
    (folder / "episodes.csv").write_text("\n".join(rows))
    return folder


def test_windows_weigh_records_by_their_updates(run, tmp_path):
    write_events(run, 0, [(100, 1.0), (200, 2.0), (300, 3.0), (600, 4.0)])
    extract.extract(run, "name", tmp_path)
    header = (tmp_path / "name_losses.csv").read_text().splitlines()[0]
    assert header == "updates,global_step,behavior/advantage_mag,losses/reward"
    # (100 * 1 + 100 * 2 + 50 * 3) / 250 = 1.8 and (50 * 3 + 200 * 4) / 250 = 3.8; 501 to 600 is
    # not complete
    rows = numbers(tmp_path / "name_losses.csv")
    np.testing.assert_allclose(rows[0], [250, 1500, 0.18, 1.8])
    np.testing.assert_allclose(rows[1], [500, 2000, 0.38, 3.8])
    assert len(rows) == 2
    episodes = (run / "episodes.csv").read_text()
    assert (tmp_path / "name.csv").read_text() == episodes
    assert not (tmp_path / "name_evals.csv").exists()
    assert not (tmp_path / "name_advantage.csv").exists()


def test_updates_that_are_made_again_after_a_kill_count_once(run, tmp_path):
    write_events(run, 0, [(100, 1.0), (200, 2.0), (300, 3.0), (400, 4.0)])
    write_events(run, 150, [(250, 7.0), (500, 8.0)])
    extract.extract(run, "name", tmp_path)
    # (100 * 1 + 50 * 2 + 100 * 7) / 250 = 3.6
    rows = numbers(tmp_path / "name_losses.csv")
    np.testing.assert_allclose(rows[0], [250, 1500, 0.36, 3.6])
    np.testing.assert_allclose(rows[1], [500, 2000, 0.8, 8])


def test_updates_without_a_record_are_left_out(run, tmp_path):
    write_events(run, 0, [(100, 1.0)])
    write_events(run, 150, [(250, 7.0)])
    extract.extract(run, "name", tmp_path)
    # (100 * 1 + 100 * 7) / 200 = 4
    rows = numbers(tmp_path / "name_losses.csv")
    np.testing.assert_allclose(rows, [[250, 1500, 0.4, 4]])


def test_evaluations_have_the_updates_made_until_then(run, tmp_path):
    write_events(run, 0, [(100, 1.0), (300, 2.0)])
    writer = SummaryWriter(run)
    for step, value in ((800, 10), (1200, 20), (1600, 30)):
        writer.add_scalar("eval/episodic_return", value, step)
    writer.close()
    extract.extract(run, "name", tmp_path)
    rows = numbers(tmp_path / "name_evals.csv")
    assert rows == [[800, 0, 10], [1200, 100, 20], [1600, 300, 30]]


def test_first_updates_are_written_as_they_were_recorded(run, tmp_path):
    write_events(run, 0, [(6, 1.0), (56, 2.0), (2506, 3.0), (2556, 4.0)])
    extract.extract(run, "name", tmp_path, advantage=True)
    rows = numbers(tmp_path / "name_advantage.csv")
    expected = [[6, 1012, 0.1], [56, 1112, 0.2], [2506, 6012, 0.3]]
    np.testing.assert_allclose(rows, expected)


def test_mean_actions_come_from_the_steps_that_are_stored(run, tmp_path):
    replay = run / "replay"
    replay.mkdir()
    action = np.full((2, 600, 3), 9.0, np.float32)  # 2 environments, 600 slots
    action[:, :256] = [0.5, -1.0, 2.0]
    action[0, 256:512] = [0.0, 1.0, 3.0]
    action[1, 256:512] = [1.0, 0.0, 3.0]
    reward = np.zeros((2, 600), np.float32)
    reward[1, 256:512] = 0.5
    np.save(replay / "action.npy", action)
    np.save(replay / "reward.npy", reward)
    np.save(replay / "clock.npy", np.array([520]))
    write_events(run, 0, [(250, 1.0)])
    extract.extract(run, "name", tmp_path, actions=True)
    rows = numbers(tmp_path / "name_actions.csv")
    # a third window would need 768 slots in all
    assert rows == [[512, 0, 0.5, -1, 2], [1024, 0.25, 0.5, 0.5, 3]]


def test_episodes_of_steps_that_were_made_again_count_once(run, tmp_path):
    with open(run / "episodes.csv", "a") as file:
        file.write("1502,3004,9,500,5.0\n")
        file.write("1400,2800,3,399,6.0\n")
        file.write("1901,3802,4,500,7.0\n")
    write_events(run, 0, [(250, 1.0)])
    extract.extract(run, "name", tmp_path)
    steps = [row[0] for row in numbers(tmp_path / "name.csv")]
    assert steps == [500, 1001, 1400, 1901]


def test_minutes_of_the_official_code_get_the_columns_of_its_first_run(run, tmp_path):
    path = RESULTS / "official" / "finger-spin__official_seed1_losses.csv"
    columns = path.read_text().splitlines()[0].split(",")
    lines = [json.dumps({"step": 501, "episode/score": 4.0})]
    # the last minute follows a checkpoint before step 1,300
    for step in (1200, 1300, 1250):
        metrics = {"step": step}
        for name in columns[1:]:
            key = name.replace("_", "/", 1)
            metrics[f"train/{key}"] = step / 100
        lines.append(json.dumps(metrics))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    extract.extract_official(run, "name", tmp_path)
    rows = numbers(tmp_path / "name_losses.csv")
    assert rows == [[1200, *[12] * 25], [1250, *[12.5] * 25]]
    assert len(numbers(tmp_path / "name.csv")) == 2


# === Files and pages ==============================================================================
def test_every_csv_has_a_row_in_protocols():
    results = Results()
    places = {"ours": RESULTS, "official": RESULTS / "official"}
    for row in results.rows:
        assert row["code"] in places
    for code, folder in places.items():
        known = {row["run"] for row in results.rows if row["code"] == code}
        for path in folder.glob("*.csv"):
            stem = re.sub(SUFFIX, "", path.stem)
            assert stem in known | {"protocols"}


def test_every_run_that_took_hours_has_its_files():
    results = Results()
    for row in results.rows:
        if row["code"] == "ours" and row["hours"]:
            losses = results.path(row["run"], "_losses")
            assert results.path(row["run"]).exists() or losses.exists(), row["run"]
            assert row["commit"], row["run"]


def test_every_run_of_ours_with_a_file_has_hours_and_a_commit():
    results = Results()
    for row in results.rows:
        path = results.path(row["run"])
        if row["code"] == "ours" and path.exists():
            assert row["hours"], row["run"]
            assert row["commit"], row["run"]


def test_no_run_has_two_rows():
    rows = Results().rows
    keys = [(row["run"], row["seed"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_logs_of_ours_are_logs_of_the_program():
    for path in RESULTS.glob("*.csv"):
        if path.stem != "protocols" and not re.search(SUFFIX, path.stem):
            header = path.read_text().splitlines()[0]
            assert header == "global_step,frames,return,length,seconds"


def test_the_tables_of_the_results_are_those_that_are_printed():
    page = (RESULTS / "results.md").read_text()
    text = compare.compare(Results())
    assert len(re.findall("^## ", text, re.MULTILINE)) == 6
    for block in text.split("\n\n"):
        assert block in page, "results.md lacks what compare.py prints"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("results.md", 14_000),
        ("rounding.md", 4096),
    ],
)
def test_a_page_is_short_enough_to_be_finished(name, limit):
    assert (RESULTS / name).stat().st_size <= limit


def figures(page: Path) -> set[Path]:
    """The pictures that a page shows."""
    names = re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)", page.read_text())
    return {(page.parent / name).resolve() for name in names}


def test_every_figure_is_shown_on_a_page():
    shown = set().union(*(figures(page) for page in PAGES))
    assert {path.resolve() for path in RESULTS.glob("*.png")} <= shown


def test_every_figure_but_the_dream_is_drawn_from_the_csvs(tmp_path):
    plot.draw(Results(), tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    committed = {path.name for path in RESULTS.glob("*.png")}
    assert drawn <= committed
    assert committed - drawn == {"Boxing_dream.png"}


def test_a_curve_is_named_by_its_seed_when_another_one_is_missing(copied):
    write_finger(copied, compare.FINGER[2], 0)
    _, (ax,) = plot.panels(1)
    plot.finger_returns(ax, copied)
    names = [line.get_label() for line in ax.lines]
    assert names == ["official, seed 1", "official, seed 3"]


def test_a_figure_of_runs_that_do_not_exist_is_not_drawn(copied):
    for path in copied.folder.glob("*demo*.csv"):
        path.unlink()
    assert plot.demo(copied) is None
    assert plot.cartpole_16envs(copied) is None


def test_every_link_of_a_page_leads_to_a_file():
    for page in PAGES:
        for link in re.findall(r"\]\(([^):#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
