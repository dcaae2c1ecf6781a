"""Tests of DreamerV3: closed-form values, the official code's numbers, alignment, replay, and the program itself.

`pytest` runs all of it in a few minutes on two cores. `GOLDEN_DIR=folder pytest -k golden` checks other golden files.
"""

import ast
import csv
import errno
import gc
import io
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image, ImageSequence
from torch.utils._python_dispatch import TorchDispatchMode

import dreamerv3
import networks
from dreamerv3 import SIZES, Agent, Args
from networks import ActionSpec, ObsSpec, Size
from replay import Replay

TINY = Size(deter=32, hidden=16, units=16, classes=4, depth=4, groups=4, blocks=4)
SPECS = {"image": ObsSpec((64, 64, 3)), "vector": ObsSpec((5,)), "discrete": ObsSpec((2,), 3)}
ROOT = Path(__file__).parent
PLAIN_STEP = networks.RSSM.observe_step


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


THREE = ActionSpec((3,), 3)


def make_agent(specs=None, action=THREE, **flags) -> tuple[Agent, Args]:
    args = Args(precision="float32", imagination_horizon=3, warmup_updates=1, **flags)
    return Agent(specs or {"vector": ObsSpec((5,))}, action, TINY, args), args


def make_batch(agent: Agent, batch: int = 2, length: int = 6, seed: int = 0) -> dict:
    """A random batch as train_step takes it."""
    rng = np.random.default_rng(seed)
    out = {
        f"obs/{key}": rng.integers(0, max(2, s.classes) if s.classes else 256, (batch, length, *s.shape))
        for key, s in agent.specs.items()
    }
    out = {key: x.astype(agent.specs[key[4:]].dtype) for key, x in out.items()}
    for key, spec in agent.specs.items():
        if spec.dtype == "float32":
            out[f"obs/{key}"] = rng.normal(size=(batch, length, *spec.shape)).astype(np.float32)
    nvec = agent.action.nvec
    action = (
        rng.integers(0, nvec, (batch, length, len(nvec)))
        if nvec
        else rng.normal(size=(batch, length, agent.action.size))
    )
    out |= {"prev_action": action.astype(np.int32 if nvec else np.float32)}
    out |= {"reward": rng.normal(size=(batch, length)).astype(np.float32)}
    out |= {key: rng.random((batch, length)) < 0.2 for key in ("is_first", "is_last", "is_terminal")}
    out |= {"deter": rng.normal(size=(batch, TINY.deter)).astype(np.float16)}
    out |= {"stoch": rng.integers(0, TINY.classes, (batch, TINY.groups)).astype(np.uint8)}
    return dreamerv3.batch_to_device(out, agent, torch.device("cpu"))


# === symlog and twohot ================================================================================================


def test_symlog_and_symexp_values():
    x = torch.tensor([0.0, 1.0, -1.0, math.e - 1, 1e4, -1e-6])
    expected = torch.tensor([0.0, math.log(2), -math.log(2), 1.0, math.log(10001), -1e-6])
    torch.testing.assert_close(networks.symlog(x), expected)
    torch.testing.assert_close(networks.symexp(expected), x)
    assert networks.symexp(torch.tensor(1.0)).item() == pytest.approx(math.e - 1)


def test_twohot_bins_are_symmetric_and_symexp_spaced():
    bins = networks.TwoHot().bins
    assert len(bins) == 255 and bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    torch.testing.assert_close(bins, networks.symexp(torch.linspace(-20, 20, 255)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(networks.TwoHot(space="symlog").bins, torch.linspace(-20, 20, 255))


@pytest.mark.parametrize("space", ["symexp", "symlog"])
def test_twohot_loss_equals_cross_entropy_with_the_encoding(space):
    twohot = networks.TwoHot(space=space)
    values = torch.tensor([0.0, 0.3, -2.5, 1000.0, float(twohot.bins[200]), 1e12, -1e12])
    logits = torch.randn(len(values), 255)
    y = networks.symlog(values) if space == "symlog" else values
    for i, target in enumerate(y.double().clamp(twohot.bins[0], twohot.bins[-1])):
        encoding = torch.zeros(255, dtype=torch.float64)  # weights by closeness to the two bins around the target
        above = int((twohot.bins.double() < target).sum().clamp(1, 254))
        low, high = twohot.bins[above - 1].double(), twohot.bins[above].double()
        encoding[above - 1], encoding[above] = (high - target) / (high - low), (target - low) / (high - low)
        expected = -(encoding * logits[i].double().log_softmax(0)).sum()
        assert twohot.loss(logits, values)[i].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("space", ["symexp", "symlog"])
def test_twohot_decodes_what_it_encodes(space):
    twohot = networks.TwoHot(space=space)
    for value in (0.0, 0.5, -3.0, 123.0, -1e5):
        logits = torch.zeros(1, 255, requires_grad=True)
        twohot.loss(logits, torch.tensor([value])).backward()
        encoding = (1 / 255 - logits.grad).clamp(min=0)  # the gradient of cross-entropy is softmax minus target
        assert encoding.sum().item() == pytest.approx(1, abs=1e-5) and (encoding > 1e-6).sum() <= 2
        assert twohot.mean((encoding + 1e-30).log()).item() == pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("space", ["symexp", "symlog"])
def test_twohot_is_exactly_zero_for_uniform_logits(space):
    assert (networks.TwoHot(space=space).mean(torch.full((7, 255), 0.37)) == 0).all()
    agent, _ = make_agent(twohot=space)
    feat = torch.randn(9, 32 + 16)
    for head in (agent.reward, agent.critic, agent.slow_critic):
        assert (agent.twohot.mean(head(feat)) == 0).all()  # outscale 0: nothing is predicted before training


def test_twohot_flag_bins():
    agent, _ = make_agent(bins=31)
    assert agent.twohot.bins.shape == (31,) and agent.critic(torch.randn(2, 48)).shape == (2, 31)


# === distributions and layers =========================================================================================


def test_sampling_follows_the_probabilities():
    probs = torch.tensor([0.1, 0.6, 0.3])
    u = (torch.arange(10_000) + 0.5) / 10_000
    counts = networks.sample_index(probs.expand(10_000, 3), u).bincount()
    assert counts.tolist() == [1000, 6000, 3000]
    assert networks.sample_index(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(0.9999999)).item() == 0
    assert (
        networks.sample_index(torch.tensor([0.2, 0.2, 0.2]), torch.tensor(0.99)).item() == 2
    )  # sums below 1 stay valid


def test_onehot_mixes_uniform_and_passes_gradients_straight_through():
    logits = torch.tensor([[1000.0, 0.0, 0.0, 0.0]], requires_grad=True)
    dist = networks.OneHot(logits, 0.01)
    torch.testing.assert_close(dist.probs, torch.tensor([[0.9925, 0.0025, 0.0025, 0.0025]]))
    logits = torch.tensor([0.1, 0.5, -0.3], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0])
    dist = networks.OneHot(logits, 0.01)
    sample = dist.sample(torch.tensor(0.5))
    assert sorted(sample.tolist()) == pytest.approx([0, 0, 1])
    gradient = torch.autograd.grad((sample * weights).sum(), logits)[0]
    expected = torch.autograd.grad((networks.OneHot(logits, 0.01).probs * weights).sum(), logits)[0]
    torch.testing.assert_close(gradient, expected)


def test_distributions_agree_with_torch():
    logits, action = [torch.randn(6, 3), torch.randn(6, 4)], torch.eye(3)[torch.arange(6) % 3]
    action = torch.cat([action, torch.eye(4)[torch.arange(6) % 4]], -1)
    dist, reference = networks.MultiOneHot(logits, 0.0), [torch.distributions.Categorical(logits=x) for x in logits]
    expected = reference[0].log_prob(torch.arange(6) % 3) + reference[1].log_prob(torch.arange(6) % 4)
    torch.testing.assert_close(dist.log_prob(action), expected)
    torch.testing.assert_close(dist.entropy(), sum(d.entropy() for d in reference))
    assert dist.sample(torch.rand(6, 2)).sum(-1).tolist() == [2.0] * 6
    mean, std, x = torch.randn(5, 2), torch.rand(5, 2) + 0.1, torch.randn(5, 2)
    normal, reference = networks.Normal(mean, std), torch.distributions.Normal(mean, std)
    torch.testing.assert_close(normal.log_prob(x), reference.log_prob(x).sum(-1))
    torch.testing.assert_close(normal.entropy(), reference.entropy().sum(-1))


def test_actor_flags_and_bounds():
    feat = torch.randn(4, 48) * 100
    agent, _ = make_agent(actor_unimix=0.5)
    assert agent.actor(feat).parts[0].probs.min() >= 0.5 / 3
    agent, _ = make_agent(action=ActionSpec((), 2))
    agent.actor.outs[1].weight.data.normal_(std=100)
    dist = agent.actor(feat)
    assert dist.mean.abs().max() <= 1 and dist.std.min() >= 0.1 and dist.std.max() <= 1


def test_initialization():
    layer = networks.linear(400, 300, 0.5)
    assert layer.weight.std().item() == pytest.approx(0.5 / math.sqrt(400), rel=0.02)
    assert layer.weight.abs().max().item() <= 0.5 * 2 * 1.1368 / math.sqrt(400) and not layer.bias.any()
    block = networks.BlockLinear(256, 512, 8, shared=96)
    assert block.weight.shape == (8, 128, 64)
    assert block.weight.std().item() == pytest.approx(1 / math.sqrt(256 + 8 * 96), rel=0.02)  # full input width
    assert networks.conv5(16, 64).weight.std().item() == pytest.approx(1 / math.sqrt(25 * 16), rel=0.02)


def test_block_linear_equals_its_definition():
    layer = networks.BlockLinear(8, 12, 4, shared=3)
    layer.bias.data.normal_()
    x, shared = torch.randn(5, 8), torch.randn(5, 3)
    blocks = [torch.cat([x[:, 2 * g : 2 * g + 2], shared], -1) @ layer.weight[g] for g in range(4)]
    torch.testing.assert_close(layer(x, shared), torch.cat(blocks, -1) + layer.bias)


def test_upsample_conv_equals_its_definition():
    conv, x = networks.conv5(3, 4).double(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    conv.bias.data.normal_()
    expected = conv(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    phases = networks.upsample_conv(x, conv)
    torch.testing.assert_close(networks.merge_phases(phases), expected)
    torch.testing.assert_close(networks.split_phases(expected.permute(0, 2, 3, 1)), phases.permute(0, 2, 3, 1))


COUNTS = {
    "1m": (686_456, 640_477),
    "12m": (10_492_616, 9_736_477),
    "25m": (23_487_016, 21_780_637),
    "50m": (41_646_984, 38_608_925),
    "100m": (93_463_624, 86_617_885),
    "200m": (165_942_536, 153_763_357),
    "400m": (372_887_176, 345_463_837),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_official_code(size):
    with torch.device("meta"):
        for spec, count in zip((ObsSpec((64, 64, 3)), ObsSpec((24,))), COUNTS[size], strict=True):
            agent = Agent({"obs": spec}, ActionSpec((6,), 6), SIZES[size], Args())
            assert sum(p.numel() for p in agent.trained()) == count


# === returns, losses, optimizer =======================================================================================


def test_lambda_return_by_hand():
    # two steps after the first; the middle one is ordinary: R1 = r2 + g*b2, R0 = r1 + g*((1-l)*b1 + l*R1)
    zeros = torch.zeros(1, 3)
    reward, boot = torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([[7.0, 10.0, 20.0]])
    out = dreamerv3.lambda_return(zeros, zeros, reward, boot, 0.9, 0.5)
    r1 = 2 + 0.9 * 20
    torch.testing.assert_close(out, torch.tensor([[1 + 0.9 * (0.5 * 10 + 0.5 * r1), r1]]))
    one = torch.tensor([[0.0, 1.0, 0.0]])
    # truncated at step 1: bootstrap from its value alone; terminated there: its reward alone
    assert dreamerv3.lambda_return(one, zeros, reward, boot, 0.9, 0.5)[0, 0].item() == pytest.approx(1 + 0.9 * 10)
    assert dreamerv3.lambda_return(one, one, reward, boot, 0.9, 0.5)[0, 0].item() == pytest.approx(1)


def n_step_return(t, n, last, term, reward, boot, disc):
    """Discounted rewards of t+1 .. t+n, then the value there; stops at episode ends."""
    total, scale = 0.0, 1.0
    for k in range(t + 1, t + n + 1):
        total += scale * reward[k]
        scale *= disc * (not term[k])
        if last[k]:
            break
    return total + scale * boot[k]


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_lambda_return_equals_the_weighted_sum_of_n_step_returns(lam):
    rng, length = np.random.default_rng(0), 7
    for _ in range(20):
        reward, boot = rng.normal(size=length), rng.normal(size=length)
        term = rng.random(length) < 0.15
        trajectory = (term | (rng.random(length) < 0.15), term, reward, boot)
        expected = []
        for t in range(length - 1):
            steps = length - 1 - t
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, steps)] + [lam ** (steps - 1)]
            expected.append(sum(w * n_step_return(t, n, *trajectory, 0.97) for n, w in enumerate(weights, 1)))
        out = dreamerv3.lambda_return(*(torch.tensor(x)[None] for x in trajectory), 0.97, lam)[0]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_kl_is_summed_over_groups_before_free_nats_and_split_by_stop_gradients():
    agent, args = make_agent()
    batch = make_batch(agent)
    for free, active in ((1e-6, True), (1e6, False)):
        args.free_nats = free
        losses, _, _, outputs = dreamerv3.world_model_loss(agent, batch, args)
        mixed = [0.99 * outputs[k].softmax(-1) + 0.01 / 4 for k in ("post", "prior")]
        kl = (mixed[0] * (mixed[0] / mixed[1]).log()).sum((-1, -2))
        torch.testing.assert_close(losses["dyn"], kl.clamp(min=free))
        torch.testing.assert_close(losses["rep"], losses["dyn"])
        for name, trained, fixed in (("dyn", "prior", "post"), ("rep", "post", "prior")):
            logits = [outputs[trained], outputs[fixed]]
            grads = torch.autograd.grad(losses[name].sum(), logits, retain_graph=True, allow_unused=True)
            assert bool(grads[0].any()) == active
            # the posterior also reaches later priors through deter, so there only its last step tells
            silent = grads[1] if trained == "post" or grads[1] is None else grads[1][:, -1]
            assert silent is None or not silent.any()


def test_return_norm_tracks_percentiles():
    norm = dreamerv3.ReturnNorm()
    returns = torch.arange(101.0)  # 5th percentile 5, 95th 95
    norm.update(returns)
    assert (norm.lo.item(), norm.hi.item()) == pytest.approx((0.05, 0.95)) and norm.scale.item() == 1
    for _ in range(2000):
        norm.update(returns)
    assert (norm.lo.item(), norm.hi.item()) == pytest.approx((5, 95), rel=1e-3)
    assert norm.scale.item() == pytest.approx(90, rel=1e-3)
    norm.update(torch.tensor([0.0, 1.0]))  # interpolated linearly: 0.05 and 0.95
    assert norm.lo.item() == pytest.approx(0.99 * 5 + 0.01 * 0.05, rel=1e-3)


def test_optimizer_equals_a_plain_loop():
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = dreamerv3.LaProp(params, lr=0.1, warmup=4, clip=0.3)
    plain = [(p.detach().double(), torch.zeros(p.shape).double(), torch.zeros(p.shape).double()) for p in params]
    for step in range(7):
        for p in params:
            p.grad = torch.randn(p.shape) * 10 ** (step - 3)
        for i, (p, mean, square) in enumerate(plain):
            g = params[i].grad.double()
            g = g * min(1, 0.3 * max(1e-3, p.norm()) / g.norm())
            square = 0.999 * square + 0.001 * g * g
            mean = 0.9 * mean + 0.1 * g / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-20)
            plain[i] = p - 0.1 * min(1, step / 4) * mean / (1 - 0.9 ** (step + 1)), mean, square
        before = [p.clone() for p in params]
        metrics = optimizer.step()
        assert step > 0 or all(torch.equal(p, q) for p, q in zip(params, before, strict=True))  # first rate is 0
        assert metrics["charts/learning_rate"].item() == pytest.approx(0.1 * min(1, step / 4))
        for p, (expected, _, _) in zip(params, plain, strict=True):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-3, atol=1e-5)


