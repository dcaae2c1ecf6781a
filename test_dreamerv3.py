"""Tests: closed-form values, the official code's numbers (GOLDEN_DIR: a folder of others), replay, the program."""

import ast
import gc
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, Mock

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import dreamerv3
import networks
from dreamerv3 import SIZES, Agent, Args
from networks import ActionSpec, ObsSpec, Size
from replay import Replay

TINY = Size(deter=32, hidden=16, units=16, classes=4, depth=4, groups=4, blocks=4)
SPECS = {
    "image": ObsSpec((48, 64, 3)),
    "gray": ObsSpec((48, 64, 1)),
    "vector": ObsSpec((5,)),
    "kind": ObsSpec((2,), 3),
}
THREE = ActionSpec((3,), 3)
ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text()
PONG, CRAFTER = "examples.protocols:PongFull-v5", "examples.crafter_env:Crafter-v0"
# flags of short runs: in this process with a tiny model, or as a program
QUICK = "--no-compile --batch-size 4 --batch-length 8 --train-ratio 16 --imagination-horizon 2 --size 1m"
QUICK += " --precision float32 --learning-starts 40"
CHAIN = f"{QUICK} --env-id DreamerChain-v0 --buffer-size 60"
FAST = "--no-compile --batch-size 4 --batch-length 16 --train-ratio 16 --learning-starts 64 --imagination-horizon 3"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def argmax_sampling(monkeypatch):
    """As the golden files were made: the argmax for categoricals and mean + 0.5 std for normals."""
    monkeypatch.setattr(networks, "sample_index", lambda probs, u: probs.argmax(-1))
    monkeypatch.setattr(
        networks.Actor, "noise", lambda self, *shape: torch.full((*shape, self.action.size), 0.5)
    )
    torch._dynamo.reset()  # compiled functions must not remember another sampling


def make_agent(specs=None, action=THREE, **flags) -> tuple[Agent, Args]:
    args = Args(**{"precision": "float32", "imagination_horizon": 3, "warmup_updates": 1} | flags)
    agent = Agent(specs or {"vector": ObsSpec((5,))}, action, TINY, args)
    for head in (agent.reward, agent.critic, agent.slow_critic):
        torch.nn.init.normal_(head[1].weight)  # outscale 0 would pass nothing on
    return agent, args


def make_batch(agent: Agent, batch: int = 2, length: int = 6) -> dict:
    """A random batch as train_step takes it."""
    rng, nvec, shape = np.random.default_rng(0), agent.action.nvec, (batch, length)
    out = {key: rng.random(shape) < 0.2 for key in ("is_first", "is_last", "is_terminal")}
    out["reward"] = rng.normal(size=shape).astype(np.float32)
    for key, spec in agent.specs.items():
        size = (*shape, *spec.shape)
        x = (
            rng.normal(size=size)
            if spec.dtype == "float32"
            else rng.integers(0, spec.classes or 256, size)
        )
        out[f"obs/{key}"] = x.astype(spec.dtype)
    action = (
        rng.integers(0, nvec, (*shape, len(nvec)))
        if nvec
        else rng.normal(size=(*shape, agent.action.size))
    )
    out["prev_action"] = action.astype(np.int32 if nvec else np.float32)
    out["deter"] = rng.normal(size=(batch, TINY.deter)).astype(np.float16)
    out["stoch"] = rng.integers(0, TINY.classes, (batch, TINY.groups)).astype(np.uint8)
    return dreamerv3.batch_to_device(out, agent, torch.device("cpu"))


# === symlog and twohot ================================================================================================
def test_symlog_and_symexp_values():
    x = torch.tensor([0.0, 1.0, -1.0, math.e - 1, 1e4, -1e-6])
    expected = torch.tensor([0.0, math.log(2), -math.log(2), 1.0, math.log(10001), -1e-6])
    torch.testing.assert_close(networks.symlog(x), expected)
    torch.testing.assert_close(networks.symexp(expected), x)


@pytest.mark.parametrize("space", ["symexp", "symlog"])
def test_twohot_bins_are_symmetric_and_predict_exactly_zero_at_first(space):
    twohot, even = networks.TwoHot(space=space, mean="exact"), torch.linspace(-20, 20, 255)
    assert twohot.bins[127] == 0 and torch.equal(twohot.bins, -twohot.bins.flip(0))
    torch.testing.assert_close(
        twohot.bins, networks.symexp(even) if space == "symexp" else even, rtol=1e-4, atol=1e-6
    )
    assert (twohot.mean(torch.full((7, 255), 0.37)) == 0).all()
    agent = Agent(
        {"vector": ObsSpec((5,))}, THREE, TINY, Args(twohot=space, twohot_mean="exact", bins=31)
    )
    for head in (agent.reward, agent.critic, agent.slow_critic):  # outscale 0
        logits = head(torch.randn(9, 48))
        assert logits.shape == (9, 31) and (agent.twohot.mean(logits) == 0).all()


@pytest.mark.parametrize("space", ["symexp", "symlog"])
def test_twohot_weighs_the_two_bins_around_a_target(space):
    """The loss is the cross-entropy with these weights, the mean under them is the target, cut to the bins' range."""
    twohot, logits = (
        networks.TwoHot(space=space),
        torch.randn(255).bfloat16(),
    )  # as autocast gives them
    bins = twohot.bins.double()
    for value in torch.tensor([0.0, 0.3, -2.5, 123.0, 1000.0, -1e5, twohot.bins[200], 1e12, -1e12]):
        target = (
            (networks.symlog(value) if space == "symlog" else value)
            .double()
            .clamp(bins[0], bins[-1])
        )
        above = int((bins < target).sum().clamp(1, 254))
        low, high = bins[above - 1], bins[above]
        encoding = torch.zeros(255, dtype=torch.float64)
        encoding[above - 1], encoding[above] = (
            (high - target) / (high - low),
            (target - low) / (high - low),
        )
        expected = -(encoding * logits.double().log_softmax(0)).sum()
        assert twohot.loss(logits, value).item() == pytest.approx(expected.item(), rel=1e-5)
        expected = networks.symexp(target) if space == "symlog" else target
        assert twohot.mean((encoding + 1e-30).log()).item() == pytest.approx(
            expected.item(), rel=1e-3, abs=1e-3
        )


# === distributions and layers: what the golden numbers below do not reach =============================================
def test_categoricals():
    u = (torch.arange(10_000) + 0.5) / 10_000
    counts = networks.sample_index(torch.tensor([0.1, 0.6, 0.3]).expand(10_000, 3), u).bincount()
    assert counts.tolist() == [1000, 6000, 3000]
    assert networks.sample_index(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(0.9999999)).item() == 0
    assert (
        networks.sample_index(torch.tensor([0.2, 0.2, 0.2]), torch.tensor(0.99)).item() == 2
    )  # a sum below 1
    # independent categoricals agree with torch
    logits, index = [torch.randn(6, 3), torch.randn(6, 4)], torch.arange(6)
    dist, reference = (
        networks.MultiOneHot(logits, 0.0),
        [torch.distributions.Categorical(logits=x) for x in logits],
    )
    action = torch.cat([torch.eye(n)[index % n] for n in (3, 4)], -1)
    torch.testing.assert_close(
        dist.log_prob(action), sum(d.log_prob(index % len(d.probs[0])) for d in reference)
    )
    torch.testing.assert_close(dist.entropy(), sum(d.entropy() for d in reference))
    spec = ActionSpec((3, 4), 7)
    torch.testing.assert_close(
        dreamerv3.encode_action(dreamerv3.decode_action(action, spec), spec), action
    )
    u = torch.tensor([0.0, 0.9999999]).expand(
        6, 2
    )  # the first class of the first, the last of the second
    assert dist.sample(u).nonzero()[:, 1].tolist() == [0, 6] * 6
    recon, target = (
        torch.randn(2, 6, 2, 3),
        torch.randint(3, (2, 6, 2)),
    )  # of a discrete observation
    expected = -torch.distributions.Categorical(logits=recon).log_prob(target).sum(-1)
    torch.testing.assert_close(dreamerv3.recon_loss(recon, target), expected)
    rssm, zeros = (agent := make_agent(unimix=1.0)[0]).rssm, torch.zeros(500, 3, 16)
    feat, action = dreamerv3.imagine(agent, *rssm.initial(500)[:2], 3)
    _, seen, _ = rssm.observe(*rssm.initial(500)[:2], zeros[..., :3], zeros, zeros[..., 0] == 0)
    acted = dreamerv3.policy(
        agent, {"vector": torch.zeros(500, 5)}, rssm.initial(500), zeros[:, 0, 0] == 0
    )[1][1]
    for x in (
        action,
        z := feat[:, 1:, 32:].unflatten(-1, (4, 4)),
        seen,
        z.swapaxes(1, 2),
        seen.swapaxes(1, 2),
        acted,
    ):
        assert (x[:, 1:] * x[:, :-1]).sum(-1).mean(
            0
        ).max() < 0.7  # every step and every group has noise of its own


