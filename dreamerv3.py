r"""DreamerV3 in one file (Hafner et al., "Mastering diverse control tasks through world models", Nature 2025).

    python dreamerv3.py --env-id ALE/Pong-v5

The algorithm in short. The agent acts in the environment and stores every step in a replay buffer. An update samples B
sequences of T steps. The world model encodes each observation x_t, runs a recurrent state-space model over the sequence
(deterministic state h_t, discrete stochastic state z_t) and learns to reconstruct x_t, to predict reward and
continuation, and to predict z_t before it sees x_t. From each of the B*T states the model then imagines H steps with
actions of the actor. The critic learns the lambda-returns of these trajectories (and of the replayed ones). The actor
learns by REINFORCE to increase them, with advantages divided by the range between the returns' 5th and 95th percentile.
One optimizer and one set of hyperparameters for every environment.

Symbols: B batch, T sequence length, N rows (B*T in imagination, environments when acting), H imagination horizon, D
width of h (deter), S groups of K classes in z (stoch), F = D + S*K features, E embedding, A action, V bins. Scalars per
step are (B, T). Everything but noise is batch-major.

Time line. Step t holds what arrived at t and the action chosen on it; reward[t] was earned by action[t-1].

      step             0          1          2         3          4
      obs              x0 ------> x1 ------> x2        x3 ------> x4        x3 comes from a reset: no arrow into it,
      action              \_ a0 _/  \_ a1 _/  (a2)      \_ a3 _/            a2 is stored but never executed
      reward           0          r1         r2        0          r4        r1 was earned by a0
      is_first         1          0          0         1          0         h, z, a of the step before are zeroed here
      is_last          0          0          1         0          0         the episode ended, for either reason
      is_terminal      0          0          1 or 0    0          0         0 when it was cut by a time limit

The first half of this file is the specification: 1 flags · 2 agent · 3 world-model loss · 4 imagination · 5
lambda-return and return range · 6 actor and critic losses · 7 optimizer · 8 update and loop. To see the whole at once,
start at `loss`, `train_step` and `main`. The second half holds everything else, from environments to checkpoints.
"""

import copy
import ctypes
import io
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial, reduce
from importlib import import_module
from pathlib import Path
from typing import Literal

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