def test_slow_critic_follows_with_rate_tau():
    agent, args = make_agent(tau=0.25)
    agent.critic[1].weight.data.fill_(1.0)
    optimizer = dreamerv3.LaProp(agent.trained(), 0.0)
    dreamerv3.train_step(agent, optimizer, make_batch(agent), args)
    torch.testing.assert_close(agent.slow_critic[1].weight, torch.full_like(agent.critic[1].weight, 0.25))


FLAGS = {
    **dict.fromkeys(["pred_scale", "dyn_scale", "rep_scale", "free_nats", "ent_coef", "slow_critic_scale"], 3.0),
    **dict.fromkeys(["gamma", "return_lambda", "unimix", "actor_unimix", "replay_critic_scale"], 0.5),
    "twohot": "symlog",
    "imagination_horizon": 2,
}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_loss_flag_changes_the_loss(flag):
    totals = []
    for value in (getattr(Args(imagination_horizon=3), flag), FLAGS[flag]):
        torch.manual_seed(0)
        agent, args = make_agent()
        for head in (agent.reward, agent.critic, agent.slow_critic):
            torch.nn.init.normal_(head[1].weight)
        setattr(args, flag, value)
        agent.rssm.unimix, agent.actor.unimix = args.unimix, args.actor_unimix
        agent.twohot = networks.TwoHot(args.bins, args.twohot)
        torch.manual_seed(1)
        totals.append(dreamerv3.loss(agent, make_batch(agent), args)[0].item())
    assert totals[0] != totals[1]


# === gradients, devices, alignment ====================================================================================


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("action", [ActionSpec((3,), 3), ActionSpec((3, 2), 5), ActionSpec((), 2)])
def test_every_parameter_receives_gradient(action, precision):
    agent, args = make_agent(SPECS, action, free_nats=0.0)
    args.precision = precision
    for head in (agent.reward, agent.critic, agent.slow_critic):
        torch.nn.init.normal_(head[1].weight)  # outscale 0 passes nothing on at first
    dreamerv3.loss(agent, make_batch(agent), args)[0].backward()
    silent = [name for name, p in agent.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent


def test_imagined_losses_send_no_gradient_into_the_world_model():
    agent, args = make_agent()
    for head in (agent.reward, agent.critic):
        torch.nn.init.normal_(head[1].weight)
    batch = make_batch(agent)
    losses, deter, stoch, _ = dreamerv3.world_model_loss(agent, batch, args)
    feat, action = dreamerv3.imagine(agent, deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1), 3)
    behavior, returns, _ = dreamerv3.actor_critic_loss(agent, feat, action, args)
    sum(x.sum() for x in behavior.values()).backward()
    world = [agent.encoder, agent.rssm, agent.decoder, agent.reward, agent.cont]
    assert all(p.grad is None for net in world for p in net.parameters())
    assert all(p.grad is not None for net in (agent.actor, agent.critic) for p in net.parameters())
    agent.zero_grad()
    boot = returns[:, 0].unflatten(0, deter.shape[:2])
    replay_loss = dreamerv3.replay_critic_loss(agent, dreamerv3.get_feat(deter, stoch), batch, boot, args)
    replay_loss.sum().backward()  # this one does
    assert agent.rssm.gru.weight.grad.any() and agent.encoder.mlp[0][0].weight.grad.any()
    assert all(p.grad is None for p in [*agent.actor.parameters(), *agent.slow_critic.parameters()])