def test_layers():
    layer = networks.linear(400, 300, 0.5)
    assert layer.weight.std().item() == pytest.approx(0.5 / math.sqrt(400), rel=0.02)
    assert (
        layer.weight.abs().max().item() <= 0.5 * 2 * 1.1368 / math.sqrt(400)
        and not layer.bias.any()
    )
    block = networks.BlockLinear(256, 512, 8, shared=96)
    assert block.weight.std().item() == pytest.approx(
        1 / math.sqrt(256 + 8 * 96), rel=0.02
    )  # full input width
    assert networks.conv5(16, 64).weight.std().item() == pytest.approx(
        1 / math.sqrt(25 * 16), rel=0.02
    )
    noise = (actor := networks.Actor(400, 300, ActionSpec((), 2), 0.0)).noise(10_000)
    assert (noise.T @ noise / 10_000 - torch.eye(2)).abs().max() < 0.06 and actor.outs[
        0
    ].weight.std() < 0.01
    # upsampling and convolving equals its definition
    conv, x = (
        networks.conv5(3, 4).double(),
        torch.randn(2, 3, 6, 5, dtype=torch.float64),
    )  # not square
    conv.bias.data.normal_()
    expected = conv(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(networks.upsample_conv(x, conv), expected)


COUNTS = """686456 640477 10492616 9736477 23487016 21780637 41646984 38608925 93463624 86617885 165942536 153763357
372887176 345463837"""  # with 6 discrete actions and a 64x64x3 image | a vector of 24 numbers, 1m to 400m


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_official_code(size):
    i = list(SIZES).index(size)
    for spec, count in zip(
        (ObsSpec((64, 64, 3)), ObsSpec((24,))), COUNTS.split()[2 * i :], strict=False
    ):
        with torch.device("meta"):
            agent = Agent({"obs": spec}, ActionSpec((6,), 6), SIZES[size], Args())
        assert sum(p.numel() for p in agent.trained()) == int(count)


# === returns, optimizer, flags ========================================================================================
@pytest.mark.parametrize(
    "shape", [(1,), (2, 1), (21,), (16, 15)]
)  # 21: the ranks are whole numbers
def test_return_range_follows_the_percentiles(shape):
    returns, norm = 1000 * torch.randn(shape), dreamerv3.ReturnNorm()
    assert norm.scale == 1
    lo, hi = np.percentile(returns.numpy(), [5, 95])
    for share in (0.01, 0.0199):
        norm.update(returns)
        np.testing.assert_allclose([norm.lo, norm.hi], [share * lo, share * hi], rtol=1e-5)
    np.testing.assert_allclose(norm.scale, max(1, share * (hi - lo)), rtol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_lambda_return_equals_the_weighted_sum_of_n_step_returns(lam):
    rng, length, disc = np.random.default_rng(0), 7, 0.97

    def n_step(t: int, n: int) -> float:
        """n discounted rewards and then the value, or fewer where the episode ends."""
        if n == 0:
            return boot[t]
        return reward[t + 1] + disc * (not term[t + 1]) * n_step(t + 1, 0 if last[t + 1] else n - 1)

    for _ in range(20):
        reward, boot, term = (
            rng.normal(size=length),
            rng.normal(size=length),
            rng.random(length) < 0.15,
        )
        last, expected = term | (rng.random(length) < 0.15), []
        for t in range(length - 1):
            steps = length - 1 - t
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, steps)] + [lam ** (steps - 1)]
            expected.append(sum(w * n_step(t, n) for n, w in enumerate(weights, 1)))
        out = dreamerv3.lambda_return(
            *(torch.tensor(x)[None] for x in (last, term, reward, boot)), disc, lam
        )[0]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_optimizer_equals_a_plain_loop():
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = dreamerv3.LaProp(params, lr=0.1, warmup=4, clip=0.3)
    plain = [(p.detach().double(), 0.0, 0.0) for p in params]
    for step in range(7):
        rate = 0.1 * min(1, step / 4)  # none at first
        for i, (p, mean, square) in enumerate(plain):
            params[i].grad = torch.randn(p.shape) * 10 ** (step - 3)
            g = params[i].grad.double()
            g = g * min(1, 0.3 * max(1e-3, p.norm()) / g.norm())
            square = 0.999 * square + 0.001 * g * g
            mean = 0.9 * mean + 0.1 * g / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-20)
            plain[i] = p - rate * mean / (1 - 0.9 ** (step + 1)), mean, square
        assert optimizer.step()["charts/learning_rate"].item() == pytest.approx(rate)
        for p, (expected, _, _) in zip(params, plain, strict=True):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-3, atol=1e-5)


FLAGS = dict.fromkeys(
    "pred_scale dyn_scale rep_scale free_nats ent_coef slow_critic_scale".split(), 3.0
)
FLAGS |= dict.fromkeys(
    "gamma return_lambda unimix actor_unimix replay_critic_scale tau".split(), 0.5
)
FLAGS |= {"twohot": "symlog", "imagination_horizon": 2, "precision": "bfloat16"}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_of_the_update_changes_it(flag):
    results = []
    for flags in ({}, {flag: FLAGS[flag]}):
        torch.manual_seed(0)
        agent, args = make_agent(**flags)
        _, metrics = dreamerv3.train_step(
            agent, dreamerv3.LaProp(agent.trained(), 0.0), make_batch(agent), args
        )
        assert metrics["losses/dyn"] == metrics["losses/rep"] and {
            x.dtype for x in metrics.values()
        } == {torch.float32}
        results.append(agent.slow_critic[1].weight if flag == "tau" else metrics["losses/total"])
    assert not torch.equal(*results)


