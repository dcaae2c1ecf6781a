"""DreamerV3 in one file (Hafner et al., "Mastering diverse control tasks through world models", Nature 2025).

    python dreamerv3.py --env-id ALE/Pong-v5

The algorithm in ten lines. The agent acts in the environment and stores every step in a replay buffer. An update samples
B sequences of T steps. The world model encodes each observation x_t, runs a recurrent state-space model over the
sequence (deterministic h_t, discrete stochastic z_t) and learns to reconstruct x_t, to predict reward and continuation,
and to predict z_t before seeing x_t. From every one of the B*T states the model then imagines H steps with actions of
the actor. The critic learns the lambda-returns of these trajectories (and of the replayed ones), the actor learns by
REINFORCE to increase them, with advantages scaled by the returns' 5th to 95th percentile range. One optimizer, one
learning rate, the same hyperparameters for every environment.

Symbols: B batch, T sequence length, N = B*T, H imagination horizon, D deter (h), S groups and K classes of stoch (z),
F = D + S*K features, E embedding, A action, V bins. Scalars per step are (B, T). Everything is batch-major.

Time line. Step t holds what arrived at t and the action chosen on it; reward[t] was earned by action[t-1].

      step             0          1          2         3          4
      obs              x0 ------> x1 ------> x2        x3 ------> x4        x3 comes from a reset: no arrow into it,
      action              \\ a0 /     \\ a1 /     (a2)      \\ a3 /             a2 is stored but never executed
      reward           0          r1         r2        0          r4        r1 was earned by a0
      is_first         1          0          0         1          0         h, z, a of the step before are zeroed here
      is_last          0          0          1         0          0         the episode ended, for either reason
      is_terminal      0          0          1 or 0    0          0         0 when it was cut by a time limit

Contents: 1 Args · 2 environments · 3 agent and policy · 4 world-model loss · 5 imagination · 6 lambda-return and return
normalization · 7 actor and critic losses · 8 optimizer · 9 update · 10 checkpoints · 11 main
"""

import copy
import csv
import difflib
import io
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from networks import RSSM, ActionSpec, Actor, Decoder, Encoder, Head, ObsSpec, OneHot, Size, TwoHot, symlog
from replay import Replay

# === 1. Args ==========================================================================================================


@dataclass
class Args:
    exp_name: str = "dreamerv3"
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment; environment i of several gets seed + i"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """if toggled, CUDA is used when it is present"""
    save_model: bool = False
    """whether to save the final weights alone into `runs/{run_name}/model.pt`"""

    # Environment
    env_id: str = "ALE/Pong-v5"
    """any Gymnasium id, `module:Id-v0` included"""
    total_timesteps: int = 400_000
    """agent steps of the run, over all environments"""
    num_envs: int = 1
    """parallel environments, in processes of their own when more than one"""
    action_repeat: int = 0
    """environment steps per agent step; 0 means 4 (with max-pooling) for Atari and 1 for everything else"""
    image_size: int = 64
    """height and width to which images are resized, a multiple of 16 from 48 to 256"""

    # World model
    size: Literal["auto", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "auto"
    """model size by parameters; auto means 12m on CUDA and 1m on a CPU"""
    batch_size: int = 16
    """B, sequences per update"""
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

    # Replay
    buffer_size: int = 1_000_000
    """steps the replay buffer holds; never more than total_timesteps"""
    replay_windows: Literal["episode", "stream"] = "episode"
    """sequences inside one episode, or consecutive steps across episodes (official code)"""
    persist_replay: bool = True
    """keep the replay buffer in memory-mapped files of the run folder, which resuming needs"""

    # Logging
    log_frequency: int = 100
    """agent steps between two records of losses in TensorBoard"""
    checkpoint_frequency: int = 10_000
    """agent steps between two checkpoints; 0 writes only the final one"""
    resume: str = ""
    """run folder `runs/{run_name}` to go on with, under its stored flags"""


SIZES = {
    "1m": Size(512, 64, 64, 4, 4),
    "12m": Size(2048, 256, 256, 16, 16),
    "25m": Size(3072, 384, 384, 24, 24),
    "50m": Size(4096, 512, 512, 32, 32),  # 32 x 32 = 1024-dimensional stochastic state
    "100m": Size(6144, 768, 768, 48, 48),
    "200m": Size(8192, 1024, 1024, 64, 64),
    "400m": Size(12288, 1536, 1536, 96, 96),
}


def fail(message: str):
    """A user error: one line, exit status 2."""
    print(f"dreamerv3.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# === 3. Agent =========================================================================================================


class Agent(nn.Module):
    """All networks: world model (encoder, rssm, decoder, reward, cont), actor, critic, slow critic, return range.

    specs: observation key -> ObsSpec. action: ActionSpec. size: a row of SIZES. args: unimix, bins and twohot are read.
    """

    def __init__(self, specs: dict[str, ObsSpec], action: ActionSpec, size: Size, args: Args):
        super().__init__()
        self.specs, self.action, self.size = specs, action, size
        feat = size.deter + size.groups * size.classes
        self.encoder = Encoder(specs, size)
        self.rssm = RSSM(self.encoder.embed_size, action.size, size, args.unimix)
        self.decoder = Decoder(specs, size)
        self.reward = Head(feat, size.units, 1, args.bins, outscale=0.0)
        self.cont = Head(feat, size.units, 1, 1)
        self.actor = Actor(feat, size.units, action, args.actor_unimix)
        self.critic = Head(feat, size.units, 3, args.bins, outscale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.twohot = TwoHot(args.bins, args.twohot)
        self.return_norm = ReturnNorm()

    def trained(self) -> list[nn.Parameter]:
        """The parameters the optimizer changes: all but the slow critic's."""
        return [p for p in self.parameters() if p.requires_grad]


