r"""DreamerV3 in one file (Hafner et al., "Mastering diverse control tasks through world models",
Nature 2025).

    python dreamerv3.py --env-id ALE/Pong-v5

The algorithm in short. The agent acts in the environment and stores every step in a replay buffer.
An update samples B sequences of T steps. The world model encodes each observation x_t, runs a
recurrent state-space model over the sequence (deterministic state h_t, discrete stochastic state
z_t) and learns to reconstruct x_t, to predict reward and continuation, and to predict z_t before it
sees x_t. From each of the B*T states the model then imagines H steps with actions of the actor. The
critic learns the lambda-returns of these trajectories (and of the replayed ones). The actor learns
by REINFORCE to increase them, with advantages divided by the range between the returns' 5th and
95th percentile. One optimizer and one set of hyperparameters for every environment.

Symbols: B batch, T sequence length, N rows (B*T in imagination, environments when acting), H
imagination horizon, L length of a trajectory, D width of h (deter), S groups of K classes in z
(stoch), F = D + S*K features, E embedding, A action, V bins. Scalars per step are (B, T).
Everything but noise is batch-major. The functions under @torch.compile run as they stand with
--no-compile.

Time line. Step t holds what arrived at t and the action chosen on it; reward[t] was earned by
action[t-1].

      step             0          1          2         3          4
      obs              x0 ------> x1 ------> x2        x3 ------> x4
      action              \_ a0 _/  \_ a1 _/  (a2)      \_ a3 _/
      reward           0          r1         r2        0          r4
      is_first         1          0          0         1          0
      is_last          0          0          1         0          0
      is_terminal      0          0          1 or 0    0          0

x3 comes from a reset: no arrow leads into it, a2 is stored but never executed, and h, z, a of the
step before are zeroed where is_first. r1 was earned by a0. is_last: the episode ended, for either
reason; is_terminal is 0 when it was cut by a time limit.

The first part of this file is the specification: 1 flags · 2 agent · 3 world-model loss ·
4 imagination · 5 lambda-return and return range · 6 actor and critic losses · 7 optimizer ·
8 update and loop. To see the whole at once, start at `loss`, `train_step` and `main`. The rest
of the file is everything else, from environments to checkpoints.
"""

import argparse
import copy
import ctypes
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import closing, contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from networks import (
    RSSM,
    ActionSpec,
    Actor,
    Decoder,
    Encoder,
    ObsSpec,
    OneHot,
    Size,
    TwoHot,
    head,
    one_hot,
    symexp,
    symlog,
)
from replay import Replay