# === gradients, devices, latents ======================================================================================
class NoHostSync(TorchDispatchMode):
    """Fails on every operation that would make the host wait for the device or has a data-dependent shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        forbidden = "_local_scalar_dense nonzero masked_select unique item is_nonzero equal. lift_fresh".split()
        assert not any(name in str(function) for name in forbidden), (
            f"{function} waits for the device"
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "device, precision", [("cpu", "float32"), ("cpu", "bfloat16"), ("meta", "float32")]
)
@pytest.mark.parametrize("action", [THREE, ActionSpec((3, 2), 5), ActionSpec((), 2)])
def test_update_stays_on_the_device_and_reaches_every_parameter(action, device, precision):
    """On the meta device an operation that mixes devices raises, as it would on a GPU."""
    agent, args = make_agent(SPECS, action, free_nats=0.0, precision=precision)
    batch, agent = make_batch(agent), agent.to(device)
    optimizer = dreamerv3.LaProp(agent.trained(), args.learning_rate)
    batch = tree_map(lambda x: x.to(device), batch)
    obs, state = batch["obs"], agent.rssm.initial(2)
    with NoHostSync():
        latents, metrics = dreamerv3.train_step(agent, optimizer, batch, args)
        out, _ = dreamerv3.policy(
            agent, {key: x[:, 0] for key, x in obs.items()}, state, batch["is_first"][:, 0]
        )
    assert {(x.device.type, x.requires_grad) for x in (out, *latents, *metrics.values())} == {
        (device, False)
    }
    assert all(device == "meta" or p.grad.any() for p in agent.trained()) and out.shape == (
        2,
        action.size,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_updates_are_the_updates(precision):
    results = []
    for wrap in (lambda update: update, dreamerv3.Graph):
        torch.manual_seed(0)
        agent, args = make_agent(SPECS, precision=precision)
        batches = [tree_map(lambda x: x.cuda(), make_batch(agent)) for _ in range(3)]
        batches[2]["reward"] += 1  # what a graph has to be told
        optimizer = dreamerv3.LaProp(agent.cuda().trained(), 1e-3, warmup=1)
        update = wrap(partial(dreamerv3.train_step, agent, optimizer, args=args))
        results.append([update(batch) for batch in batches] + [agent.state_dict()])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_an_update_is_captured_once_or_the_program_ends(capsys, monkeypatch):
    monkeypatch.setattr(torch, "cuda", cuda := MagicMock())
    graph, broken = (
        dreamerv3.Graph(Mock(side_effect=x)) for x in (lambda x: x, [0, RuntimeError("the cause")])
    )
    assert [graph(torch.tensor(i)) for i in range(5)] == [*range(5)] and broken(
        torch.ones(1)
    ) == 0  # not overwritten
    assert (
        graph.function.call_count == 2 and graph.graph.replay.call_count == 4
    )  # plainly, then captured
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("a consequence")
    with pytest.raises(SystemExit):
        broken(torch.ones(1))
    assert "cannot capture a CUDA graph, add --no-cudagraphs: the cause" in capsys.readouterr().err


@pytest.mark.parametrize("works", [True, False])
def test_functions_are_compiled_if_a_compiler_works(works, capsys, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda graph, _: graph if works else 1 / 0)
    )
    monkeypatch.setattr(dreamerv3, "COMPILED", [(networks, "symlog")])
    monkeypatch.setattr(networks, "symlog", plain := networks.symlog)  # restored afterwards
    dreamerv3.compile_functions(torch.device("cpu"))
    assert networks.symlog(torch.zeros(())) == 0 and (networks.symlog is plain) != works
    assert ("cannot compile, going on in eager mode: " in capsys.readouterr().out) != works


# === the time line ====================================================================================================
class Chain(gym.Env):
    """Walks 0, 1, 2, … to 5, then ends, by termination or truncation; the reward is the new position. `fault`: fails in
    its constructor (that of a worker), at its first reset, or in its 50th step by a wrong observation or by dying."""

    def __init__(self, terminal: bool = True, fault: str = ""):
        self.terminal, self.fault, self.steps, self.odd = terminal, fault, 0, None
        self.observation_space, self.action_space = (
            spaces.Box(-1, 99, (1,)),
            spaces.Discrete(4, start=3),
        )
        assert fault != "constructor" and not (
            fault == "worker" and torch.multiprocessing.parent_process()
        ), "broken"

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        assert self.fault != "reset", "two\nlines"
        self.position, self.odd = (
            0,
            self.odd if seed is None else seed % 2 or None,
        )  # Gymnasium cannot join 1 and None
        return np.zeros(1, np.float32), {"odd": self.odd}

    def step(self, action):
        assert action in self.action_space and self.position < 5
        self.position, self.steps = self.position + 1, self.steps + 1
        fails, end = (
            self.fault * (self.steps == 50 and os.environ.get("RANK") != "0"),
            self.position == 5,
        )
        if fails == "signalled" and self.odd:
            os.killpg(os.getpgid(os.getppid()), signal.SIGINT)  # as a terminal does
        if fails in ("dies", "signalled"):
            os._exit(1)
        obs = np.full(1, math.nan if fails == "nan" else self.position, np.float32)
        return (
            obs,
            self.position,
            end and self.terminal,
            end and not self.terminal,
            {"odd": self.odd},
        )


FAULTS = {
    "nan": "ValueError: observation 'obs' is declared .* came as .*nan",
    "reset": "AssertionError: two lines",
}
FAULTS |= {"dies": "EOFError: its process is gone", "constructor": "AssertionError: broken"}
for fault in [*FAULTS, "worker", "signalled"]:
    gym.register(f"Dreamer-{fault}-v0", Chain, kwargs={"fault": fault}, order_enforce=False)
gym.register("DreamerChain-v0", Chain)
gym.register("DreamerTruncatedChain-v0", Chain, kwargs={"terminal": False})


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program in this process, its model tiny and its folder tmp_path: flags, exit status -> the run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C stays pytest's
    monkeypatch.setitem(dreamerv3.SIZES, "1m", TINY)

    def main(flags: str, status: int = 0) -> Path | None:
        with pytest.raises(SystemExit) as stop:
            dreamerv3.main(flags.split())
        assert (stop.value.code or 0) == status
        return max(
            tmp_path.glob("runs/**/episodes.csv"), key=os.path.getmtime, default=tmp_path
        ).parent

    return main


@pytest.mark.parametrize("env_id", ["DreamerChain-v0", "DreamerTruncatedChain-v0"])
@pytest.mark.parametrize("windows", ["episode", "stream"])
def test_alignment_on_a_chain(env_id, windows, program, monkeypatch):
    """The loop stores, and replay returns, exactly the time line drawn at the top of dreamerv3.py."""
    seen, written, convert, write = [], [], dreamerv3.batch_to_device, Replay.update_latents
    monkeypatch.setattr(
        dreamerv3,
        "batch_to_device",
        lambda batch, *rest: seen.append(batch) or convert(batch, *rest),
    )
    monkeypatch.setattr(
        Replay, "update_latents", lambda *x, **kw: written.append(x[0].windows) or write(*x, **kw)
    )
    program(
        f"{QUICK} --env-id {env_id} --total-timesteps 90 {'--replay-windows stream' * (windows == 'stream')}"
    )
    assert len(seen) == 25 and written == [windows] * 25
    assert (
        seen[0]["deter"].any() and seen[0]["stoch"].any()
    )  # the latents that the agent had when it acted
    for batch in seen:
        x, r = batch["obs/obs"][..., 0], batch["reward"]
        assert (
            batch["is_first"] >= (x == 0)
        ).all()  # a reset shows position 0; a row may also start over elsewhere
        np.testing.assert_array_equal(r, x)  # reward[t] arrives with obs[t], 0 on resets
        assert (batch["is_last"] >= (x == 5)).all()
        np.testing.assert_array_equal(
            batch["is_terminal"], (x == 5) & (env_id == "DreamerChain-v0")
        )
        follows = x[:, 1:] == x[:, :-1] + 1
        np.testing.assert_array_equal(follows, ~batch["is_first"][:, 1:])
        np.testing.assert_array_equal(batch["is_last"][:, :-1], batch["is_first"][:, 1:])


# === replay ===========================================================================================================
FIELDS = {"obs/x": ((3,), np.float32), "action": ((1,), np.int32), "reward": ((), np.float32)}
FIELDS |= {
    "deter": ((3,), np.float16),
    "stoch": ((2,), np.uint8),
    "obs/a.b": ((), "i4"),
    "obs/a/b": ((), "i4"),
}
FULL_DISK = [None] * 8 + [
    OSError(28, "No space left on device")
]  # when the clock is made, the last of nine files


def fill(replay: Replay, steps: int, lengths, seed: int = 0) -> None:
    """Add steps whose observation is (environment, time, steps left), in episodes of these lengths; the last is cut."""
    rng, envs = np.random.default_rng(seed), replay.num_envs
    first, left = np.ones(envs, bool), rng.choice(lengths, envs)
    for now in range(replay.now, replay.now + steps):
        last, time = left == 1, np.full(envs, now)
        step = {
            "obs/x": np.stack([np.arange(envs), time, left], 1),
            "action": time[:, None],
            "reward": time,
        }
        step |= {
            "is_first": first,
            "is_last": last,
            "is_terminal": last,
            "obs/a.b": time,
            "obs/a/b": left,
        }
        step |= {"deter": np.zeros((envs, 3)), "stoch": np.full((envs, 2), now % 200)}
        for value in step.values():
            value.flags.writeable = False  # add must not change its input
        replay.add(step)
        first, left = last, np.where(last, rng.choice(lengths, envs), left - 1)


@pytest.mark.parametrize("windows", ["episode", "stream"])
@pytest.mark.parametrize("lengths", [[1], [3, 5], [8], [7, 9, 30], [40, 50], [10_000]])
def test_sampled_rows_are_contiguous_and_seams_are_marked(windows, lengths):
    replay = Replay(600, 2, FIELDS, 8, windows)
    for steps in (20, 270, 37, 500):  # not full, just full, past the write head, far past it
        fill(replay, steps, lengths)
        kept = min(replay.now, 300)
        assert len(replay) == 2 * kept
        for _ in range(50):
            batch, (env, time) = replay.sample(16)
            first, last, left = batch["is_first"], batch["is_last"], batch["obs/x"][..., 2]
            np.testing.assert_array_equal(batch["obs/x"][..., 0], np.broadcast_to(env, (16, 8)))
            np.testing.assert_array_equal(batch["obs/x"][..., 1], time)
            np.testing.assert_array_equal(batch["reward"], time)
            assert time.min() >= replay.now - kept and time.max() < replay.now
            follows = time[:, 1:] == time[:, :-1] + 1
            assert (follows | first[:, 1:]).all()
            np.testing.assert_array_equal(
                last[:, :-1], first[:, 1:]
            )  # also where an episode was cut
            np.testing.assert_array_equal(batch["is_terminal"], left == 1)
            # the action and the latent before each step are those of the step before it, unless the state is reset
            assert (first | (batch["prev_action"][..., 0] == time - 1)).all()
            assert (first[:, 0] | (batch["stoch"][:, 0] == (time[:, 0] - 1) % 200)).all()
            assert (
                first[:, 0] | (time[:, 0] > replay.now - kept)
            ).all()  # the step before is still kept
            np.testing.assert_array_equal(
                first[:, 0], replay.data["is_first"][env[:, 0], time[:, 0] % replay.slots]
            )
            if windows == "episode":
                assert not (last[:, :-1] & follows).any()  # never on into the next episode
            for value in batch.values():
                value[:] = 1  # a copy, or the next batches would be wrong


def test_episode_windows_draw_every_step_equally_often():
    """Within six standard deviations; a row shows a step of a short episode several times, so that rows are counted."""
    lengths, draws = [3, 40, 64, 65, 100, 200, 1000], 4000
    replay, step = (
        Replay(2944, 2, FIELDS, 64),
        {name: np.zeros((2, *shape)) for name, (shape, _) in FIELDS.items()},
    )
    for left, length in ((t, x) for x in lengths for t in reversed(range(x))):
        last = np.full(2, left == 0)
        replay.add(
            step
            | {"is_first": np.full(2, left == length - 1), "is_last": last, "is_terminal": last}
        )
    replay.online.clear()
    counts = np.bincount(
        np.ravel([1472 * env + time for _, (env, time) in map(replay.sample, [16] * draws)])
    )
    for episode in np.split(counts / counts.mean(), np.cumsum(lengths * 2)[:-1]):
        noise = 6 * np.sqrt(2944 / (16 * draws * min(64, len(episode))))
        assert np.abs(episode - 1).max() < noise, (
            len(episode),
            noise,
        )  # terminal steps, the last ones, too


def test_a_stretch_is_used_once_when_it_is_complete():
    replay, episodes = Replay(400, 2, FIELDS, 8, "stream"), Replay(400, 1, FIELDS, 8, "episode")
    fill(replay, 16, [1000])
    assert replay.online == {0: 8, 1: 8}
    for n, env in (1, 0), (3, 1):
        _, index = replay.sample(n)
        assert (
            index[0].shape == (n, 1)
            and index[0][0] == env
            and index[1][0].tolist() == list(range(8, 16))
        )
    assert not replay.online
    fill(episodes, 30, [12])
    assert episodes.online == {
        0: 16 - 4
    }  # the first eight steps of the second episode; the third is too young
    fill(episodes, 500, [3])  # overwrites them
    assert episodes.sample(4)[1][1].min() > episodes.now - 400 and not episodes.online


def test_latents_are_written_back_unless_their_step_is_gone():
    replay = Replay(40, 2, FIELDS, 4)
    fill(replay, 20, [9])
    _, (env, time) = replay.sample(5)
    deter = np.random.default_rng(0).normal(size=(5, 4, 3))
    replay.update_latents((env, time), deter, np.full((5, 4, 2), 7))
    assert (replay.data["stoch"][env, time % replay.slots] == 7).all()
    np.testing.assert_allclose(
        replay.data["deter"][env[-1], time[-1] % replay.slots], deter[-1], rtol=1e-3
    )
    fill(replay, 20, [9])
    before = replay.data["stoch"].copy()
    replay.update_latents((env, time), deter, np.full((5, 4, 2), 9))
    np.testing.assert_array_equal(before, replay.data["stoch"])


@pytest.mark.parametrize("windows", ["episode", "stream"])
def test_replay_goes_on_from_its_files(windows, tmp_path):
    kept = Replay(60, 2, FIELDS, 8, windows, folder=tmp_path)
    fill(kept, 45, [5, 13])
    again = Replay(60, 2, FIELDS, 8, windows, seed=9, folder=tmp_path)
    again.load_state_dict(kept.state_dict())
    for _ in range(20):
        (a, _), (b, _) = kept.sample(6), again.sample(6)
        assert all(np.array_equal(a[k], b[k]) for k in a) and (a["obs/a.b"] == a["reward"]).all()
    state = kept.state_dict() | {"online": {0: 1}}
    fill(kept, 9, [5, 13])
    again = Replay(60, 2, FIELDS, 8, windows, folder=tmp_path)
    again.load_state_dict(state)
    assert not again.online  # that of the state is of another moment
    with pytest.raises(ValueError, match="this run needs"):
        Replay(80, 2, FIELDS, 8, windows, folder=tmp_path)
    os.truncate(tmp_path / "reward.npy", os.path.getsize(tmp_path / "reward.npy") - 20)
    with pytest.raises(
        ValueError, match="shorter than|greater than file size"
    ):  # never zeros for what was stored
        Replay(60, 2, FIELDS, 8, windows, folder=tmp_path)
    (tmp_path / "reward.npy").unlink()
    with pytest.raises(FileNotFoundError):
        Replay(60, 2, FIELDS, 8, windows, folder=tmp_path)


def test_replay_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="capacity of 16"):
        Replay(16, 2, FIELDS, 8)
    with pytest.raises(ValueError, match="nothing to sample"):
        Replay(100, 1, FIELDS, 8).sample(1)
    assert Replay.bytes_per_step(FIELDS) == 12 + 4 + 4 + 6 + 2 + 4 + 4 + 3 + 20


# === environments =====================================================================================================
class Everything(gym.Env):
    """Every kind of space, nested."""

    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (20, 30, 1), np.uint8),
        tuple=spaces.Tuple((spaces.Discrete(3, start=5), spaces.MultiBinary(4))),
        deep=spaces.Dict(multi=spaces.MultiDiscrete([2, 7]), bool=spaces.Box(0, 1, (), bool)),
        small=spaces.Box(0, 255, (10, 10, 3), np.uint8),
        double=spaces.Box(-1, 1, (2, 2), np.float64),
    )

    def __init__(self, action_space=None):
        self.action_space, self.actions = action_space or spaces.MultiDiscrete([2, 3]), []

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
    specs = {"camera": ObsSpec((48, 48, 1)), "small": ObsSpec((300,)), "double": ObsSpec((4,))}
    specs |= {"tuple/0": ObsSpec((), 3), "tuple/1": ObsSpec((4,), 2)}
    specs |= {"deep/multi": ObsSpec((2,), 7), "deep/bool": ObsSpec((1,))}
    assert env.specs == specs
    obs, _ = env.reset(seed=0)
    assert (
        env.observation_space.contains(obs)
        and obs["tuple/0"] in (0, 1, 2)
        and env.action_spec.nvec == (2, 3)
    )
    assert dreamerv3.obs_spec(spaces.Box(0, 255, (3, 64, 64), np.uint8), 64) == ObsSpec(
        (12288,)
    )  # channels first
    env = Everything()
    env.observation_space = spaces.Box(
        0, 255, (84, 84, 7), np.uint8
    )  # OpenCV refuses 7 channels here
    stack = env.observation_space.sample()
    single = [cv2.resize(stack[..., i], (64, 64), interpolation=cv2.INTER_AREA) for i in range(7)]
    np.testing.assert_array_equal(
        dreamerv3.Adapter(env, 64).observation(stack)["obs"], np.stack(single, -1)
    )


ACTIONS = [
    (spaces.Discrete(3, start=-1), ActionSpec((3,), 3), [2], 1),
    (
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        ActionSpec((2, 3, 4, 5), 14),
        [1, 2, 3, 4],
        [[1, 2], [3, 4]],
    ),
    (spaces.MultiBinary(3), ActionSpec((2, 2, 2), 6), [1, 0, 1], [1, 0, 1]),
    (
        spaces.Box(np.array([[0.0, -4.0]]), np.array([[1.0, 8.0]])),
        ActionSpec((), 2),
        [-3.0, 0.5],
        [[0.0, 5.0]],
    ),
    (
        spaces.Box(-3.6, 2.2, (1,)),
        ActionSpec((), 1),
        [1.0],
        [np.float32(2.2)],
    ),  # rounding would exceed it
    (spaces.Box(-3.4e38, np.inf, (2,)), ActionSpec((), 2), [-3.0, 0.25], [-1.0, 0.25]),
    (
        spaces.Box(np.array([0, -np.inf]), np.array([np.inf, 4])),
        ActionSpec((), 2),
        [1.0, -1.0],
        [2.0, 2.0],
    ),
    (spaces.Box(0, 10, (1,), np.int64), ActionSpec((), 1), [0.1], [6]),
]


@pytest.mark.parametrize("space, spec, given, expected", ACTIONS)
def test_adapter_translates_actions(space, spec, given, expected):
    inner = Everything(space)
    env = dreamerv3.Adapter(inner, 48)
    env.reset(seed=0)
    env.step(np.array(given))
    assert env.action_spec == spec
    np.testing.assert_array_equal(inner.actions[0], expected)


def test_adapter_leaves_out_what_cannot_be_learned_from():
    env = Everything()
    texts = {
        "mission": spaces.Text(5),
        "graph": spaces.Graph(spaces.Discrete(2), None),
        "none": spaces.Box(0, 1, (0,)),
    }
    env.observation_space = spaces.Dict({"a": spaces.Discrete(2, dtype=np.int8), **texts})
    adapter = dreamerv3.Adapter(env, 64)
    assert list(adapter.specs) == ["a"]
    assert sorted(adapter.left_out) == ["graph (Graph)", "mission (Text)", "none (Box)"]
    for one in (1, True):  # Gymnasium takes both for classes
        assert adapter.observation({"a": one, "mission": "go", "graph": None, "none": []}) == {
            "a": 1
        }
    env.observation_space = spaces.Dict(texts)
    with pytest.raises(ValueError, match="no Box, .* space in Dict.*mission"):
        dreamerv3.Adapter(env, 64)
    with pytest.raises(ValueError, match="action space Dict"):
        dreamerv3.Adapter(Everything(spaces.Dict({"a": spaces.Discrete(2)})), 64)


OUTSIDE = {
    "camera": [np.zeros((20, 30, 1), np.float32), np.zeros((30, 20, 1), np.uint8)],
    "tuple": [(8, np.zeros(4)), (5.5, np.zeros(4)), (6, np.array([0, 1, 2, 0]))],
    "deep": [{"multi": np.array([2, 0]), "bool": True}, {"multi": np.array([1, 0]), "bool": None}],
    "double": [
        *([[0, x], [0, 0]] for x in (np.nan, -np.inf, 1e39)),
        np.zeros(4),
        [["a", "b"], ["c", "d"]],
    ],
}


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in OUTSIDE.items() for value in values]
)
def test_observations_that_leave_their_space_are_refused(key, value):
    env = dreamerv3.Adapter(Everything(), 48)
    obs = env.env.observation_space.sample()
    assert env.observation(obs).keys() == env.specs.keys()
    obs[key] = value
    with pytest.raises(
        ValueError, match=f"observation '{key}(/[01]|/multi|/bool)?' is declared .* came as"
    ):
        env.observation(obs)
    for reward in (math.nan, -math.inf, None, np.zeros(2)):
        env.env.step = lambda action: (obs, reward, False, False, {})  # noqa: B023
        with pytest.raises(
            ValueError, match=rf"reward {re.escape(str(reward))} is not a finite number"
        ):
            env.step(np.array([0, 0]))


@pytest.mark.parametrize("env_id, sticky", [("ALE/Pong-v5", 0.25), ("PongNoFrameskip-v4", 0.0)])
def test_atari_skips_frames_exactly_once(env_id, sticky):
    env = dreamerv3.make_env(env_id)
    ale = env.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == sticky and env.repeat == 4
    env.reset(seed=1)
    before = ale.getEpisodeFrameNumber()
    obs, *_ = env.step(np.array([0]))
    assert 1 <= before <= 30 and ale.getEpisodeFrameNumber() == before + 4
    assert obs["obs"].shape == (64, 64, 3) and obs["obs"].dtype == np.uint8
    assert dreamerv3.make_env(env_id, image_size=96, action_repeat=2).specs["obs"].shape == (
        96,
        96,
        3,
    )


def test_action_repeat_adds_up_rewards_and_stops_at_the_end():
    env = dreamerv3.make_env("DreamerChain-v0", action_repeat=3)
    env.reset(seed=0)
    obs, reward, terminated, _, _ = env.step(np.array([0]))
    assert (obs["obs"][0], reward, terminated) == (3, 1 + 2 + 3, False)
    obs, reward, terminated, _, info = env.step(np.array([0]))
    assert (obs["obs"][0], reward, terminated) == (5, 4 + 5, True) and info["episode"]["r"] == 15


# === the program ======================================================================================================
def saved(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def scalars(folder: Path) -> dict[str, list]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [e.value for e in events.Scalars(tag) if e.step] for tag in events.Tags()["scalars"]
    }


KEYS = """charts/{episodic_return,episodic_length,SPS,updates_per_second,learning_rate,updates,frames,train_ratio}
charts/{time_share_update} losses/{recon,reward,continue,dyn,rep,actor,critic,replay_critic,total}
behavior/{return_mean,return_scale,advantage_mag,value_mean,reward_mean,continue_mean,actor_entropy}
world_model/{prior_entropy,posterior_entropy} optim/{grad_norm,update_rms,param_rms}"""
KEYS = {
    f"{group}{name}"
    for group, names in re.findall(r"(\w+/){(.*?)}", KEYS)
    for name in names.split(",")
}
WORDS = "trained parameters| GB|1 update every|run folder: runs/".split("|")
WORDS += ["device: cuda"] if torch.cuda.is_available() else ["device: cpu", "CUDA is not available"]

RUNS = """--env-id CartPole-v1 | --env-id CartPole-v1 --num-envs 4 --replay-windows stream --capture-video
--env-id Pendulum-v1 --action-repeat 2 --twohot symlog --video-frequency 0 --warmup-updates 0
--env-id ALE/Pong-v5 --total-timesteps 1500 --train-ratio 0.5 --save-model --capture-video
--env-id test_dreamerv3:DreamerEverything-v0 --train-ratio 4"""


@pytest.mark.parametrize("flags", RUNS.replace(" | ", "\n").splitlines())
def test_a_run_trains_and_leaves_its_files(flags, program, capsys, tmp_path):
    flags = f"{QUICK} --total-timesteps 200 --seed 7 {flags}"
    folder, out = program(flags), capsys.readouterr().out
    assert not [word for word in WORDS if word not in out]
    assert (
        (folder / "episodes.csv")
        .read_text()
        .startswith("global_step,frames,return,length,seconds\n")
    )
    rows = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1, ndmin=2)
    frames = 2 if "--action-repeat 2" in flags else 4 if "ALE/" in flags else 1
    assert len(rows) and (rows[:, 1] == frames * rows[:, 0]).all() and (rows[:, 2:4] != 0).all()
    values, action = scalars(folder), np.load(folder / "replay" / "action.npy")
    assert (
        set(values) == KEYS
        and all(np.isfinite(v).all() for v in values.values())
        and torch.initial_seed() == 7
    )
    total, ratio = (
        float(re.findall(rf"--{flag} ([\d.]+)", flags)[-1])
        for flag in ("total-timesteps", "train-ratio")
    )
    envs = 4 if "--num-envs" in flags else 1
    updates = math.floor(ratio * (total - 40 - (total - 40) % envs) / (4 * 8))
    assert (saved(folder)["global_step"], saved(folder)["updates"]) == (
        total,
        updates,
    ) and updates > 0
    assert (folder / "model.pt").exists() == ("--save-model" in flags) and (action % 1).any() == (
        "Pendulum" in flags
    )
    videos = {
        x.name
        for x in tmp_path.glob(f"videos/{folder.relative_to(tmp_path / 'runs')}/train-0/*.mp4")
    }
    assert bool(videos) == ("--capture-video" in flags) and videos <= {
        f"rl-video-episode-{i}.mp4" for i in (0, 1, 8)
    }
    if envs > 1:  # every environment has a seed of its own
        assert (
            len({*map(bytes, np.load(folder / "replay/obs.obs.npy")[:, 0])}) == envs
            and action.std(0).mean() > 0.2
        )


BAD = """--size 3m | --twohot log | --replay-windows all | --precision half | --batch-size x | --nonsense 1 | --seed -1
--batch-size 0 | --batch-length 1 | --imagination-horizon 0 | --num-envs 0 | --total-timesteps 0 | --total-timesteps 20
--train-ratio 0 | --train-ratio nan | --train-ratio inf | --learning-rate 0 | --warmup-updates -1 | --clip 0 | --gamma 1
--gamma nan | --return-lambda 1.1 | --tau 2 | --unimix 1 | --bins 254 | --actor-unimix -1 | --bins 1 | --dyn-scale -1
--image-size 60 | --image-size 32 | --image-size 512 | --action-repeat -1 | --learning-starts 10
--learning-starts 500000 | --buffer-size 10 | --buffer-size 100 --num-envs 2 | --ent-coef nan | --replay-critic-scale -1
--buffer-size 500 | --free-nats inf | --eval-only | --eval-episodes 0 | --eval-frequency -1
--resume nowhere --eval-only | --checkpoint-frequency -1 | --video-frequency -1 | --log-frequency 0 | --resume nowhere
--env-id bad! | --env-id Taxi-v3 | --env-id Pnog-v5 | --env-id ALE/Pongg-v5 | --env-id CartPole-v9
--env-id nomodule:Thing-v0 | --seed 4294967296 | --free-nats -1 | --tau -0.1 | --batch-size 2.5"""  # Taxi is deprecated


@pytest.mark.parametrize("flags", [x.strip() for line in BAD.splitlines() for x in line.split("|")])
def test_bad_input_gives_one_line_and_status_2(flags, program, capsys, tmp_path, monkeypatch):
    if "--env-id" not in flags:
        monkeypatch.setattr(dreamerv3, "make_env", None)  # refused before any environment is made
    program(flags, 2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("dreamerv3.py: error: ") and "\n" not in error
    assert flags.split()[0].lstrip("-") in error.replace("_", "-") and not list(tmp_path.iterdir())


def test_limits_count_the_processes_that_train_together(capsys):
    least = {"buffer_size": 65 * 16, "learning_starts": 64 * 16 * 8, "total_timesteps": 65 * 16 * 8}
    dreamerv3.check_args(Args(num_envs=16, **least), 8)
    for name in least:
        with pytest.raises(SystemExit):
            dreamerv3.check_args(Args(num_envs=16, **least | {name: least[name] - 1}), 8)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--exp-name same", "File exists: 'runs/"),
        ("--exp-name full", r"cannot write the run folder .*\(--buffer-size\): .*No space left"),
        (
            f"--total-timesteps {10**13} --buffer-size {10**13} --no-persist-replay",
            "-size.: .*Unable to allocate",
        ),
        (
            "--capture-video",
            "CartPole-v1 cannot be made with --capture-video: .*(?i:moviepy).*pip install",
        ),
        (
            "--capture-video --env-id DreamerChain-v0",
            "Chain-v0 cannot be made with --capture-video: .*render_mode",
        ),
        ("--track", r"--track cannot start \(pip install wandb, .*wandb"),
        ("--env-id CartPoel-v1", "--env-id CartPoel-v1 cannot be made: .*Did you mean: `CartPole`"),
        (
            "--env-id Dreamer-constructor-v0",
            "cannot be made: AssertionError: broken.*test_dreamerv3.py:",
        ),
        (
            "--env-id Dreamer-worker-v0 --num-envs 2",
            "worker-v0 cannot be made: (EOF|Connection|BrokenPipe)",
        ),
        (
            "--env-id MinAtar/Breakout-v1",
            "Breakout-v1 cannot be made: .*minatar.gym .*try: pip install minatar",
        ),
        (
            "--env-id dm_control/hopper-hop-v0",
            "hopper-hop-v0 cannot be made: .*shimmy .*try: pip install .shimmy",
        ),
    ],
)
def test_a_start_that_fails_is_one_line_and_leaves_nothing(
    flags, words, program, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(dreamerv3, "Agent", None)  # refused before any model is made
    for module in ("moviepy", "wandb", "minatar.gym", "shimmy"):
        if module in words:
            monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    if "full" in flags:
        monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=FULL_DISK))
    if "same" in flags:  # another run began in the same second
        monkeypatch.setattr(time, "time", lambda: 7.5)
        (tmp_path / "runs" / "CartPole-v1__same__1__7").mkdir(parents=True)
    program(f"{QUICK} --env-id CartPole-v1 --total-timesteps 100 {flags}", 2)
    error = capsys.readouterr().err.strip()
    assert re.search(words, error) and "\n" not in error
    assert not [x for x in tmp_path.rglob("*") if x.is_file()]


def test_a_run_survives_sigkills_at_random_moments(tmp_path):
    """Killed after some updates, with SLOW=1 19 times more while starting, acting, training or saving, then stopped by
    SIGTERM: steps, episodes and counters stay consistent."""
    rng, every, kills = np.random.default_rng(0), 20, 20 if "SLOW" in os.environ else 1
    start = f"{FAST} --batch-size 2 --batch-length 8 --env-id CartPole-v1 --checkpoint-frequency {every}".split()
    folder, cuts, updates, clock = None, {0}, 0, [0]
    for kill in range(kills + 1):
        flags = ["--resume", str(folder)] if kill else start
        command = [sys.executable, ROOT / "dreamerv3.py", "--total-timesteps", "100000", *flags]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        line = next(
            line for line in process.stdout if line.startswith("resumed" if kill else "run folder")
        )
        folder = next(tmp_path.glob("runs/*"))
        if kill:
            step, after = (
                int(x.replace(",", "")) for x in re.findall(r"(?:step|after) ([\d,]+)", line)
            )
            assert step == clock[0] and after >= updates
            cuts.add(step)
        time.sleep(rng.uniform(0, 4) if 0 < kill < kills else 0)
        while kill in (0, kills) and np.load(folder / "replay" / "clock.npy")[0] < clock[0] + 87:
            time.sleep(0.01)  # the end comes between two checkpoints
        process.stdout.close()  # as when Ctrl-C ends `| tee` too
        process.send_signal(signal.SIGTERM if kill == kills else signal.SIGKILL)
        assert process.wait(60) == (128 + signal.SIGTERM if kill == kills else -signal.SIGKILL)
        clock = np.load(folder / "replay" / "clock.npy")
        state = dreamerv3.load_checkpoint(folder)[1]
        assert (
            clock[0] - every * (kill + 1) <= state["global_step"] <= clock[0]
        )  # every kill may cut one save short
        assert state["updates"] >= updates
        assert state["updates"] + state["owed"] == pytest.approx(
            max(0, state["global_step"] - 64) * 16 / (2 * 8)
        )
        updates = state["updates"]
    assert state["global_step"] == clock[0]
    names = ("is_first", "is_last", "is_terminal", "reward", "obs.obs")
    first, last, terminal, reward, obs = (
        np.load(folder / "replay" / f"{k}.npy")[0, : clock[0]] for k in names
    )
    begins = {0, *(np.flatnonzero(last[:-1]) + 1).tolist()} | cuts - {int(clock[0])}
    assert set(np.flatnonzero(first).tolist()) == begins and len(
        {obs[i].tobytes() for i in begins}
    ) == len(begins)
    np.testing.assert_array_equal(reward, ~first)
    follows = ~first[1:]
    np.testing.assert_allclose(
        obs[1:, 0][follows], (obs[:-1, 0] + 0.02 * obs[:-1, 1])[follows], atol=1e-5
    )
    assert not terminal[~last].any()


@pytest.mark.parametrize(
    "fault, envs", [("nan", 1), ("nan", 2), ("dies", 2), ("reset", 1), ("reset", 2)]
)
def test_an_environment_that_fails_ends_the_run_saved(
    fault, envs, program, recwarn, capsys, monkeypatch
):
    steps = 0 if fault == "reset" else 59
    folder = program(
        f"{QUICK} --env-id Dreamer-{fault}-v0 --num-envs {envs} --total-timesteps 200", 2
    )
    *trace, line = capsys.readouterr().err.strip().splitlines()
    text = f"dreamerv3.py: error: Dreamer-{fault}-v0 failed at step {steps * envs}, saved runs/.*: {FAULTS[fault]}.*"
    assert re.fullmatch(text, line)
    trace = "\n".join(
        [*trace, *(str(warning.message) for warning in recwarn)]
    )  # those of workers are warnings
    assert "Traceback" in trace and (
        fault == "dies" or "test_dreamerv3.py" in trace or "in observation" in trace
    )
    assert saved(folder)["global_step"] == steps * envs
    assert np.load(folder / "replay" / "clock.npy")[0] == steps
    if fault == "reset":
        monkeypatch.setattr(torch, "save", Mock(side_effect=FULL_DISK[-1]))
        program(f"{QUICK} --env-id Dreamer-reset-v0 --total-timesteps 200 --exp-name full", 2)
        assert "failed at step 0, could not save runs/" in capsys.readouterr().err.splitlines()[-1]


def test_a_signal_to_all_processes_is_a_stop_and_no_failure(tmp_path):
    command = f"{sys.executable} {ROOT}/dreamerv3.py {FAST} --env-id test_dreamerv3:Dreamer-signalled-v0 --num-envs 2"
    run = subprocess.run(
        command.split(), cwd=tmp_path, capture_output=True, text=True, start_new_session=True
    )
    assert run.returncode == 128 + signal.SIGINT and "failed at" not in run.stderr
    assert saved(next(tmp_path.glob("runs/*")))["global_step"] == 2 * 59


def test_updates_made_up_after_a_kill_are_saved_on_the_way(program, monkeypatch):
    folder = program(f"{CHAIN} --total-timesteps 60")
    torch.save(saved(folder) | {"owed": 1200.0}, folder / "checkpoint.pt")
    latents = torch.zeros(4, 8, TINY.deter), torch.zeros(4, 8, TINY.groups, TINY.classes)
    update = Mock(
        side_effect=[
            (latents, {"losses/total": torch.tensor(x)}) for x in [1.0] * 599 + [math.nan] * 501
        ]
    )
    monkeypatch.setattr(dreamerv3, "train_step", update)
    with pytest.raises(
        SystemExit, match="losses/total is not finite"
    ):  # before the second of these checkpoints
        dreamerv3.main(f"--resume {folder} --total-timesteps 70 --no-cudagraphs".split())
    assert (saved(folder)["updates"], saved(folder)["owed"]) == (500, 1200.5 - 490)


def test_resumed_and_evaluated_runs_are_bit_identical_to_a_plain_one(program, tmp_path, capsys):
    """All start an episode after step 60, so that the environments agree; weights, counters and replay do too."""
    flags = f"{CHAIN} --train-ratio 12 --clip 0.2 --total-timesteps"
    plain, resumed = (
        program(f"{flags} 91 --exp-name plain"),
        program(f"{flags} 60 --exp-name resumed"),
    )
    program(
        f"--resume {resumed} --total-timesteps 91 --video-frequency 6 --no-cudagraphs --save-model"
    )
    capsys.readouterr()
    evaluated = program(f"{flags} 91 --exp-name evaluated --eval-frequency 30 --eval-episodes 2")
    line = "evaluation: 2 episodes of DreamerChain-v0, return mean 15.0, std 0.0, min 15, max 15"
    assert capsys.readouterr().out.splitlines().count(line) == 3
    a = saved(plain)
    assert (
        a["optimizer"]["param_groups"][0]["clip"] == 0.2
        and {"return_norm.lo", "return_norm.hi"} < a["agent"].keys()
    )
    for folder in (resumed, evaluated):
        b = saved(folder)
        rows = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1)
        assert (
            rows[:, :4].tolist() == [[i, i, 15, 5] for i in range(5, 91, 6)]
            and (np.diff(rows[:, 4]) >= 0).all()
        )
        assert (b["updates"], b["owed"]) == (19, 0.125) and torch.equal(
            a["torch_rng"], b["torch_rng"]
        )
        assert all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])
        for file in (plain / "replay").iterdir():
            assert file.read_bytes() == (folder / "replay" / file.name).read_bytes(), file.name
    assert (
        scalars(evaluated)["eval/episodic_return"]
        == [15.0] * 3
        == scalars(folder)["charts/episodic_return"][:3]
    )
    assert any(
        b"|eval_frequency|30|" in file.read_bytes() for file in evaluated.glob("events*")
    )  # hyperparameters


def test_resume_takes_a_checkpoint_file_and_falls_back_to_a_good_one(program, capsys):
    folder = program(f"{CHAIN} --total-timesteps 60 --checkpoint-frequency 50")
    newest, previous, foreign = (
        folder / f"{name}.pt" for name in ("checkpoint", "checkpoint_previous", "foreign")
    )
    good, old, state = newest.read_bytes(), previous.read_bytes(), saved(folder)
    torch.save({"model": Path()}, foreign)  # weights_only refuses paths

    def resume(path, newest_bytes=good, previous_bytes=old, flags="", status=2) -> str:
        """The output of a run, or the one line of an error."""
        newest.write_bytes(newest_bytes)
        previous.write_bytes(previous_bytes)
        capsys.readouterr()
        program(f"--resume {path} {flags}", status)
        out, error = capsys.readouterr()
        assert not status or (len(error.splitlines()) == 1 and "resumed" not in out), error
        return error if status else out

    assert all(
        "--bins 5 disagrees with 255" in resume(folder, flags=f"--bins 5{x}")
        for x in ("", " --eval-only")
    )
    assert "--total-timesteps 59 is less than the 60" in resume(
        folder, flags="--total-timesteps 59"
    )
    assert "foreign.pt is unreadable (UnpicklingError), using checkpoint.pt" in resume(
        foreign, status=0
    )
    assert "step 60 after 5 updates" in resume(previous, status=0) and not [
        *folder.glob("*.unreadable")
    ]
    assert "is unreadable (UnpicklingError), using checkpoint_prev" in resume(
        folder, foreign.read_bytes(), status=0
    )
    assert foreign.exists() and (folder / "checkpoint.unreadable").exists()
    assert " after 5 updates" in resume(newest, good[:500], status=0) and newest.is_file()
    assert "holds no good checkpoint" in resume(folder, good[:500], good[:500]) and newest.exists()
    torch.save(state | {"args": state["args"] | {"env_id": "CartPole-v1"}}, foreign)
    words = "cannot read the replay buffer .*obs.obs.npy holds float32 .1, 61, 1., this run needs float32 .1, 61, 4."
    assert re.search(words, resume(folder, foreign.read_bytes()))
    state["agent"].pop("reward.0.0.0.weight")
    torch.save(state, foreign)
    assert "another size: RuntimeError: Error(s) in loading" in resume(folder, foreign.read_bytes())


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(program, capsys, monkeypatch):
    def full_disk(state, file, save=torch.save):
        if state.get("global_step", 51) > 50:  # there is none in model.pt
            save("a part", file)
            raise RuntimeError(
                "PytorchStreamWriter failed writing file"
            )  # what torch says of a real one
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        patch.setattr(np.memmap, "flush", flush := Mock())
        folder = program(
            f"{CHAIN} --total-timesteps 110 --checkpoint-frequency 50 --save-model", 1
        )  # the last fails
    assert capsys.readouterr().out.count("warning: cannot save at step") == 3
    assert saved(folder)["global_step"] == 50 and not [
        *folder.glob("*.tmp"),
        *folder.glob("model.pt"),
    ]
    assert (
        np.load(folder / "replay" / "clock.npy")[0] == 110 and flush.call_count == 3 * 9
    )  # files of the replay
    program(f"--resume {folder}")  # all steps are there: only updates are missing
    assert (saved(folder)["updates"], saved(folder)["owed"]) == ((110 - 40) // 2, 0.5)


def test_without_persistent_replay_a_resumed_run_refills_first(program, capsys, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "device_count", lambda: 1
    )  # of a GPU that cannot start: --no-cuda leaves it alone
    flags = "--env-id DreamerTruncatedChain-v0 --buffer-size 100 --no-persist-replay --replay-windows stream --no-cuda"
    folder = program(f"{CHAIN} --total-timesteps 60 {flags}")
    assert (
        "CUDA" not in capsys.readouterr().out
        and (c := torch.backends.cudnn).deterministic
        and not c.allow_tf32
    )
    torch.save(
        saved(folder) | {"owed": 3.0}, folder / "checkpoint.pt"
    )  # as if stopped between updates
    program(f"--resume {folder} --total-timesteps 120 --eval-frequency 60 --video-frequency 5")
    out = capsys.readouterr().out
    assert "after 10 updates, 3 owed, 0 steps in the replay buffer: TOO FEW, collecting 40" in out
    assert "replay: 60 steps take 0.00 GB" in out  # as many as before
    assert saved(folder)["updates"] == 10 + 3 + 20 // 2 and not (folder / "replay").exists()
    folder = program(f"{CHAIN} --total-timesteps 60 --exp-name interrupted")
    shutil.rmtree(folder / "replay")
    program(f"--resume {folder} --total-timesteps 70")  # in the middle of a refill
    program(f"--resume {folder} --total-timesteps 120")
    assert "10 steps in the replay buffer: TOO FEW, collecting 30" in capsys.readouterr().out
    assert saved(folder)["updates"] == 10 + (120 - 60 - 40) // 2


def test_memory_and_live_tensors_are_constant_once_the_buffer_is_full(program, monkeypatch):
    save, seen = dreamerv3.save_run, []

    def measure(*inputs) -> bool:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append(
            (
                pages * os.sysconf("SC_PAGE_SIZE"),
                sum(type(x) is torch.Tensor for x in gc.get_objects()),
            )
        )
        return save(*inputs)

    monkeypatch.setattr(dreamerv3, "save_run", measure)
    flags = f"{QUICK} --env-id CartPole-v1 --buffer-size 300 --total-timesteps 1200 --train-ratio 3"
    program(f"{flags} --checkpoint-frequency 120 --log-frequency 120 --video-frequency 30")
    memory, tensors = zip(*seen[4:], strict=True)
    assert len(seen) == 11 and max(tensors) == min(tensors) and memory[-1] - memory[0] < 4e6, seen


def test_a_dream_is_the_posterior_then_the_prior_alone(argmax_sampling, tmp_path, capsys):
    agent, _ = make_agent(SPECS)
    batch = make_batch(agent, batch=5, length=8)
    batch["is_first"][:] = torch.arange(8) == 1
    batch["is_first"][0, 6] = True
    obs, action, dream = (
        batch["obs"],
        batch["prev_action"],
        dreamerv3.open_loop(agent, batch, context=3),
    )
    with torch.no_grad():
        seen = agent.rssm.observe(
            batch["deter"], batch["stoch"], action, agent.encoder(obs), batch["is_first"]
        )
        states = [(seen[0][:, t], seen[1][:, t]) for t in range(3)]
        for t in range(3, 8):
            before = [x.clone() for x in (*states[-1], action[:, t])]
            for x in before if t == 6 else ():
                x[0] = 0
            states.append(agent.rssm.predict_step(*before, torch.zeros(5, TINY.groups)))
        recon = agent.decoder(*(torch.stack(x, 1) for x in zip(*states, strict=True)))
    expected = {
        k: torch.cat([obs[k] / 255, recon[k], (recon[k] - obs[k] / 255 + 1) / 2], 2)
        for k in ("image", "gray")
    }
    expected["vector"] = torch.stack([obs["vector"], networks.symexp(recon["vector"])], 2)
    expected["kind"] = torch.stack([obs["kind"], recon["kind"].argmax(-1)], 2).float()
    torch.testing.assert_close(dream, tree_map(lambda x: x[:4], expected), rtol=1e-4, atol=1e-5)
    before = torch.get_rng_state()
    dreamerv3.write_dream(agent, batch, tmp_path, dreamerv3.SummaryWriter(tmp_path), 0, 7)
    assert torch.equal(torch.get_rng_state(), before)
    with Image.open(
        tmp_path / "dreams" / "7.gif"
    ) as gif:  # the border tells context, prediction, episode start
        colors = [gif.convert("RGB").getpixel((0, 0)) for _ in ImageSequence.Iterator(gif)]
    green, red, white = (0, 255, 0), (255, 0, 0), (255, 255, 255)
    np.testing.assert_allclose(
        colors, [green, white, green, green, green, red, white, red], atol=30
    )


def test_dreams_are_drawn(program):
    folder = program(
        f"{QUICK} --env-id DreamerEverything-v0 --total-timesteps 60 --video-frequency 5 --image-size 48"
    )
    gif, plot = (Image.open(folder / "dreams" / name) for name in ("5.gif", "10.png"))
    assert (gif.n_frames, gif.size, plot.size) == (8, (4 * 52, 3 * 48 + 4), (1280, 8 * 120))
    assert (
        len(dreamerv3.evaluate(*dreamerv3.load_agent(folder), 1, 0)) == 1
    )  # with images of that size
    events = EventAccumulator(str(folder)).Reload()
    for tag, size in {"dream/images": (8 * 52, 4 * 148), "dream/vectors": (1280, 8 * 120)}.items():
        assert [(e.width, e.height, e.step) for e in events.Images(tag)] == [
            (*size, 50),
            (*size, 60),
        ]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    log = dreamerv3.Log(tmp_path, Args(), 0, 1, 1, 0, 0, 0.0)
    log.window = [
        {"losses/rep": torch.ones(()), "losses/recon": torch.tensor(x)} for x in (1.0, 3.0)
    ]
    assert log.means(7) == {"losses/rep": 1, "losses/recon": 2}
    log.window.append({"losses/rep": torch.tensor(1.0), "losses/recon": torch.tensor(math.inf)})
    with pytest.raises(SystemExit, match="losses/recon is not finite at step 7"):
        log.means(7)


# === evaluation, videos, tracking =====================================================================================
def test_eval_only_plays_what_load_agent_loads_and_writes_nothing(
    program, capsys, tmp_path, monkeypatch
):
    flags = "--total-timesteps 60 --checkpoint-frequency 50 --save-model --learning-rate 0.01 --warmup-updates 1"
    folder = program(f"{QUICK} --env-id CartPole-v1 {flags}")
    (folder / "checkpoint.pt").write_bytes(b"torn")  # stays where it is
    shutil.rmtree(folder / "replay")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    monkeypatch.setattr(dreamerv3, "policy", play := Mock(wraps=dreamerv3.policy))
    lines = []
    for path in (folder, folder / "checkpoint_previous.pt", folder / "model.pt"):
        agent, args = dreamerv3.load_agent(path, "cuda" if torch.cuda.is_available() else "cpu")
        dreamerv3.evaluate(agent, args, 4, seed=3)
        lines.append(capsys.readouterr().out.splitlines()[-1])
        program(f"--resume {path} --eval-only --eval-episodes 4 --seed 3")
        assert capsys.readouterr().out.splitlines()[-1] == lines[-1]
    assert lines[0] == lines[1] != lines[2] and lines[0].startswith(
        "evaluation: 4 episodes of CartPole-v1"
    ), lines
    begins = [
        obs["obs"]
        for _, obs, _, is_first in (call.args for call in play.call_args_list)
        if is_first
    ]
    assert (len(begins), len(torch.cat(begins).unique(dim=0))) == (
        3 * 2 * 4,
        4,
    ) and play.call_args.args[2][0].any()
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    program(f"--resume {folder} --eval-only --eval-episodes 1 --capture-video --no-cuda")


def test_the_snippets_of_the_readme_run(program, capsys, tmp_path):
    texts = README, (ROOT / "results" / "speed.md").read_text()
    table = README.split("| paper | code | flag (default) |")[1].split("--help")[0]
    assert all(
        getattr(Args, k.replace("-", "_")) == float(x)
        for k, x in re.findall(r"--(\S+) ([\d.e-]+)", table)
    )
    assert Args() == Args(
        compile=True, cudagraphs=True, checkpoint_frequency=10_000, buffer_size=1e6, batch_size=16
    )
    play, speed = (re.search("```python\n(.*?)```", text, re.S)[1] for text in texts)
    (program(f"{CHAIN} --total-timesteps 50 --save-model") / "model.pt").rename("model.pt")
    exec(play, {})
    assert capsys.readouterr().out.splitlines()[-1] == "return 15.0" and Args() == Args(
        learning_starts=1024
    )
    exec(speed.replace("compile=True", "compile=False").replace(", 5, (16, 64)", ", 1, (2, 4)"), {})
    assert re.search(r"^\d+\.\d after \d\.\d+ s$", capsys.readouterr().out, re.M)


def test_results_are_logs_of_the_program_and_draw_the_figures_of_the_readme(tmp_path):
    for path in (ROOT / "results").glob("*.csv"):
        assert path.read_text().startswith("global_step,frames,return,length,seconds\n")
        shutil.copy(path, tmp_path)
    dreamerv3.import_module("results.plot").draw(tmp_path)
    assert (
        {path.name for path in tmp_path.glob("*.png")}
        >= set(re.findall(r"results/(\w+\.png)", README))
        != set()
    )


def test_videos_show_every_step_of_an_episode(program, tmp_path):
    flags = "--total-timesteps 100 --capture-video --eval-frequency 100 --eval-episodes 1 --action-repeat 2"
    folder = program(f"{QUICK} --env-id CartPole-v1 {flags}")
    program(f"--resume {folder} --total-timesteps 120")
    program(f"--resume {folder} --eval-only --eval-episodes 3")
    for episode, steps in enumerate(
        dreamerv3.evaluate(*dreamerv3.load_agent(folder), 3, seed=1)
    ):  # 1 per step
        video = cv2.VideoCapture(f"videos/{folder.name}/eval-only/rl-video-episode-{episode}.mp4")
        frames, fps = video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)
        assert (
            0 <= frames - math.ceil(steps / 2) <= 1 and fps == 25
        )  # moviepy may drop the last one
    assert {p.parent.name for p in Path("videos").rglob("*.mp4")} == {
        "train-0",
        "train-100",
        "eval-100",
        "eval-only",
    }


def test_tracking_passes_on_what_cleanrl_does(program, monkeypatch, tmp_path):
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = f"{QUICK} --env-id ale_py:ALE/Pong-v5 --track"
    folder = program(
        f"{flags} --wandb-project-name project --wandb-entity team --total-timesteps 40 --capture-video"
    )
    program(f"--resume {folder} --total-timesteps 50")
    one, two = (call.kwargs for call in wandb.init.call_args_list)
    files = [Path(call.args[0]) for call in wandb.save.call_args_list]
    assert one["name"] == "/".join(folder.parts[-2:]) and two["id"] == one["id"] == re.sub(
        "[:/]", "-", one["name"]
    )
    assert (one["project"], one["entity"], one["config"]["batch_length"]) == ("project", "team", 8)
    assert one["sync_tensorboard"] and one["save_code"] and one["resume"] == "allow"
    assert [x.name for x in files[:4]] == [
        "dreamerv3.py",
        "networks.py",
        "replay.py",
        "*.mp4",
    ] and files[0].exists()
    before = set(tmp_path.rglob("*"))
    wandb.init.side_effect = ConnectionError
    program(f"{flags} --exp-name refused --total-timesteps 40", 2)
    assert set(tmp_path.rglob("*")) == before


# === golden: numbers computed by the official JAX code (golden/README.md) =============================================
FILES = sorted(Path(os.environ.get("GOLDEN_DIR", ROOT / "golden")).glob("*.npz"))
assert FILES, "no .npz file in GOLDEN_DIR"

# our name=the official one; "#" is any digit; a layer's norm goes by the layer's name, as in enc/mlp0 and enc/mlp0norm
NAMES = """encoder.mlp.#=enc/mlp# encoder.convs.#=enc/cnn# encoder.norms.#=enc/cnn#norm rssm.in_deter=dyn/dynin0
rssm.in_stoch=dyn/dynin1 rssm.in_action=dyn/dynin2 rssm.hid=dyn/dynhid0 rssm.hid_norm=dyn/dynhid0norm
rssm.gru=dyn/dyngru rssm.post.0=dyn/obs0 rssm.post.1=dyn/obslogit rssm.prior.0=dyn/prior0 rssm.prior.1=dyn/prior1
rssm.prior.2=dyn/priorlogit decoder.mlp.#.0=dec/mlp/linear# decoder.mlp.#.1=dec/mlp/norm# decoder.from_deter=dec/sp0
decoder.from_stoch.0=dec/sp1 decoder.from_stoch.1=dec/sp2 decoder.norms.0=dec/spnorm decoder.convs.0=dec/conv2
decoder.convs.1=dec/conv1 decoder.convs.2=dec/conv0 decoder.convs.3=dec/imgout decoder.norms.1=dec/conv2norm
decoder.norms.2=dec/conv1norm decoder.norms.3=dec/conv0norm reward.0.#.0=rew/mlp/linear# reward.0.#.1=rew/mlp/norm#
reward.1=rew/head/logits cont.0.#.0=con/mlp/linear# cont.0.#.1=con/mlp/norm# cont.1=con/head/logit
critic.0.#.0=val/mlp/linear# critic.0.#.1=val/mlp/norm# critic.1=val/head/logits slow_critic.0.#.0=slowval/mlp/linear#
slow_critic.0.#.1=slowval/mlp/norm# slow_critic.1=slowval/head/logits actor.mlp.#.0=pol/mlp/linear#
actor.mlp.#.1=pol/mlp/norm#"""