class NoHostSync(TorchDispatchMode):
    """Fails on every operation that would make the host wait for the device or has a data-dependent shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal.")
        assert not any(name in str(function) for name in forbidden), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("action", [ActionSpec((3, 2), 5), ActionSpec((), 2)])
def test_update_never_waits_for_the_device(action):
    agent, args = make_agent(SPECS, action)
    optimizer = dreamerv3.LaProp(agent.trained(), args.learning_rate)
    batch = make_batch(agent)
    with NoHostSync():
        dreamerv3.train_step(agent, optimizer, batch, args)


@pytest.mark.parametrize("action", [ActionSpec((3, 2), 5), ActionSpec((), 2)])
def test_update_creates_every_tensor_on_the_right_device(action):
    """On the meta device an operation that mixes devices raises, as it would on a GPU."""
    agent, args = make_agent(SPECS, action)
    batch = make_batch(agent)
    agent = agent.to("meta")
    optimizer = dreamerv3.LaProp(agent.trained(), args.learning_rate)
    batch = {k: {n: x.to("meta") for n, x in v.items()} if k == "obs" else v.to("meta") for k, v in batch.items()}
    (deter, stoch), metrics = dreamerv3.train_step(agent, optimizer, batch, args)
    assert {x.device.type for x in (deter, stoch, *metrics.values())} == {"meta"}
    state = (*agent.rssm.initial(2), torch.zeros(2, action.size, device="meta"))
    obs = {key: x[:, 0] for key, x in batch["obs"].items()}
    out, _ = dreamerv3.policy(agent, obs, state, batch["is_first"][:, 0])
    assert out.shape == (2, action.size) and out.device.type == "meta"


def test_compiled_functions_are_one_graph_each(monkeypatch):
    """fullgraph raises on anything that would break the graph: a host sync, a data-dependent shape, a print."""
    agent, args = make_agent(SPECS)
    batch = make_batch(agent)
    torch.manual_seed(1)
    expected = dreamerv3.loss(agent, batch, args)[0]
    agent.return_norm.lo.zero_()
    agent.return_norm.hi.zero_()
    for owner, name in dreamerv3.COMPILED:
        compiled = torch.compile(getattr(owner, name), fullgraph=True, backend="eager", dynamic=False)
        monkeypatch.setattr(owner, name, compiled)
    torch.manual_seed(1)
    torch.testing.assert_close(dreamerv3.loss(agent, batch, args)[0], expected)


def test_nothing_before_a_reset_reaches_later_latents():
    agent, _ = make_agent()
    batch = make_batch(agent, length=8)
    batch["is_first"][:] = False
    batch["is_first"][:, 4] = True
    outs = []
    for change in (0.0, 100.0):
        obs = {"vector": batch["obs"]["vector"].clone()}
        obs["vector"][:, :4] += change
        action = batch["prev_action"].clone()
        action[:, :5] += change  # the action before the reset step included
        torch.manual_seed(1)
        embed = agent.encoder(obs)
        outs.append(agent.rssm.observe(batch["deter"] + change, batch["stoch"], action, embed, batch["is_first"]))
    for before, after in zip(*outs, strict=True):
        assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(outs[0][0][:, 3], outs[1][0][:, 3])


@pytest.mark.parametrize("trained_embed", [True, False])
def test_gradients_of_a_sequence_equal_those_of_its_steps(trained_embed, monkeypatch):
    monkeypatch.setattr(networks, "sample_index", lambda probs, u: probs.argmax(-1))
    agent, _ = make_agent()
    batch = make_batch(agent, length=5)
    embed = agent.encoder(batch["obs"]).detach().requires_grad_(trained_embed)
    action, is_first, noise = batch["prev_action"], batch["is_first"], torch.zeros(2, 5, 32)
    first = batch["deter"], batch["stoch"]
    late = agent.rssm.observe(*first, action, embed, is_first)
    plain = agent.rssm.forward(*first, action, embed, is_first, noise, *(torch.zeros_like(x) for x in late))
    wanted = [p for name, p in agent.rssm.named_parameters() if "prior" not in name] + [embed] * trained_embed
    upstream = [torch.randn_like(x) for x in late]
    for a, b in zip(*(torch.autograd.grad(x, wanted, upstream) for x in (late, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_policy_and_training_agree_on_latents(monkeypatch):
    monkeypatch.setattr(networks, "sample_index", lambda probs, u: probs.argmax(-1))
    agent, _ = make_agent(SPECS)
    batch = make_batch(agent, batch=3, length=7)
    state = (batch["deter"], batch["stoch"], batch["prev_action"][:, 0])
    deter, stoch, _ = agent.rssm.observe(
        batch["deter"], batch["stoch"], batch["prev_action"], agent.encoder(batch["obs"]), batch["is_first"]
    )
    for t in range(7):
        obs = {key: x[:, t] for key, x in batch["obs"].items()}
        _, new = dreamerv3.policy(agent, obs, (*state[:2], batch["prev_action"][:, t]), batch["is_first"][:, t])
        torch.testing.assert_close(new[0], deter[:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new[1], stoch[:, t])
        state = new


def test_one_batch_can_be_overfitted():
    agent, args = make_agent(SPECS)
    optimizer = dreamerv3.LaProp(agent.trained(), 3e-3, warmup=10)
    batch = make_batch(agent, batch=2, length=4)
    batch["obs"]["image"] = batch["obs"]["image"][:, :, :1, :1].expand(2, 4, 64, 64, 3)  # one color per step
    history = [dreamerv3.train_step(agent, optimizer, batch, args)[1] for _ in range(300)]
    first, last = ({k: float(m[k]) for k in m} for m in (history[0], history[-1]))
    for name, factor in {"recon": 0.1, "reward": 0.5, "continue": 0.3}.items():
        assert last[f"losses/{name}"] < factor * first[f"losses/{name}"], name


class Chain(gym.Env):
    """Walks 0, 1, 2, … to `length`, then ends, by termination or truncation; the reward is the new position."""

    def __init__(self, length: int = 5, terminal: bool = True):
        self.length, self.terminal = length, terminal
        self.observation_space, self.action_space = spaces.Box(-1, 99, (1,)), spaces.Discrete(4, start=3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action in self.action_space
        self.position += 1
        end = self.position == self.length
        return (
            np.full(1, self.position, np.float32),
            self.position,
            end and self.terminal,
            end and not self.terminal,
            {},
        )


gym.register("DreamerChain-v0", Chain, kwargs={"length": 5})
gym.register("DreamerTruncatedChain-v0", Chain, kwargs={"length": 5, "terminal": False})


QUICK = "--no-compile --batch-size 4 --batch-length 8 --train-ratio 16 --imagination-horizon 2 --size 1m"
QUICK += " --precision float32 --learning-starts 40"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program in this process, its model tiny and its folder tmp_path: flags -> what it exits with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C stays pytest's
    monkeypatch.setitem(dreamerv3.SIZES, "1m", TINY)

    def main(flags: str):
        with pytest.raises(SystemExit) as stop:
            dreamerv3.main(flags.split())
        return stop.value.code

    return main


@pytest.mark.parametrize("env_id", ["DreamerChain-v0", "DreamerTruncatedChain-v0"])
@pytest.mark.parametrize("windows", ["episode", "stream"])
def test_alignment_on_a_chain(env_id, windows, program, monkeypatch):
    """The loop stores, and replay returns, exactly the time line drawn at the top of dreamerv3.py."""
    seen = []
    real = dreamerv3.batch_to_device
    monkeypatch.setattr(dreamerv3, "batch_to_device", lambda batch, *rest: seen.append(batch) or real(batch, *rest))
    assert not program(f"{QUICK} --env-id {env_id} --replay-windows {windows} --total-timesteps 90") and len(seen) == 25
    for batch in seen:
        x, r = batch["obs/obs"][..., 0], batch["reward"]
        assert ((batch["is_first"]) >= (x == 0)).all()  # a reset shows position 0; a row may also start over elsewhere
        np.testing.assert_array_equal(r, x)  # reward[t] arrives with obs[t], 0 on resets
        assert (batch["is_last"] >= (x == 5)).all()
        np.testing.assert_array_equal(batch["is_terminal"], (x == 5) & (env_id == "DreamerChain-v0"))
        follows = x[:, 1:] == x[:, :-1] + 1
        np.testing.assert_array_equal(follows, ~batch["is_first"][:, 1:])
        np.testing.assert_array_equal(batch["is_last"][:, :-1], batch["is_first"][:, 1:])


# === replay ===========================================================================================================

FIELDS = {"obs/x": ((2,), np.float32), "action": ((1,), np.int32), "reward": ((), np.float32)}
FIELDS |= {"deter": ((3,), np.float16), "stoch": ((2,), np.uint8)}


def fill(replay: Replay, steps: int, lengths, seed: int = 0) -> None:
    """Add steps whose observation is (environment, time), in episodes of the given lengths."""
    rng, envs = np.random.default_rng(seed), replay.num_envs
    first, left = np.ones(envs, bool), rng.choice(lengths, envs)
    for now in range(replay.now, replay.now + steps):
        last, time = left == 1, np.full(envs, now)
        step = {"obs/x": np.stack([np.arange(envs), time], 1), "action": time[:, None], "reward": time}
        step |= {"is_first": first, "is_last": last, "is_terminal": last}
        step |= {"deter": np.zeros((envs, 3)), "stoch": np.full((envs, 2), now % 200)}
        copies = {k: v.copy() for k, v in step.items()}
        replay.add(step)
        assert all(np.array_equal(step[k], copies[k]) for k in step), "add changed its input"
        first, left = last, np.where(last, rng.choice(lengths, envs), left - 1)


@pytest.mark.parametrize("windows", ["episode", "stream"])
@pytest.mark.parametrize("lengths", [[1], [3, 5], [8], [7, 9, 30], [40, 50], [10_000]])
def test_sampled_rows_are_contiguous_and_seams_are_marked(windows, lengths):
    replay = Replay(600, 2, FIELDS, 8, windows)
    for steps in (20, 270, 37, 500):  # not full, just full, past the write head, far past it
        fill(replay, steps, lengths)
        now, kept = replay.now, min(replay.now, 300)
        assert len(replay) == 2 * kept
        for _ in range(50):
            batch, (env, time) = replay.sample(16)
            x = batch["obs/x"]
            np.testing.assert_array_equal(x[..., 0], np.broadcast_to(env, (16, 8)))
            np.testing.assert_array_equal(x[..., 1], time)
            np.testing.assert_array_equal(batch["reward"], time)
            assert time.min() >= now - kept and time.max() < now
            follows = time[:, 1:] == time[:, :-1] + 1
            first, last = batch["is_first"], batch["is_last"]
            assert (follows | (first[:, 1:] & last[:, :-1])).all()
            assert not (last[:, :-1] & ~first[:, 1:]).any()
            # the action and the latent before each step are those of the step before it, unless the state is reset
            assert (first | (batch["prev_action"][..., 0] == time - 1)).all()
            assert (first[:, 0] | (batch["stoch"][:, 0] == (time[:, 0] - 1) % 200)).all()
            assert (batch["is_terminal"] <= last).all()
            if windows == "episode":
                assert not (last[:, :-1] & follows).any()  # never on into the next episode


@pytest.mark.parametrize("lengths, low, high", [([3, 5], 0.9, 1.1), ([40], 40 / 48 - 0.05, 1.8), ([8], 0.9, 1.1)])
def test_episode_windows_cover_every_step(lengths, low, high):
    replay = Replay(240, 1, FIELDS, 8, "episode")
    fill(replay, 240, lengths)
    replay.online.clear()
    counts = np.zeros(240)
    for _ in range(6000):
        _, (_, time) = replay.sample(16)
        np.add.at(counts, time, 1)
    share = counts / counts.mean()
    assert low <= share.min() and share.max() <= high


def test_a_stretch_is_used_once_when_it_is_complete():
    replay = Replay(400, 2, FIELDS, 8, "stream")
    fill(replay, 16, [1000])
    assert replay.online == {0: 8, 1: 8}
    _, (env, time) = replay.sample(3)
    assert env[:2, 0].tolist() == [0, 1] and time[0].tolist() == time[1].tolist() == list(range(8, 16))
    assert not replay.online
    episodes = Replay(400, 1, FIELDS, 8, "episode")
    fill(episodes, 30, [12])
    assert episodes.online == {0: 16 - 4}  # the first eight steps of the second episode; the third is too young


def test_latents_are_written_back_unless_their_step_is_gone():
    replay = Replay(40, 2, FIELDS, 4)
    fill(replay, 20, [9])
    _, index = replay.sample(5)
    deter = np.random.default_rng(0).normal(size=(5, 4, 3))
    replay.update_latents(index, deter, np.full((5, 4, 2), 7))
    env, time = index
    assert (replay.data["stoch"][env, time % replay.slots] == 7).all()
    np.testing.assert_allclose(replay.data["deter"][env[-1], time[-1] % replay.slots], deter[-1], rtol=1e-3)
    fill(replay, 20, [9])
    before = replay.data["stoch"].copy()
    replay.update_latents(index, deter, np.full((5, 4, 2), 9))
    np.testing.assert_array_equal(before, replay.data["stoch"])


def test_sampling_does_not_change_what_is_stored():
    replay = Replay(100, 1, FIELDS, 8)
    fill(replay, 50, [3])
    before = {k: v.copy() for k, v in replay.data.items()}
    batch, _ = replay.sample(8)
    for value in batch.values():
        value[:] = 1
    assert all(np.array_equal(v, before[k]) for k, v in replay.data.items())


def test_an_abandoned_episode_ends_where_it_was_cut():
    replay = Replay(100, 1, FIELDS, 8, "stream")
    fill(replay, 11, [1000])
    fill(replay, 20, [1000])  # starts with is_first while the step before is not a last one
    for _ in range(50):
        batch, (_, time) = replay.sample(8)
        row, col = np.nonzero(time[:, :-1] == 10)
        assert batch["is_last"][row, col].all() and not batch["is_terminal"][row, col].any()


@pytest.mark.parametrize("windows", ["episode", "stream"])
def test_replay_goes_on_from_its_files(windows, tmp_path):
    kept = Replay(60, 2, FIELDS, 8, windows, folder=tmp_path / "replay")
    fill(kept, 45, [5, 13])
    again = Replay(60, 2, FIELDS, 8, windows, seed=9, folder=tmp_path / "replay")
    again.load_state_dict(kept.state_dict())
    for _ in range(20):
        (a, _), (b, _) = kept.sample(6), again.sample(6)
        assert all(np.array_equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="this run needs"):
        Replay(80, 2, FIELDS, 8, windows, folder=tmp_path / "replay")


def test_replay_refuses_what_cannot_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="capacity of 16"):
        Replay(16, 2, FIELDS, 8)
    with pytest.raises(ValueError, match="nothing to sample"):
        Replay(100, 1, FIELDS, 8).sample(1)
    Replay(100, 1, FIELDS, 8, folder=tmp_path / "torn")
    (tmp_path / "torn" / "reward.npy").unlink()
    with pytest.raises(FileNotFoundError):  # never zeros in place of what was stored
        Replay(100, 1, FIELDS, 8, folder=tmp_path / "torn")

    def full(*part):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Replay(100, 1, FIELDS, 8, folder=tmp_path / "full")
    assert not (tmp_path / "full").exists()
    assert Replay.bytes_per_step(FIELDS) == 8 + 4 + 4 + 6 + 2 + 3 + 20


# === environments =====================================================================================================


class Everything(gym.Env):
    """Every kind of space, nested."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (20, 30, 1), np.uint8),
            "tuple": spaces.Tuple((spaces.Discrete(3, start=5), spaces.MultiBinary(4))),
            "deep": spaces.Dict({"multi": spaces.MultiDiscrete([2, 7]), "bool": spaces.Box(0, 1, (), bool)}),
            "small": spaces.Box(0, 255, (10, 10, 3), np.uint8),
            "double": spaces.Box(-1, 1, (2, 2), np.float64),
        }
    )

    def __init__(self, action_space=None):
        self.action_space = action_space or spaces.MultiDiscrete([2, 3])
        self.actions = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.actions.append(action)
        return self.observation_space.sample(), 1.0, False, len(self.actions) % 5 == 0, {}


