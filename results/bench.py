"""Where the time of an update goes: python results/bench.py PART [flags of dreamerv3.py]

Parts, in order of value for a short loan of a GPU; each can be run alone and prints as it goes.

update      time of an update alone, of the first one, and peak memory, for --size and --kind
training    the same update inside the loop: sampling, copies, update, latents written back
filter      the recurrence alone, forward and backward, and what share of an update it takes
optimizer   clipping and LaProp alone: lists of tensors at once, and one tensor after the other
profile     what each function of an update takes, on a CPU or launched kernel by kernel
all         update for 12m vector, 12m image, 1m vector, 200m image; then the others for 12m vector

On a GPU everything that is timed is captured as one CUDA graph, as in training. The matrix product
of 2048 x 2048 that is printed first makes machines comparable.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamerv3
from dreamerv3 import SIZES, Agent, Args, LaProp
from networks import RSSM, ActionSpec, ObsSpec, Size
from replay import Replay

KINDS = {"vector": ObsSpec((24,)), "image": ObsSpec((64, 64, 3))}
ACTION = ActionSpec((6,), 6)

# what `profile` times, in the order of an update
FUNCTIONS = [
    (dreamerv3, "world_model_loss"),
    (RSSM, "observe"),  # a part of world_model_loss
    (dreamerv3, "imagine"),
    (dreamerv3, "actor_critic_loss"),
    (dreamerv3, "replay_critic_loss"),
    (torch.Tensor, "backward"),
    (dreamerv3, "clip_gradients"),
    (LaProp, "step"),
]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(function, device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after two calls that compile, load and capture."""
    seconds = []
    for i in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def report(name: str, seconds: float, note: str = "") -> None:
    print(f"{name:40s} {1000 * seconds:10.2f} ms  {note}", flush=True)


def random_replay(args: Args, spec: ObsSpec, size: Size) -> Replay:
    """As many random steps as three batches have."""
    fields = {
        "obs/x": (spec.shape, spec.dtype),
        "action": ((1,), np.int32),
        "reward": ((), np.float32),
        "deter": ((size.deter,), np.float16),
        "stoch": ((size.groups,), np.uint8),
    }
    steps = 3 * args.batch_size * args.batch_length
    replay = Replay(steps, 1, fields, args.batch_length)
    rng = np.random.default_rng(0)
    for t in range(steps):
        replay.add(
            {
                "obs/x": rng.integers(0, 255, (1, *spec.shape)).astype(spec.dtype),
                "action": rng.integers(0, 6, (1, 1)),
                "reward": rng.normal(size=1),
                "deter": np.zeros((1, size.deter)),
                "stoch": np.zeros((1, size.groups)),
                "is_first": np.array([t % 500 == 0]),
                "is_last": np.array([t % 500 == 499]),
                "is_terminal": np.array([False]),
            }
        )
    return replay


