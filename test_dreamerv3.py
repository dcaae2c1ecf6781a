import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamerv3
import networks
from dreamerv3 import Agent, Args

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
            yield from mlp(f"{name}/mlp", head.mlp)
            yield from linear(f"{name}/head/{out}", head.out)
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
    golden = Golden(path)
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