gym.register("DreamerEverything-v0", Everything)


def test_adapter_flattens_every_space():
    env = dreamerv3.Adapter(Everything(), 48)
    assert env.specs == {
        "camera": ObsSpec((48, 48, 1)),
        "tuple/0": ObsSpec((), 3),
        "tuple/1": ObsSpec((4,), 2),
        "deep/multi": ObsSpec((2,), 7),
        "deep/bool": ObsSpec((1,)),
        "small": ObsSpec((300,)),
        "double": ObsSpec((4,)),
    }
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs) and obs["tuple/0"] in (0, 1, 2)
    assert env.action_spec == ActionSpec((2, 3), 5)


@pytest.mark.parametrize(
    "space, spec, given, expected",
    [
        (spaces.Discrete(3, start=-1), ActionSpec((3,), 3), [2], 1),
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), ActionSpec((2, 3, 4, 5), 14), [1, 2, 3, 4], [[1, 2], [3, 4]]),
        (spaces.MultiBinary(3), ActionSpec((2, 2, 2), 6), [1, 0, 1], [1, 0, 1]),
        (spaces.Box(np.array([[0.0, -4.0]]), np.array([[1.0, 8.0]])), ActionSpec((), 2), [-3.0, 0.5], [[0.0, 5.0]]),
        (spaces.Box(-np.inf, np.inf, (2,)), ActionSpec((), 2), [-3.0, 0.25], [-1.0, 0.25]),
        (spaces.Box(0, 10, (1,), np.int64), ActionSpec((), 1), [0.1], [6]),
    ],
)
def test_adapter_translates_actions(space, spec, given, expected):
    inner = Everything(space)
    env = dreamerv3.Adapter(inner, 48)
    env.reset(seed=0)
    env.step(np.array(given))
    assert env.action_spec == spec
    np.testing.assert_array_equal(inner.actions[0], expected)


def test_adapter_names_what_it_does_not_support():
    env = Everything()
    env.observation_space = spaces.Dict({"a": spaces.Text(5)})
    with pytest.raises(ValueError, match="Text.*'a'"):
        dreamerv3.Adapter(env, 64)
    with pytest.raises(ValueError, match="action space Dict"):
        dreamerv3.Adapter(Everything(spaces.Dict({"a": spaces.Discrete(2)})), 64)


@pytest.mark.parametrize(
    "key, outside",
    [
        ("camera", {"camera": np.zeros((20, 30, 1), np.float32)}),
        ("camera", {"camera": np.zeros((30, 20, 1), np.uint8)}),
        ("tuple/0", {"tuple": (8, np.zeros(4, np.int8))}),
        ("tuple/0", {"tuple": (5.5, np.zeros(4, np.int8))}),
        ("tuple/1", {"tuple": (5, np.array([0, 1, 2, 0]))}),
        ("deep/multi", {"deep": {"multi": np.array([2, 0]), "bool": True}}),
        ("deep/bool", {"deep": {"multi": np.array([1, 6]), "bool": None}}),
        ("double", {"double": np.array([[0, np.nan], [0, 0]])}),
        ("double", {"double": np.array([[0, 0], [-np.inf, 0]])}),
        ("double", {"double": np.zeros(4)}),
        ("double", {"double": np.array([["a", "b"], ["c", "d"]])}),
    ],
)
def test_observations_that_leave_their_space_are_refused(key, outside):
    env = dreamerv3.Adapter(Everything(), 48)
    inside = env.env.observation_space.sample()
    assert env.observation(inside).keys() == env.specs.keys()
    with pytest.raises(ValueError, match=f"observation '{key}' is declared .* came as"):
        env.observation(inside | outside)


@pytest.mark.parametrize("reward", [math.nan, -math.inf, None])
def test_rewards_must_be_finite_numbers(reward):
    inner = Chain()
    env = dreamerv3.Adapter(inner, 48)
    env.reset()
    inner.step = lambda action: (np.zeros(1), reward, False, False, {})
    with pytest.raises(ValueError, match=f"reward {reward} is not a finite number"):
        env.step(np.array([0]))


@pytest.mark.parametrize("env_id, sticky", [("ALE/Pong-v5", 0.25), ("PongNoFrameskip-v4", 0.0)])
def test_atari_skips_frames_exactly_once(env_id, sticky):
    env = dreamerv3.make_env(env_id)
    ale = env.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == sticky and env.repeat == 4
    env.reset(seed=1)
    assert 1 <= ale.getEpisodeFrameNumber() <= 30
    before = ale.getEpisodeFrameNumber()
    obs, *_ = env.step(np.array([0]))
    assert ale.getEpisodeFrameNumber() == before + 4
    assert obs["obs"].shape == (64, 64, 3) and obs["obs"].dtype == np.uint8
    assert dreamerv3.make_env(env_id, image_size=96, action_repeat=2).specs["obs"].shape == (96, 96, 3)


def test_action_repeat_adds_up_rewards_and_stops_at_the_end():
    env = dreamerv3.make_env("DreamerChain-v0", action_repeat=3)
    env.reset(seed=0)
    obs, reward, terminated, _, _ = env.step(np.array([0]))
    assert (obs["obs"][0], reward, terminated) == (3, 1 + 2 + 3, False)
    obs, reward, terminated, _, info = env.step(np.array([0]))
    assert (obs["obs"][0], reward, terminated) == (5, 4 + 5, True) and info["episode"]["r"] == 15


def test_parallel_environments_have_their_own_seeds():
    args = Args(env_id="CartPole-v1", num_envs=3)
    adapter = dreamerv3.make_env(args.env_id)
    envs = dreamerv3.make_envs(args, adapter, None)
    obs, _ = envs.reset(seed=args.seed)
    envs.close()
    assert adapter.specs == {"obs": ObsSpec((4,))} and len({x.tobytes() for x in obs["obs"]}) == 3


# === the program ======================================================================================================

FAST = "--no-compile --batch-size 4 --batch-length 16 --train-ratio 16 --learning-starts 64 --imagination-horizon 3"


def run(flags: str, folder: Path, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "dreamerv3.py"), *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=250, **kwargs)


def run_folder(folder: Path) -> Path:
    return next(folder.glob("runs/**/episodes.csv")).parent