def official_names(agent: Agent) -> dict[str, torch.nn.Parameter]:
    """Official name -> our parameter, for every parameter."""
    pairs, names = [pair.split("=") for pair in NAMES.split()], {}
    for i, key in enumerate(agent.decoder.vectors):
        pairs.append(
            (
                f"decoder.outs.{i}",
                f"dec/vec/{key}/{'logits' if agent.specs[key].classes else 'pred'}",
            )
        )
    for i, out in enumerate(("logits",) if agent.action.nvec else ("mean", "stddev")):
        pairs.append((f"actor.outs.{i}", f"pol/head/action/{out}"))
    for name, parameter in agent.named_parameters():
        for ours, official in pairs:
            pattern = ours.replace(".", r"\.").replace("#", r"(\d)")
            name = re.sub(rf"^{pattern}\b", official.replace("#", r"\1"), name)
        name = re.sub(r"\.1\.scale$", "norm/scale", name)
        name = re.sub(r"(\.0)?\.(weight|bias|scale)$", r"/\2", name)
        names[name.replace("/weight", "/kernel")] = parameter
    return names


class Golden:
    """One golden file: a network with the official weights, its batch, and comparisons with the official numbers."""

    def __init__(self, path: Path):
        self.data = dict(np.load(path))
        self.hyper = hyper = ast.literal_eval(str(self.data["meta/hyper"]))
        specs = {
            k: ObsSpec(v[2], v[1]) if "discrete" in v else ObsSpec(tuple(v))
            for k, v in hyper["obs"].items()
        }
        kind, n = hyper["act"][:2]
        action = ActionSpec((n,) if kind == "discrete" else (), n)
        size = Size(
            *(hyper["dims"][k] for k in "deter hidden units classes depth stoch blocks".split())
        )
        flags = {
            "imagination_horizon": hyper["imag_length"],
            "actor_unimix": 0.0,
            "precision": "float32",
        }
        self.args = Args(**flags, learning_rate=hyper["lr"], warmup_updates=hyper["warmup"])
        self.agent = Agent(specs, action, size, self.args)
        self.names = official_names(self.agent)
        with torch.no_grad():
            for name, parameter in self.names.items():
                parameter.copy_(self.convert(f"params/{name}", parameter.shape))
            for name in ("lo", "hi"):
                getattr(self.agent.return_norm, name).fill_(
                    float(self.data[f"params/retnorm/{name}/value"])
                )

    def convert(self, key: str, shape) -> torch.Tensor:
        """An official array in the layout of our parameter of this shape."""
        x = torch.from_numpy(np.array(self.data[key]))
        if key.endswith("kernel") and len(shape) == 4:
            return x.permute(3, 2, 0, 1)
        if key.endswith("kernel") and len(shape) == 2:
            return x.reshape(x.shape[0], -1).T
        return x.reshape(shape)

    def batch(self) -> dict:
        """The training steps 1..T; step 0 gives the first action and latent."""
        agent, data = (
            self.agent,
            {k[6:]: torch.from_numpy(v) for k, v in self.data.items() if k.startswith("batch/")},
        )
        batch = {k: data[k][:, 1:] for k in ("reward", "is_first", "is_last", "is_terminal")}
        batch["obs"] = {key: data[key][:, 1:] for key in agent.specs}
        action = data["action"][:, :-1]
        batch["prev_action"] = dreamerv3.encode_action(
            action[..., None] if agent.action.nvec else action, agent.action
        )
        batch["deter"], batch["stoch"] = data["dyn/deter"][:, 0], data["dyn/stoch"][:, 0]
        return batch

    def close(self, prefix: str, /, **values: torch.Tensor) -> None:
        """Compare with the arrays of these names."""
        for name, value in values.items():
            x, key = value.detach().numpy(), f"{prefix}{name}"
            np.testing.assert_allclose(x, self.data[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request) -> Golden:
    return Golden(request.param)


def test_golden_forward(golden, argmax_sampling):
    official = {
        k.removeprefix("params/")
        for k in golden.data
        if k.startswith("params/") and "retnorm" not in k
    }
    assert official == set(golden.names)
    assert {id(p) for p in golden.agent.parameters()} == {id(p) for p in golden.names.values()}
    agent, batch, args = golden.agent, golden.batch(), golden.args
    losses, deter, stoch, feat, _ = dreamerv3.world_model_loss(agent, batch, args)
    assert (
        dreamerv3.stored_latents(deter.detach(), stoch)["stoch"]
        == stoch.detach().argmax(-1).numpy()
    ).all()
    obs, state = batch["obs"], (batch["deter"], batch["stoch"])
    embed, recon, reward = agent.encoder(obs), agent.decoder(deter, stoch), agent.reward(feat)
    post = agent.rssm.observe(*state, batch["prev_action"], embed, batch["is_first"])[2]
    golden.close(
        "out/", tokens=embed, post_logit=post, deter=deter, stoch=stoch, reward_logits=reward
    )
    golden.close(
        "out/",
        prior_logit=agent.rssm.prior(deter),
        continue_prob=agent.cont(feat)[..., 0].sigmoid(),
    )
    for t in range(deter.shape[1]):  # acting sees the same latents as training
        inputs = {key: x[:, t] for key, x in obs.items()}, (*state[:2], batch["prev_action"][:, t])
        action, state = dreamerv3.policy(agent, *inputs, batch["is_first"][:, t])
        torch.testing.assert_close(state, (deter[:, t], stoch[:, t], action), rtol=1e-4, atol=1e-5)
    golden.close(
        "out/",
        reward_pred=agent.twohot.mean(reward),
        value_pred=agent.twohot.mean(agent.critic(feat)),
    )
    if agent.action.nvec:
        golden.close("out/", policy_logits=agent.actor.outs[0](agent.actor.mlp(feat)))
    else:
        golden.close("out/", policy_mean=agent.actor(feat).mean, policy_std=agent.actor(feat).std)
    recon_losses = {key: dreamerv3.recon_loss(x, obs[key]) for key, x in recon.items()}
    golden.close("out/recon_", **recon)
    golden.close("out/loss/", **recon_losses)
    torch.testing.assert_close(losses["recon"], sum(recon_losses.values()), rtol=1e-4, atol=1e-5)
    golden.close(
        "out/loss/",
        rew=losses["reward"],
        con=losses["continue"],
        dyn=losses["dyn"],
        rep=losses["rep"],
    )
    lead, d = deter.shape[:2], agent.size.deter
    imagined, actions = dreamerv3.imagine(
        agent, deter.flatten(0, 1), stoch.flatten(0, 1), args.imagination_horizon
    )
    golden.close(
        "out/imag_",
        deter=imagined[:, 1:, :d],
        stoch=imagined[:, 1:, d:].unflatten(-1, stoch.shape[-2:]),
    )
    stored = dreamerv3.decode_action(actions, agent.action)[:, :-1].float()
    golden.close("out/imag_", action=stored.squeeze(-1) if agent.action.nvec else stored)
    behavior, returns, metrics = dreamerv3.actor_critic_loss(agent, imagined, actions, args)
    norm, boot = agent.return_norm, returns[:, 0].unflatten(0, lead)
    replayed = dreamerv3.replay_critic_loss(agent, feat, batch, boot, args)
    policy, value = (behavior[name].mean(1).unflatten(0, lead) for name in ("actor", "critic"))
    golden.close("out/loss/", policy=policy, value=value, repval=replayed)
    golden.close("out/retnorm/", lo=norm.lo, hi=norm.hi)
    golden.close(
        "out/metrics/",
        ret=((returns - norm.lo) / norm.scale).mean(),
        tar=metrics["behavior/return_mean"],
    )
    names = {"reward_mean": "rew", "continue_mean": "con", "value_mean": "val"}
    names |= {"advantage_mag": "adv_mag", "actor_entropy": "ent/action"}
    golden.close(
        "out/metrics/", **{name: metrics[f"behavior/{ours}"] for ours, name in names.items()}
    )


def test_golden_updates(golden, argmax_sampling):
    """Losses, gradients and all weights over the file's updates."""
    agent, args, batch = golden.agent, golden.args, golden.batch()
    start = {name: p.detach().clone() for name, p in golden.names.items()}
    optimizer = dreamerv3.LaProp(
        agent.trained(), args.learning_rate, args.warmup_updates, args.clip
    )
    update = partial(dreamerv3.train_step, agent, optimizer, args=args)
    for step in range(1, golden.hyper["steps"] + 1):
        _, metrics = update(batch)
        for key, value in {
            "loss": metrics["losses/total"],
            "grad_norm": metrics["optim/grad_norm"],
        }.items():
            np.testing.assert_allclose(
                value, golden.data[f"step{step}/{key}"], rtol=1e-4, err_msg=f"step {step} {key}"
            )
        golden.close(
            f"step{step}/", retnorm=torch.stack([agent.return_norm.lo, agent.return_norm.hi])
        )
        if step == 1:
            golden.close("out/metrics/", dyn_ent=metrics["world_model/prior_entropy"])
            golden.close("out/metrics/", rep_ent=metrics["world_model/posterior_entropy"])
            for name, p in golden.names.items():
                if f"grad/{name}" in golden.data:
                    reference = golden.convert(f"grad/{name}", p.shape)
                    assert (p.grad - reference).norm() <= 1e-3 * reference.norm() + 1e-6, (
                        f"gradient of {name}"
                    )
    for name, p in golden.names.items():
        reference = golden.convert(f"after/{name}", p.shape)
        assert (p - reference).norm() <= 2e-3 * (reference - start[name]).norm() + 1e-6, (
            f"{name} after the updates"
        )


def test_compiled_updates_equal_the_official_ones(golden, argmax_sampling, monkeypatch, capsys):
    """Not part of `-k golden`: with a cold compiler cache it takes a minute."""
    if (
        not golden.agent.action.nvec
    ):  # the actor is what differs; the rest is compiled for the other file
        monkeypatch.setattr(dreamerv3, "COMPILED", [(dreamerv3, "imagine_step")])
    for owner, name in dreamerv3.COMPILED:
        monkeypatch.setattr(
            owner, name, getattr(owner, name)
        )  # restores the plain functions afterwards
    dreamerv3.compile_functions(torch.device("cpu"))
    test_golden_updates(golden, None)
    assert "eager mode" not in capsys.readouterr().out


# === data-parallel training ===========================================================================================
def three_updates(rank: int, world: int, folder: Path) -> None:
    """Process `rank` of `world`: updates on its share of four sequences; saves the last gradients and all weights."""
    torch.rand = lambda *shape, device=None: torch.full(
        shape, 0.4, device=device
    )  # the same noise for every sequence
    torch.manual_seed(rank)  # the weights of rank 0 count
    agent, args = make_agent(SPECS, twohot="symlog")  # bins up to 5e8 would enlarge rounding errors
    for p in agent.parameters():
        p.data += 0.05 * torch.randn_like(p)  # returns are not all 0
    optimizer = dreamerv3.LaProp(agent.trained(), 1e-3, warmup=1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/store", rank=rank, world_size=world
        )
        dreamerv3.train_together(agent, optimizer)
    rows, batch = slice(4 * rank // world, 4 * (rank + 1) // world), make_batch(agent, 4)
    for _ in range(3):
        dreamerv3.train_step(agent, optimizer, tree_map(lambda x: x[rows], batch), args)
    grads = {
        f"gradient of {name}": p.grad for name, p in agent.named_parameters() if p.requires_grad
    }
    torch.save(agent.state_dict() | grads, folder / f"{rank}of{world}.pt")


def test_two_processes_make_the_updates_of_one_on_the_joined_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.rand)  # put back afterwards
    three_updates(0, 1, tmp_path)
    torch.multiprocessing.spawn(three_updates, (2, tmp_path), nprocs=2)
    alone, first, second = (
        torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2")
    )
    assert alone["return_norm.hi"] - alone["return_norm.lo"] > 1e-4
    for name, x in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - x).norm() <= 1e-4 * x.norm() + 1e-6, name