def get_feat(deter: Tensor, stoch: Tensor) -> Tensor:
    """(…, D), (…, S, K) -> (…, F), what every head but the decoder sees."""
    return torch.cat([deter, stoch.flatten(-2)], -1)


def flat_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Stored action (…, components) as the networks see it, (…, A): one-hot vectors side by side, or real numbers."""
    if not spec.nvec:
        return action.float()
    return torch.cat([F.one_hot(action[..., i].long(), n) for i, n in enumerate(spec.nvec)], -1).float()


def stored_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """The inverse of flat_action: (…, A) -> (…, components), class indices or unclipped real numbers."""
    if not spec.nvec:
        return action
    return torch.stack([x.argmax(-1) for x in action.split(spec.nvec, -1)], -1)


@torch.no_grad()
def policy(agent: Agent, obs: dict[str, Tensor], state: tuple, is_first: Tensor) -> tuple[Tensor, tuple]:
    """Act in the environment: obs key -> (E, …), is_first (E,) bool, state (deter, stoch, action) of the step before.

    Returns the sampled action (E, A) and the new state. `agent.rssm.initial(E)` and zeros (E, A) are a first state.
    """
    deter, stoch, action = state
    u = torch.rand(*stoch.shape[:2], device=stoch.device)  # (E, S)
    deter, stoch, _ = agent.rssm.observe_step(deter, stoch, action, agent.encoder(obs), is_first, u)
    action = agent.actor(get_feat(deter, stoch)).sample(agent.actor.noise(len(deter)))
    return action, (deter, stoch, action)


# === 4. World-model loss (paper: equations 2 to 5) ====================================================================


def world_model_loss(agent: Agent, batch: dict, args: Args) -> tuple[dict[str, Tensor], Tensor, Tensor, dict]:
    """Losses of the world model on replayed sequences.

    batch: obs key -> (B, T, …), prev_action (B, T, A), reward and flags (B, T), deter (B, D) and stoch (B, S, K) of the
    step before. Returns the losses, each (B, T), the posterior deter (B, T, D) and stoch (B, T, S, K) with gradient, and
    further outputs: embed, prior and posterior logits, reward and continue logits, reconstructions.
    """
    embed = agent.encoder(batch["obs"])  # (B, T, E)
    deter, stoch, post_logits = agent.rssm.observe(
        batch["deter"], batch["stoch"], batch["prev_action"], embed, batch["is_first"]
    )  # (B, T, D), (B, T, S, K), (B, T, S, K)
    prior_logits = agent.rssm.prior_logits(deter)  # (B, T, S, K)
    feat = get_feat(deter, stoch)  # (B, T, F)
    reward_logits = agent.reward(feat)  # (B, T, V)
    cont_logits = agent.cont(feat).squeeze(-1)  # (B, T)
    recon = agent.decoder(deter, stoch)  # key -> (B, T, …)

    # the KL is summed over the S groups first, then floored: free nats are per step
    post, prior = OneHot(post_logits, args.unimix), OneHot(prior_logits, args.unimix)
    fixed_post, fixed_prior = OneHot(post_logits.detach(), args.unimix), OneHot(prior_logits.detach(), args.unimix)
    losses = {
        "recon": sum(recon_loss(recon[key], batch["obs"][key], agent.specs[key]) for key in agent.specs),
        "reward": agent.twohot.loss(reward_logits, batch["reward"]),
        "continue": F.binary_cross_entropy_with_logits(
            cont_logits, (~batch["is_terminal"]).float() * args.gamma, reduction="none"
        ),  # predicts the discount too: imagination needs no other
        "dyn": fixed_post.kl(prior).sum(-1).clamp(min=args.free_nats),  # trains the prior
        "rep": post.kl(fixed_prior).sum(-1).clamp(min=args.free_nats),  # trains the posterior
    }
    outputs = {"embed": embed, "post": post_logits, "prior": prior_logits}
    outputs |= {"reward": reward_logits, "cont": cont_logits, "recon": recon}
    return losses, deter, stoch, outputs


def recon_loss(recon: Tensor, target: Tensor, spec: ObsSpec) -> Tensor:
    """Reconstruction loss of one key, summed over everything but (B, T): -> (B, T)."""
    if spec.classes:
        loss = F.cross_entropy(recon.flatten(0, -2), target.flatten().long(), reduction="none").view(target.shape)
    elif spec.is_image:
        loss = (recon - target.float() / 255).square()
    else:
        loss = (recon - symlog(target)).square()
    return loss.flatten(2).sum(-1) if loss.ndim > 2 else loss


# === 5. Imagination ===================================================================================================


@torch.no_grad()
def imagine(agent: Agent, deter: Tensor, stoch: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Roll the model forward H steps with the actor: start states (N, D), (N, S, K) -> feat (N, H+1, F), action (N, H+1, A).

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
    live = (1 - term) * disc ends the return at terminations and cont = (1 - last) * lam bootstraps at every episode end.
    """
    live = (1 - term.float()) * disc
    cont = (1 - last.float()) * lam
    returns = [boot[:, -1]]
    for t in reversed(range(reward.shape[1] - 1)):
        future = (1 - cont[:, t + 1]) * boot[:, t + 1] + cont[:, t + 1] * returns[-1]
        returns.append(reward[:, t + 1] + live[:, t + 1] * future)
    return torch.stack(returns[:0:-1], 1)