# === 1. Flags =====================================================================================
@dataclass
class Args:
    exp_name: str = "dreamerv3"
    """the name of this experiment"""
    seed: int = 1
    """environment i gets seed + i; process r of torchrun adds 1000 r, a resumed run its step"""
    torch_deterministic: bool = True
    """sets torch.backends.cudnn.deterministic"""
    cuda: bool = True
    """use CUDA when it is present"""
    track: bool = False
    """send everything that TensorBoard gets to Weights & Biases too"""
    wandb_project_name: str = "dreamerv3"
    """the project there"""
    wandb_entity: str = ""
    """the entity (team) there; empty means your default one"""
    capture_video: bool = False
    """record episodes of the first environment and of evaluations into videos/{run_name}"""
    save_model: bool = False
    """save the weights alone too, into runs/{run_name}/model.pt"""

    # Environment
    env_id: str = "ALE/Pong-v5"
    """any Gymnasium id; module:Id imports the module first"""
    env_kwargs: str = "{}"
    """keyword arguments of its constructor, as JSON: '{"continuous": true}'"""
    total_timesteps: int = 400_000
    """agent steps of the run, over all environments of all processes"""
    num_envs: int = 1
    """environments per training process; if more than one, each in a worker process"""
    action_repeat: int = 0
    """environment steps per agent step; 0 means 4 (with max-pooling) for Atari, else 1"""
    image_size: int = 64
    """height and width to which images are resized, a multiple of 16 from 48 to 256"""

    # World model
    size: Literal["auto", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "auto"
    """model size; auto: 12m on CUDA, 1m on a CPU"""
    batch_size: int = 16
    """B, sequences per update and training process"""
    batch_length: int = 64
    """T, steps per sequence"""
    pred_scale: float = 1.0
    """beta_pred, weight of the reconstruction, reward and continue losses"""
    dyn_scale: float = 1.0
    """beta_dyn, weight of the KL loss that trains the prior (0.5 in the 2023 preprint)"""
    rep_scale: float = 0.1
    """beta_rep, weight of the KL loss that trains the posterior"""
    free_nats: float = 1.0
    """KL below which neither KL loss has a gradient"""
    unimix: float = 0.01
    """uniform probability mixed into the latent categoricals"""
    twohot: Literal["symexp", "symlog"] = "symexp"
    """bins spaced by symexp, or evenly for symlog targets (preprint)"""
    twohot_mean: Literal["rounded", "exact"] = "rounded"
    """predicted rewards and values with or without the rounding of the official program on a CPU"""
    bins: int = 255
    """V, bins of the reward and critic distributions, odd"""

    # Actor and critic
    imagination_horizon: int = 15
    """H, imagined steps per start state"""
    gamma: float = 1 - 1 / 333
    """the discount, part of the continue predictor's target"""
    return_lambda: float = 0.95
    """lambda of the lambda-returns"""
    ent_coef: float = 3e-4
    """eta, coefficient of the actor's entropy bonus"""
    actor_unimix: float = 0.01
    """uniform probability mixed into a discrete actor (0 in the official code)"""
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
    """agent steps after which updates are due, at least batch_length per environment"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of an update's matrix products and convolutions; auto: bfloat16 where it is native"""
    compile: bool = True
    """compile the functions that take most of an update's time; eager mode where that fails"""
    cudagraphs: bool = True
    """on CUDA, launch the policy and the update as one graph each; not under torchrun"""

    # Replay
    buffer_size: int = 1_000_000
    """steps kept per training process; lowered to its share of total_timesteps, but to no less than
    a batch"""
    replay_windows: Literal["episode", "stream"] = "episode"
    """a sequence that comes to an episode's end begins the same episode again, or runs on into the
    next one (official code)"""
    persist_replay: bool = True
    """keep the replay buffer in memory-mapped files of the run folder, for --resume"""

    # Logging
    log_frequency: int = 100
    """agent steps between two records of losses in TensorBoard"""
    video_frequency: int = 1000
    """updates between two dreams (open-loop predictions), runs/{run_name}/dreams; 0: none"""
    checkpoint_frequency: int = 10_000
    """agent steps between two checkpoints; 0: only at the start, the end and before evaluations"""
    resume: str = ""
    """run folder runs/{run_name} to continue, under its stored flags and those given"""

    # Evaluation
    eval_only: bool = False
    """play eval_episodes with the agent of --resume (folder, checkpoint or model.pt) and exit"""
    eval_episodes: int = 10
    """whole episodes of one evaluation"""
    eval_frequency: int = 0
    """agent steps between two evaluations during training; 0 means never"""
    eval_action: Literal["sample", "mode"] = "sample"
    """how evaluations act: as in training, or by the most probable action"""


def model_size(deter: int) -> Size:
    """All widths follow from D; z has S = 32 groups of K = D / 128 classes in every size."""
    units = deter // 8
    classes = deter // 128
    return Size(
        deter=deter,
        hidden=units,
        units=units,
        classes=classes,
        depth=classes,
        groups=32,
        blocks=8,
    )


SIZES = {
    "1m": model_size(512),
    "12m": model_size(2048),
    "25m": model_size(3072),
    "50m": model_size(4096),
    "100m": model_size(6144),
    "200m": model_size(8192),
    "400m": model_size(12288),
}


# === 2. Agent and policy ==========================================================================
class Agent(nn.Module):
    """All networks: world model (encoder, rssm, decoder, reward, cont), actor, critic, slow critic,
    and the return range.

    specs: observation key -> ObsSpec. size: an entry of SIZES. Of args, unimix, actor_unimix, bins,
    twohot and twohot_mean are read.
    """

    def __init__(self, specs: dict[str, ObsSpec], action: ActionSpec, size: Size, args: Args):
        super().__init__()
        self.specs = specs
        self.action = action
        self.size = size
        width = size.deter + size.groups * size.classes  # F

        self.encoder = Encoder(specs, size)
        self.rssm = RSSM(self.encoder.embed_size, action.size, size, args.unimix)
        self.decoder = Decoder(specs, size)
        self.reward = head(width, size.units, layers=1, outputs=args.bins, outscale=0.0)
        self.cont = head(width, size.units, layers=1, outputs=1)
        self.actor = Actor(width, size.units, action, args.actor_unimix)
        self.critic = head(width, size.units, layers=3, outputs=args.bins, outscale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.twohot = TwoHot(args.bins, args.twohot, args.twohot_mean)
        self.return_norm = ReturnNorm()

    def forward(self, batch: dict, args: Args):
        """`loss`, for DistributedDataParallel, which works on calls of a module."""
        return loss(self, batch, args)

    def trained(self) -> list[nn.Parameter]:
        """The parameters the optimizer changes: all but the slow critic's."""
        return [p for p in self.parameters() if p.requires_grad]


def get_feat(deter: Tensor, stoch: Tensor) -> Tensor:
    """(…, D), (…, S, K) -> (…, F), the input of all heads but the decoder."""
    feat = torch.cat([deter, stoch.flatten(-2)], -1)
    device = "cuda" if deter.is_cuda else "cpu"
    if torch.is_autocast_enabled(device):
        return feat.bfloat16()  # cast once, for all heads
    return feat.float()


def encode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Stored action (…, components) -> (…, A) as the networks see it: one-hot vectors side by side,
    or real numbers."""
    if not spec.nvec:
        return action.float()
    parts = [one_hot(action[..., i], n) for i, n in enumerate(spec.nvec)]
    return torch.cat(parts, -1)


def decode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """The inverse: (…, A) -> (…, components), class indices or real numbers, which the environment
    clips."""
    if not spec.nvec:
        return action
    parts = [x.argmax(-1) for x in action.split(spec.nvec, -1)]
    return torch.stack(parts, -1)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # never compiled: its batches are small
def policy(
    agent: Agent, obs: dict, state: tuple, is_first: Tensor, mode: bool = False
) -> tuple[Tensor, tuple]:
    """Act in N environments, in float32.

    obs: key -> (N, …). state: (deter, stoch, action) of the step before; the first one is
    `agent.rssm.initial(N)`. is_first: (N,). mode: take the most probable action instead of a
    sample. Returns the action (N, A) and the new state.
    """
    deter, stoch, action = state
    embed = agent.encoder(obs)
    u = torch.rand(*stoch.shape[:2], device=stoch.device)  # (N, S), samples z
    deter, stoch, _ = agent.rssm.observe_step(deter, stoch, action, embed, is_first, u)
    pi = agent.actor(get_feat(deter, stoch))
    noise = agent.actor.noise(len(deter))
    action = pi.mode() if mode else pi.sample(noise)  # (N, A)
    return action, (deter, stoch, action)


# === 3. World-model loss (paper: "World model learning") ==========================================
def world_model_loss(agent: Agent, batch: dict, args: Args):
    """Losses of the world model on replayed sequences.

    batch: "obs" a dict of (B, T, …), prev_action (B, T, A), reward, is_first, is_last and
    is_terminal (B, T), deter (B, D) and stoch (B, S, K) of the step before the first. Returns
    losses, each (B, T); the posterior deter (B, T, D), stoch (B, T, S, K) and their features
    (B, T, F), with gradient; and metrics.
    """
    obs = batch["obs"]
    embed = agent.encoder(obs)  # (B, T, E)
    deter, stoch, post_logits = agent.rssm.observe(
        batch["deter"], batch["stoch"], batch["prev_action"], embed, batch["is_first"]
    )  # (B, T, D), (B, T, S, K), and the logits of the posterior that stoch is a sample of
    prior_logits = agent.rssm.prior(deter).float()  # (B, T, S, K), from h alone, without x
    feat = get_feat(deter, stoch)  # (B, T, F)

    recon = agent.decoder(deter, stoch)  # key -> (B, T, …)
    reward_logits = agent.reward(feat)  # (B, T, V)
    cont_logit = agent.cont(feat).squeeze(-1).float()  # (B, T)
    cont_target = (~batch["is_terminal"]).float() * args.gamma  # it learns the discount too
    dyn, rep, metrics = kl_losses(post_logits, prior_logits, args)
    losses = {
        "recon": sum(recon_loss(recon[key], obs[key]) for key in recon),
        "reward": agent.twohot.loss(reward_logits, batch["reward"]),
        "continue": F.binary_cross_entropy_with_logits(cont_logit, cont_target, reduction="none"),
        "dyn": dyn,
        "rep": rep,
    }
    return losses, deter, stoch, feat, metrics


@torch.compile(dynamic=False)
def recon_loss(recon: Tensor, target: Tensor) -> Tensor:
    """Loss of one observation key, summed over all its numbers: -> (B, T). Squared error for
    images, which the decoder predicts in [0, 1], and for vectors, which it predicts in symlog
    space; cross-entropy for discrete keys."""
    if recon.ndim > target.ndim:  # logits of a discrete key
        logits = recon.flatten(0, -2)
        classes = target.flatten().long()
        error = F.cross_entropy(logits, classes, reduction="none").view(target.shape)
    elif target.dtype == torch.uint8:
        error = (recon - target.float() / 255).square()
    else:
        error = (recon - symlog(target)).square()
    return error.reshape(*error.shape[:2], -1).sum(-1)


@torch.compile(dynamic=False)
def kl_losses(post_logits: Tensor, prior_logits: Tensor, args: Args):
    """Dynamics and representation loss (B, T) from posterior and prior logits (B, T, S, K), and
    mean entropies. Free nats are per step: a floor under the KL summed over all S groups."""
    post = OneHot(post_logits, args.unimix)
    prior = OneHot(prior_logits, args.unimix)
    fixed_post = OneHot(post_logits.detach(), args.unimix)
    fixed_prior = OneHot(prior_logits.detach(), args.unimix)
    dyn = fixed_post.kl(prior).sum(-1)  # trains the prior
    rep = post.kl(fixed_prior).sum(-1)  # trains the posterior
    metrics = {
        "world_model/prior_entropy": fixed_prior.entropy().sum(-1).mean(),
        "world_model/posterior_entropy": fixed_post.entropy().sum(-1).mean(),
    }
    return dyn.clamp(min=args.free_nats), rep.clamp(min=args.free_nats), metrics


# === 4. Imagination ===============================================================================
@torch.no_grad()
def imagine(agent: Agent, deter: Tensor, stoch: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Roll the model forward with the actor: states (N, D), (N, S, K) -> feat (N, H+1, F), action
    (N, H+1, A), without gradient; action[:, h] is the one taken in state h, the last one is not
    used."""
    u = torch.rand(horizon, *stoch.shape[:2], device=stoch.device)  # (H, N, S), samples z
    noise = agent.actor.noise(horizon + 1, len(deter))  # (H+1, N, …), samples actions
    feat = get_feat(deter, stoch)
    action = agent.actor(feat).sample(noise[0])
    feats = [feat]
    actions = [action]
    for h in range(horizon):
        deter, stoch, feat, action = imagine_step(agent, deter, stoch, action, u[h], noise[h + 1])
        feats.append(feat)
        actions.append(action)
    # some releases of torch would reuse weights cast under no_grad: the actor had no gradient
    torch.clear_autocast_cache()
    return torch.stack(feats, 1), torch.stack(actions, 1)


@torch.compile(dynamic=False)
def imagine_step(
    agent: Agent, deter: Tensor, stoch: Tensor, action: Tensor, u: Tensor, noise: Tensor
):
    """State (N, D), (N, S, K) and action (N, A) -> deter, stoch, feat (N, F) and action (N, A) of
    the next step. Noise is passed in so that compiled and plain code use the same numbers."""
    deter, stoch = agent.rssm.predict_step(deter, stoch, action, u)
    feat = get_feat(deter, stoch)
    action = agent.actor(feat).sample(noise)
    return deter, stoch, feat, action


# === 5. Lambda-return and return range (paper: "Critic learning", "Actor learning") ===============
@torch.compiler.disable  # an unrolled loop takes long to compile and saves at most 2 % of an update
def lambda_return(
    reward: Tensor,
    value: Tensor,
    discount: Tensor,
    lam: float = 0.95,
    is_last: Tensor | None = None,
) -> Tensor:
    """Lambda-returns of trajectories of length L: tensors (N, L) -> (N, L-1).

        R[t] = reward[t+1] + discount[t+1] * ((1 - lam) * value[t+1] + lam * R[t+1])
        R[L-1] = value[L-1]

    discount[t] multiplies everything after state t: it is 0 at terminations. Where is_last, the
    episode has no next step: lam counts as 0, so that R bootstraps from the value.
    """
    lam_t = torch.full_like(reward, lam)
    if is_last is not None:
        lam_t = lam_t.masked_fill(is_last, 0.0)
    ret = value[:, -1]  # R[L-1]
    returns = []
    for t in reversed(range(1, reward.shape[1])):
        future = (1 - lam_t[:, t]) * value[:, t] + lam_t[:, t] * ret
        ret = reward[:, t] + discount[:, t] * future  # R[t-1]
        returns.append(ret)
    return torch.stack(returns[::-1], 1)  # in the order of time, without R[L-1]


class ReturnNorm(nn.Module):
    """Running 5th and 95th percentile of the returns; advantages are divided by their distance, at
    least 1."""

    def __init__(self):
        super().__init__()
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    @torch.compiler.disable  # a sort: compiling has nothing to fuse
    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Move towards the percentiles of returns (any shape) of all training processes."""
        returns = returns.flatten()
        if dist.is_initialized():
            parts = [torch.empty_like(returns) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, returns)
            returns = torch.cat(parts)
        ordered = returns.sort().values  # torch.quantile waits for the device in torch 2.6
        self.lo.lerp_(percentile(ordered, 0.05), 0.01)  # decay 0.99, without bias correction
        self.hi.lerp_(percentile(ordered, 0.95), 0.01)

    @property
    def scale(self) -> Tensor:
        """max(1, hi - lo), a scalar."""
        return (self.hi - self.lo).clamp(min=1)


def percentile(ordered: Tensor, q: float) -> Tensor:
    """Of a sorted tensor (n,), interpolated between neighbors: a scalar."""
    index = q * (len(ordered) - 1)
    below = ordered[math.floor(index)]
    above = ordered[math.ceil(index)]
    return below.lerp(above, index % 1)


# === 6. Actor and critic losses (paper: "Critic learning", "Actor learning") ======================
@torch.compile(dynamic=False)
def actor_critic_loss(agent: Agent, feat: Tensor, action: Tensor, args: Args):
    """Losses on imagined trajectories feat (N, H+1, F), action (N, H+1, A), neither with gradient:
    -> actor loss, critic loss and lambda-returns R, (N, H) each, and metrics. Updates the return
    range."""
    with torch.no_grad():
        reward = agent.twohot.mean(agent.reward(feat))  # (N, H+1)
        cont = agent.cont(feat).squeeze(-1).float().sigmoid()  # (N, H+1), the discount is in it
    value_logits = agent.critic(feat)  # (N, H+1, V)
    value = agent.twohot.mean(value_logits.detach())  # not the slow critic's: it only regularizes
    returns = lambda_return(reward, value, cont, args.return_lambda)  # (N, H)
    weight = cont.cumprod(1)[:, :-1]  # (N, H), cont[0] * ... * cont[h]: a terminal state counts 0

    agent.return_norm.update(returns)
    advantage = (returns - value[:, :-1]) / agent.return_norm.scale  # (N, H)
    pi = agent.actor(feat)  # of all H+1 states: a slice of feat would have to be copied
    log_prob = pi.log_prob(action)[:, :-1]  # (N, H)
    entropy = pi.entropy()[:, :-1]  # (N, H)
    actor_loss = -weight * (log_prob * advantage + args.ent_coef * entropy)
    value_loss = weight * critic_loss(agent, feat, value_logits, returns, args)

    metrics = {
        "behavior/return_mean": returns.mean(),
        "behavior/return_scale": agent.return_norm.scale,
        "behavior/advantage_mag": advantage.abs().mean(),
        "behavior/value_mean": value.mean(),
        "behavior/reward_mean": reward.mean(),
        "behavior/continue_mean": cont.mean(),
        "behavior/actor_entropy": entropy.detach().mean(),
    }
    return actor_loss, value_loss, returns, metrics


def replay_critic_loss(agent: Agent, feat: Tensor, batch: dict, value: Tensor, args: Args):
    """Critic loss on replayed trajectories: feat (B, T, F) with gradient into the world model,
    value (B, T) the imagined return from every state -> (B, T-1)."""
    is_last = batch["is_last"]
    discount = (~batch["is_terminal"]).float() * args.gamma
    returns = lambda_return(batch["reward"], value, discount, args.return_lambda, is_last)
    weight = (~is_last[:, :-1]).float()  # (B, T-1), a last step has no successor in its episode
    return weight * critic_loss(agent, feat, agent.critic(feat), returns, args)


def critic_loss(agent: Agent, feat: Tensor, logits: Tensor, returns: Tensor, args: Args):
    """Loss of the critic's logits (N, L, V) on feat (N, L, F), against the returns (N, L-1) and the
    slow critic: -> (N, L-1), since the last state has no return."""
    logits = logits[:, :-1]  # (N, L-1, V)
    with torch.no_grad():
        slow_value = agent.twohot.mean(agent.slow_critic(feat))[:, :-1]  # (N, L-1)
    return_loss = agent.twohot.loss(logits, returns)
    slow_loss = agent.twohot.loss(logits, slow_value)
    return return_loss + args.slow_critic_scale * slow_loss


# === 7. Optimizer: adaptive gradient clipping, then LaProp ========================================
# torch._foreach_* does one operation on a list of tensors: 39 calls an update instead of 1,916.
@torch.no_grad()
def global_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of all numbers of a list of tensors, a scalar."""
    return torch.stack(torch._foreach_norm(tensors)).norm()


@torch.no_grad()
def clip_gradients(params: list[nn.Parameter], clip: float) -> None:
    """Adaptive gradient clipping (Brock et al., 2021), in place, for each tensor p of gradient g:

    g = g * min(1, clip * max(1e-3, ||p||) / ||g||), with L2 norms
    """
    grads = [p.grad for p in params]
    norms = torch.stack(torch._foreach_norm(params))  # (tensors,)
    grad_norms = torch.stack(torch._foreach_norm(grads))  # (tensors,)
    limits = clip * norms.clamp(min=1e-3)
    factors = (limits / grad_norms).clamp(max=1)
    torch._foreach_mul_(grads, list(factors.unbind()))


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al., 2020): RMSProp's normalization first, then momentum. For each tensor p
    of gradient g, both averages being corrected for their start at 0:

    exp_avg_sq = EMA(g^2),  exp_avg = EMA(g / (sqrt(exp_avg_sq) + eps)),  p = p - lr * exp_avg

    The first `warmup` updates multiply lr by a factor that rises linearly from 0. All state lives
    on the parameters' device, and so does lr: `param_groups[0]["lr"].fill_(x)` or a scheduler
    changes it, also while a CUDA graph replays `step`.
    """

    def __init__(self, params, lr: float, warmup: int = 0, betas=(0.9, 0.999), eps=1e-20):
        params = list(params)
        defaults = {
            "lr": torch.tensor(lr, device=params[0].device),
            "warmup": warmup,
            "betas": betas,
            "eps": eps,
            "capturable": True,  # load_state_dict keeps "step" on the device
        }
        super().__init__(params, defaults)
        for p in params:
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """Update the parameters, each of which has a `.grad`, which it overwrites. Returns the rate
        (lr times the warm-up's factor) and the norm of the whole change."""
        (group,) = self.param_groups
        params = group["params"]
        grads = [p.grad for p in params]
        steps = [self.state[p]["step"] for p in params]
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]
        beta1, beta2 = group["betas"]

        warmup = 1.0
        if group["warmup"] > 0:
            warmup = (steps[0] / group["warmup"]).clamp(max=1)  # 0 at the first update
        rate = group["lr"] * warmup
        torch._foreach_add_(steps, 1)

        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        rms = torch._foreach_div(exp_avg_sqs, 1 - beta2 ** steps[0])
        torch._foreach_sqrt_(rms)
        torch._foreach_add_(rms, group["eps"])

        torch._foreach_div_(grads, rms)  # now of size 1, whatever the size of the loss
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        changes = torch._foreach_mul(exp_avgs, -rate / (1 - beta1 ** steps[0]))
        torch._foreach_add_(params, changes)
        return rate, global_norm(changes)


# === 8. One update, and the loop ==================================================================
def loss(agent: Agent, batch: dict, args: Args):
    """The weighted sum of all losses. batch: as for world_model_loss. Returns total (), the
    posterior latents deter (B, T, D) and stoch (B, T, S, K), and metrics; latents and metrics are
    detached."""
    # world model, on the replayed sequences
    losses, deter, stoch, feat, metrics = world_model_loss(agent, batch, args)
    latents = (deter.detach(), stoch.detach())

    # actor and critic, on trajectories imagined from all B*T posterior states, without gradient:
    # losses on imagined states do not train the world model
    starts = [x.flatten(0, 1) for x in latents]  # (N, D), (N, S, K)
    imagined, action = imagine(agent, *starts, args.imagination_horizon)
    actor_loss, value_loss, returns, behavior_metrics = actor_critic_loss(
        agent, imagined, action, args
    )
    losses["actor"] = actor_loss
    losses["critic"] = value_loss
    metrics.update(behavior_metrics)

    # critic, on the replayed sequences, with the imagined returns as values; this loss does train
    # the world model, through the features
    value = returns[:, 0].unflatten(0, deter.shape[:2])  # (B, T)
    losses["replay_critic"] = replay_critic_loss(agent, feat, batch, value, args)

    weights = {
        "recon": args.pred_scale,
        "reward": args.pred_scale,
        "continue": args.pred_scale,
        "dyn": args.dyn_scale,
        "rep": args.rep_scale,
        "actor": 1.0,
        "critic": 1.0,
        "replay_critic": args.replay_critic_scale,
    }
    assert weights.keys() == losses.keys(), weights.keys() ^ losses.keys()
    means = {name: x.mean() for name, x in losses.items()}
    total = sum(weights[name] * means[name] for name in weights)

    metrics["losses/recon"] = means["recon"].detach()
    metrics["losses/reward"] = means["reward"].detach()
    metrics["losses/continue"] = means["continue"].detach()
    metrics["losses/dyn"] = means["dyn"].detach()
    metrics["losses/rep"] = means["rep"].detach()
    metrics["losses/actor"] = means["actor"].detach()
    metrics["losses/critic"] = means["critic"].detach()
    metrics["losses/replay_critic"] = means["replay_critic"].detach()
    metrics["losses/total"] = total.detach()
    return total, latents, metrics


def train_step(model: nn.Module, optimizer: LaProp, batch: dict, args: Args):
    """One update on one batch: -> fresh latents deter (B, T, D) and stoch (B, T, S, K), and
    metrics, on the device. model: the agent, or DistributedDataParallel around it."""
    agent = getattr(model, "module", model)
    params = agent.trained()
    device = "cuda" if params[0].is_cuda else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bfloat16"):
        total, latents, metrics = model(batch, args)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    metrics["optim/grad_norm"] = global_norm([p.grad for p in params])
    clip_gradients(params, args.clip)
    rate, change = optimizer.step()
    with torch.no_grad():  # slow = (1 - tau) * slow + tau * critic
        slow = list(agent.slow_critic.parameters())
        torch._foreach_lerp_(slow, list(agent.critic.parameters()), args.tau)

    root = math.sqrt(sum(p.numel() for p in params))
    metrics["optim/update_rms"] = change / root
    metrics["optim/param_rms"] = global_norm(params) / root
    metrics["charts/learning_rate"] = rate
    return latents, metrics


def stored_latents(deter: Tensor, stoch: Tensor) -> dict[str, np.ndarray]:
    """deter (…, D), stoch (…, S, K) as the replay buffer keeps them: float16, class indices.
    Raises NotFinite rather than let a diverged model into the buffer."""
    if not math.isfinite(deter.sum()):  # of numbers in [-1, 1]; quicker than to look at each
        raise NotFinite("a latent state is not finite")
    return {
        "deter": deter.half().cpu().numpy(),
        "stoch": stoch.argmax(-1).byte().cpu().numpy(),
    }


def batch_to_device(batch: dict[str, np.ndarray], agent: Agent, device: torch.device) -> dict:
    """A sampled batch as train_step takes it. Copies to a GPU are asynchronous."""
    out = {"obs": {}}
    for key, array in batch.items():
        x = torch.from_numpy(array)
        if device.type == "cuda":
            x = x.pin_memory().to(device, non_blocking=True)
        if key.startswith("obs/"):
            out["obs"][key.removeprefix("obs/")] = x
        else:
            out[key] = x
    out["prev_action"] = encode_action(out["prev_action"], agent.action)  # (B, T, A)
    out["deter"] = out["deter"].float()  # (B, D)
    out["stoch"] = one_hot(out["stoch"], agent.size.classes)  # (B, S, K)
    return out


def main(args: Args) -> None:
    """Train: act, store, step, learn, log and save, evaluate."""
    args = copy.copy(args)  # in which `auto` flags are resolved
    device = set_up_torch(args)
    # when the block ends, also by an exception or a signal, a checkpoint is saved
    with Run(args) as run, make_envs(args, run) as envs, Log(args, run) as log, run.saving():
        # agent, optimizer, replay buffer
        specs = envs.get_attr("specs")[0]
        action_spec = envs.get_attr("action_spec")[0]
        agent = Agent(specs, action_spec, SIZES[args.size], args).to(device)
        optimizer = LaProp(agent.trained(), args.learning_rate, args.warmup_updates)
        replay = make_replay(args, agent, run)
        run.begin(agent, optimizer, replay)  # after --resume: as the checkpoint has them

        model = DistributedDataParallel(agent) if dist.is_initialized() else agent
        run_policy = partial(policy, agent)
        run_train_step = partial(train_step, model, optimizer, args=args)
        if args.cudagraphs and device.type == "cuda" and model is agent:
            run_policy = Graph(run_policy)
            run_train_step = Graph(run_train_step)

        replayed = args.batch_size * args.batch_length * run.num_processes  # steps per update
        steps_per_update = replayed / args.train_ratio  # agent steps
        print(f"schedule: 1 update every {steps_per_update:g} agent steps", flush=True)
        obs, _ = envs.reset(seed=run.seed)
        reward = np.zeros(args.num_envs, np.float32)
        terminated = np.zeros(args.num_envs, bool)
        truncated = np.zeros(args.num_envs, bool)
        is_first = np.ones(args.num_envs, bool)
        state = agent.rssm.initial(args.num_envs)
        while run.step < args.total_timesteps and not run.stopped:
            # act on what arrived
            inputs = {key: torch.as_tensor(x).to(device) for key, x in obs.items()}
            first = torch.as_tensor(is_first).to(device)
            action, state = run_policy(inputs, state, first)
            action = decode_action(action, action_spec).cpu().numpy()

            # store it, with the action and the latent state
            is_last = terminated | truncated
            record = {f"obs/{key}": x for key, x in obs.items()}
            record.update(action=action, reward=reward)
            record.update(is_first=is_first, is_last=is_last, is_terminal=terminated)
            record.update(stored_latents(*state[:2]))
            replay.add(record)
            run.step += run.all_envs

            # step the environments; after a last step they ignore the action and reset
            obs, reward, terminated, truncated, infos = envs.step(action)
            is_first = is_last  # of the stored step: what follows a last step comes from a reset
            log.episodes(infos)

            # learn: one update for every steps_per_update agent steps after learning_starts;
            # run.trained is the agent step up to which they are made
            began = time.time()
            while run.step - run.trained >= steps_per_update and not run.stopped:
                batch, index = replay.sample(args.batch_size)
                batch = batch_to_device(batch, agent, device)
                latents, metrics = run_train_step(batch)
                replay.update_latents(index, **stored_latents(*latents))
                run.updates += 1
                run.trained += steps_per_update
                log.update(metrics)
                log.dream(agent, batch)
            log.updating += time.time() - began

            # log, save, evaluate
            log.means()  # every log_frequency steps
            evaluate_now = run.due(args.eval_frequency)
            if run.due(args.checkpoint_frequency) or evaluate_now:
                run.save()
            if evaluate_now:
                log.evaluate(agent)


# ######## Nothing below is needed to understand the algorithm ####################################
# === 9. Environments ==============================================================================
REGISTERED_BY = {"dm_control": "shimmy", "MinAtar": "minatar.gym"}  # id prefix -> module
INSTALL = {
    "dm_control": 'pip install "shimmy[dm-control]" imageio "mujoco<4"',
    "MinAtar": "pip install minatar",
}
OLD_GYM = (
    "in Gymnasium reset returns (observation, info) and step (observation, reward, terminated, "
    "truncated, info); examples/crafter_env.py translates an environment of the old Gym"
)
OLD_GYM_ERRORS = ("values to unpack", "reset() got an unexpected keyword argument 'seed'")


def find_spec(env_id: str) -> EnvSpec:
    """Gymnasium's spec of an id, whose packages are imported first. Raises what importing and
    Gymnasium raise; UserError, which says what to install, where a known package is missing."""
    prefix = env_id.split("/")[0]
    try:
        if ":" in env_id:  # module:Id, whose import registers the id
            module, env_id = env_id.split(":", 1)
            import_module(module)
        # ale_py has ids without a prefix too: PongNoFrameskip-v4
        name = REGISTERED_BY.get(prefix, "ale_py")
        with warnings.catch_warnings():  # shimmy switches all DeprecationWarnings on
            package = import_module(name)
        if env_id not in gym.registry and hasattr(package, "register_envs"):
            package.register_envs()
        return gym.spec(env_id)
    except Exception as error:
        absent = isinstance(error, (ImportError, gym.error.NamespaceNotFound))
        if prefix in INSTALL and absent:
            raise UserError(f"{error}; try: {INSTALL[prefix]}") from error
        raise


def is_atari(spec: EnvSpec, env_kwargs: dict) -> bool:
    """Whether an id is ale_py's own environment, unwrapped, and shows its screen."""
    from ale_py.env import AtariEnv

    creator = spec.entry_point
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    options = {**spec.kwargs, **env_kwargs}
    shows_ram = options.get("obs_type") == "ram"
    return creator is AtariEnv and not spec.additional_wrappers and not shows_ram


def make_env(
    env_id: str | EnvSpec,
    image_size: int = 64,
    action_repeat: int = 0,
    env_kwargs: dict | None = None,
    videos: Path | None = None,
    every_episode: bool = False,
) -> "Adapter":
    """One environment as an Adapter.

    env_kwargs go to its constructor. videos: a folder to record into, every episode or
    Gymnasium's schedule (0, 1, 8, 27, ...). Atari ids get frame skip 4 or action_repeat with
    max-pooling, RGB images (gray if env_kwargs say so) and up to 30 no-ops after a reset; no
    reward clipping, no end at lost lives, stickiness as the id says. Raises what importing,
    registering and constructing raise, and ValueError for spaces that are not supported.
    """
    with foreign_code():
        spec = env_id if isinstance(env_id, EnvSpec) else find_spec(env_id)
        options = dict(env_kwargs or {})
        atari = is_atari(spec, options)
        repeat = action_repeat or (4 if atari else 1)
        gray = {**spec.kwargs, **options}.get("obs_type") == "grayscale"
        if atari:
            if "frameskip" in options:
                raise ValueError("the frame skip of Atari is --action-repeat")
            options["frameskip"] = 1
        env = make_to_render(spec, options) if videos else None
        can_render = env is not None
        if not can_render:
            env = gym.make(spec, disable_env_checker=True, **options)
        try:
            env = gym.wrappers.TransformReward(env, scalar_reward)
            if atari:
                env = gym.wrappers.AtariPreprocessing(
                    env,
                    noop_max=30,
                    frame_skip=repeat,
                    screen_size=image_size,
                    grayscale_obs=gray,
                    grayscale_newaxis=True,
                )
            elif repeat > 1:
                env = gym.wrappers.RepeatAction(env, repeat)
            if can_render:
                env = record(env, videos, repeat, every_episode)
            return Adapter(env, image_size, repeat)
        except Exception:
            env.close()
            raise


def make_to_render(spec: EnvSpec, options: dict) -> gym.Env | None:
    """The environment with frames for videos; None, and a warning, where it has none."""
    options = {**options, "render_mode": "rgb_array"}
    try:
        import_module("moviepy")
        return Frames(gym.make(spec, disable_env_checker=True, **options))
    except Exception as error:
        warn_of_no_videos(error)
    return None


def record(env: gym.Env, videos: Path, repeat: int, every_episode: bool) -> gym.Env:
    """The environment with a Recorder; without one, and with a warning, where that fails."""
    try:
        return Recorder(env, videos, repeat, every_episode)
    except Exception as error:  # no folder, a strange render_fps
        warn_of_no_videos(error)
    return env


def warn_of_no_videos(error: Exception) -> None:
    """That a run goes on without videos, in one line."""
    install = 'pip install "gymnasium[other]" brings what videos need'
    print(f"warning: no videos, {type(error).__name__}: {error} ({install})", flush=True)


@contextmanager
def make_envs(args: Args, run: "Run"):
    """The environments of a training process, each in a worker process when there are several;
    the first one records videos. Resolves args.action_repeat. Closes them at the end."""
    if args.env_id.startswith("dm_control/") and not args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "disabled")  # state observations need no renderer
    flags = f"--env-id {args.env_id}"
    if args.env_kwargs != "{}":
        flags = f"{flags} --env-kwargs {args.env_kwargs}"
    with blame(f"{flags} cannot be made"), foreign_code():
        # workers get the spec: a user's script may have registered the id
        spec = find_spec(args.env_id)
        kwargs = json.loads(args.env_kwargs)
        make = partial(make_env, spec, args.image_size, args.action_repeat, kwargs)
        makers = [partial(make, run.videos(f"train-{run.step}"))] + [make] * (args.num_envs - 1)
        if args.num_envs == 1:
            envs = gym.vector.SyncVectorEnv(makers)
        else:
            envs = start_workers(makers, run.seed)
    try:
        mode = envs.metadata["autoreset_mode"]
        assert mode == gym.vector.AutoresetMode.NEXT_STEP, "see the time line at the top"
        args.action_repeat = envs.get_attr("repeat")[0]
        specs = envs.get_attr("specs")[0]
        action = envs.get_attr("action_spec")[0]
        print(f"environment: {args.env_id}, {specs} -> {action}")
        for note in envs.get_attr("notes")[0]:
            print(f"note: {note}")
        yield envs
    finally:
        with suppress(Exception):  # what has failed once may fail again
            envs.close(timeout=10)