class Bench:
    """An agent, its optimizer and a replay buffer with random steps."""

    def __init__(self, args: Args, kind: str, repeats: int):
        self.args = args
        self.repeats = repeats
        self.device = dreamerv3.set_up_torch(args)
        self.name = f"{args.size} {kind} {args.precision}"
        specs = {"x": KINDS[kind]}
        self.agent = Agent(specs, ACTION, SIZES[args.size], args).to(self.device)
        params = self.agent.trained()
        self.optimizer = LaProp(params, args.learning_rate, args.warmup_updates)
        self.replay = random_replay(args, KINDS[kind], self.agent.size)
        self.batch, self.index = self.sample()

    def sample(self) -> tuple[dict, tuple]:
        batch, index = self.replay.sample(self.args.batch_size)
        return dreamerv3.batch_to_device(batch, self.agent, self.device), index

    def captured(self, function):
        """The function as training launches it."""
        if self.device.type == "cuda" and self.args.cudagraphs:
            return dreamerv3.Graph(function)
        return function

    def update(self) -> None:
        """Time of an update alone, of the first one, and peak memory."""
        update = partial(dreamerv3.train_step, self.agent, self.optimizer, args=self.args)
        update = self.captured(update)
        start = time.perf_counter()
        update(self.batch)
        wait(self.device)
        report(f"first update, {self.name}", time.perf_counter() - start)
        note = ""
        seconds = measure(lambda: update(self.batch), self.device, self.repeats)
        if self.device.type == "cuda":
            note = f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
        report(f"update, {self.name}", seconds, note)

    def training(self) -> None:
        """The parts of the loop around an update, each waited for."""
        update = partial(dreamerv3.train_step, self.agent, self.optimizer, args=self.args)
        update = self.captured(update)
        latents, _ = update(self.batch)

        def write_back() -> None:
            self.replay.update_latents(self.index, **dreamerv3.stored_latents(*latents))

        def loop() -> None:
            batch, index = self.sample()
            fresh, _ = update(batch)
            self.replay.update_latents(index, **dreamerv3.stored_latents(*fresh))

        report("sample and copy to the device", measure(self.sample, self.device, self.repeats))
        seconds = measure(lambda: update(self.batch), self.device, self.repeats)
        report(f"update, {self.name}", seconds)
        report("latents to the host and the buffer", measure(write_back, self.device, self.repeats))
        report("all of it, as the loop does", measure(loop, self.device, self.repeats))

    def filter(self) -> None:
        """The recurrence alone, forward and backward."""
        agent = self.agent
        batch = self.batch
        bfloat16 = self.args.precision == "bfloat16"

        def forward_backward(batch: dict) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                embed = agent.encoder(batch["obs"])
                deter, stoch, logits = agent.rssm.observe(
                    batch["deter"], batch["stoch"], batch["prev_action"], embed, batch["is_first"]
                )
            total = deter.sum() + stoch.sum() + logits.sum()
            agent.zero_grad(set_to_none=True)
            total.backward()
            return total.detach()

        step = self.captured(forward_backward)
        seconds = measure(lambda: step(batch), self.device, self.repeats)
        report(f"encoder and recurrence, {self.name}", seconds)

    def optimize(self) -> None:
        """Clipping and LaProp, in lists and as a plain loop."""
        params = self.agent.trained()
        for p in params:
            p.grad = torch.randn_like(p)

        def lists() -> torch.Tensor:
            dreamerv3.clip_gradients(params, self.args.clip)
            return self.optimizer.step()[0]

        loop = partial(plain_step, params, self.optimizer, self.args.clip)
        name = f"{len(params)} tensors, {self.name}"
        seconds = measure(self.captured(lists), self.device, self.repeats)
        report(f"optimizer, lists, {name}", seconds)
        seconds = measure(self.captured(loop), self.device, self.repeats)
        report(f"optimizer, plain loop, {name}", seconds)

    def profile(self) -> None:
        """What the functions of an update take, those they call included."""
        seconds = defaultdict(float)
        updates = self.repeats

        def timed(function, name: str):
            def call(*args, **kwargs):
                wait(self.device)
                start = time.perf_counter()
                result = function(*args, **kwargs)
                wait(self.device)
                seconds[name] += time.perf_counter() - start
                return result

            return call

        update = partial(dreamerv3.train_step, self.agent, self.optimizer, self.batch, self.args)
        update()
        update()
        with ExitStack() as stack:
            for owner, name in FUNCTIONS:
                function = timed(getattr(owner, name), name)
                stack.enter_context(patch.object(owner, name, function))
            timed_update = timed(update, "update")
            for _ in range(updates):
                timed_update()
        report(f"update, {self.name}", seconds["update"] / updates)
        for _, name in FUNCTIONS:
            share = f"{seconds[name] / seconds['update']:.0%}"
            report(f"  {name}", seconds[name] / updates, share)


@torch.no_grad()
def plain_step(params: list[nn.Parameter], optimizer: LaProp, clip: float) -> torch.Tensor:
    """Clipping and LaProp, one tensor after the other."""
    lr = optimizer.param_groups[0]["lr"]
    for p in params:
        state = optimizer.state[p]
        limit = clip * p.norm().clamp(min=1e-3)
        grad = p.grad * (limit / p.grad.norm()).clamp(max=1)
        state["step"] += 1
        state["exp_avg_sq"].mul_(0.999).addcmul_(grad, grad, value=0.001)
        rms = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt_().add_(1e-20)
        state["exp_avg"].lerp_(grad / rms, 0.1)
        p.sub_(state["exp_avg"] * (lr / (1 - 0.9 ** state["step"])))
    return lr.clone()


def product(device: torch.device) -> None:
    """The time of a float32 product of 2048 x 2048."""
    x = torch.randn(2048, 2048, device=device)
    seconds = measure(lambda: x @ x, device, 3)
    report("product of 2048 x 2048, float32", seconds, f"{2 * 2.048**3 / seconds:.0f} GFLOP/s")


def main() -> None:
    parts = {
        "update": Bench.update,
        "training": Bench.training,
        "filter": Bench.filter,
        "optimizer": Bench.optimize,
        "profile": Bench.profile,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*parts, "all"])
    parser.add_argument("--kind", choices=list(KINDS), default="vector")
    parser.add_argument("--repeats", type=int, default=10)
    given, flags = parser.parse_known_args()

    cells = [(given.part, given.kind, [])]
    if given.part == "all":
        cells = [
            ("update", "vector", ["--size", "12m"]),
            ("update", "image", ["--size", "12m"]),
            ("update", "vector", ["--size", "1m"]),
            ("update", "image", ["--size", "200m"]),
            ("training", "vector", ["--size", "12m"]),
            ("filter", "vector", ["--size", "12m"]),
            ("optimizer", "vector", ["--size", "12m"]),
            ("profile", "vector", ["--size", "12m"]),
        ]
    product(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for part, kind, more in cells:
        args = dreamerv3.parse_args([*flags, *more])
        parts[part](Bench(args, kind, given.repeats))


if __name__ == "__main__":
    main()