def scalars(folder: Path) -> dict[str, list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


KEYS = [f"charts/{k}" for k in "episodic_return episodic_length SPS updates_per_second learning_rate updates".split()]
KEYS += ["charts/frames", "charts/train_ratio", "charts/time_share_update"]
KEYS += [f"losses/{k}" for k in "recon reward continue dyn rep actor critic replay_critic total".split()]
KEYS += ["world_model/prior_entropy", "world_model/posterior_entropy"]
KEYS += [f"behavior/{k}" for k in "return_mean return_scale advantage_mag value_mean reward_mean".split()]
KEYS += ["behavior/continue_mean", "behavior/actor_entropy"]
KEYS += ["optim/grad_norm", "optim/update_rms", "optim/param_rms"]


@pytest.mark.parametrize(
    "flags, frames",
    [
        ("--env-id CartPole-v1 --total-timesteps 200", 1),
        ("--env-id CartPole-v1 --total-timesteps 200 --num-envs 2 --replay-windows stream --no-persist-replay", 1),
        ("--env-id Pendulum-v1 --total-timesteps 450 --action-repeat 2 --twohot symlog", 2),
        ("--env-id ALE/Pong-v5 --total-timesteps 1500 --train-ratio 0.5 --save-model", 4),
        ("--env-id test_dreamerv3:DreamerEverything-v0 --total-timesteps 200", 1),
    ],
)
def test_command_line_trains_and_leaves_its_files(flags, frames, tmp_path):
    total = int(re.search(r"--total-timesteps (\d+)", flags)[1])
    flags = f"{FAST} {flags}"
    done = run(flags, tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "device: cpu",
        "parameters: encoder",
        "CUDA is not available",
        "GB free",
        "1 update every",
        "run folder: runs/",
    ):
        assert word in done.stdout
    folder = run_folder(tmp_path)
    with open(folder / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and list(rows[0]) == ["global_step", "frames", "return", "length", "seconds"]
    assert all(int(row["frames"]) == frames * int(row["global_step"]) for row in rows)
    values = scalars(folder)
    assert set(KEYS) <= set(values) and all(np.isfinite(v).all() for v in values.values())
    ratio = float(re.findall(r"--train-ratio ([\d.]+)", flags)[-1])
    envs = 2 if "--num-envs" in flags else 1
    updates = math.floor(ratio * (total - 64 - (total - 64) % envs) / (4 * 16))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["global_step"], state["updates"]) == (total, updates) and updates > 0
    assert (folder / "model.pt").exists() == ("--save-model" in flags)


BAD = """--size 3m | --twohot log | --replay-windows all | --precision half | --batch-size x | --nonsense 1 | --seed -1
--batch-size 0 | --batch-length 1 | --batch-length 0 | --imagination-horizon 0 | --num-envs 0 | --num-envs -2
--total-timesteps 0 | --total-timesteps 20 | --train-ratio 0 | --train-ratio -1 | --train-ratio nan | --train-ratio inf
--learning-rate 0 | --learning-rate -1e-4 | --warmup-updates -1 | --clip 0 | --gamma 1 | --gamma -0.1 | --gamma nan
--return-lambda 1.1 | --tau -0.1 | --tau 2 | --unimix 1 | --actor-unimix -1 | --bins 254 | --bins 1 | --free-nats -1
--dyn-scale -1 | --ent-coef -1 | --image-size 60 | --image-size 32 | --image-size 512 | --action-repeat -1
--learning-starts 10 | --learning-starts 500000 | --buffer-size 10 | --buffer-size 100 --num-envs 2
--clip -1 | --ent-coef nan | --replay-critic-scale -1 | --buffer-size 500 | --batch-size 2.5 | --free-nats inf
--eval-only | --eval-episodes 0 | --eval-frequency -1 | --resume nowhere --eval-only
--checkpoint-frequency -1 | --video-frequency -1 | --log-frequency 0 | --resume nowhere | --env-id bad!
--env-id Taxi-v3 | --env-id Pnog-v5 | --env-id ALE/Pongg-v5
--env-id CartPole-v9 | --env-id nomodule:Thing-v0"""  # Taxi-v3 is deprecated


@pytest.mark.parametrize("flags", [x.strip() for line in BAD.splitlines() for x in line.split("|")])
def test_bad_input_gives_one_line_and_status_2(flags, program, capsys, tmp_path, monkeypatch):
    if "--env-id" not in flags:
        monkeypatch.setattr(dreamerv3, "make_env", None)  # refused before any environment is made
    assert program(flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dreamerv3.py: error: ") and "\n" not in error
    assert flags.split()[0].lstrip("-") in error.replace("_", "-") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--exp-name file", "cannot write the run folder"),
        (f"--exp-name {'x' * 300}", "File name too long"),
        ("--total-timesteps 10000000000000 --buffer-size 10000000000000", "80 %.*--buffer-size"),
        ("--total-timesteps 10000000000000 --buffer-size 10000000000000 --no-persist-replay", "80 %.*--buffer-size"),
        ("--exp-name full", "No space left"),
        ("--capture-video --buffer-size 10000000000000 --total-timesteps 10000000000000", "80 %.*--buffer-size"),
        ("--capture-video", "--capture-video needs .*moviepy.* pip install moviepy"),
        ("--capture-video --env-id DreamerChain-v0", "Chain-v0 is not supported with --capture-video: .*render_mode"),
        ("--track", "--track needs .*wandb.* pip install wandb"),
    ],
)
def test_a_start_without_room_leaves_nothing_behind(flags, words, program, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(dreamerv3, "Agent", None)  # refused before any model is made
    for module in {"moviepy", "wandb"} & set(words.split()):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    if "file" in flags:
        (tmp_path / "runs").touch()
    if "full" in flags:

        def reserve(file, start, size):
            if size < 150:  # the clock, made last
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", reserve)
    assert program(f"{QUICK} --env-id CartPole-v1 --total-timesteps 100 {flags}") == 2
    error = capsys.readouterr().err.strip()
    assert re.search(words, error) and "\n" not in error and not [x for x in tmp_path.iterdir() if x.is_dir()]


def test_unknown_ids_name_the_closest(capsys):
    with pytest.raises(SystemExit):
        dreamerv3.make_env("CartPoel-v1")
    assert "CartPole-v1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "env_id, module", [("MinAtar/Breakout-v1", "minatar.gym"), ("dm_control/hopper-hop-v0", "shimmy")]
)
def test_missing_packages_are_named_with_the_way_to_install_them(env_id, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(SystemExit) as stop:
        dreamerv3.make_env(env_id)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and env_id in error and "pip install" in error and "\n" not in error


def test_stopping_and_resuming_continues_every_counter(tmp_path):
    """SIGTERM saves; a resumed run goes on where it stopped, refuses other flags, and survives a torn checkpoint."""
    flags = f"{FAST} --env-id CartPole-v1 --total-timesteps 100000 --checkpoint-frequency 50"
    command = [sys.executable, str(ROOT / "dreamerv3.py"), *flags.split()]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("runs/*/checkpoint_previous.pt")):
        time.sleep(0.2)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    folder = run_folder(tmp_path)
    first = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert first["global_step"] == np.load(folder / "replay" / "clock.npy")[0]
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    resume = f"--resume {folder.relative_to(tmp_path)}"
    refused = run(f"{resume} --batch-size 5", tmp_path)
    assert "disagrees with 4" in refused.stderr and "is unreadable" in refused.stdout
    process = subprocess.Popen([*command[:2], *resume.split()], cwd=tmp_path, text=True, stdout=subprocess.PIPE)
    lines = [process.stdout.readline()]
    while lines[-1] and not lines[-1].startswith("resumed"):
        lines.append(process.stdout.readline())
    while process.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.2)
    process.kill()  # no chance to save: the steps are kept all the same
    process.wait()
    assert lines[-1].startswith(f"resumed at step {first['global_step']:,} ")
    second = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert second["updates"] > first["updates"]
    for state in (first, second):
        expected = (state["global_step"] - 64) * 16 / (4 * 16)
        assert state["updates"] + state["owed"] == pytest.approx(expected)
    clock = np.load(folder / "replay" / "clock.npy")[0]
    last, first_flag = (np.load(folder / "replay" / f"is_{k}.npy")[0, :clock] for k in ("last", "first"))
    assert clock >= second["global_step"] and first_flag.sum() in (
        last.sum() + 1,
        last.sum() + 2,
    )  # one episode was cut