def test_torchrun_trains_logs_once_and_resumes(tmp_path):
    def output(flags: str) -> str:
        torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 {ROOT / 'dreamerv3.py'}"
        return subprocess.getoutput(
            f"cd {tmp_path} && CUDA_VISIBLE_DEVICES= {torchrun} {flags}"
        )  # and errors

    text = output(
        f"{FAST} --env-id CartPole-v1 --seed 3 --total-timesteps 150 --checkpoint-frequency 139"
    )
    assert (
        text.count("run folder: ") == 1
        and "1 update every 8 agent steps" in text
        and "size: 1m" in text
    )
    (folder,) = tmp_path.glob("runs/*")  # one for both
    assert (saved(folder)["global_step"], saved(folder)["updates"]) == (150, (150 - 64) // 8)
    steps, acts = (
        [np.load(folder / f"replay{i}/{k}.npy")[0, :-1] for i in ("", 1)]
        for k in ("obs.obs", "action")
    )
    assert (
        len(steps[0]) == 75
        and not (steps[0] == steps[1]).all(-1).any()
        and (acts[0] != acts[1]).mean() > 0.2
    )
    (folder / "checkpoint_previous.pt").rename(
        folder / "checkpoint.pt"
    )  # as if killed after the one of step 140
    np.save(folder / "replay1" / "clock.npy", np.array([74]))  # one process was a step behind
    text = output(f"--resume {folder} --total-timesteps 160")
    assert text.count("resumed at step 148 after 9 updates") == 1
    assert (
        saved(folder)["updates"] == 12
        and ("bfloat16" in text) == torch.cpu._is_avx512_bf16_supported()
    )
    assert scalars(folder)["optim/grad_norm"] == scalars(folder / "rank1")["optim/grad_norm"] != []
    for name, flags in {
        "early": "--train-ratio 64",
        "last": "--train-ratio 1 --total-timesteps 118",
    }.items():
        text = output(
            f"{FAST} --env-id test_dreamerv3:Dreamer-nan-v0 {flags} --exp-name {name}"
        )  # in process 1 alone
        assert "failed at step 118, saved runs/" in text
        assert saved(next(tmp_path.glob(f"runs/*{name}*")))["global_step"] == 2 * 59  # by process 0


# === the README's environments ========================================================================================
@pytest.mark.parametrize(
    "env_id", sorted({*re.findall(r"--env-id (\S+?)`", README), PONG} - {CRAFTER})
)
def test_ids_of_the_readme_can_be_stepped_or_say_how_to_install_them(env_id, capsys):
    try:
        env = dreamerv3.make_env(env_id)
    except SystemExit:  # CI installs requirements.txt alone
        error = capsys.readouterr().err
        assert (
            any(f"pip install {x}" in error for x in ("minatar", '"shimmy[dm', '"gymnasium['))
            or "minigrid" in error
        )
        return
    env.reset(seed=0)
    assert all(
        env.observation_space.contains(env.step(env.action_space.sample())[0]) for _ in range(5)
    )
    assert env.action_spec.size == 18 or env_id != PONG  # the full action set


def test_examples_of_environments_that_are_not_installed(monkeypatch):
    class Game:  # episodes of two steps, every second one ended by death
        def __init__(self, seed=None):
            self.time, self.reset = 0, lambda: np.full((64, 64, 3), seed, np.uint8)

        def step(self, action):
            self.time += 1
            return self.reset(), 0.1, self.time % 2 == 0, {"discount": float(self.time % 4 > 0)}

    monkeypatch.setitem(sys.modules, "crafter", Mock(Env=Game))
    env = dreamerv3.make_env(CRAFTER)
    for seed, last in {7: (False, True), None: (True, False)}.items():
        assert env.reset(seed=seed)[0]["obs"][0, 0, 0] == 7  # a seed is for the first reset
        assert [env.step(np.array([16]))[2:4] for _ in range(2)] == [(False, False), last]
    make = lambda *_, render_kwargs, **flags: gym.make("CartPole-v1", **flags)  # noqa: E731
    monkeypatch.setitem(sys.modules, "shimmy", Mock())
    module = dreamerv3.import_module("examples.protocols")
    monkeypatch.setattr(module, "gym", Mock(wrappers=gym.wrappers, make=make))
    assert dreamerv3.make_env("examples.protocols:WalkerPixels-v0").specs == {
        "obs": ObsSpec((64, 64, 3))
    }


def test_your_own_environment_trains(program):
    env = dreamerv3.make_env("examples.my_env:MyEnv-v0")
    assert (env.specs, env.action_spec.nvec) == (
        {"camera": ObsSpec((64, 64, 3)), "state": ObsSpec((4,))},
        (3, 3),
    )
    for action, steps, last in [
        (1, 200, (False, True)),
        (2, 14, (True, False)),
    ]:  # rest, and leave the field
        env.reset(seed=0)
        assert [env.step(np.array([action, action]))[2:4] for _ in range(steps)][-1] == last
    program(f"{QUICK} --env-id examples.my_env:MyEnv-v0 --total-timesteps 60 --capture-video")