# === 1. Flags =========================================================================================================
@dataclass
class Args:
    exp_name: str = "dreamerv3"  # the name of this experiment
    seed: int = 1  # environment i gets seed + i; process r of torchrun adds 1000 r, --resume adds the agent step
    torch_deterministic: bool = True  # sets torch.backends.cudnn.deterministic
    cuda: bool = True  # use CUDA when it is present
    track: bool = False  # send everything that TensorBoard gets to Weights & Biases too
    wandb_project_name: str = "dreamerv3"  # the project there
    wandb_entity: str = ""  # the entity (team) there; empty means your default one
    capture_video: bool = False  # record episodes of the first environment and of evaluations into videos/{run_name}
    save_model: bool = False  # save the weights alone too, into runs/{run_name}/model.pt
    # Environment
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id; module:Id imports the module first
    total_timesteps: int = 400_000  # agent steps of the run, over all environments of all processes
    num_envs: int = 1  # environments per training process; if more than one, each in a worker process
    action_repeat: int = 0  # environment steps per agent step; 0 means 4 (with max-pooling) for Atari, else 1
    image_size: int = 64  # height and width to which images are resized, a multiple of 16 from 48 to 256
    # World model
    size: Literal["auto", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "auto"  # 12m on CUDA, 1m on a CPU
    batch_size: int = 16  # B, sequences per update and training process
    batch_length: int = 64  # T, steps per sequence
    pred_scale: float = 1.0  # beta_pred, weight of the reconstruction, reward and continue losses
    dyn_scale: float = 1.0  # beta_dyn, weight of the KL loss that trains the prior (0.5 in the 2023 preprint)
    rep_scale: float = 0.1  # beta_rep, weight of the KL loss that trains the posterior
    free_nats: float = 1.0  # KL below which neither KL loss has a gradient
    unimix: float = 0.01  # uniform probability mixed into the latent categoricals
    twohot: Literal["symexp", "symlog"] = "symexp"  # bins spaced by symexp, or evenly for symlog targets (preprint)
    twohot_mean: Literal["rounded", "exact"] = "rounded"  # with the rounding of the official program, or without
    bins: int = 255  # V, bins of the reward and critic distributions, odd
    # Actor and critic
    imagination_horizon: int = 15  # H, imagined steps per start state
    gamma: float = 1 - 1 / 333  # the discount, part of the continue predictor's target
    return_lambda: float = 0.95  # lambda of the lambda-returns
    ent_coef: float = 3e-4  # eta, coefficient of the actor's entropy bonus
    actor_unimix: float = 0.01  # uniform probability mixed into a discrete actor (0 in the official code)
    tau: float = 0.02  # rate at which the slow critic follows the critic
    slow_critic_scale: float = 1.0  # weight of the critic's regularization towards the slow critic
    replay_critic_scale: float = 0.3  # weight of the critic loss on replayed trajectories
    # Optimization
    learning_rate: float = 4e-5  # the learning rate of the optimizer
    warmup_updates: int = 1000  # updates over which the learning rate rises linearly from 0
    clip: float = 0.3  # adaptive gradient clipping: largest ratio of a tensor's gradient norm to its own norm
    train_ratio: float = 256.0  # replayed steps per agent step; an update replays batch_size * batch_length steps
    learning_starts: int = 1024  # agent steps after which updates are due, at least batch_length per environment
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 where it is native
    compile: bool = True  # compile the functions that take most of an update's time; eager mode where that fails
    cudagraphs: bool = True  # on CUDA, launch the policy and the update as one graph each; not under torchrun
    # Replay
    buffer_size: int = 1_000_000  # steps kept per training process; never more than its share of total_timesteps
    replay_windows: Literal["episode", "stream"] = "episode"  # at an episode's end: start it over, or run on (official)
    persist_replay: bool = True  # keep the replay buffer in memory-mapped files of the run folder, for --resume
    # Logging
    log_frequency: int = 100  # agent steps between two records of losses in TensorBoard
    video_frequency: int = 1000  # updates between two dreams (open-loop predictions), runs/{run_name}/dreams; 0: none
    checkpoint_frequency: int = 10_000  # agent steps between two checkpoints; 0: only at the end and before evaluations
    resume: str = ""  # run folder runs/{run_name} to continue, under its stored flags
    # Evaluation
    eval_only: bool = False  # play eval_episodes with the agent of --resume (folder, checkpoint or model.pt) and exit
    eval_episodes: int = 10  # whole episodes of one evaluation
    eval_frequency: int = 0  # agent steps between two evaluations during training; 0 means never


# all widths follow from D; z always has S = 32 groups, of K = D / 128 classes
DETER = {"1m": 512, "12m": 2048, "25m": 3072, "50m": 4096, "100m": 6144, "200m": 8192, "400m": 12288}
SIZES = {name: Size(d, hidden=d // 8, units=d // 8, classes=d // 128, depth=d // 128) for name, d in DETER.items()}


# === 2. Agent and policy ==============================================================================================
class Agent(nn.Module):
    """All networks: world model (encoder, rssm, decoder, reward, cont), actor, critic, slow critic, return range.

    specs: observation key -> ObsSpec. size: an entry of SIZES. Of args, unimix, actor_unimix, bins, twohot and twohot_mean are read.
    """

    def __init__(self, specs: dict[str, ObsSpec], action: ActionSpec, size: Size, args: Args):
        super().__init__()
        self.specs, self.action, self.size = specs, action, size
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

    def trained(self) -> list[nn.Parameter]:
        """The parameters the optimizer changes: all but the slow critic's."""
        return [p for p in self.parameters() if p.requires_grad]


def get_feat(deter: Tensor, stoch: Tensor) -> Tensor:
    """(…, D), (…, S, K) -> (…, F), the input of all heads but the decoder; under autocast cast here, once for all."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cuda" if deter.is_cuda else "cpu") else torch.float32
    return torch.cat([deter, stoch.flatten(-2)], -1).to(dtype)


def encode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Stored action (…, components) -> (…, A) as the networks see it: one-hot vectors side by side, or real numbers."""
    if not spec.nvec:
        return action.float()
    return torch.cat([one_hot(action[..., i], n) for i, n in enumerate(spec.nvec)], -1)


def decode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """The inverse of encode_action: (…, A) -> (…, components), class indices or unclipped real numbers."""
    if not spec.nvec:
        return action
    return torch.stack([x.argmax(-1) for x in action.split(spec.nvec, -1)], -1)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # never compiled: its batches are small
def policy(agent: Agent, obs: dict[str, Tensor], state: tuple, is_first: Tensor) -> tuple[Tensor, tuple]:
    """Act in N environments, in float32: obs key -> (N, …), is_first (N,), state (deter, stoch, action) of the step
    before, the first being `agent.rssm.initial(N)` -> the sampled action (N, A) and a new state."""
    deter, stoch, action = state
    u = torch.rand(*stoch.shape[:2], device=stoch.device)  # (N, S), samples z
    deter, stoch, _ = agent.rssm.observe_step(deter, stoch, action, agent.encoder(obs), is_first, u)
    action = agent.actor(get_feat(deter, stoch)).sample(agent.actor.noise(len(deter)))  # (N, A)
    return action, (deter, stoch, action)


# === 3. World-model loss (paper: "World model learning") ==============================================================
def world_model_loss(agent: Agent, batch: dict, args: Args) -> tuple[dict, Tensor, Tensor, Tensor, dict]:
    """Losses of the world model on replayed sequences. batch: "obs" a dict of (B, T, …), prev_action (B, T, A), reward,
    is_first, is_last and is_terminal (B, T), deter (B, D) and stoch (B, S, K) of the step before the first. Returns
    losses, each (B, T), the posterior deter (B, T, D) and stoch (B, T, S, K) and the features (B, T, F), all three with
    gradient, and metrics."""
    start = batch["deter"], batch["stoch"]  # (B, D), (B, S, K)
    embed = agent.encoder(batch["obs"])  # (B, T, E)
    # h: (B, T, D), z: (B, T, S, K), and the logits of the posterior (B, T, S, K) that z is a sample of
    deter, stoch, post_logits = agent.rssm.observe(*start, batch["prev_action"], embed, batch["is_first"])
    prior_logits = agent.rssm.prior(deter).float()  # (B, T, S, K): the prior predicts z from h alone
    feat = get_feat(deter, stoch)  # (B, T, F)
    recon = agent.decoder(deter, stoch)  # key -> (B, T, …)
    reward_logits = agent.reward(feat)  # (B, T, V)
    cont_logit = agent.cont(feat).squeeze(-1).float()  # (B, T)
    cont_target = (~batch["is_terminal"]).float() * args.gamma  # (B, T): the predictor learns the discount too

    losses = {
        "recon": sum(recon_loss(recon[key], batch["obs"][key]) for key in recon),
        "reward": agent.twohot.loss(reward_logits, batch["reward"]),
        "continue": F.binary_cross_entropy_with_logits(cont_logit, cont_target, reduction="none"),
    }
    kl, metrics = kl_losses(post_logits, prior_logits, args)
    return losses | kl, deter, stoch, feat, metrics


def recon_loss(recon: Tensor, target: Tensor) -> Tensor:
    """Loss of one observation key, summed over all its numbers: -> (B, T). Squared error for images, which the decoder
    predicts in [0, 1], and for vectors, which it predicts in symlog space; cross-entropy for discrete keys."""
    if recon.ndim > target.ndim:  # logits of a discrete key
        error = F.cross_entropy(recon.flatten(0, -2), target.flatten().long(), reduction="none").view(target.shape)
    else:
        error = (recon - (target.float() / 255 if target.dtype == torch.uint8 else symlog(target))).square()
    return error.reshape(*error.shape[:2], -1).sum(-1)


def kl_losses(post_logits: Tensor, prior_logits: Tensor, args: Args) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dynamics and representation loss (B, T) from posterior and prior logits (B, T, S, K), and mean entropies. Free
    nats are per step: a floor under the KL summed over all S groups."""
    post, prior = OneHot(post_logits, args.unimix), OneHot(prior_logits, args.unimix)
    fixed_post, fixed_prior = OneHot(post_logits.detach(), args.unimix), OneHot(prior_logits.detach(), args.unimix)
    losses = {
        "dyn": fixed_post.kl(prior).sum(-1).clamp(min=args.free_nats),  # no gradient into the posterior's logits
        "rep": post.kl(fixed_prior).sum(-1).clamp(min=args.free_nats),  # no gradient into the prior's logits
    }
    entropies = {"prior": fixed_prior.entropy(), "posterior": fixed_post.entropy()}  # (B, T, S) each
    return losses, {f"world_model/{name}_entropy": x.sum(-1).mean() for name, x in entropies.items()}


# === 4. Imagination ===================================================================================================
@torch.no_grad()
def imagine(agent: Agent, deter: Tensor, stoch: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Roll the model forward with the actor: states (N, D), (N, S, K) -> feat (N, H+1, F), action (N, H+1, A), without
    gradient; action[:, h] is the one taken in state h, the last one is not used."""
    u = torch.rand(horizon, *stoch.shape[:2], device=stoch.device)  # (H, N, S)
    noise = agent.actor.noise(horizon + 1, len(deter))  # (H+1, N, components or A), samples actions
    feats = [get_feat(deter, stoch)]
    actions = [agent.actor(feats[0]).sample(noise[0])]
    for h in range(horizon):
        deter, stoch, feat, action = imagine_step(agent, deter, stoch, actions[-1], u[h], noise[h + 1])
        feats.append(feat)
        actions.append(action)
    torch.clear_autocast_cache()  # else some releases of torch reuse its gradient-free casts of weights in the losses
    return torch.stack(feats, 1), torch.stack(actions, 1)


def imagine_step(agent: Agent, deter: Tensor, stoch: Tensor, action: Tensor, u: Tensor, noise: Tensor):
    """State (N, D), (N, S, K) and action (N, A) -> deter, stoch, feat (N, F) and action (N, A) of the next step.
    Noise is passed in so that compiled and plain functions use the same numbers."""
    deter, stoch = agent.rssm.predict_step(deter, stoch, action, u)
    feat = get_feat(deter, stoch)
    return deter, stoch, feat, agent.actor(feat).sample(noise)


# === 5. Lambda-return and return range (paper: "Critic learning", "Actor learning") ===================================
@torch.compiler.disable  # an unrolled loop takes long to compile and saves at most 2 % of an update
def lambda_return(last: Tensor, term: Tensor, reward: Tensor, boot: Tensor, disc: float = 1, lam: float = 0.95):
    """Lambda-returns of trajectories of length L: tensors (N, L) -> (N, L-1).

    R[t] = reward[t+1] + live[t+1] * ((1 - trace[t+1]) * boot[t+1] + trace[t+1] * R[t+1]), R[L-1] = boot[L-1], where
    live = (1 - term) * disc is 0 at terminations; trace = (1 - last) * lam is 0, so that R bootstraps, at episode ends.
    """
    live = (1 - term.float()) * disc
    trace = (1 - last.float()) * lam
    returns = [boot[:, -1]]
    for t in reversed(range(reward.shape[1] - 1)):
        future = (1 - trace[:, t + 1]) * boot[:, t + 1] + trace[:, t + 1] * returns[-1]
        returns.append(reward[:, t + 1] + live[:, t + 1] * future)
    return torch.stack(returns[1:][::-1], 1)  # in the order of time, without R[L-1]


class ReturnNorm(nn.Module):
    """Running 5th and 95th percentile of the returns; advantages are divided by their distance, at least 1."""

    def __init__(self):
        super().__init__()
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    @torch.compiler.disable  # a sort: compiling has nothing to fuse
    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Move towards the percentiles of returns (any shape), interpolated between neighbors."""
        ordered = returns.flatten().sort().values  # (n,); torch.quantile waits for the device in torch 2.6
        for running, q in ((self.lo, 0.05), (self.hi, 0.95)):
            rank = q * (len(ordered) - 1)
            percentile = ordered[int(rank)].lerp(ordered[math.ceil(rank)], rank % 1)  # ()
            running.lerp_(percentile, 0.01)  # decay 0.99, from 0, without bias correction

    @property
    def scale(self) -> Tensor:
        """max(1, hi - lo), a scalar."""
        return (self.hi - self.lo).clamp(min=1)


# === 6. Actor and critic losses (paper: "Critic learning", "Actor learning") ==========================================
def actor_critic_loss(agent: Agent, feat: Tensor, action: Tensor, args: Args) -> tuple[dict[str, Tensor], Tensor, dict]:
    """Losses on imagined trajectories feat (N, H+1, F), action (N, H+1, A), neither with gradient: -> the losses and
    the lambda-returns R, (N, H) each, and metrics. Updates the return range."""
    with torch.no_grad():
        reward = agent.twohot.mean(agent.reward(feat))  # (N, H+1)
        cont = agent.cont(feat).squeeze(-1).float().sigmoid()  # (N, H+1), the discount is in it
    value_logits = agent.critic(feat)  # (N, H+1, V)
    value = agent.twohot.mean(value_logits.detach())  # (N, H+1), bootstraps returns; the slow critic only regularizes
    weight = cont.cumprod(1)[:, :-1]  # (N, H), cont[0] * … * cont[h]: the discounted probability to get past state h
    last = torch.zeros_like(cont)  # imagined episodes end only by termination
    returns = lambda_return(last=last, term=1 - cont, reward=reward, boot=value, lam=args.return_lambda)  # (N, H)

    agent.return_norm.update(returns)
    advantage = (returns - value[:, :-1]) / agent.return_norm.scale  # (N, H)
    pi = agent.actor(feat[:, :-1])
    entropy = pi.entropy()  # (N, H)
    actor_loss = -weight * (pi.log_prob(action[:, :-1]) * advantage + args.ent_coef * entropy)  # (N, H)
    losses = {"actor": actor_loss, "critic": weight * critic_loss(agent, feat, value_logits, returns, args)}  # (N, H)
    metrics = {"return_mean": returns, "return_scale": agent.return_norm.scale, "advantage_mag": advantage.abs()}
    metrics |= {"value_mean": value, "reward_mean": reward, "continue_mean": cont, "actor_entropy": entropy.detach()}
    return losses, returns, {f"behavior/{name}": x.mean() for name, x in metrics.items()}


def replay_critic_loss(agent: Agent, feat: Tensor, batch: dict, boot: Tensor, args: Args) -> Tensor:
    """Critic loss on replayed trajectories: feat (B, T, F) with gradient into the world model, boot (B, T) the imagined
    return from every state -> (B, T-1)."""
    steps = {"last": batch["is_last"], "term": batch["is_terminal"], "reward": batch["reward"], "boot": boot}
    returns = lambda_return(**steps, disc=args.gamma, lam=args.return_lambda)  # (B, T-1)
    weight = (~batch["is_last"][:, :-1]).float()  # (B, T-1), a last step has no successor in its episode
    return weight * critic_loss(agent, feat, agent.critic(feat), returns, args)


def critic_loss(agent: Agent, feat: Tensor, logits: Tensor, returns: Tensor, args: Args) -> Tensor:
    """Loss of the critic's logits (N, L, V) on feat (N, L, F), against the returns (N, L-1) and the slow critic: ->
    (N, L-1), since the last state has no return."""
    with torch.no_grad():
        slow_value = agent.twohot.mean(agent.slow_critic(feat))[:, :-1]  # (N, L-1)
    logits = logits[:, :-1]  # (N, L-1, V)
    return agent.twohot.loss(logits, returns) + args.slow_critic_scale * agent.twohot.loss(logits, slow_value)


# === 7. Optimizer: LaProp with adaptive gradient clipping =============================================================
class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al., 2020): per-tensor adaptive clipping, then RMSProp's normalization, then momentum.

    lr rises linearly from 0 at the first update over `warmup` updates. clip: a gradient's norm is limited to clip times
    the norm of its tensor (that norm being at least 1e-3). All state lives on the parameters' device; no host sync.
    """

    def __init__(self, params, lr: float, warmup: int = 1000, clip: float = 0.3, betas=(0.9, 0.999), eps=1e-20):
        options = {"lr": lr, "warmup": warmup, "clip": clip, "betas": betas, "eps": eps}
        super().__init__(params, options | {"capturable": True})  # so that load_state_dict keeps `step` on the device
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": p.new_zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """One update of the one parameter group, every tensor of which has a `.grad`. Returns metrics."""
        (group,) = self.param_groups
        params = group["params"]
        grads, state = [p.grad for p in params], [self.state[p] for p in params]
        steps, means, squares = ([s[name] for s in state] for name in ("step", "mean", "square"))
        beta1, beta2 = group["betas"]
        rate = group["lr"] * (steps[0] / max(1, group["warmup"])).clamp(max=1)  # 0 at the first update
        torch._foreach_add_(steps, 1)

        grad_norms, norms = torch.stack(torch._foreach_norm(grads)), torch.stack(torch._foreach_norm(params))
        limit = (group["clip"] * norms.clamp(min=1e-3) / grad_norms).clamp(max=1)  # (tensors,)
        grads = torch._foreach_mul(grads, list(limit.unbind()))
        # square = EMA(g^2); u = g / sqrt(square); mean = EMA(u); both averages bias-corrected; p = p - rate * mean
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        scale = torch._foreach_div(squares, 1 - beta2 ** steps[0])
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_div_(grads, scale)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        deltas = torch._foreach_mul(means, -rate / (1 - beta1 ** steps[0]))
        torch._foreach_add_(params, deltas)

        root, update_norms = sum(p.numel() for p in params) ** 0.5, torch.stack(torch._foreach_norm(deltas))
        rms = {"optim/update_rms": update_norms.norm() / root, "optim/param_rms": norms.norm() / root}
        return {"optim/grad_norm": grad_norms.norm(), "charts/learning_rate": rate} | rms


# === 8. One update, and the loop ======================================================================================
def loss(agent: Agent, batch: dict, args: Args) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The weighted sum of all losses. batch: as for world_model_loss. Returns total (), the posterior latents deter
    (B, T, D) and stoch (B, T, S, K), and metrics; latents and metrics are detached."""
    with torch.autocast(batch["reward"].device.type, torch.bfloat16) if args.precision == "bfloat16" else nullcontext():
        losses, deter, stoch, feat, metrics = world_model_loss(agent, batch, args)
        # imagination starts from all B*T posterior states, detached: losses on imagined states do not train the model
        starts = deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1)  # (N, D), (N, S, K)
        imagined, action = imagine(agent, *starts, args.imagination_horizon)  # (N, H+1, F), (N, H+1, A)
        behavior_losses, returns, behavior_metrics = actor_critic_loss(agent, imagined, action, args)
        boot = returns[:, 0].unflatten(0, deter.shape[:2])  # (B, T)
        # this loss, on replayed states, does send a gradient into the world model, through the features
        replay_critic = replay_critic_loss(agent, feat, batch, boot, args)  # (B, T-1)
    losses |= behavior_losses | {"replay_critic": replay_critic}
    losses = {name: value.mean() for name, value in losses.items()}
    scales = {"recon": args.pred_scale, "reward": args.pred_scale, "continue": args.pred_scale}
    scales |= {"dyn": args.dyn_scale, "rep": args.rep_scale, "replay_critic": args.replay_critic_scale}
    total = sum(scales.get(name, 1.0) * value for name, value in losses.items())
    metrics |= behavior_metrics | {f"losses/{name}": x.detach() for name, x in (losses | {"total": total}).items()}
    return total, (deter.detach(), stoch.detach()), metrics


def train_step(agent: Agent, optimizer: LaProp, batch: dict, args: Args) -> tuple[tuple[Tensor, Tensor], dict]:
    """One update on one batch: -> fresh latents deter (B, T, D) and stoch (B, T, S, K), and metrics, on the device."""
    total, latents, metrics = loss(agent, batch, args)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    metrics |= optimizer.step()
    with torch.no_grad():  # slow = (1 - tau) * slow + tau * critic
        torch._foreach_lerp_(list(agent.slow_critic.parameters()), list(agent.critic.parameters()), args.tau)
    return latents, metrics


def stored_latents(deter: Tensor, stoch: Tensor) -> dict[str, np.ndarray]:
    """deter (…, D), stoch (…, S, K) as the replay buffer keeps them: float16, and class indices as uint8."""
    return {"deter": deter.half().cpu().numpy(), "stoch": stoch.argmax(-1).byte().cpu().numpy()}


def batch_to_device(batch: dict[str, np.ndarray], agent: Agent, device: torch.device) -> dict:
    """A sampled batch as train_step takes it. Copies to a GPU are asynchronous, from pinned memory."""
    out = {key: torch.from_numpy(x) for key, x in batch.items()}
    if device.type == "cuda":
        out = {key: x.pin_memory().to(device, non_blocking=True) for key, x in out.items()}
    out["obs"] = {key[4:]: out.pop(key) for key in batch if key.startswith("obs/")}
    out["prev_action"] = encode_action(out["prev_action"], agent.action)  # (B, T, A)
    out["deter"], out["stoch"] = out["deter"].float(), one_hot(out["stoch"], agent.size.classes)  # (B, D), (B, S, K)
    return out


def main(argv: list[str] | None = None) -> None:
    """Train: act, store, step, update, log, save, evaluate. With --eval-only, only evaluate. Always exits."""
    rank, world = join_ranks()  # 0 and 1 unless under torchrun
    args, resumed = parse_args(argv, world)  # resumed: the checkpoint of --resume, or {}
    device = choose_device(args)  # also resolves the flags that are "auto" and sets all seeds
    begun = max_over_ranks(int(time.time()))  # the same name in all ranks
    folder = Path(args.resume or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{begun}")
    folder = folder.parent if args.resume and not folder.is_dir() else folder  # --resume may name a file in it
    run_name = "/".join(folder.parts[-1 - args.env_id.count("/") :])  # ids may contain slashes
    videos = Path("videos", run_name) if args.capture_video and not rank else None
    if args.eval_only:
        with exit_on_error(args.env_id, Exception, abort=lambda: "failed"):  # one line, exit status 2
            agent, _ = load_agent(args.resume, device)
            evaluate(agent, args, args.eval_episodes, args.seed, videos and videos / "eval-only")
        sys.exit()
    all_envs = args.num_envs * world  # of all processes: their steps are counted together
    steps_per_update = args.batch_size * args.batch_length * world / args.train_ratio  # agent steps per update

    with exit_on_error(f"--env-id {args.env_id} cannot be made", Exception):  # in a worker; else make_env exits itself
        envs = make_envs(args, videos and videos / f"train-{resumed.get('global_step', 0)}")
    specs, left_out, action_spec, repeat = (envs.get_attr(x)[0] for x in "specs left_out action_spec repeat".split())
    if args.track and not rank:
        track(args, run_name)
    replay = make_replay(args, specs, action_spec, folder, resumed, rank, world)
    agent = Agent(specs, action_spec, SIZES[args.size], args).to(device)
    optimizer = LaProp(agent.trained(), args.learning_rate, args.warmup_updates, args.clip)
    parts = {"agent": agent, "optimizer": optimizer, "replay": replay}
    # in a new run 0, 0, 0 and --learning-starts
    global_step, updates, owed, train_after = resume_run(args, resumed, parts, rank, all_envs, steps_per_update)
    print(f"environment: {args.env_id}, {specs} -> {action_spec}; left out: {', '.join(left_out) or 'nothing'}")
    print(f"size: {args.size}, {sum(p.numel() for p in agent.trained()):,} trained parameters")
    print(f"schedule: 1 update every {steps_per_update:g} agent steps, after the first {args.learning_starts:,}")
    print(f"run folder: {folder}", flush=True)
    seed = args.seed + 1000 * rank + global_step  # of the environments, and of the noise under torchrun
    if world > 1:
        train_together(agent, optimizer)
        torch.manual_seed(seed)
    act, update = partial(policy, agent), partial(train_step, agent, optimizer, args=args)
    if args.cudagraphs and device.type == "cuda" and world == 1:
        act, update = Graph(act), Graph(update)
    if args.compile:
        compile_functions(device)
    stop = Stop()  # from here on, Ctrl-C and SIGTERM end the run after the current step
    with exit_on_error("cannot write the run folder", OSError):
        log = Log(folder, args, rank, all_envs, repeat, global_step, updates, resumed.get("seconds", 0.0))

    def save() -> bool:
        """Write a checkpoint; says whether that worked."""
        log.means(global_step)  # ends the program when a loss is not finite: no checkpoint then
        counters = {"global_step": global_step, "updates": updates, "owed": owed, "seconds": time.time() - log.begin}
        return rank > 0 or save_run(folder, args, agent, optimizer, replay, counters)

    def abort() -> str:
        """End the run because an environment failed; says what was done."""
        stop.code = stop.code or 1
        status = stop.now()  # tells the other ranks, if there are any
        envs.closed = True  # closing what is broken may fail again; worker processes end with this one
        log.bar.close()
        saved = save()
        if status > 1:  # no failure: SLURM or systemd has signalled the worker processes too
            sys.exit(status)
        return f"failed at step {global_step}, {'saved' if saved else 'could not save'} {folder}"

    def due(frequency: int) -> bool:
        return frequency > 0 and global_step % frequency < all_envs

    with exit_on_error(args.env_id, Exception, abort=abort):
        obs, _ = envs.reset(seed=seed)
    reward = np.zeros(args.num_envs, np.float32)
    terminated = truncated = np.zeros(args.num_envs, bool)
    is_first = np.ones(args.num_envs, bool)
    state = agent.rssm.initial(args.num_envs)
    while (global_step < args.total_timesteps or owed >= 1) and not stop.now():  # a resumed run may lack only updates
        # act on what arrived, and store it with the action and the latent state
        tensors = {key: torch.as_tensor(x).to(device) for key, x in obs.items()}
        action, state = act(tensors, state, torch.as_tensor(is_first).to(device))  # policy
        action = decode_action(action, action_spec).cpu().numpy()  # (args.num_envs, components)
        is_last = terminated | truncated
        step = {f"obs/{key}": x for key, x in obs.items()} | {"action": action, "reward": reward}
        step |= {"is_first": is_first, "is_last": is_last, "is_terminal": terminated}
        replay.add(step | stored_latents(*state[:2]))  # as float16 and class indices
        global_step += all_envs

        # step the environments; after a last step they ignore the action and reset
        with exit_on_error(args.env_id, Exception, abort=abort):
            obs, reward, terminated, truncated, infos = envs.step(action)
        is_first = is_last

        # make the updates that are due: `owed` counts them, after step `train_after` (--learning-starts)
        started = time.time()
        if global_step > train_after:
            owed += all_envs / steps_per_update
        while owed >= 1 and global_step > train_after and not stop.now():
            batch, index = replay.sample(args.batch_size)
            batch = batch_to_device(batch, agent, device)  # obs/key -> obs[key], one-hot prev_action and stoch
            latents, metrics = update(batch)  # train_step
            replay.update_latents(index, **stored_latents(*latents))
            updates, owed = updates + 1, owed - 1
            log.window.append(metrics)  # on the device, until they are recorded
            if args.video_frequency and updates % args.video_frequency == 0 and not rank:
                with suppress(OSError):  # a full disk is no reason to stop
                    write_dream(agent, batch, folder, log.writer, global_step, updates)
            if owed > 1 + all_envs / steps_per_update and updates % 500 == 0:
                save()  # more than one step's updates are owed only after a kill: save on the way
                log.step(global_step, updates, {})
        log.updating += time.time() - started

        # log, save, evaluate
        log.step(global_step, updates, infos)
        if due(args.checkpoint_frequency) or due(args.eval_frequency):  # an evaluation may fail: save before it
            save()
        if due(args.eval_frequency) and not rank:
            with exit_on_error(args.env_id, Exception, abort=abort):
                to = videos and videos / f"eval-{global_step}"
                returns = evaluate(agent, args, args.eval_episodes, args.seed + global_step, to)
            log.record(global_step, {"eval/episodic_return": np.mean(returns)})

    saved = save()
    log.bar.close()
    with suppress(Exception):  # everything is saved
        log.writer.close()
        envs.close()
    if args.track and videos:
        import_module("wandb").save(f"{videos}/*/*.mp4", policy="now")
    if status := stop.now():
        print(f"stopped at step {global_step:,}; continue with: python dreamerv3.py --resume {folder}")
    sys.exit(status or int(not saved))  # an int: wandb does not take a bool


# ############### Nothing below is needed to understand the algorithm: it is what a program needs besides. #############
# === 9. Environments ==================================================================================================
PACKAGES = {  # id prefix -> the module that registers these ids, how to install it
    "dm_control/": ("shimmy", 'pip install "shimmy[dm-control]" imageio "mujoco<4"'),
    "MinAtar/": ("minatar.gym", "pip install minatar"),
}


def leaves(space: gym.Space, path: tuple = ()) -> list[tuple]:
    """(path, space) of every leaf of nested Dict and Tuple spaces."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return [(path, space)]
    items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
    return [leaf for key, child in items for leaf in leaves(child, (*path, key))]


def class_counts(space: gym.Space) -> np.ndarray | None:
    """Classes of every component of a discrete space, None for others."""
    if isinstance(space, (spaces.Discrete, spaces.MultiBinary)):
        return np.full(space.shape, space.n if isinstance(space, spaces.Discrete) else 2)
    return space.nvec if isinstance(space, spaces.MultiDiscrete) else None


def obs_spec(space: gym.Space, image_size: int) -> ObsSpec | None:
    """What the networks need to know of one observation key, None when they cannot learn from it."""
    if (counts := class_counts(space)) is not None:
        return ObsSpec(space.shape, int(counts.max()))
    if not isinstance(space, spaces.Box) or 0 in space.shape:
        return None
    image = space.dtype == np.uint8 and len(space.shape) == 3 and min(space.shape[:2]) >= 16
    return ObsSpec((image_size, image_size, space.shape[2]) if image else (math.prod(space.shape),))


class Adapter(gym.Wrapper):
    """Any supported environment as flat arrays. Raises ValueError for spaces and values that are not supported.

    Observations become one dict, nested keys joined by "/" (a space without keys is "obs"): images uint8 (image_size,
    image_size, C), discrete spaces int32 class indices, everything else float32 (n,). Actions come as class indices
    (components,), or as real numbers (A,) that are clipped to [-1, 1] and rescaled to the bounds of the space.
    """

    def __init__(self, env: gym.Env, image_size: int, repeat: int = 1):
        super().__init__(env)
        found = {"/".join(map(str, path)) or "obs": (path, leaf) for path, leaf in leaves(env.observation_space)}
        specs = {key: obs_spec(leaf, image_size) for key, (_, leaf) in found.items()}
        self.repeat, self.specs = repeat, {key: spec for key, spec in specs.items() if spec}
        self.leaves = {key: found[key] for key in self.specs}
        self.left_out = [f"{key} ({type(found[key][1]).__name__})" for key in specs.keys() - self.specs.keys()]
        if not self.specs:
            raise ValueError(f"no Box, Discrete, MultiDiscrete or MultiBinary space in {env.observation_space}")
        bounds = {"uint8": (0, 255), "int32": (0, 2**31 - 1), "float32": (-np.inf, np.inf)}
        flat = {key: spaces.Box(*bounds[x.dtype], x.shape, np.dtype(x.dtype)) for key, x in self.specs.items()}
        self.observation_space, space = spaces.Dict(flat), env.action_space
        if (counts := class_counts(space)) is not None:
            nvec = tuple(counts.ravel().tolist())
            self.action_spec, self.action_space = ActionSpec(nvec, sum(nvec)), spaces.MultiDiscrete(nvec)
        elif isinstance(space, spaces.Box):
            no_low, no_high = (np.abs(x.astype(float)) > 1e30 for x in (space.low, space.high))  # open sides
            self.low = np.where(no_low, np.where(no_high, -1.0, space.high - 2.0), space.low)
            self.high = np.where(no_high, self.low + 2, space.high)  # an open side is 2 away from the other
            self.action_spec, self.action_space = ActionSpec((), self.low.size), spaces.Box(-1, 1, (self.low.size,))
        else:
            raise ValueError(f"action space {space}; supported are Discrete, MultiDiscrete, MultiBinary and Box")

    def observation(self, observation) -> dict[str, np.ndarray]:
        """One flat array per key, of the declared shape, with classes that exist and finite numbers."""
        out = {}
        for key, (path, space) in self.leaves.items():
            x, spec = np.asarray(reduce(lambda part, name: part[name], path, observation)), self.specs[key]
            good = x.dtype.kind in ("u" if spec.is_image else "iub" if spec.classes else "iubf")  # NumPy's letters
            value = x if x.ndim else x.item()  # of an int, Discrete checks the value, not the dtype
            good = good and (space.contains(value) if spec.classes else np.isfinite(x.astype(np.float32)).all())
            if not good or x.shape != space.shape:
                raise ValueError(f"observation '{key}' is declared {space} and came as {x.dtype} {x.shape} {x}")
            if spec.is_image and x.shape[:2] != spec.shape[:2]:
                parts = np.split(x, range(4, x.shape[2], 4), 2)  # OpenCV's limit is 4 channels
                x = np.dstack([cv2.resize(part, spec.shape[1::-1], interpolation=cv2.INTER_AREA) for part in parts])
            out[key] = (x - getattr(space, "start", 0)).astype(spec.dtype).reshape(spec.shape)
        return out

    def reset(self, **options):
        """As Gymnasium's, but without info: that of several environments may not join."""
        return self.observation(self.env.reset(**options)[0]), {}

    def step(self, action: np.ndarray):
        """As Gymnasium's, for an action (components,) or (A,). Of info only "episode" is kept."""
        space = self.env.action_space
        if self.action_spec.nvec:
            x = action.reshape(space.shape) + getattr(space, "start", 0)
        else:
            x = self.low + (np.clip(action, -1, 1).reshape(space.shape) + 1) / 2 * (self.high - self.low)
            x = (x.round() if np.issubdtype(space.dtype, np.integer) else x).clip(self.low, self.high)  # after rounding
        x = int(x) if isinstance(space, spaces.Discrete) else x.astype(space.dtype)
        obs, reward, *ends, info = self.env.step(x)
        if np.ndim(reward) or not np.isfinite(np.float32(reward)):
            raise ValueError(f"reward {reward} is not a finite number")
        return self.observation(obs), reward, *ends, {key: info[key] for key in info.keys() & {"episode"}}


def make_env(env_id: str, image_size: int = 64, action_repeat: int = 0, videos: Path | None = None, **record):
    """One environment as an Adapter, with episode statistics; videos: a folder for RecordVideo, record: its options.
    Exits with one line when it cannot be made. Atari ids get frame skip 4 or action_repeat with max-pooling, RGB images
    and up to 30 no-ops after a reset; no reward clipping, no end at lost lives, stickiness as the id says."""
    if multiprocessing.parent_process():
        os.setpgid(0, 0)  # Ctrl-C and launchers signal a whole process group: the training process decides
    module, install = next((entry for prefix, entry in PACKAGES.items() if env_id.startswith(prefix)), ("ale_py", ""))
    options = {"disable_env_checker": True} | ({"render_mode": "rgb_array"} if videos else {})
    try:
        getattr(import_module(module), "register_envs", lambda: None)()
        env, repeat = gym.make(env_id, **options), action_repeat or 1
        if hasattr(env.unwrapped, "ale") and len(env.observation_space.shape) > 1:  # Atari, unless it shows its RAM
            repeat = action_repeat or 4
            skip = {"noop_max": 30, "frame_skip": repeat, "screen_size": image_size, "grayscale_obs": False}
            env = gym.wrappers.AtariPreprocessing(gym.make(env_id, frameskip=1, **options), **skip)
        elif repeat > 1:
            env = gym.wrappers.RepeatAction(env, repeat)
        if videos:
            fps = max(1, env.metadata.get("render_fps", 30) // repeat)  # a frame per agent step, in real time
            env = gym.wrappers.RecordVideo(env, str(videos), fps=fps, **record)
        return Adapter(gym.wrappers.RecordEpisodeStatistics(env), image_size, repeat)
    except Exception as error:  # a missing package, spaces that are not supported, whatever constructors raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"; try: {install}" if install and "Did you mean" not in str(error) else f" ({at.filename}:{at.lineno})"
        what = f"{env_id} cannot be made{' with --capture-video' if videos else ''}: {type(error).__name__}"
        return fail(f"--env-id {what}: {str(error) or at.line}{where}")


def make_envs(args: Args, videos: Path | None) -> gym.vector.VectorEnv:
    """The environments of a training process, each in a worker process when there are several; videos: of the first."""
    if args.env_id.startswith("dm_control/") and not args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "disabled")  # state observations need no renderer
    make = partial(make_env, args.env_id, args.image_size, args.action_repeat)
    makers = [partial(make, videos if i == 0 else None) for i in range(args.num_envs)]
    envs = gym.vector.SyncVectorEnv(makers) if args.num_envs == 1 else gym.vector.AsyncVectorEnv(makers)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP, "see the time line at the top"
    return envs


# === 10. Errors, flags, device, logging ===============================================================================
def fail(message: str) -> None:
    """A user error: one line, exit status 2."""
    print(f"dreamerv3.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def exit_on_error(what: str, *kinds: type[Exception], abort=None):
    """Errors of these kinds inside become one line that begins with `what`, and exit status 2. abort, for errors of
    environments, is called first and says what was done; then the traceback is printed too."""
    try:
        yield
    except kinds as error:
        if abort:
            what = f"{what} {abort()}"
            traceback.print_exception(error)  # Gymnasium has printed that of a worker process
        missing = "its process is gone" if isinstance(error, (EOFError, OSError)) else "it has no message"
        fail(f"{what}: {type(error).__name__}: {str(error)[:300] or missing}")


def parse_args(argv: list[str] | None, world: int) -> tuple[Args, dict]:
    """Flags from the command line, checked; with --resume the stored ones, and the checkpoint, else {}."""

    def parse(default: Args) -> Args:
        try:
            with redirect_stderr(out := io.StringIO()):
                return tyro.cli(Args, args=argv, default=default, description=(__doc__ or "").split("\n\n")[0])
        except SystemExit as stop:  # tyro draws a box with a title: keep its words
            return fail(re.sub(r"[─-╿]+", " ", out.getvalue().partition("\n")[2])) if stop.code else sys.exit()

    args, state = parse(Args()), {}
    if args.eval_only and not args.resume:
        fail("--eval-only needs --resume and a run folder, a checkpoint or a model.pt")
    if args.resume:
        stored, state = load_checkpoint(Path(args.resume), "agent" if args.eval_only else "optimizer")
        args = parse(stored)
        free = "resume total_timesteps checkpoint_frequency log_frequency compile cuda save_model capture_video track"
        free += " cudagraphs wandb_project_name wandb_entity eval_only eval_episodes eval_frequency video_frequency"
        for name in asdict(stored).keys() - {*free.split(), "seed" * args.eval_only}:
            flag, old, new = f"--{name.replace('_', '-')}", getattr(stored, name), getattr(args, name)
            if new not in (old, "auto"):
                fail(f"{flag} {new} disagrees with {old} of the run to resume; leave it out or start a new run")
            setattr(args, name, old)
        if args.total_timesteps < stored.total_timesteps:
            fail(f"--total-timesteps {args.total_timesteps} is less than the {stored.total_timesteps} of that run")
    check_args(args, world)
    return args, state


def check_args(args: Args, world: int) -> None:
    """Exit with one line when a flag has an impossible value: it names the value, the limit and so the fix."""
    numbers = " ".join(name for name, value in asdict(args).items() if not isinstance(value, str))
    positive = "total_timesteps num_envs batch_size learning_rate train_ratio log_frequency imagination_horizon clip"
    first, total = args.batch_length * args.num_envs * world, (args.batch_length + 1) * args.num_envs * world
    buffer = max(total // world, args.batch_size * args.batch_length)
    rules = [
        (numbers, lambda x: 0 <= x < math.inf, "at least 0"),
        (f"{positive} eval_episodes", lambda x: x > 0, "more than 0"),
        ("batch_length", lambda x: x >= 2, "at least 2"),
        ("gamma unimix actor_unimix", lambda x: x < 1, "in [0, 1)"),
        ("return_lambda tau", lambda x: x <= 1, "in [0, 1]"),
        ("bins", lambda x: x >= 3 and x % 2, "odd, so that one bin is exactly 0, and at least 3"),
        ("image_size", lambda x: x % 16 == 0 and 48 <= x <= 256, "a multiple of 16 from 48 to 256"),
        ("seed", lambda x: x < 2**32, "less than 2^32"),
        ("learning_starts", lambda x: x >= first, f"at least {first}, --batch-length per environment"),
        ("learning_starts", lambda x: x <= args.total_timesteps, f"at most --total-timesteps {args.total_timesteps}"),
        ("total_timesteps", lambda x: x >= total, f"at least {total}, --batch-length + 1 per environment"),
        ("buffer_size", lambda x: x >= buffer, f"at least {buffer}, one batch, and --batch-length + 1 per environment"),
    ]
    for names, good, limit in rules:
        for name in names.split():
            if not good(getattr(args, name)):
                fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be {limit}")


def choose_device(args: Args) -> torch.device:
    """The device, which it prints; resolves the `auto` flags for it, sets torch's switches and all seeds."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        name, native = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        name, native = f"{torch.get_num_threads()} threads", torch.cpu._is_avx512_bf16_supported()
        with suppress(OSError, AttributeError):  # another C library than glibc
            # keep what an update frees for the next one: an image update takes 7 % less at 1m, 19 % less at 12m
            ctypes.CDLL("libc.so.6").mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
            ctypes.CDLL("libc.so.6").mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    args.size = args.size.replace("auto", "12m" if device.type == "cuda" else "1m")
    args.precision = args.precision.replace("auto", "bfloat16" if native else "float32")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in convolutions too; torch's default is True
    torch.backends.cudnn.deterministic = args.torch_deterministic
    absent = ", CUDA is not available" if args.cuda and device.type == "cpu" else ""
    print(f"device: {device} ({name}), {args.precision}{absent}")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    return device


class Stop:
    """SIGINT and SIGTERM end the run, saved, after this step or evaluation; a second one, without torchrun, at once."""

    def __init__(self):
        self.code = self.agreed = 0  # exit status: 128 + signal number; the one that all ranks agreed on
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.code and not dist.is_initialized():  # launchers signal more than once
            os._exit(128 + number)
        self.code = 128 + number
        try:
            print("\nstopping after this step or evaluation, then saving; once more to exit at once", flush=True)
        except OSError:  # the same Ctrl-C has ended `| tee`: from now on, write nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)

    def now(self) -> int:
        """The exit status as soon as any rank is to stop, else 0. From then on no rank waits for another here."""
        self.agreed = self.agreed or max_over_ranks(self.code)
        return self.agreed


def make_replay(args, specs: dict, action: ActionSpec, folder: Path, resumed: dict, rank: int, world: int) -> Replay:
    """The replay buffer of one process, in the run folder or in RAM. Exits with one line when it does not fit there."""
    size, seed = SIZES[args.size], args.seed + 1000 * rank
    layout = {f"obs/{key}": (spec.shape, spec.dtype) for key, spec in specs.items()}
    layout["action"] = ((len(action.nvec),), np.int32) if action.nvec else ((action.size,), np.float32)
    layout |= {"reward": ((), np.float32), "deter": ((size.deter,), np.float16), "stoch": ((size.groups,), np.uint8)}
    capacity = resumed.get("capacity", min(args.buffer_size, args.total_timesteps // world))  # a run keeps its own
    print(f"replay: {capacity:,} steps take {capacity * Replay.bytes_per_step(layout) / 1e9:.2f} GB")
    where = folder / f"replay{rank or ''}" if args.persist_replay else None
    wrong = f"cannot read the replay buffer {where}" if resumed else "cannot write the run folder (--buffer-size)"
    with exit_on_error(wrong, OSError, ValueError, EOFError, MemoryError):
        folder.mkdir(parents=True, exist_ok=bool(resumed) or world > 1)  # another rank may be faster
        return Replay(capacity, args.num_envs, layout, args.batch_length, args.replay_windows, seed, where)


class Log:
    """TensorBoard, episodes.csv and a progress bar. A full disk costs the records, not the run; checkpoints warn."""

    def __init__(self, folder, args, rank, all_envs, repeat, step: int, updates: int, seconds: float):
        self.args, self.all_envs, self.repeat, self.folder, self.returns = args, all_envs, repeat, folder, []
        self.begin, self.last = time.time() - seconds, (time.time(), step, updates)  # last: at the last record
        self.window, self.updating = [], 0.0  # since then: the metrics of every update, and the time of all
        wait = 0.5 if sys.stderr.isatty() else 20
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", mininterval=wait, disable=rank > 0)
        self.writer = SummaryWriter(folder if not rank else folder / f"rank{rank}")
        self.file = open(folder / "episodes.csv" if not rank else os.devnull, "a", buffering=1)
        table = "|param|value|\n|-|-|\n" + "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", table, step)
        self.file.write("" if self.file.tell() else "global_step,frames,return,length,seconds\n")

    def record(self, step: int, values: dict[str, float], row: str = "") -> None:
        """Scalars of this agent step, and a row of episodes.csv."""
        with suppress(OSError):
            self.file.write(row)
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def means(self, step: int) -> dict[str, float]:
        """Of the metrics since the last record. Stops the program when one of them is not finite."""
        names = self.window[0] if self.window else {}
        means = {name: torch.stack([metrics[name] for metrics in self.window]).mean().item() for name in names}
        for name, x in means.items():
            if not math.isfinite(x):
                sys.exit(f"dreamerv3.py: {name} is not finite at step {step}; the last checkpoint is in {self.folder}")
        return means

    def step(self, step: int, updates: int, infos: dict) -> None:
        """Record finished episodes and, every --log-frequency agent steps, the means of the metrics since."""
        frames, args = step * self.repeat, self.args
        for i in np.flatnonzero(infos.get("_episode", [])):
            score, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            self.returns = [*self.returns[-19:], score]
            row = f"{step},{frames},{score:g},{length},{time.time() - self.begin:.1f}\n"
            self.record(step, {"charts/episodic_return": score, "charts/episodic_length": length}, row)
        mean = f"{np.mean(self.returns):.1f}" if self.returns else "none yet"
        self.bar.set_postfix_str(f"mean return {mean}, {updates:,} updates", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.window and step % args.log_frequency < self.all_envs:
            seconds, steps, done = np.subtract((time.time(), step, updates), self.last).tolist()
            replayed = updates * args.batch_size * args.batch_length * self.all_envs // args.num_envs  # by all ranks
            charts = {"SPS": steps / seconds, "updates_per_second": done / seconds, "train_ratio": replayed / step}
            charts |= {"updates": updates, "frames": frames, "time_share_update": self.updating / seconds}
            self.record(step, self.means(step) | {f"charts/{name}": x for name, x in charts.items()})
            self.window, self.updating, self.last = [], 0.0, (time.time(), step, updates)


def track(args: Args, name: str) -> None:
    """Send what TensorBoard gets, and the three source files, to Weights & Biases; a resumed run goes on there."""
    settings = {"project": args.wandb_project_name, "entity": args.wandb_entity or None, "config": vars(args)}
    settings |= {"name": name, "id": re.sub("[:;,#?/']", "-", name), "resume": "allow"}
    with exit_on_error("--track cannot start (pip install wandb, wandb login)", Exception):
        wandb = import_module("wandb")
        wandb.init(**settings, sync_tensorboard=True, save_code=True)  # monitor_gym fails with Gymnasium 1.x
        for file in ("dreamerv3.py", "networks.py", "replay.py"):
            wandb.save(str(Path(__file__).with_name(file)), base_path=Path(__file__).parent, policy="now")


# === 11. Checkpoints, evaluation, dreams, compilation, several processes ==============================================
def save_run(folder: Path, args: Args, agent: Agent, optimizer: LaProp, replay: Replay, counters: dict) -> bool:
    """Write folder/checkpoint.pt so that at every moment it or checkpoint_previous.pt is whole; with --save-model,
    model.pt too. False, with a warning, when the disk is full."""
    state = {"args": asdict(args), "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"replay": replay.state_dict(), "capacity": replay.capacity, "torch_rng": torch.get_rng_state()}
    state["cuda_rng"] = torch.cuda.get_rng_state_all() if agent.return_norm.lo.is_cuda else []
    path, temporary = folder / "checkpoint.pt", folder / "checkpoint.tmp"
    try:
        replay.flush()
        with open(temporary, "wb") as file:
            torch.save(state | counters, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, folder / "checkpoint_previous.pt")
        os.replace(temporary, path)
        if args.save_model:
            torch.save({"args": state["args"], "agent": state["agent"]}, temporary)
            os.replace(temporary, folder / "model.pt")
        return True
    except (OSError, RuntimeError) as error:  # torch.save raises either when the disk is full
        temporary.unlink(missing_ok=True)  # it needs the space
        print(f"warning: cannot save at step {counters['global_step']:,}, {error}: training goes on", flush=True)
        return False


def load_checkpoint(path: Path, needed: str = "optimizer") -> tuple[Args, dict]:
    """Flags and state of the newest good checkpoint, one with the key `needed` (model.pt has only "agent"). path: a run
    folder, or a file in it, which is tried first."""
    folder = path.parent if path.is_file() else path
    newest, problems = folder / "checkpoint.pt", []
    for file in filter(Path.is_file, dict.fromkeys([path, newest, folder / "checkpoint_previous.pt"])):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)  # a stranger's file cannot run code
            args, _ = Args(**{"twohot_mean": "exact"} | state["args"]), state[needed]  # exact: runs older than the flag
        except Exception as error:  # truncated, corrupt or foreign: torch raises many kinds
            problems.append(f"{file} is unreadable ({type(error).__name__})")
            continue
        print("".join(f"warning: {problem}, using {file.name}\n" for problem in problems), end="")
        if problems and needed == "optimizer" and file != newest:
            with suppress(FileNotFoundError):  # there is none, or another rank was faster
                os.replace(newest, newest.with_suffix(".unreadable"))  # else a save would replace the good previous one
        return args, state
    return fail(f"--resume {path} holds no good checkpoint of a run: {', '.join(problems) or 'there is none'}")


def resume_run(args: Args, state: dict, parts: dict, rank: int, all_envs: int, steps_per_update: float) -> tuple:
    """Load a checkpoint, if there is one, into agent, optimizer and replay (parts), and set the random state: ->
    global_step, updates, updates owed, and the step after which updates begin."""
    replay = parts["replay"]
    global_step, updates, owed = (state.get(name, 0) for name in ("global_step", "updates", "owed"))
    stored = -max_over_ranks(-replay.now) * all_envs  # steps that every rank has, times all environments
    missing = max(0, args.learning_starts - stored)
    if state:
        with exit_on_error("--resume names a run of other spaces or another size", KeyError, RuntimeError, ValueError):
            for name, part in parts.items():
                if name != "replay" or rank == 0:  # the others' random state is not saved: it starts anew
                    part.load_state_dict(state[name])
            torch.set_rng_state(state["torch_rng"])
            torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])  # [] if saved on a CPU
        owed += max(0, stored - max(global_step, args.learning_starts)) / steps_per_update
        global_step = max(global_step, stored)  # more are stored when it was killed after its last checkpoint
        refill = f": TOO FEW, collecting {missing:,} before the next update" if missing else ""
        done = f"step {global_step:,} after {updates:,} updates, {int(owed):,} owed"
        print(f"resumed at {done}, {len(replay):,} steps in the replay buffer{refill}", flush=True)
    return global_step, updates, owed, global_step + missing


def load_agent(path: str | Path, device: str | torch.device = "cpu") -> tuple[Agent, Args]:
    """The agent of a run folder, a checkpoint or a model.pt, and the flags it was trained with. An environment is made,
    to ask it for its spaces. Exits with one line when a file or the environment is missing."""
    args, state = load_checkpoint(Path(path), "agent")
    env = make_env(args.env_id, args.image_size, args.action_repeat)
    agent = Agent(env.specs, env.action_spec, SIZES[args.size], args).to(device)
    agent.load_state_dict(state["agent"])
    return agent, args


def evaluate(agent: Agent, args: Args, episodes: int, seed: int, videos: Path | None = None) -> list[float]:
    """Undiscounted returns of whole episodes in an environment of its own, whose first reset takes the seed; videos: a
    folder for one mp4 each. The policy samples as in training. Changes neither the agent nor torch's random state."""
    env = make_env(args.env_id, args.image_size, args.action_repeat, videos, episode_trigger=lambda episode: True)
    device, returns = agent.return_norm.lo.device, []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(returns) < episodes:
            obs, _ = env.reset(seed=None if returns else seed)
            state, is_first, over = agent.rssm.initial(1), True, False
            while not over:
                tensors = {key: torch.as_tensor(x[None]).to(device) for key, x in obs.items()}
                action, state = policy(agent, tensors, state, torch.tensor([is_first], device=device))
                obs, _, terminated, truncated, info = env.step(decode_action(action, agent.action)[0].cpu().numpy())
                is_first, over = False, terminated or truncated
            returns.append(float(info["episode"]["r"]))
    env.close()
    spread = f"mean {np.mean(returns):.1f}, std {np.std(returns):.1f}, min {min(returns):g}, max {max(returns):g}"
    tqdm.write(f"evaluation: {episodes} episodes of {args.env_id}, return {spread}")
    return returns


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def open_loop(agent: Agent, batch: dict, context: int = 5) -> dict[str, Tensor]:
    """Predict the first n = min(4, B) sequences of a batch (as for world_model_loss): the posterior sees `context`
    steps, then the prior goes on under the recorded actions. Returns for images truth, prediction and error (0.5: none)
    above each other, (n, T, 3h, w, C) in [0, 1]; else truth and prediction (n, T, 2, d), discrete keys as classes."""
    obs = {key: x[:4] for key, x in batch["obs"].items()}
    deter, stoch, action, is_first = (batch[key][:4] for key in ("deter", "stoch", "prev_action", "is_first"))
    embed, states, rng = agent.encoder(obs), [], torch.Generator(stoch.device)  # training's noise is left alone
    u = torch.rand(is_first.shape[1], *stoch.shape[:2], generator=rng, device=stoch.device)  # (T, n, S)
    for t in range(is_first.shape[1]):
        deter, stoch, _ = agent.rssm.observe_step(deter, stoch, action[:, t], embed[:, t], is_first[:, t], u[t])
        if t >= context:
            stoch = OneHot(agent.rssm.prior(deter).float(), agent.rssm.unimix).sample(u[t])
        states.append((deter, stoch))
    out = agent.decoder(*(torch.stack(x, 1) for x in zip(*states, strict=True)))
    for key, x in out.items():
        if agent.specs[key].is_image:
            truth = obs[key].float() / 255
            out[key] = torch.cat([truth, x, (x - truth + 1) / 2], 2)
        else:
            x = x.argmax(-1) if agent.specs[key].classes else networks.symexp(x)
            out[key] = torch.stack([y.reshape(*is_first.shape, -1).float() for y in (obs[key], x)], 2)
    return out


def write_dream(agent: Agent, batch: dict, folder: Path, writer: SummaryWriter, step: int, updates: int) -> None:
    """Draw open_loop of a batch: images into folder/dreams/{updates}.gif, vectors into .png, both into TensorBoard.
    Borders are green while the model sees the frames, red when it does not, white where an episode starts."""
    context, path = 5, folder / "dreams" / str(updates)
    is_first = batch["is_first"][:4].cpu()  # (n, T)
    path.parent.mkdir(exist_ok=True)
    dream = {key: x.cpu() for key, x in open_loop(agent, batch, context).items()}
    # images that are not RGB are shown by their last channel: the newest of stacked frames
    images = [x if x.shape[-1] == 3 else x[..., -1:].expand(*x.shape[:-1], 3) for x in dream.values() if x.ndim == 5]
    lines = [(f"{key}[{i}]", x[..., i]) for key, x in dream.items() if x.ndim == 4 for i in range(x.shape[-1])]
    if images:
        x = torch.cat(images, 3)  # (n, T, 3h, w, 3)
        kind = torch.where(is_first, 2, (torch.arange(x.shape[1]) >= context).long())  # (n, T)
        colors = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        video = colors[kind][:, :, None, None].repeat(1, 1, x.shape[2] + 4, x.shape[3] + 4, 1)
        video[:, :, 2:-2, 2:-2] = x
        video = (video * 255).byte().numpy()
        strip = np.concatenate([np.concatenate(row[:: math.ceil(len(row) / 16)], 1) for row in video])
        writer.add_image("dream/images", strip, step, dataformats="HWC")
        frames = [Image.fromarray(np.concatenate(x, 1)).quantize(method=2) for x in video.swapaxes(0, 1)]  # 2: fast
        frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=100, loop=0)
    if lines:
        lines, length = lines[:: math.ceil(len(lines) / 8)], is_first.shape[1]  # at most 8 components, of all keys
        plots = import_module("matplotlib.figure")  # here, because it takes half a second
        figure = plots.Figure((16, 1.5 * len(lines)), dpi=80, layout="constrained")
        begin = np.arange(len(is_first)) * (length + 1)  # the sequences are drawn side by side
        for ax, (name, x) in zip(figure.subplots(len(lines), squeeze=False)[:, 0], lines, strict=True):
            ax.plot(F.pad(x, (0, 0, 0, 1), value=math.nan).flatten(0, 1), label=["true", "predicted"])  # NaN: a gap
            ax.set(ylabel=name, xticks=begin + context, xlim=(-1, begin[-1] + length))  # ticks: where prediction begins
        ax.legend(loc="upper right")
        figure.savefig(path.with_suffix(".png"))
        writer.add_figure("dream/vectors", figure, step)


# no loop over time steps: unrolled, it would compile for ten minutes
COMPILED = [(networks.RSSM, "observe_step"), (networks.NormSiLU, "on_maps"), (networks, "scale_pixels")]
COMPILED += [(sys.modules[__name__], x) for x in ("kl_losses", "recon_loss", "imagine_step", "actor_critic_loss")]


def compile_functions(device: torch.device) -> None:
    """Have the functions that take most of an update's time compiled when they are first called, if a compiler works.
    torch's default mode is right on CUDA too: others make graphs of functions, `Graph` makes one of the update."""
    print("compiling: the first update takes one or two minutes the first time, a few seconds later", flush=True)
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:  # compilers fail in many ways
        print(f"cannot compile, going on in eager mode: {type(error).__name__}: {str(error)[:200]!r}", flush=True)
        return
    torch._dynamo.config.cache_size_limit = 64  # shapes per function; beyond the limit it would be eager silently
    for owner, name in COMPILED:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))


class Graph:
    """A function of GPU tensors, launched as one graph, since launching a kernel takes longer than most of them run.
    The first call runs the function, which loads its kernels; the next captures the graph, for inputs of its shapes."""

    def __init__(self, function):
        self.function, self.graph, self.ran = function, None, False

    def __call__(self, *inputs):
        if not self.ran:
            self.ran = True
            return self.function(*inputs)
        if self.graph is None:
            self.inputs, self.graph = tree_map(torch.clone, inputs), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.outputs = self.function(*self.inputs)
            except RuntimeError as error:  # torch cannot go on: it still captures
                fail(f"cannot capture a CUDA graph, add --no-cudagraphs: {error.__context__ or error}")
        tree_map(Tensor.copy_, self.inputs, inputs)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)  # copies: the next call overwrites the graph's own


def join_ranks() -> tuple[int, int]:
    """Under torchrun: rank and number of the processes that train together; else 0 and 1."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    gpus, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < ranks:
        fail(f"--nproc-per-node {ranks} is more than the {gpus} GPUs here; CUDA_VISIBLE_DEVICES= hides them")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=1))  # evaluations are long
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    return dist.get_rank(), dist.get_world_size()


def max_over_ranks(value: int) -> int:
    """The largest value of all ranks, which wait for each other here."""
    if dist.is_initialized():
        value = torch.tensor(value)
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def train_together(agent: Agent, optimizer: LaProp) -> None:
    """Make every update the one on the joined batches of all ranks: the same weights at first, averaged gradients (as
    losses are means over a batch), the range of everyone's returns."""

    @torch.compiler.disable
    def update_range(returns: Tensor) -> None:
        parts = [torch.empty(returns.shape, device=returns.device) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, returns.contiguous())  # compiled code may choose another order
        ReturnNorm.update(agent.return_norm, torch.cat(parts))  # the class's, since the instance's is replaced

    def average_gradients(*_) -> None:
        for p in agent.trained():
            dist.all_reduce(p.grad.div_(dist.get_world_size()))

    for x in agent.state_dict().values():
        dist.broadcast(x, 0)
    agent.return_norm.update = update_range
    optimizer.register_step_pre_hook(average_gradients)  # before clipping


if __name__ == "__main__":
    main()