def test_the_same_state_gives_the_same_updates(tmp_path):
    """Two copies of one checkpoint, one written to disk and read again, train on bit-identically."""
    agent, args = make_agent(SPECS)
    optimizer = dreamerv3.LaProp(agent.trained(), 1e-3, warmup=1)
    batches = [make_batch(agent, seed=i) for i in range(4)]
    for batch in batches[:2]:
        dreamerv3.train_step(agent, optimizer, batch, args)
    state = dict.fromkeys(dreamerv3.CHECKPOINT) | {"args": {}, "torch_rng": torch.get_rng_state()}
    state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    dreamerv3.save_checkpoint(tmp_path, state)
    _, _, loaded = dreamerv3.load_checkpoint(tmp_path)
    other, _ = make_agent(SPECS)
    other_optimizer = dreamerv3.LaProp(other.trained(), 1e-3, warmup=1)
    other.load_state_dict(loaded["agent"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    for a, o in ((agent, optimizer), (other, other_optimizer)):
        torch.set_rng_state(loaded["torch_rng"])
        for batch in batches[2:]:
            dreamerv3.train_step(a, o, batch, args)
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes: SLOW=1 pytest -k sigkill")
def test_a_run_survives_twenty_sigkills_at_random_moments(tmp_path):
    """Killed while starting, acting, training or saving: steps, episodes and counters stay consistent."""
    rng, every = np.random.default_rng(0), 20
    program = [sys.executable, str(ROOT / "dreamerv3.py"), "--total-timesteps", "100000"]
    start = f"{FAST} --batch-size 2 --batch-length 8 --env-id CartPole-v1 --checkpoint-frequency {every}".split()
    cuts, updates, clock, saved, allowed = {0}, 0, [0], 0, every
    for kill in range(21):
        flags = start if not kill else ["--resume", str(run_folder(tmp_path))]
        process = subprocess.Popen([*program, *flags], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("resumed" if kill else "run folder"):
                break
        if kill:
            step = int(re.search(r"step ([\d,]+)", line)[1].replace(",", ""))
            assert step == clock[0] and int(re.search(r"after ([\d,]+)", line)[1].replace(",", "")) >= updates
            cuts.add(step)
        while not list(tmp_path.glob("runs/*/checkpoint.pt")):
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 4))
        process.send_signal(signal.SIGTERM if kill == 20 else signal.SIGKILL)
        assert process.wait(60) == (128 + signal.SIGTERM if kill == 20 else -signal.SIGKILL)
        folder = run_folder(tmp_path)
        clock = np.load(folder / "replay" / "clock.npy")
        state = dreamerv3.load_checkpoint(folder)[2]
        if state["global_step"] > saved:
            saved, allowed = state["global_step"], every
        assert clock[0] - allowed <= state["global_step"] <= clock[0] and state["updates"] >= updates
        allowed += every * (
            clock[0] % every == 0 and saved < clock[0]
        )  # this kill cut a save short: the next one counts
        assert state["updates"] + state["owed"] == pytest.approx(max(0, state["global_step"] - 64) * 16 / (2 * 8))
        updates = state["updates"]
    assert state["global_step"] == clock[0]
    names = ("is_first", "is_last", "is_terminal", "reward", "obs.obs")
    first, last, terminal, reward, obs = (np.load(folder / "replay" / f"{k}.npy")[0, : clock[0]] for k in names)
    begins = {0, *(np.flatnonzero(last[:-1]) + 1).tolist()} | cuts - {int(clock[0])}
    assert set(np.flatnonzero(first).tolist()) == begins
    np.testing.assert_array_equal(reward, ~first)
    follows = ~first[1:]
    np.testing.assert_allclose(obs[1:, 0][follows], (obs[:-1, 0] + 0.02 * obs[:-1, 1])[follows], atol=1e-5)
    assert not terminal[~last].any()


class Faulty(Chain):
    """Fails at its first reset, or in its 50th step by an observation outside its space or by dying."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault, self.steps = fault, 0

    def reset(self, seed=None, options=None):
        assert self.fault != "reset", "two\nlines"
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        if self.steps == 50 and self.fault == "dies":
            os._exit(1)
        obs, *rest = super().step(action)
        return obs * (np.nan if self.steps == 50 else 1), *rest


for fault in ("reset", "nan", "dies"):
    gym.register(f"Dreamer-{fault}-v0", Faulty, kwargs={"fault": fault}, order_enforce=False)


@pytest.mark.parametrize(
    "fault, envs, words, steps",
    [
        ("nan", 1, "ValueError: observation 'obs' is declared .* came as .*nan", 59),
        ("nan", 2, "ValueError: observation 'obs' is declared .* came as .*nan", 59),
        ("dies", 2, "EOFError: its process is gone", 59),
        ("reset", 1, "AssertionError: two lines", 0),
        ("reset", 2, "AssertionError: two lines", 0),
    ],
)
def test_an_environment_that_fails_ends_the_run_saved_with_one_line(fault, envs, words, steps, program, recwarn):
    message = program(f"{QUICK} --env-id Dreamer-{fault}-v0 --num-envs {envs} --total-timesteps 200")
    assert re.fullmatch(
        f"dreamerv3.py: Dreamer-{fault}-v0 failed at step {steps * envs}, saved runs/.*: {words}.*", message
    )
    assert not any("Traceback" in str(warning.message) for warning in recwarn)  # of a worker, by Gymnasium
    folder = run_folder(Path.cwd())
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == steps * envs
    assert np.load(folder / "replay" / "clock.npy")[0] == steps


CHAIN = f"{QUICK} --env-id DreamerChain-v0 --buffer-size 60"


def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(program, tmp_path):
    """Both start an episode after step 60, so that the environments agree; weights, counters and replay do too."""
    assert not program(f"{CHAIN} --exp-name unbroken --total-timesteps 91 --train-ratio 12")
    assert not program(f"{CHAIN} --exp-name broken --total-timesteps 60 --train-ratio 12")
    broken, unbroken = (next(tmp_path.glob(f"runs/*__{name}__*")) for name in ("broken", "unbroken"))
    assert not program(f"--resume {broken} --total-timesteps 91 --video-frequency 6")
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (broken, unbroken))
    assert a["updates"] == b["updates"] == 19 and a["owed"] == b["owed"] == 0.125
    assert all(torch.equal(a["agent"][name], b["agent"][name]) for name in b["agent"])
    for file in (unbroken / "replay").iterdir():
        assert file.read_bytes() == (broken / "replay" / file.name).read_bytes(), file.name


def test_resume_takes_a_checkpoint_file_and_falls_back_to_a_good_one(program, capsys):
    program(f"{CHAIN} --total-timesteps 60 --checkpoint-frequency 50")
    folder = run_folder(Path.cwd())
    newest, previous, foreign = (folder / f"{name}.pt" for name in ("checkpoint", "checkpoint_previous", "foreign"))
    good, old = newest.read_bytes(), previous.read_bytes()
    torch.save({"model": torch.zeros(3)}, foreign)
    capsys.readouterr()

    def resume(path) -> str:
        code = program(f"--resume {path}")
        out, error = capsys.readouterr()
        assert code in (0, 2) and (not code or (len(error.splitlines()) == 1 and "resumed" not in out)), error
        return error if code else out

    assert "resumed at step 60 after 5 updates" in resume(previous)
    newest.write_bytes(good)
    previous.write_bytes(old)
    out = resume(foreign)
    assert "foreign.pt is unreadable (KeyError), using checkpoint.pt" in out and "after 10 updates" in out
    newest.write_bytes(foreign.read_bytes())
    previous.write_bytes(old)
    assert "checkpoint.pt is unreadable (KeyError), using checkpoint_previous.pt" in resume(folder)
    assert foreign.exists() and (folder / "checkpoint.unreadable").exists()
    for file in (newest, previous):
        file.write_bytes(good[:500])
    assert "holds no good checkpoint" in resume(folder) and newest.exists()
    state = torch.load(io.BytesIO(good), weights_only=True)
    torch.save(state | {"args": state["args"] | {"env_id": "CartPole-v1"}}, newest)
    assert "obs.obs.npy holds float32 (1, 61, 1), this run needs float32 (1, 61, 4)" in resume(folder)
    state["agent"].pop("reward.0.0.0.weight")
    torch.save(state, newest)
    assert "belongs to other spaces or another size: Error(s) in loading" in resume(folder)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(program, capsys, monkeypatch):
    """The second and later checkpoints meet a real limit of the file size, in the middle of their file."""
    save, limits = dreamerv3.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(folder, state):
        if state["global_step"] > 50:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(folder, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(dreamerv3, "save_checkpoint", limited)
    assert program(f"{CHAIN} --total-timesteps 110 --checkpoint-frequency 50") == 1  # the last one is missing
    assert capsys.readouterr().out.count("warning: no checkpoint at step 1") == 2
    folder = run_folder(Path.cwd())
    assert (folder / "checkpoint.pt").stat().st_size > 100_000 and not (folder / "checkpoint.tmp").exists()
    assert dreamerv3.load_checkpoint(folder)[2]["global_step"] == 50
    assert np.load(folder / "replay" / "clock.npy")[0] == 110


def test_without_persistent_replay_a_resumed_run_refills_first(program, capsys):
    program(f"{CHAIN} --total-timesteps 60 --no-persist-replay --no-cuda")
    out = capsys.readouterr().out
    assert "free memory" in out and "CUDA" not in out
    folder = run_folder(Path.cwd())
    program(f"--resume {folder} --total-timesteps 120")
    assert "after 10 updates, 0 steps in the replay buffer: WITHOUT THEM, collecting 40" in capsys.readouterr().out
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["updates"] == 10 + 20 // 2
    assert not (folder / "replay").exists()


def test_memory_is_constant(program, monkeypatch):
    """Resident memory and live tensors at every checkpoint after the buffer is full."""
    save, seen = dreamerv3.save_checkpoint, []

    def measure(*inputs):
        save(*inputs)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), sum(type(x) is torch.Tensor for x in gc.get_objects())))

    monkeypatch.setattr(dreamerv3, "save_checkpoint", measure)
    flags = "--env-id CartPole-v1 --buffer-size 500 --total-timesteps 2500 --checkpoint-frequency 250 --train-ratio 3"
    flags += " --log-frequency 250 --video-frequency 40"
    program(f"{QUICK} {flags}")
    memory, tensors = zip(*seen[4:], strict=True)
    assert len(seen) == 11 and max(tensors) == min(tensors) and memory[-1] - memory[0] < 4e6, seen


def test_a_dream_is_the_posterior_then_the_prior_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(networks, "sample_index", lambda probs, u: probs.argmax(-1))
    agent, _ = make_agent(SPECS)
    batch = make_batch(agent, batch=5, length=8)
    batch["is_first"][:] = torch.arange(8) == 1
    batch["is_first"][0, 6] = True
    obs, action, dream = batch["obs"], batch["prev_action"], dreamerv3.open_loop(agent, batch, context=3)
    with torch.no_grad():
        embed = agent.encoder(obs)
        seen = agent.rssm.observe(batch["deter"], batch["stoch"], action, embed, batch["is_first"])
        states = [(seen[0][:, t], seen[1][:, t]) for t in range(3)]
        for t in range(3, 8):
            before = [x.clone() for x in (*states[-1], action[:, t])]
            for x in before if t == 6 else ():
                x[0] = 0
            states.append(agent.rssm.imagine_step(*before, torch.zeros(5, TINY.groups)))
        recon, maps = agent.decoder(*(torch.stack(x, 1) for x in zip(*states, strict=True)))
    image, truth = agent.decoder.pixels(maps, 5, 8)["image"], obs["image"] / 255
    expected = {"image": torch.cat([truth, image, (image - truth + 1) / 2], 2)}
    expected["vector"] = torch.stack([obs["vector"], networks.symexp(recon["vector"])], 2)
    expected["discrete"] = torch.stack([obs["discrete"], recon["discrete"].argmax(-1)], 2).float()
    for key in SPECS:
        torch.testing.assert_close(dream[key], expected[key][:4], rtol=1e-4, atol=1e-5)
    before = torch.get_rng_state()
    dreamerv3.write_dream(agent, batch, tmp_path / "missing", None, 0, 7)
    assert "no dream after 7 updates" in capsys.readouterr().out and torch.equal(torch.get_rng_state(), before)
    dreamerv3.write_dream(agent, batch, tmp_path, dreamerv3.SummaryWriter(tmp_path), 0, 7)
    with Image.open(tmp_path / "dreams" / "7.gif") as gif:  # the border tells context, prediction, episode start
        colors = [gif.convert("RGB").getpixel((0, 0)) for _ in ImageSequence.Iterator(gif)]
    names = {(False, True, False): "green", (True, False, False): "red", (True, True, True): "white"}
    assert " ".join(names[tuple(x > 99 for x in c)] for c in colors) == "green white green green green red white red"


def test_dreams_are_drawn(program):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not program(f"{QUICK} --env-id DreamerEverything-v0 --total-timesteps 60 --video-frequency 5")
    folder = run_folder(Path.cwd())
    assert sorted(x.name for x in (folder / "dreams").iterdir()) == ["10.gif", "10.png", "5.gif", "5.png"]
    with Image.open(folder / "dreams" / "10.gif") as gif, Image.open(folder / "dreams" / "10.png") as plot:
        assert (gif.n_frames, gif.size, plot.size) == (8, (4 * 68, 3 * 64 + 4), (1280, 8 * 120))
    events = EventAccumulator(str(folder))
    events.Reload()
    for tag, size in {"dream/images": (8 * 68, 4 * 196), "dream/vectors": (1280, 8 * 120)}.items():
        assert [(e.width, e.height, e.step) for e in events.Images(tag)] == [(*size, 50), (*size, 60)]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    window = [{"losses/recon": torch.tensor(1.0)}, {"losses/recon": torch.tensor(float("nan"))}]
    with pytest.raises(SystemExit, match="losses/recon is not finite at step 7"):
        dreamerv3.check_finite(window, 7, tmp_path)


# === evaluation, videos, tracking =====================================================================================


def test_evaluations_leave_training_bit_identical(program, tmp_path, capsys):
    assert not program(f"{CHAIN} --exp-name plain --total-timesteps 90")
    capsys.readouterr()
    assert not program(f"{CHAIN} --exp-name evaluated --total-timesteps 90 --eval-frequency 30 --eval-episodes 2")
    line = "evaluation: 2 episodes of DreamerChain-v0, return mean 15.0, std 0.0, min 15, max 15"
    assert capsys.readouterr().out.splitlines().count(line) == 3
    plain, evaluated = (next(tmp_path.glob(f"runs/*__{name}__*")) for name in ("plain", "evaluated"))
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (plain, evaluated))
    assert torch.equal(a["torch_rng"], b["torch_rng"]) and a["updates"] == b["updates"] > 10
    assert all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])
    for file in (plain / "replay").iterdir():
        assert file.read_bytes() == (evaluated / "replay" / file.name).read_bytes(), file.name
    assert scalars(evaluated)["eval/episodic_return"] == [15.0] * 3 and "eval/episodic_return" not in scalars(plain)
    assert any(b"|eval_frequency|30|" in file.read_bytes() for file in evaluated.glob("events*"))  # hyperparameters


def test_an_interrupted_evaluation_ends_at_once(capsys):
    agent, args = make_agent({"obs": ObsSpec((1,))}, ActionSpec((4,), 4), env_id="DreamerChain-v0")
    asked = iter(range(99))
    assert dreamerv3.evaluate(agent, args, 9, seed=0, stopped=lambda: next(asked) > 8) == [15.0]
    assert not capsys.readouterr().out and next(asked) < 14


def test_eval_only_plays_what_load_agent_loads_and_writes_nothing(program, capsys, tmp_path):
    flags = "--total-timesteps 60 --checkpoint-frequency 50 --save-model --learning-rate 0.01 --warmup-updates 1"
    program(f"{QUICK} --env-id CartPole-v1 {flags}")
    folder = run_folder(tmp_path)
    (folder / "checkpoint.pt").write_bytes(b"torn")  # stays where it is
    shutil.rmtree(folder / "replay")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    lines, expected = [], []
    for path in (folder, folder / "checkpoint_previous.pt", folder / "model.pt"):
        agent, args = dreamerv3.load_agent(path)
        returns = dreamerv3.evaluate(agent, args, 4, seed=3)
        expected.append(
            f"evaluation: 4 episodes of CartPole-v1, return mean {np.mean(returns):.1f}, std {np.std(returns):.1f}, "
            f"min {min(returns):g}, max {max(returns):g}"
        )
        capsys.readouterr()
        assert not program(f"--resume {path} --eval-only --eval-episodes 4 --seed 3")
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert lines == expected and lines[0] == lines[1] != lines[2], lines
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert program(f"--resume {folder} --eval-only --batch-size 3") == 2


def readme_snippet(word: str) -> str:
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    return next(code for code in (block.split("```")[0] for block in blocks) if word in code)


def test_the_snippet_of_the_readme_plays_an_episode(program, capsys, tmp_path):
    snippet = readme_snippet("load_agent")
    assert len(snippet.splitlines()) <= 15
    program(f"{CHAIN} --total-timesteps 50 --save-model")
    (run_folder(tmp_path) / "model.pt").rename("model.pt")
    exec(snippet, {})
    assert capsys.readouterr().out.splitlines()[-1] == "return 15.0"


def test_the_first_of_several_environments_is_filmed(tmp_path):
    """In a process of its own: workers are forked, and this one has run threads."""
    run(f"{FAST} --env-id CartPole-v1 --num-envs 2 --total-timesteps 120 --capture-video", tmp_path)
    videos = {path.name for path in tmp_path.glob("videos/*/train-0/*.mp4")}
    assert "rl-video-episode-0.mp4" in videos and videos <= {f"rl-video-episode-{i}.mp4" for i in (0, 1, 8)}


def test_videos_show_every_step_of_an_episode(program, tmp_path):
    flags = "--total-timesteps 100 --capture-video --eval-frequency 100 --eval-episodes 1"
    program(f"{QUICK} --env-id CartPole-v1 {flags}")
    folder = run_folder(tmp_path)
    assert not program(f"--resume {folder} --eval-only --eval-episodes 3")
    agent, args = dreamerv3.load_agent(folder)
    for episode, length in enumerate(dreamerv3.evaluate(agent, args, 3, args.seed)):  # CartPole pays 1 per step
        video = cv2.VideoCapture(f"videos/{folder.name}/eval-only/rl-video-episode-{episode}.mp4")
        assert 0 <= video.get(cv2.CAP_PROP_FRAME_COUNT) - length <= 1  # moviepy may drop the last one
    names = {path.parent.name for path in Path("videos", folder.name).glob("*/*.mp4")}
    assert names == {"train-0", "eval-100", "eval-only"}


def test_tracking_passes_on_what_cleanrl_does(program, monkeypatch, tmp_path):
    calls, saved = [], []
    wandb = types.SimpleNamespace(init=lambda **kw: calls.append(kw), save=lambda file, **kw: saved.append(Path(file)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = f"{QUICK} --env-id test_dreamerv3:DreamerChain-v0 --track"
    program(f"{flags} --wandb-project-name project --wandb-entity team --total-timesteps 40")
    folder = run_folder(tmp_path)
    program(f"--resume {folder} --total-timesteps 50")
    first, second = calls
    assert first["name"] == folder.name and second["id"] == first["id"] == folder.name.replace(":", "-")
    assert (first["project"], first["entity"], first["config"]["batch_length"]) == ("project", "team", 8)
    assert first["sync_tensorboard"] and first["save_code"] and first["resume"] == "allow"
    assert [path.name for path in saved[:3]] == ["dreamerv3.py", "networks.py", "replay.py"]
    assert all(path.exists() for path in saved)
    before = set(tmp_path.rglob("*"))
    wandb.init = lambda **kw: 1 / 0
    assert program(f"{flags} --exp-name refused --total-timesteps 40") == 2 and set(tmp_path.rglob("*")) == before


def test_tracking_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = run(f"{FAST} --env-id CartPole-v1 --total-timesteps 110 --track --capture-video", tmp_path)
    assert done.returncode == 0, done.stderr
    files = {path.name for path in tmp_path.glob("wandb/offline-run-*/files/**/*")}
    assert {"dreamerv3.py", "networks.py", "replay.py", "rl-video-episode-0.mp4"} <= files
    assert b"losses/recon" in next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes()


# === golden: numbers computed by the official JAX code (golden/README.md) =============================================


def golden_files() -> list[Path]:
    return sorted(Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden")).glob("*.npz"))


class Golden:
    """One golden file: a network with the official weights, its batch, and the mapping between the two namings."""

    def __init__(self, path: Path):
        self.data = dict(np.load(path))
        hyper = ast.literal_eval(str(self.data["meta/hyper"]))
        self.hyper, dims = hyper, hyper["dims"]
        self.size = networks.Size(
            *(dims[k] for k in ("deter", "hidden", "units", "classes", "depth", "stoch", "blocks"))
        )
        self.specs = {
            key: networks.ObsSpec(tuple(value[2]), value[1])
            if value[:1] == ("discrete",)
            else networks.ObsSpec(tuple(value))
            for key, value in hyper["obs"].items()
        }
        kind, n = hyper["act"][:2]
        self.action = networks.ActionSpec((n,) if kind == "discrete" else (), n)
        self.args = Args(
            imagination_horizon=hyper["imag_length"],
            actor_unimix=0.0,
            learning_rate=hyper["lr"],
            warmup_updates=hyper["warmup"],
            precision="float32",
        )
        self.agent = Agent(self.specs, self.action, self.size, self.args)
        self.names = dict(self.pairs())
        with torch.no_grad():
            for name, parameter in self.names.items():
                parameter.copy_(self.convert(f"params/{name}", parameter.shape))
            self.agent.return_norm.lo.fill_(float(self.data["params/retnorm/lo/value"]))
            self.agent.return_norm.hi.fill_(float(self.data["params/retnorm/hi/value"]))

    def convert(self, key: str, shape) -> torch.Tensor:
        """An official array in the layout of our parameter of this shape."""
        x = torch.from_numpy(np.array(self.data[key]))
        if key.endswith("kernel") and len(shape) == 4:
            return x.permute(3, 2, 0, 1)
        if key.endswith("kernel") and len(shape) == 2:
            return x.reshape(x.shape[0], -1).T
        return x.reshape(shape)

    def pairs(self):
        """(official name, our parameter), for every parameter."""

        def linear(name, module):
            yield f"{name}/kernel", module.weight
            yield f"{name}/bias", module.bias

        def dense(name, norm, module):
            yield from linear(name, module[0])
            yield f"{norm}/scale", module[1].scale

        def mlp(name, module):
            for i, layer in enumerate(module):
                yield from dense(f"{name}/linear{i}", f"{name}/norm{i}", layer)

        agent, rssm = self.agent, self.agent.rssm
        for i, layer in enumerate(getattr(agent.encoder, "mlp", [])):
            yield from dense(f"enc/mlp{i}", f"enc/mlp{i}norm", layer)
        for i, conv in enumerate(getattr(agent.encoder, "convs", [])):
            yield from linear(f"enc/cnn{i}", conv)
            yield f"enc/cnn{i}norm/scale", agent.encoder.norms[i].scale
        for i, layer in enumerate((rssm.in_deter, rssm.in_stoch, rssm.in_action)):
            yield from dense(f"dyn/dynin{i}", f"dyn/dynin{i}norm", layer)
        yield from linear("dyn/dynhid0", rssm.hid)
        yield "dyn/dynhid0norm/scale", rssm.hid_norm.scale
        yield from linear("dyn/dyngru", rssm.gru)
        yield from dense("dyn/obs0", "dyn/obs0norm", rssm.post[0])
        yield from linear("dyn/obslogit", rssm.post[1])
        yield from dense("dyn/prior0", "dyn/prior0norm", rssm.prior[0])
        yield from dense("dyn/prior1", "dyn/prior1norm", rssm.prior[1])
        yield from linear("dyn/priorlogit", rssm.prior[2])
        if agent.decoder.vectors:
            yield from mlp("dec/mlp", agent.decoder.mlp)
            for key, out in zip(agent.decoder.vectors, agent.decoder.outs, strict=True):
                yield from linear(f"dec/vec/{key}/{'logits' if self.specs[key].classes else 'pred'}", out)
        if agent.decoder.images:
            yield from linear("dec/sp0", agent.decoder.from_deter)
            yield from dense("dec/sp1", "dec/sp1norm", agent.decoder.from_stoch[0])
            yield from linear("dec/sp2", agent.decoder.from_stoch[1])
            for norm, name in zip(agent.decoder.norms, ("spnorm", "conv2norm", "conv1norm", "conv0norm"), strict=True):
                yield f"dec/{name}/scale", norm.scale
            for conv, name in zip(agent.decoder.convs, ("conv2", "conv1", "conv0", "imgout"), strict=True):
                yield from linear(f"dec/{name}", conv)
        heads = {"rew": (agent.reward, "logits"), "con": (agent.cont, "logit")}
        heads |= {"val": (agent.critic, "logits"), "slowval": (agent.slow_critic, "logits")}
        for name, (head, out) in heads.items():
            yield from mlp(f"{name}/mlp", head[0])
            yield from linear(f"{name}/head/{out}", head[1])
        yield from mlp("pol/mlp", agent.actor.mlp)
        outs = ("logits",) if self.action.nvec else ("mean", "stddev")
        for out, module in zip(outs, agent.actor.outs, strict=True):
            yield from linear(f"pol/head/action/{out}", module)

    def batch(self) -> dict:
        """The training steps 1..T; step 0 gives the first action and latent."""
        data = {k: torch.from_numpy(np.array(v)) for k, v in self.data.items() if k.startswith("batch/")}
        batch = {k: data[f"batch/{k}"][:, 1:] for k in ("reward", "is_first", "is_last", "is_terminal")}
        batch["obs"] = {key: data[f"batch/{key}"][:, 1:] for key in self.specs}
        action = data["batch/action"][:, :-1]
        batch["prev_action"] = dreamerv3.flat_action(action.unsqueeze(-1) if self.action.nvec else action, self.action)
        batch["deter"], batch["stoch"] = data["batch/dyn/deter"][:, 0], data["batch/dyn/stoch"][:, 0]
        return batch

    def close(self, key: str, value: torch.Tensor) -> None:
        np.testing.assert_allclose(value.detach().numpy(), self.data[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.fixture
def argmax_sampling(monkeypatch):
    """The golden files were made with the argmax for categoricals and mean + 0.5 std for normals."""
    monkeypatch.setattr(networks, "sample_index", lambda probs, u: probs.argmax(-1))
    monkeypatch.setattr(networks.Actor, "noise", lambda self, *shape: torch.full((*shape, self.action.size), 0.5))
    torch._dynamo.reset()  # compiled functions must not remember the real sampling
    yield
    torch._dynamo.reset()


def test_golden_files_exist():
    assert golden_files(), "no .npz file in GOLDEN_DIR"


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_golden_names_cover_every_parameter(path):
    golden = Golden(path)
    official = {k.removeprefix("params/") for k in golden.data if k.startswith("params/") and "retnorm" not in k}
    assert official == set(golden.names)
    assert {id(p) for p in golden.agent.parameters()} == {id(p) for p in golden.names.values()}


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_golden_forward(path, argmax_sampling):
    golden = Golden(path)
    agent, batch, args = golden.agent, golden.batch(), golden.args
    losses, deter, stoch, outputs = dreamerv3.world_model_loss(agent, batch, args)
    feat = dreamerv3.get_feat(deter, stoch)
    golden.close("out/tokens", outputs["embed"])
    golden.close("out/post_logit", outputs["post"])
    golden.close("out/prior_logit", outputs["prior"])
    golden.close("out/deter", deter)
    golden.close("out/stoch", stoch)
    golden.close("out/reward_logits", outputs["reward"])
    golden.close("out/reward_pred", agent.twohot.mean(outputs["reward"]))
    golden.close("out/continue_prob", outputs["cont"].sigmoid())
    golden.close("out/value_pred", agent.twohot.mean(agent.critic(feat)))
    dist = agent.actor(feat)
    if golden.action.nvec:
        golden.close("out/policy_logits", agent.actor.outs[0](agent.actor.mlp(feat)))
    else:
        golden.close("out/policy_mean", dist.mean)
        golden.close("out/policy_std", dist.std)
    for key, recon in outputs["recon"].items():
        golden.close(f"out/recon_{key}", recon)
        golden.close(f"out/loss/{key}", dreamerv3.vector_loss(recon, batch["obs"][key]))
    if agent.decoder.images:
        for key, image in agent.decoder.pixels(outputs["maps"], *deter.shape[:2]).items():
            golden.close(f"out/recon_{key}", image)
            golden.close(f"out/loss/{key}", (image - batch["obs"][key] / 255).square().sum((2, 3, 4)))
    recon_total = sum(golden.data[f"out/loss/{key}"] for key in golden.specs)
    np.testing.assert_allclose(losses["recon"].detach(), recon_total, rtol=1e-4, atol=1e-5)
    for ours, official in {"reward": "rew", "continue": "con", "dyn": "dyn", "rep": "rep"}.items():
        golden.close(f"out/loss/{official}", losses[ours])

    horizon, deters = args.imagination_horizon, agent.size.deter
    imagined, actions = dreamerv3.imagine(agent, deter.flatten(0, 1), stoch.flatten(0, 1), horizon)
    golden.close("out/imag_deter", imagined[:, 1:, :deters])
    golden.close("out/imag_stoch", imagined[:, 1:, deters:].unflatten(-1, stoch.shape[-2:]))
    stored = dreamerv3.stored_action(actions, golden.action)
    golden.close("out/imag_action", (stored.squeeze(-1) if golden.action.nvec else stored)[:, :horizon].float())

    behavior, returns, metrics = dreamerv3.actor_critic_loss(agent, imagined, actions, args)
    golden.close("out/loss/policy", behavior["actor"].unflatten(0, deter.shape[:2]))
    golden.close("out/loss/value", behavior["critic"].unflatten(0, deter.shape[:2]))
    golden.close("out/retnorm/lo", agent.return_norm.lo)
    golden.close("out/retnorm/hi", agent.return_norm.hi)
    golden.close("out/metrics/tar", metrics["behavior/return_mean"])
    golden.close("out/metrics/ret", ((returns - agent.return_norm.lo) / agent.return_norm.scale).mean())
    golden.close("out/metrics/rew", metrics["behavior/reward_mean"])
    golden.close("out/metrics/con", metrics["behavior/continue_mean"])
    golden.close("out/metrics/val", metrics["behavior/value_mean"])
    golden.close("out/metrics/adv_mag", metrics["behavior/advantage_mag"])
    golden.close("out/metrics/ent/action", metrics["behavior/actor_entropy"])
    boot = returns[:, 0].unflatten(0, deter.shape[:2])
    golden.close("out/loss/repval", dreamerv3.replay_critic_loss(agent, feat, batch, boot, args))


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_golden_updates(path, argmax_sampling):
    check_updates(Golden(path))


def check_updates(golden):
    """Losses, gradients and all weights over the file's updates."""
    agent, args, batch = golden.agent, golden.args, golden.batch()
    start = {name: p.detach().clone() for name, p in golden.names.items()}
    optimizer = dreamerv3.LaProp(agent.trained(), args.learning_rate, args.warmup_updates, args.clip)
    for step in range(1, golden.hyper["steps"] + 1):
        _, metrics = dreamerv3.train_step(agent, optimizer, batch, args)
        for key, value in {"loss": metrics["losses/total"], "grad_norm": metrics["optim/grad_norm"]}.items():
            np.testing.assert_allclose(value, golden.data[f"step{step}/{key}"], rtol=1e-4, err_msg=f"step {step} {key}")
        norm = [agent.return_norm.lo, agent.return_norm.hi]
        np.testing.assert_allclose(norm, golden.data[f"step{step}/retnorm"], rtol=1e-4, atol=1e-5)
        if step == 1:
            golden.close("out/loss/total", metrics["losses/total"])
            golden.close("out/metrics/dyn_ent", metrics["world_model/prior_entropy"])
            golden.close("out/metrics/rep_ent", metrics["world_model/posterior_entropy"])
            for name, p in golden.names.items():
                if f"grad/{name}" in golden.data:
                    reference = golden.convert(f"grad/{name}", p.shape)
                    assert (p.grad - reference).norm() <= 1e-3 * reference.norm() + 1e-6, f"gradient of {name}"
    for name, p in golden.names.items():
        reference = golden.convert(f"after/{name}", p.shape)
        assert (p - reference).norm() <= 2e-3 * (reference - start[name]).norm() + 1e-6, f"{name} after the updates"


def test_the_speed_snippet_of_the_readme_runs(capsys):
    snippet = readme_snippet("train_step")
    assert len(snippet.splitlines()) <= 20
    exec(snippet.replace("compile=True", "compile=False").replace(", 5, (16, 64)", ", 1, (2, 4)"), {})
    assert re.search(r"^\d+\.\d after \d\.\d+ s$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_compiled_updates_equal_the_official_ones(path, argmax_sampling, monkeypatch):
    """About a minute each with a cold compiler cache, so not part of `-k golden`."""
    golden = Golden(path)
    for owner, name in dreamerv3.COMPILED:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # restores the plain functions afterwards
    dreamerv3.compile_functions(golden.agent, golden.batch(), golden.args)
    assert networks.RSSM.observe_step is not PLAIN_STEP, "fell back to eager mode"
    check_updates(golden)


# === the README's environments ========================================================================================

README_IDS = set(re.findall(r"python dreamerv3.py --env-id (\S+)", (ROOT / "README.md").read_text()))


@pytest.fixture
def readme_module(tmp_path, monkeypatch):
    """Name -> the README's snippet of that name as a module, its file in a folder that modules are imported from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def load(name: str) -> types.ModuleType:
        Path(f"{name}.py").write_text(readme_snippet(f"# {name}.py\n"))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return dreamerv3.import_module(name)

    return load


@pytest.mark.parametrize("env_id", sorted(README_IDS - {"crafter_env:Crafter-v0", "protocols:WalkerPixels-v0"}))
def test_ids_of_the_readme_can_be_stepped_or_say_how_to_install_them(env_id, readme_module, capsys):
    if ":" in env_id:
        readme_module(env_id.split(":")[0])
    try:
        env = dreamerv3.make_env(env_id)
    except SystemExit:  # CI installs requirements.txt alone
        install = capsys.readouterr().err.strip("`\n").rpartition("pip install ")[2]
        assert install and f"`pip install {install}`" in (ROOT / "README.md").read_text()
        return
    env.reset(seed=0)
    assert all(env.observation_space.contains(env.step(env.action_space.sample())[0]) for _ in range(5))
    assert env.action_spec.size == 18 or env_id != "protocols:PongFull-v5"  # the full action set


def test_pixels_of_the_readme_are_what_is_rendered(readme_module, monkeypatch):
    fake = types.SimpleNamespace(
        wrappers=gym.wrappers, make=lambda *_, render_kwargs, **flags: gym.make("CartPole-v1", **flags)
    )
    monkeypatch.setitem(sys.modules, "shimmy", fake)
    monkeypatch.setattr(readme_module("protocols"), "gym", fake)
    assert dreamerv3.make_env("protocols:WalkerPixels-v0").specs == {"obs": ObsSpec((64, 64, 3))}


def test_crafter_ends_by_death_or_is_cut(readme_module, monkeypatch):
    class Game:  # episodes of two steps, every second one ended by death
        def __init__(self, seed=None):
            self.time, self.reset = 0, lambda: np.full((64, 64, 3), seed, np.uint8)

        def step(self, action):
            self.time += 1
            return self.reset(), 0.1, self.time % 2 == 0, {"discount": float(self.time % 4 > 0)}

    monkeypatch.setitem(sys.modules, "crafter", types.SimpleNamespace(Env=Game))
    readme_module("crafter_env")
    env = dreamerv3.make_env("crafter_env:Crafter-v0")
    for seed, last in {7: (False, True), None: (True, False)}.items():
        assert env.reset(seed=seed)[0]["obs"][0, 0, 0] == 7  # a seed is for the first reset
        assert [env.step(np.array([16]))[2:4] for _ in range(2)] == [(False, False), last]


def test_your_own_environment_trains(readme_module, program):
    readme_module("my_env")
    env = dreamerv3.make_env("my_env:MyEnv-v0")
    assert (env.specs, env.action_spec.nvec) == ({"camera": ObsSpec((64, 64, 3)), "state": ObsSpec((4,))}, (3, 3))
    for action, steps, last in [(1, 200, (False, True)), (2, 14, (True, False))]:  # rest, and leave the field
        env.reset(seed=0)
        assert [env.step(np.array([action, action]))[2:4] for _ in range(steps)][-1] == last
    assert not program(f"{QUICK} --env-id my_env:MyEnv-v0 --total-timesteps 60")