# what this program imports; each worker by itself would take seconds and 180 MB for it
LARGE_PACKAGES = [
    "torch.utils.tensorboard",
    "torch._inductor.compile_fx",
    "tyro",
    "cv2",
    "gymnasium.wrappers",
    "ale_py",
]


def start_workers(makers: list, seed: int) -> gym.vector.AsyncVectorEnv:
    """One process for each environment. They are forked from a server that has imported the large
    packages and has no threads: an environment that computes with torch or JAX survives that."""
    program = os.getpid()
    makers = [partial(make_in_worker, x, program, seed + i) for i, x in enumerate(makers)]
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.get_context(method).set_forkserver_preload(LARGE_PACKAGES)
    # with an empty __main__, workers do not run the user's script again: cloudpickle sends them
    # what is defined there
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        return gym.vector.AsyncVectorEnv(makers, context=method)
    finally:
        sys.modules["__main__"] = script


def make_in_worker(make, program: int, seed: int) -> "Adapter":
    """An environment in a worker, which has random numbers of its own. AsyncVectorEnv makes the
    first one in the program too, to ask for its spaces."""
    if os.getpid() != program:
        become_worker()
        seed_all(seed)
    return make()


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def become_worker() -> None:
    """Let Ctrl-C, which signals a process group, reach the training process alone; end with it."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def foreign_code(generator: torch.Generator | None = None):
    """Around code that is not ours: it draws torch's random numbers (on a CPU) from this generator,
    and ours go on as if it had drawn none. Its sys.exit is an error. In a worker its exceptions
    become ones that can be sent to the training process."""
    in_worker = multiprocessing.parent_process() is not None
    cuda = torch.cuda.is_initialized() and not in_worker  # a worker has no numbers of ours
    devices = [torch.cuda.current_device()] if cuda else []
    try:
        with torch.random.fork_rng(devices):
            if generator:
                torch.set_rng_state(generator.get_state())
            yield
            if generator:
                generator.set_state(torch.get_rng_state())
    except SystemExit as error:
        raise RuntimeError(f"the environment called sys.exit({error.code})") from error
    except Exception as error:
        if any(text in str(error) for text in OLD_GYM_ERRORS):
            hint = f"if this environment has the interface of the old Gym: {OLD_GYM}"
            raise ValueError(f"{error} ({hint})") from error
        if in_worker:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


def scalar_reward(reward) -> float:
    """A reward of one element, of whatever shape and type, as a float."""
    if isinstance(reward, Tensor):
        reward = reward.detach().cpu()
    try:
        value = float(np.asarray(reward, np.float64).reshape(()))
    except (TypeError, ValueError):
        value = math.nan
    if not abs(value) <= np.finfo(np.float32).max:
        raise ValueError(f"reward {reward} is not a finite number")
    return value


def leaves(space: gym.Space, path: tuple = ()) -> list[tuple]:
    """(path, space) of every leaf of nested Dict and Tuple spaces."""
    if isinstance(space, spaces.Dict):
        children = space.items()
    elif isinstance(space, spaces.Tuple):
        children = enumerate(space)
    else:
        return [(path, space)]
    return [leaf for key, child in children for leaf in leaves(child, (*path, key))]


def class_counts(space: gym.Space) -> np.ndarray | None:
    """Classes of every component of a discrete space, None for others."""
    if isinstance(space, spaces.Discrete):
        return np.array(space.n)
    if isinstance(space, spaces.MultiBinary):
        return np.full(space.shape, 2)
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec
    return None


def obs_spec(space: gym.Space, image_size: int) -> ObsSpec | None:
    """What the networks need to know of one key, None when they cannot learn from it."""
    counts = class_counts(space)
    if counts is not None:
        return ObsSpec(space.shape, int(counts.max()))
    if not isinstance(space, spaces.Box) or 0 in space.shape:
        return None
    is_image = space.dtype == np.uint8 and len(space.shape) == 3 and min(space.shape[:2]) >= 16
    if is_image:
        return ObsSpec((image_size, image_size, space.shape[2]))
    return ObsSpec((math.prod(space.shape),))


NOT_AN_IMAGE = (
    "taken as a vector of numbers. An image is uint8 (height, width, channels): "
    "gymnasium.wrappers.ReshapeObservation adds a channel axis, TransformObservation moves axes or "
    "scales floats to 0..255"
)


def looks_like_image(space: gym.Space) -> bool:
    """Whether two of its axes are as long as those of images."""
    return isinstance(space, spaces.Box) and len([n for n in space.shape if n >= 16]) >= 2


def array_space(spec: ObsSpec) -> spaces.Box:
    """The space of the arrays that an Adapter returns for a key."""
    if spec.is_image:
        return spaces.Box(0, 255, spec.shape, np.uint8)
    if spec.classes:
        return spaces.Box(0, 2**31 - 1, spec.shape, np.int32)
    return spaces.Box(-np.inf, np.inf, spec.shape, np.float32)


def action_bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Bounds to which [-1, 1] is scaled; an open side is 2 away from the other one."""
    low = space.low.astype(float)
    high = space.high.astype(float)
    # an open side may also be written as a huge number
    no_low = ~space.bounded_below | (np.abs(low) > 1e15)
    no_high = ~space.bounded_above | (np.abs(high) > 1e15)
    low = np.where(no_low, high - 2, low)
    low = np.where(no_low & no_high, -1, low)
    high = np.where(no_high, low + 2, high)
    return low, high


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, C) -> (height, width, C). OpenCV's limit is 4 channels at a time."""
    if image.shape[:2] == (height, width):
        return image
    parts = np.split(image, range(4, image.shape[2], 4), axis=2)
    parts = [cv2.resize(x, (width, height), interpolation=cv2.INTER_AREA) for x in parts]
    return np.dstack(parts)