class ReturnNorm(nn.Module):
    """Running 5th and 95th percentile of the returns; advantages are divided by their distance, but by no less than 1."""

    def __init__(self, rate: float = 0.01):
        super().__init__()
        self.rate = rate
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Move towards the percentiles of returns (any shape)."""
        lo, hi = torch.quantile(returns, torch.tensor([0.05, 0.95], device=returns.device))
        self.lo.lerp_(lo, self.rate)
        self.hi.lerp_(hi, self.rate)

    @property
    def scale(self) -> Tensor:
        return (self.hi - self.lo).clamp(min=1)


# === 7. Actor and critic losses (paper: "Critic learning", "Actor learning") ==========================================


def actor_critic_loss(agent: Agent, feat: Tensor, action: Tensor, args: Args) -> tuple[dict[str, Tensor], Tensor, dict]:
    """Losses on imagined trajectories feat (N, H+1, F), action (N, H+1, A), neither with gradient.

    Returns the losses (N,), the lambda-returns R (N, H), and metrics.
    """
    with torch.no_grad():
        reward = agent.twohot.mean(agent.reward(feat))  # (N, H+1)
        cont = agent.cont(feat).squeeze(-1).sigmoid()  # (N, H+1), the discount is in it
        slow_value = agent.twohot.mean(agent.slow_critic(feat))  # (N, H+1)
    value_logits = agent.critic(feat)  # (N, H+1, V)
    value = agent.twohot.mean(value_logits.detach())  # (N, H+1)
    weight = cont.cumprod(1)[:, :-1]  # (N, H) probability that the episode is still running
    returns = lambda_return(torch.zeros_like(cont), 1 - cont, reward, value, 1.0, args.return_lambda)  # (N, H)

    agent.return_norm.update(returns)
    advantage = (returns - value[:, :-1]) / agent.return_norm.scale  # (N, H)
    dist = agent.actor(feat[:, :-1])
    entropy = dist.entropy()  # (N, H)
    actor_loss = -weight * (dist.log_prob(action[:, :-1]) * advantage + args.ent_coef * entropy)
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
    value_logits = agent.critic(feat)[:, :-1]  # (B, T-1, V)
    with torch.no_grad():
        slow_value = agent.twohot.mean(agent.slow_critic(feat[:, :-1]))  # (B, T-1)
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

    def __init__(self, params, lr: float, warmup: int = 1000, clip: float = 0.3, betas=(0.9, 0.999), eps: float = 1e-20):
        super().__init__(params, dict(lr=lr, warmup=warmup, clip=clip, betas=betas, eps=eps))
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


def total_loss(agent: Agent, batch: dict, args: Args) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The sum of all losses on one batch; see world_model_loss for its shapes.

    Returns the total (), the posterior latents deter (B, T, D) and stoch (B, T, S, K), and metrics, all detached.
    """
    losses, deter, stoch, outputs = world_model_loss(agent, batch, args)
    # imagination starts from all B*T posterior states, detached: behavior learning does not shape the world model
    feat, action = imagine(agent, deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1), args.imagination_horizon)
    behavior_losses, returns, metrics = actor_critic_loss(agent, feat, action, args)
    boot = returns[:, 0].unflatten(0, deter.shape[:2])  # (B, T)
    losses |= behavior_losses
    losses["replay_critic"] = replay_critic_loss(agent, get_feat(deter, stoch), batch, boot, args)
    scales = {"recon": args.pred_scale, "reward": args.pred_scale, "continue": args.pred_scale}
    scales |= {"dyn": args.dyn_scale, "rep": args.rep_scale, "replay_critic": args.replay_critic_scale}
    losses = {name: loss.mean() for name, loss in losses.items()}
    total = sum(scales.get(name, 1.0) * loss for name, loss in losses.items())
    metrics |= {f"losses/{name}": loss.detach() for name, loss in losses.items()}
    metrics["losses/total"] = total.detach()
    metrics["world_model/prior_entropy"] = OneHot(outputs["prior"].detach(), args.unimix).entropy().sum(-1).mean()
    metrics["world_model/posterior_entropy"] = OneHot(outputs["post"].detach(), args.unimix).entropy().sum(-1).mean()
    return total, (deter.detach(), stoch.detach()), metrics


def train_step(agent: Agent, optimizer: LaProp, batch: dict, args: Args) -> tuple[tuple[Tensor, Tensor], dict]:
    """One update on one batch: -> fresh latents deter (B, T, D) and stoch (B, T, S, K), and metrics, on the device."""
    device = batch["reward"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bfloat16"):
        total, latents, metrics = total_loss(agent, batch, args)
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

    tensors = {key: copy_over(x) for key, x in batch.items()}
    out = {key: tensors[key] for key in ("reward", "is_first", "is_last", "is_terminal")}
    out["obs"] = {key[4:]: x for key, x in tensors.items() if key.startswith("obs/")}
    out["prev_action"] = flat_action(tensors["prev_action"], agent.action)  # (B, T, A)
    out["deter"] = tensors["deter"].float()
    out["stoch"] = F.one_hot(tensors["stoch"].long(), agent.size.classes).float()  # (B, S, K)
    return out