class Frames(gym.Wrapper):
    """What `render` returns, as RGB frames of one size that a video can be made of: at most 320
    wide and high, both even. One that cannot be taken repeats the last one."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.last = None

    def render(self) -> np.ndarray:
        try:
            frame = np.asarray(self.env.render())
            if frame.ndim == 2:
                frame = frame[..., None]
            frame = np.broadcast_to(frame[..., :3], (*frame.shape[:2], 3)).astype(np.uint8)
            height, width = frame.shape[:2] if self.last is None else self.last.shape[:2]
            shrink = min(1.0, 320 / max(height, width))
            height = 2 * max(1, round(height * shrink / 2))
            width = 2 * max(1, round(width * shrink / 2))
            self.last = resize(np.ascontiguousarray(frame), height, width)
        except Exception as error:
            if self.last is None:
                self.last = np.zeros((64, 64, 3), np.uint8)
                print(f"warning: a frame cannot be recorded, {error}", flush=True)
        return self.last


class Recorder(gym.wrappers.RecordVideo):
    """Gymnasium's RecordVideo, one video an episode, of some 3,000 frames at most. A video that
    cannot be written costs a warning, not the run."""

    def __init__(self, env: gym.Env, folder: Path, repeat: int, every_episode: bool):
        schedule = (lambda episode: True) if every_episode else None
        fps = max(1, round((env.metadata.get("render_fps") or 30) / repeat))
        super().__init__(env, str(folder), schedule, video_length=3000, fps=fps)

    def reset(self, **options):
        if self.recording:
            self.stop_recording()
        return super().reset(**options)

    def stop_recording(self) -> None:
        try:
            super().stop_recording()
        except Exception as error:  # of moviepy, ffmpeg, a full disk
            print(f"warning: a video cannot be written, {error}", flush=True)
            self.recorded_frames = []
            self.recording = False


class Adapter(gym.Wrapper):
    """Any supported environment as flat arrays. Raises ValueError for spaces and values that are
    not supported.

    Observations become one dict, nested keys joined by "/" (a space without keys is "obs"): images
    uint8 (image_size, image_size, C), discrete spaces int32 class indices, everything else float32
    (n,). Actions come as class indices (components,), or as real numbers (A,) that are clipped to
    [-1, 1] and rescaled to the bounds of the space. The info of a last step holds the episode's
    undiscounted return and its length in agent steps.
    """

    def __init__(self, env: gym.Env, image_size: int, repeat: int = 1):
        super().__init__(env)
        self.repeat = repeat
        self.generator = torch.Generator()  # of the environment
        self.episode_return = 0.0
        self.episode_length = 0
        self.specs = {}
        self.leaves = {}
        self.notes = []  # for the user
        for path, space in leaves(env.observation_space):
            key = "/".join(map(str, path)) or "obs"
            spec = obs_spec(space, image_size)
            if spec is None:
                self.notes.append(f"observation '{key}' ({type(space).__name__}) is left out")
                continue
            if key in self.specs:
                raise ValueError(f"two observations would be called '{key}'; rename one")
            if looks_like_image(space) and not spec.is_image:
                self.notes.append(f"observation '{key}' {space}: {NOT_AN_IMAGE}")
            self.specs[key] = spec
            self.leaves[key] = (path, space)
        if not self.specs:
            kinds = "Box, Discrete, MultiDiscrete or MultiBinary"
            raise ValueError(f"no {kinds} space in {env.observation_space}")
        flat = {key: array_space(spec) for key, spec in self.specs.items()}
        self.observation_space = spaces.Dict(flat)

        space = env.action_space
        counts = class_counts(space)
        if counts is not None:
            nvec = tuple(counts.ravel().tolist())
            self.action_spec = ActionSpec(nvec, sum(nvec))
            self.action_space = spaces.MultiDiscrete(nvec)
        elif isinstance(space, spaces.Box) and 0 not in space.shape:
            self.low, self.high = action_bounds(space)
            self.action_spec = ActionSpec((), self.low.size)
            self.action_space = spaces.Box(-1, 1, (self.low.size,))
        else:
            kinds = "Discrete, MultiDiscrete, MultiBinary and Box, not empty"
            raise ValueError(f"action space {space}; supported are {kinds}")

    def reset(self, **options):
        """As Gymnasium's, but without info."""
        if options.get("seed") is not None:
            self.generator.manual_seed(options["seed"] + 1)  # other numbers than the agent's
        with foreign_code(self.generator):
            result = self.env.reset(**options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(OLD_GYM)
        self.episode_return = 0.0
        self.episode_length = 0
        return self.observation(result[0]), {}

    def step(self, action: np.ndarray):
        """As Gymnasium's, for an action (components,) or (A,)."""
        with foreign_code(self.generator):
            result = self.env.step(self.inner_action(action))
        obs, reward, terminated, truncated, _ = result
        self.episode_return += reward
        self.episode_length += 1
        info = {}
        if terminated or truncated:
            info["episode_return"] = self.episode_return
            info["episode_length"] = self.episode_length
        return self.observation(obs), reward, terminated, truncated, info

    def close(self) -> None:
        """As Gymnasium's."""
        with foreign_code(self.generator):
            super().close()

    def inner_action(self, action: np.ndarray):
        """An action as the wrapped environment takes it."""
        space = self.env.action_space
        if self.action_spec.nvec:
            x = action.reshape(space.shape) + getattr(space, "start", 0)
        else:
            share = (np.clip(action, -1, 1).reshape(space.shape) + 1) / 2
            x = self.low + share * (self.high - self.low)
            if np.issubdtype(space.dtype, np.integer):
                x = x.round()
            x = x.clip(self.low, self.high)  # after rounding
        if isinstance(space, spaces.Discrete):
            return int(x)
        return x.astype(space.dtype)

    def observation(self, observation) -> dict[str, np.ndarray]:
        """One flat array per key, of the declared shape, with classes that exist and finite
        numbers."""
        flat = {}
        for key, (path, space) in self.leaves.items():
            x = observation
            for name in path:
                x = x[name]
            x = np.asarray(x)
            spec = self.specs[key]
            if x.shape != space.shape or not is_valid(x, space, spec):
                came = f"{x.dtype} {x.shape} {x}"
                raise ValueError(f"observation '{key}' is declared {space} and came as {came}")
            if spec.is_image:
                x = resize(x, *spec.shape[:2])
            x = x - getattr(space, "start", 0)
            flat[key] = x.astype(spec.dtype).reshape(spec.shape)
        return flat


def is_valid(x: np.ndarray, space: gym.Space, spec: ObsSpec) -> bool:
    """Whether the networks can take this value of an observation key."""
    kind = x.dtype.kind  # NumPy's letters: unsigned, integer, bool, float
    if spec.is_image:
        return x.dtype == np.uint8
    if spec.classes:
        if kind not in "iub":
            return False
        value = x if x.ndim else x.item()  # of an int, Discrete checks the value, not the dtype
        return space.contains(value)
    if kind not in "iubf":
        return False
    return bool(np.isfinite(x.astype(np.float32)).all())


# === 10. Command line, device =====================================================================
class UserError(Exception):
    """Something the user of the program can fix: the command line prints it in one line."""


class NotFinite(FloatingPointError):
    """A metric, a latent or a weight is not finite: the run ends without another checkpoint."""


@contextmanager
def blame(what: str):
    """An exception inside becomes a UserError that begins with `what`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error


def command_line(argv: list[str] | None = None) -> None:
    """The program: prints a UserError in one line and exits with status 2."""
    try:
        args = parse_args(argv)
        if args.eval_only:
            evaluate_only(args)
        else:
            main(args)
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"dreamerv3.py: error: {message[:1000]}", file=sys.stderr)
        sys.exit(2)


def parse_args(argv: list[str] | None) -> Args:
    """Flags of the command line; with --resume, those of the run to continue are the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", default="")
    with parser_errors():
        resume = parser.parse_known_args(argv)[0].resume
    default = Args()
    if resume:
        with blame(f"--resume {resume}"):
            default = Args(**load_checkpoint(resume)["args"])
    description = __doc__.split("\n\n")[0]
    with parser_errors():
        args, unknown = tyro.cli(
            Args, args=argv, default=default, description=description, return_unknown_args=True
        )
    if unknown:
        raise UserError(f"unknown flag {' '.join(unknown)}; --help lists all flags")
    return args


@contextmanager
def parser_errors():
    """What a parser of flags prints in a box before it exits becomes a UserError."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except SystemExit as error:
        if error.code:  # 0 after --help
            raise UserError(re.sub("[─│╭╮╰╯]|---+", " ", printed.getvalue())) from None
        raise


def check_args(args: Args) -> None:
    """Raise UserError when a flag has an impossible value."""
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    num_envs = args.num_envs * num_processes
    least_start = args.batch_length * num_envs
    least_total = (args.batch_length + 1) * num_envs
    one_batch = args.batch_length * args.batch_size
    one_window = (args.batch_length + 1) * args.num_envs
    least_buffer = max(one_batch, one_window)
    rules = [
        ("num_envs", args.num_envs > 0, "positive"),
        ("batch_size", args.batch_size > 0, "positive"),
        ("batch_length", args.batch_length > 1, "at least 2"),
        (
            "total_timesteps",
            args.total_timesteps >= least_total,
            f"at least {least_total}, a sequence and a step each",
        ),
        ("unimix", args.unimix < 1, "below 1"),
        ("actor_unimix", args.actor_unimix < 1, "below 1"),
        ("bins", args.bins >= 3 and args.bins % 2 == 1, "odd, so that one is 0, and at least 3"),
        ("imagination_horizon", args.imagination_horizon > 0, "positive"),
        ("gamma", args.gamma < 1, "below 1"),
        ("return_lambda", args.return_lambda <= 1, "at most 1"),
        ("tau", args.tau <= 1, "at most 1"),
        ("learning_rate", args.learning_rate > 0, "positive"),
        ("clip", args.clip > 0, "positive"),
        ("train_ratio", args.train_ratio > 0, "positive"),
        (
            "learning_starts",
            args.learning_starts >= least_start,
            f"at least {least_start}, a sequence each",
        ),
        ("learning_starts", args.learning_starts <= args.total_timesteps, "at most the total"),
        ("buffer_size", args.buffer_size >= least_buffer, f"at least {least_buffer}"),
        ("image_size", args.image_size in range(48, 257, 16), "a multiple of 16 from 48 to 256"),
        ("log_frequency", args.log_frequency > 0, "positive"),
        ("eval_episodes", args.eval_episodes > 0, "positive"),
        ("eval_only", args.resume or not args.eval_only, "used with --resume"),
        ("seed", args.seed < 2**32, "below 2^32"),
        ("env_kwargs", is_json_object(args.env_kwargs), "a JSON object, like '{\"key\": 1}'"),
        ("exp_name", ".." not in args.exp_name, "without '..'"),
    ]
    for name, value in asdict(args).items():
        if not isinstance(value, str):
            rules.append((name, 0 <= value < math.inf, "a number, at least 0"))
    for name, good, limit in rules:
        if not good:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, name)} must be {limit}")


def is_json_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def set_up_torch(args: Args) -> torch.device:
    """Join the processes of torchrun, check the flags, choose the device, which it prints, resolve
    the `auto` flags for it, set torch's switches and all seeds."""
    cuda = torch.cuda.is_available() and args.cuda
    rank = 0
    if dist.is_torchelastic_launched():
        if cuda:
            gpus = torch.cuda.device_count()
            processes = int(os.environ["LOCAL_WORLD_SIZE"])
            if processes > gpus:
                raise UserError(f"--nproc-per-node {processes} is more than the {gpus} GPUs here")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # evaluations are long
        rank = dist.get_rank()
        if rank > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    check_args(args)

    if cuda:
        device = torch.device("cuda")
        name = torch.cuda.get_device_name()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device = torch.device("cpu")
        name = f"{torch.get_num_threads()} threads"
        native = torch.cpu._is_avx512_bf16_supported()
        keep_freed_memory()
    if args.size == "auto":
        args.size = "12m" if cuda else "1m"
    if args.precision == "auto":
        args.precision = "bfloat16" if native else "float32"
    absent = ", CUDA is not available" if args.cuda and not cuda else ""
    print(f"device: {device} ({name}), {args.precision}{absent}")

    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in convolutions too
    torch.backends.cudnn.deterministic = args.torch_deterministic
    use_compiler(args.compile, device)
    seed_all(args.seed + 1000 * rank)
    return device


def keep_freed_memory() -> None:
    """On a CPU, keep what an update frees for the next one: an image update takes 7 % less time at
    1m, 19 % less at 12m."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def use_compiler(wanted: bool, device: torch.device) -> None:
    """Whether the functions decorated with torch.compile are compiled when they are first called,
    or run as they are. torch's default mode is right on CUDA too: others make graphs of functions,
    `Graph` makes one of the update."""
    torch.compiler.set_stance("default" if wanted else "force_eager")
    if not wanted:
        return
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:  # compilers fail in many ways
        reason = f"{type(error).__name__}: {str(error)[:200]!r}"
        print(f"cannot compile, going on in eager mode: {reason}", flush=True)
        torch.compiler.set_stance("force_eager")
        return
    print("compiling: the first update takes a minute or two, later seconds", flush=True)
    torch._dynamo.config.cache_size_limit = 64  # shapes per function, else silently eager
    torch._dynamo.config.optimize_ddp = False  # it would split the compiled functions at buckets


# === 11. The run: folder, checkpoints, signals; the log ===========================================
class Run:
    """One training run: its folder, counters and checkpoints, and the signals that stop it.

    `with Run(args) as run:` locks the folder, `with run.saving():` saves a checkpoint at the end.
    Raises UserError when the folder cannot be read or another process trains there. Under torchrun
    the first process writes all but the others' replay buffers, and a signal or a failure of
    another process ends the run at its last checkpoint.
    """

    def __init__(self, args: Args):
        self.args = args
        self.num_processes = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.writes = self.rank == 0
        self.all_envs = args.num_envs * self.num_processes  # their steps add up
        self.step = 0  # agent steps
        self.updates = 0
        self.trained = args.learning_starts  # the agent step that updates have reached
        self.stopped = 0  # number of the signal that is to end the run
        self.failed = False  # whether it ends without a checkpoint
        self.agent = None  # until `begin`
        self.state = None  # the checkpoint to go on from
        self.handlers = {}  # of signals, to be restored
        self.path = run_folder(args)  # as the user reads it
        self.folder = self.path.resolve()  # environments may change the current folder
        self.video_folder = Path("videos", run_name(self.folder)).resolve()

    def __enter__(self) -> "Run":
        self.began = time.time()
        if self.writes:
            self.lock = lock_folder(self.folder, self.args)
        if self.args.resume:
            with blame(f"--resume {self.args.resume}"):
                self.state = load_checkpoint(self.args.resume)
                if "optimizer" not in self.state:
                    raise UserError("it holds weights alone; name a run folder to go on training")
                self.step = self.state["step"]
                self.updates = self.state["updates"]
                self.trained = self.state["trained"]
                self.began -= self.state["seconds"]  # as if it had never paused
        self.seed = self.args.seed + 1000 * self.rank + self.step  # of the environments
        if self.num_processes == 1 and threading.current_thread() is threading.main_thread():
            self.handlers = catch_signals(self.stop)
        return self

    def stop(self, number: int, frame) -> None:
        """The first signal ends the run after this step; the same one again ends the program."""
        self.stopped = number
        signal.signal(number, signal.SIG_DFL)
        print_if_possible("\nstopping after this step, then saving; once more to exit at once")

    def begin(self, agent: Agent, optimizer: LaProp, replay: Replay) -> None:
        """Take the parts of the run; after --resume, set them to what the checkpoint holds."""
        self.optimizer = optimizer
        self.replay = replay
        if self.state:
            with blame(f"--resume {self.args.resume} does not fit"):
                self.load(agent, self.state)
            self.state = None  # free its memory
        self.agent = agent
        parameters = sum(p.numel() for p in agent.trained())
        print(f"size: {self.args.size}, {parameters:,} trained parameters")
        print(f"run folder: {self.path}", flush=True)
        if not self.args.resume:
            self.save()  # a run that is killed before the next checkpoint can be resumed
        for number in self.handlers:
            if number != self.stopped:
                signal.signal(number, self.stop)  # an environment may have set its own

    def load(self, agent: Agent, state: dict) -> None:
        """Weights, optimizer, replay and random state of a checkpoint."""
        agent.load_state_dict(state["agent"])
        optimizer = self.optimizer.state_dict()  # with the hyperparameters of the flags
        optimizer["state"] = copy.deepcopy(state["optimizer"]["state"])  # lets go of the file
        self.optimizer.load_state_dict(optimizer)
        if self.num_processes == 1:
            set_random_state(state)
        else:
            torch.manual_seed(self.seed)
        if self.writes:
            self.replay.load_state_dict(state["replay"])  # the other processes draw anew
        made = f"step {self.step:,} after {self.updates:,} updates"
        print(f"resumed at {made}, {len(self.replay):,} steps in the replay buffer")
        now = smallest(self.replay.now)
        extra = (now - state["replay"]["now"]) * self.all_envs
        if extra > 0:
            print(f"{extra:,} steps were stored after the checkpoint; they are kept")
            self.seed += extra  # not the same episodes once more
        missing = self.args.learning_starts - now * self.all_envs
        if missing > 0:  # the buffer was not saved, or a process is new
            print(f"collecting {missing:,} steps before the next update")
            self.trained = self.step + missing

    def save(self) -> None:
        """Write checkpoint.pt (and model.pt). Raises NotFinite if a weight is not finite."""
        if not math.isfinite(global_norm(self.agent.trained())):
            raise NotFinite(f"a weight is not finite at step {self.step}: not saved")
        if not self.writes:
            return
        self.replay.flush()
        model = model_state(self.agent, self.args)
        state = {
            **model,
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            **random_state(),
            "step": self.step,
            "updates": self.updates,
            "trained": self.trained,
            "seconds": time.time() - self.began,
        }
        save_atomically(state, self.folder / "checkpoint.pt")
        if self.args.save_model:
            save_atomically(model, self.folder / "model.pt")

    @contextmanager
    def saving(self):
        """Save a checkpoint when the block ends, also by an exception, unless the model diverged.
        This comes before the environments are closed, which may hang or crash."""
        try:
            yield
        except NotFinite:
            self.failed = True
            raise
        finally:
            if self.agent is not None and not self.failed:
                self.failed = True  # until it is written
                self.save()
                self.failed = False

    def videos(self, kind: str) -> Path | None:
        """The folder for videos of a kind, None when there are to be none."""
        return self.video_folder / kind if self.args.capture_video and self.writes else None

    def due(self, frequency: int) -> bool:
        """Whether this step is the first at or after a multiple of `frequency`; 0: never."""
        return frequency > 0 and self.step % frequency < self.all_envs

    def __exit__(self, *exception) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.writes:
            self.lock.release()
        if self.agent is None and self.writes and not self.args.resume:  # nothing has begun
            remove_folder(self.folder, len(self.path.parents) - 1)
        if self.stopped and not self.failed:
            if self.agent is not None:
                resume = f"python dreamerv3.py --resume {shlex.quote(str(self.path))}"
                print(f"stopped at step {self.step:,}; continue with: {resume}")
            sys.exit(128 + self.stopped)


def catch_signals(handler) -> dict[int, object]:
    """Let Ctrl-C, SIGTERM and a closed terminal call the handler, unless they are ignored: -> the
    handlers that they had."""
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGHUP: not on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    return before


def random_state() -> dict:
    """The state of torch's generators, as a checkpoint has it."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch_rng": torch.get_rng_state(), "cuda_rng": on_gpus}


def set_random_state(state: dict) -> None:
    """Set torch's generators to what a checkpoint has; there may be fewer GPUs now."""
    torch.set_rng_state(state["torch_rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])


def smallest(number: int) -> int:
    """The smallest of the numbers that the training processes call this with."""
    if not dist.is_initialized():
        return number
    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return min(numbers)


class Log:
    """TensorBoard, episodes.csv, dreams, evaluations and the progress bar of a run. Under torchrun
    only the first process writes: its own episodes, and the losses of its part of the batch."""

    def __init__(self, args: Args, run: Run):
        self.args = args
        self.run = run
        self.returns = deque(maxlen=20)  # of the last episodes
        self.patience = run.step + 20_000 * run.all_envs  # agent step by which one should end
        self.start_window()
        self.bar = tqdm(
            total=args.total_timesteps,
            initial=run.step,
            unit=" steps",
            mininterval=0.5 if sys.stderr.isatty() else 20,
            delay=0.1,  # not before the lines that come first
            disable=not run.writes,
        )
        if not run.writes:
            return
        if args.track:
            with blame("--track cannot start (pip install wandb, then wandb login)"):
                track(args, run_name(run.folder))
        with blame(f"the run folder {run.path} cannot be written"):
            path = run.folder / "episodes.csv"
            lost = None  # the first step that is made again, after a kill
            if args.resume:
                lost = run.step + 1
                drop_episodes(path, lost)
            self.csv = open(path, "a", buffering=1)
            self.writer = SummaryWriter(run.folder, purge_step=lost)
        rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
        table = "\n".join(["|param|value|", "|-|-|", *rows])
        self.writer.add_text("hyperparameters", table, run.step)
        if self.csv.tell() == 0:
            self.csv.write("global_step,frames,return,length,seconds\n")

    def start_window(self) -> None:
        """Forget the metrics that have been recorded."""
        self.metrics = []  # of every update since, on the device
        self.updating = 0.0  # seconds of sampling, updates and dreams since
        self.window_began = time.time()
        self.window_step = self.run.step
        self.window_updates = self.run.updates

    def record(self, values: dict[str, float]) -> None:
        """Scalars of this agent step."""
        if self.run.writes:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.run.step)

    def episodes(self, infos: dict) -> None:
        """Record the episodes that have just ended."""
        run = self.run
        for i in np.flatnonzero(infos.get("_episode_return", [])):
            score = float(infos["episode_return"][i])
            length = int(infos["episode_length"][i])
            self.returns.append(score)
            self.record({"charts/episodic_return": score, "charts/episodic_length": length})
            if run.writes:
                frames = run.step * self.args.action_repeat
                seconds = time.time() - run.began
                self.csv.write(f"{run.step},{frames},{score:g},{length},{seconds:.1f}\n")
        if run.step >= self.patience and not self.returns:
            self.patience = math.inf  # said once
            tqdm.write(
                "note: no episode has ended yet, so there are no returns; training needs none. "
                "gymnasium.wrappers.TimeLimit cuts episodes"
            )

    def update(self, metrics: dict[str, Tensor]) -> None:
        """Keep the metrics of an update, on the device, until they are recorded."""
        self.metrics.append(metrics)

    def means(self) -> None:
        """Move the progress bar and, every --log-frequency steps, record the means of the metrics.
        Raises NotFinite when one of them is not finite."""
        run = self.run
        mean = f"{np.mean(self.returns):.1f}" if self.returns else "none yet"
        self.bar.set_postfix_str(f"mean return {mean}, {run.updates:,} updates", refresh=False)
        self.bar.update(run.step - self.bar.n)
        if not self.metrics or not run.due(self.args.log_frequency):
            return

        values = {}
        for name in self.metrics[0]:
            values[name] = torch.stack([x[name] for x in self.metrics]).mean().item()
            if not math.isfinite(values[name]):
                raise NotFinite(f"{name} is not finite at step {run.step}")
        seconds = time.time() - self.window_began
        batch_steps = self.args.batch_size * self.args.batch_length * run.num_processes
        values["charts/SPS"] = (run.step - self.window_step) / seconds
        values["charts/updates_per_second"] = (run.updates - self.window_updates) / seconds
        values["charts/time_share_update"] = self.updating / seconds
        values["charts/updates"] = run.updates
        values["charts/frames"] = run.step * self.args.action_repeat
        values["charts/train_ratio"] = run.updates * batch_steps / run.step
        self.record(values)
        self.start_window()

    def dream(self, agent: Agent, batch: dict) -> None:
        """Every --video-frequency updates, draw what the model predicts for a batch."""
        run = self.run
        frequency = self.args.video_frequency
        if run.writes and frequency > 0 and run.updates % frequency == 0:
            write_dream(agent, batch, run.folder, self.writer, run.step, run.updates)

    def evaluate(self, agent: Agent) -> None:
        """Play and record whole episodes; other processes wait at their next update."""
        args = self.args
        run = self.run
        if not run.writes:
            return
        videos = run.videos(f"eval-{run.step}")
        try:
            returns = evaluate(agent, args, args.eval_episodes, args.seed + run.step, videos, run)
        except UserError as error:
            message = " ".join(str(error).split())
            tqdm.write(f"warning: {message}; training goes on without it")
            return
        if len(returns) == args.eval_episodes:  # not stopped before
            self.record({"eval/episodic_return": np.mean(returns)})

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        if not self.run.writes:
            return
        self.writer.close()
        self.csv.close()
        if self.args.track:
            import wandb

            if self.args.capture_video:
                wandb.save(f"{self.run.video_folder}/*/*.mp4", policy="now")
            # a second run of the same program is one of its own; one that raised counts as failed
            wandb.finish(exit_code=0 if exception[0] is None else 1)


def drop_episodes(path: Path, step: int) -> None:
    """Remove the rows of episodes.csv from this agent step on, and one that was not finished."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = lines[:1]  # the header
    for line in lines[1:]:
        if line.endswith("\n") and int(line.split(",")[0]) < step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def run_folder(args: Args) -> Path:
    """That of --resume, which may name a file in it, or else runs/{env_id}__{exp_name}__{seed}__
    {time}, without characters that a file system refuses."""
    if args.resume:
        path = Path(args.resume)
        return path if path.is_dir() else path.parent
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    for character in '<>:"\\|?*':
        name = name.replace(character, "-")
    names = [name]
    if dist.is_initialized():
        dist.broadcast_object_list(names)  # one folder for all
    return Path("runs", names[0])


def lock_folder(folder: Path, args: Args) -> FileLock:
    """So that two processes never write one run folder; makes it for a new run. The system drops
    the lock of a process that is killed."""
    with blame(f"the run folder {folder} cannot be written"):
        if not args.resume:
            folder.mkdir(parents=True, exist_ok=dist.is_initialized())
        lock = FileLock(folder / "lock")
        with suppress(Timeout):
            lock.acquire(timeout=0)
    if not lock.is_locked:
        raise UserError(f"another process trains the run {folder}; end it first")
    return lock


def remove_folder(folder: Path, depth: int) -> None:
    """Remove a run folder, and of `depth` folders above it those that it leaves empty."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents[:depth]:
        with suppress(OSError):  # other runs are there
            parent.rmdir()


def print_if_possible(text: str) -> None:
    """Print, unless the Ctrl-C that stops the run has ended `| tee` too; then nothing is printed
    from now on."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)


def run_name(folder: Path) -> str:
    """The part of a run folder's path below runs/, which may contain slashes; of a folder that was
    moved elsewhere the last part."""
    path = folder.resolve()
    _, runs, name = path.as_posix().rpartition("/runs/")
    return name if runs else path.name


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint of a run folder, or this file. Raises what torch.load raises."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    # weights_only: a stranger's file cannot run code; mmap: what is not used is not read
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or "args" not in state:
        raise UserError(f"{path} is not a checkpoint of this program")
    return upgrade(state)


def upgrade(state: dict) -> dict:
    """A checkpoint of the program before December 2026 as one of today."""
    args = state["args"]
    args.setdefault("twohot_mean", "exact")
    if "owed" in state:
        steps_per_update = args["batch_size"] * args["batch_length"] / args["train_ratio"]
        state["step"] = state["global_step"]
        state["trained"] = state["step"] - state["owed"] * steps_per_update
        if state["updates"] == 0:
            state["trained"] = args["learning_starts"]
        args["buffer_size"] = state["capacity"]
        for tensors in state["optimizer"]["state"].values():
            tensors["exp_avg"] = tensors.pop("mean")
            tensors["exp_avg_sq"] = tensors.pop("square")
    return state


def model_state(agent: Agent, args: Args) -> dict:
    """What model.pt holds: all that load_agent needs."""
    return {
        "args": asdict(args),
        "specs": {key: tuple(spec) for key, spec in agent.specs.items()},
        "action": tuple(agent.action),
        "agent": agent.state_dict(),
    }


def save_atomically(state: dict, path: Path) -> None:
    """Write aside, then rename: at every moment the file at `path` is whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk needs the space


def make_replay(args: Args, agent: Agent, run: Run) -> Replay:
    """The replay buffer of one process, in the run folder or in RAM. Resolves args.buffer_size."""
    layout = {f"obs/{key}": (spec.shape, spec.dtype) for key, spec in agent.specs.items()}
    if agent.action.nvec:
        layout["action"] = ((len(agent.action.nvec),), np.int32)
    else:
        layout["action"] = ((agent.action.size,), np.float32)
    layout["reward"] = ((), np.float32)
    layout["deter"] = ((agent.size.deter,), np.float16)
    layout["stoch"] = ((agent.size.groups,), np.uint8)
    assert agent.size.classes <= 256, "a class of z does not fit into uint8"
    if not args.resume:  # a run keeps its buffer
        capacity = min(args.buffer_size, args.total_timesteps // run.num_processes)
        args.buffer_size = max(capacity, args.batch_size * args.batch_length)
    gigabytes = args.buffer_size * Replay.bytes_per_step(layout) / 1e9
    print(f"replay: {args.buffer_size:,} steps take {gigabytes:.2f} GB")

    folder = None
    if args.persist_replay:
        folder = run.folder / ("replay" if run.rank == 0 else f"replay{run.rank}")
    failed = f"--buffer-size {args.buffer_size}: no replay buffer in {run.folder}"
    if args.resume:
        failed = f"--resume {args.resume}: its replay buffer does not fit the flags"
    with blame(failed):
        return Replay(
            args.buffer_size,
            args.num_envs,
            layout,
            args.batch_length,
            args.replay_windows,
            args.seed + 1000 * run.rank,
            folder,
        )


def track(args: Args, name: str) -> None:
    """Send what TensorBoard gets, and the three source files, to Weights & Biases; a resumed run
    goes on there."""
    import wandb

    run_id = name
    for character in ":;,#?/'":
        run_id = run_id.replace(character, "-")
    wandb.init(
        project=args.wandb_project_name,
        entity=args.wandb_entity or None,
        config=vars(args),
        name=name,
        id=run_id,
        resume="allow",
        sync_tensorboard=True,
        save_code=True,
    )
    here = Path(__file__).parent
    for file in ("dreamerv3.py", "networks.py", "replay.py"):
        wandb.save(str(here / file), base_path=here, policy="now")


# === 12. Evaluation, dreams, CUDA graphs ==========================================================
def load_agent(
    path: str | Path, device: str | torch.device = "cpu", args: Args | None = None
) -> tuple[Agent, Args]:
    """The agent of a run folder, a checkpoint or a model.pt, and its flags: those it was trained
    with, or args. Raises what torch.load and load_state_dict raise."""
    state = load_checkpoint(path)
    if args is None:
        args = Args(**state["args"])
    if "specs" not in state:  # older than December 2026: ask an environment
        kwargs = json.loads(args.env_kwargs)
        with closing(make_env(args.env_id, args.image_size, args.action_repeat, kwargs)) as env:
            state["specs"] = env.specs
            state["action"] = env.action_spec
    specs = {key: ObsSpec(*spec) for key, spec in state["specs"].items()}
    agent = Agent(specs, ActionSpec(*state["action"]), SIZES[args.size], args).to(device)
    agent.load_state_dict(state["agent"])
    return agent, args


def evaluate_only(args: Args) -> None:
    """--eval-only."""
    args = copy.copy(args)
    args.compile = False  # a policy never is
    device = set_up_torch(args)
    with blame(f"--resume {args.resume}"):
        agent, _ = load_agent(args.resume, device, args)
    name = run_name(run_folder(args))
    videos = Path("videos", name, "eval-only").resolve() if args.capture_video else None
    evaluate(agent, args, args.eval_episodes, args.seed, videos)


def evaluate(
    agent: Agent,
    args: Args,
    episodes: int,
    seed: int,
    videos: Path | None = None,
    run: Run | None = None,
) -> list[float]:
    """Undiscounted returns of whole episodes in an environment of its own, whose first reset takes
    the seed; videos: a folder for one mp4 each. Ends early when the run is stopped. Changes neither
    the agent nor torch's random state. Raises UserError when the environment cannot be made."""
    device = agent.return_norm.lo.device
    cuda = [device] if device.type == "cuda" else []
    needs = f"an evaluation needs an environment of its own, {args.env_id} cannot be made"
    with blame(needs):
        kwargs = json.loads(args.env_kwargs)
        env = make_env(args.env_id, args.image_size, args.action_repeat, kwargs, videos, True)
    mode = args.eval_action == "mode"
    returns = []
    steps = 0
    with closing(env), torch.random.fork_rng(cuda):
        if (env.specs, env.action_spec) != (agent.specs, agent.action):
            here = f"{env.specs} -> {env.action_spec}"
            there = f"{agent.specs} -> {agent.action}"
            raise UserError(f"--env-id {args.env_id} has {here}, the agent was trained on {there}")
        torch.manual_seed(seed)
        with blame(needs):  # some begin here
            obs, _ = env.reset(seed=seed)
        state = agent.rssm.initial(1)
        is_first = True
        while len(returns) < episodes and (run is None or not run.stopped):
            inputs = {key: torch.as_tensor(x[None]).to(device) for key, x in obs.items()}
            first = torch.tensor([is_first], device=device)
            action, state = policy(agent, inputs, state, first, mode=mode)
            action = decode_action(action, agent.action)[0].cpu().numpy()
            obs, _, terminated, truncated, info = env.step(action)
            is_first = terminated or truncated
            steps += 1
            if is_first:
                returns.append(info["episode_return"])
                if len(returns) < episodes:
                    obs, _ = env.reset()
            elif steps % 10_000 == 0:
                tqdm.write(
                    f"evaluation: {steps:,} steps, {len(returns)} of {episodes} episodes "
                    "have ended; Ctrl-C stops"
                )
    if returns:
        spread = f"mean {np.mean(returns):.1f}, std {np.std(returns):.1f}"
        ends = f"min {min(returns):g}, max {max(returns):g}"
        tqdm.write(f"evaluation: {len(returns)} episodes of {args.env_id}, return {spread}, {ends}")
    return returns


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def open_loop(agent: Agent, batch: dict, context: int = 5) -> dict[str, Tensor]:
    """Predict the first n = min(4, B) sequences of a batch (as for world_model_loss): the posterior
    sees `context` steps, then the prior goes on under the recorded actions.

    Returns for images truth, prediction and error (0.5: none) above each other, (n, T, 3h, w, C) in
    [0, 1]; else truth and prediction (n, T, 2, d), discrete keys as classes.
    """
    obs = {key: x[:4] for key, x in batch["obs"].items()}
    action = batch["prev_action"][:4]
    is_first = batch["is_first"][:4]
    deter = batch["deter"][:4]
    stoch = batch["stoch"][:4]
    length = is_first.shape[1]
    embed = agent.encoder(obs)
    generator = torch.Generator(stoch.device)  # training's noise is left alone
    u = torch.rand(length, *stoch.shape[:2], generator=generator, device=stoch.device)

    deters = []
    stochs = []
    for t in range(length):
        deter, stoch, _ = agent.rssm.observe_step(
            deter, stoch, action[:, t], embed[:, t], is_first[:, t], u[t]
        )
        if t >= context:
            logits = agent.rssm.prior(deter).float()
            stoch = OneHot(logits, agent.rssm.unimix).sample(u[t])
        deters.append(deter)
        stochs.append(stoch)
    recon = agent.decoder(torch.stack(deters, 1), torch.stack(stochs, 1))

    out = {}
    for key, x in recon.items():
        if agent.specs[key].is_image:
            truth = obs[key].float() / 255
            error = (x - truth + 1) / 2
            out[key] = torch.cat([truth, x, error], 2)
        else:
            x = x.argmax(-1) if agent.specs[key].classes else symexp(x)
            pair = [y.reshape(*is_first.shape, -1).float() for y in (obs[key], x)]
            out[key] = torch.stack(pair, 2)
    return out


def write_dream(
    agent: Agent, batch: dict, folder: Path, writer: SummaryWriter, step: int, updates: int
) -> None:
    """Draw open_loop of a batch: images into folder/dreams/{updates}.gif, vectors into .png, both
    into TensorBoard."""
    context = 5
    is_first = batch["is_first"][:4].cpu()  # (n, T)
    dream = open_loop(agent, batch, context)
    images = []
    lines = []
    for key, x in dream.items():
        x = x.cpu()
        if agent.specs[key].is_image:
            if x.shape[-1] != 3:  # not RGB: the last channel is the newest of stacked frames
                x = x[..., -1:].expand(*x.shape[:-1], 3)
            images.append(x)
        else:
            lines += [(f"{key}[{i}]", x[..., i]) for i in range(x.shape[-1])]
    path = folder / "dreams" / str(updates)
    path.parent.mkdir(exist_ok=True)
    if images:
        video = frame_video(torch.cat(images, 3), is_first, context)
        strip = [np.concatenate(row[:: math.ceil(len(row) / 16)], 1) for row in video]
        writer.add_image("dream/images", np.concatenate(strip), step, dataformats="HWC")
        frames = [np.concatenate(x, 1) for x in video.swapaxes(0, 1)]
        frames = [Image.fromarray(x).quantize(method=2) for x in frames]  # 2: the fast one
        gif = path.with_suffix(".gif")
        frames[0].save(gif, save_all=True, append_images=frames[1:], duration=100, loop=0)
    if lines:
        figure = plot_lines(lines[:: math.ceil(len(lines) / 8)], context)
        figure.savefig(path.with_suffix(".png"))
        writer.add_figure("dream/vectors", figure, step)


def frame_video(video: Tensor, is_first: Tensor, context: int) -> np.ndarray:
    """(n, T, h, w, 3) in [0, 1] -> uint8 with a border: green while the model sees the frames, red
    when it does not, white where an episode starts."""
    green_red_white = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    n, length, h, w, _ = video.shape
    kind = (torch.arange(length) >= context).long().repeat(n, 1)  # (n, T)
    kind[is_first] = 2
    framed = green_red_white[kind][:, :, None, None].repeat(1, 1, h + 4, w + 4, 1)
    framed[:, :, 2:-2, 2:-2] = video
    return (framed * 255).byte().numpy()


def plot_lines(lines: list[tuple[str, Tensor]], context: int):
    """(name, truth and prediction (n, T, 2)) -> a figure, the n sequences side by side; ticks are
    where prediction begins."""
    from matplotlib.figure import Figure  # here, because it takes half a second

    n, length, _ = lines[0][1].shape
    begin = np.arange(n) * (length + 1)
    figure = Figure((16, 1.5 * len(lines)), dpi=80, layout="constrained")
    axes = figure.subplots(len(lines), squeeze=False)[:, 0]
    for ax, (name, x) in zip(axes, lines, strict=True):
        x = F.pad(x, (0, 0, 0, 1), value=math.nan)  # a gap between sequences
        ax.plot(x.flatten(0, 1).numpy(), label=["true", "predicted"])
        ax.set(ylabel=name, xticks=begin + context, xlim=(-1, begin[-1] + length))
    ax.legend(loc="upper right")
    return figure


class Graph:
    """A function of GPU tensors, launched as one graph, since launching a kernel takes longer than
    most of them run. The first call runs the function, which loads its kernels; the next captures
    the graph, for inputs of its shapes."""

    def __init__(self, function):
        self.function = function
        self.graph = None
        self.ran = False

    def __call__(self, *inputs):
        if not self.ran:
            self.ran = True
            return self.function(*inputs)
        if self.graph is None:
            self.capture(inputs)
        tree_map(Tensor.copy_, self.inputs, inputs)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)  # the next call overwrites the graph's own

    def capture(self, inputs) -> None:
        self.inputs = tree_map(torch.clone, inputs)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            cause = error.__context__ or error
            raise UserError(f"cannot capture a CUDA graph, add --no-cudagraphs: {cause}") from error


if __name__ == "__main__":
    command_line()
