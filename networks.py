"""Networks of DreamerV3 (Hafner et al., Nature 2025): what the equations in dreamerv3.py call.

From top to bottom: symlog and twohot, distributions, layers, encoder, recurrent state-space model (RSSM), decoder, heads.
Nothing here knows about rewards, loss weights, flags or the replay buffer.

Symbols: B batch, T sequence length, D deterministic state, S groups, K classes per group, F = D + S*K, E encoder output,
A action size, G blocks, V bins, U units, C channels; "…" stands for any leading shape, usually (B, T).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ObsSpec(NamedTuple):
    """One observation key: an image (height, width, channels), a vector (n,), or, with classes > 0, integers of any shape."""

    shape: tuple[int, ...]
    classes: int = 0

    @property
    def is_image(self) -> bool:
        return self.classes == 0 and len(self.shape) == 3

    @property
    def size(self) -> int:
        """Width of this key as a flat vector; discrete keys count their one-hot encoding."""
        return math.prod(self.shape) * max(1, self.classes)


class ActionSpec(NamedTuple):
    """Actions as the networks see them: `nvec` holds one class count per categorical; empty means `size` real numbers."""

    nvec: tuple[int, ...]
    size: int


class Size(NamedTuple):
    """Widths of one model size: D, hidden width of the RSSM, U, K, base channel count; then S and G."""

    deter: int
    hidden: int
    units: int
    classes: int
    depth: int
    groups: int = 32
    blocks: int = 8


# --- 1. symlog and twohot (paper: "Robust predictions") ---------------------------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): squashes large values of either sign, near the identity around 0."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of symlog."""
    return x.sign() * x.abs().expm1()


class TwoHot(nn.Module):
    """A scalar as a softmax over V fixed bins; targets put their weight on the two bins around them.

    bins: V, odd and at least 3. space: "symexp" (Nature paper, official code) interpolates in raw space between bins
    symexp(linspace(-20, 20, V)); "symlog" (2023 preprint) interpolates symlog(target) between bins linspace(-20, 20, V).
    """

    def __init__(self, bins: int = 255, space: str = "symexp"):
        super().__init__()
        half = torch.linspace(-20, 0, bins // 2 + 1, dtype=torch.float64)
        half = (symexp(half) if space == "symexp" else half).float()
        self.symlog_targets = space == "symlog"
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]), persistent=False)  # (V,) exactly symmetric

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy between logits (…, V) and the twohot encoding of target (…,): -> (…,).

        The two logits are gathered rather than building the V-wide target: six times faster.
        """
        logits = logits.float()
        y = symlog(target) if self.symlog_targets else target
        y = y.clamp(self.bins[0], self.bins[-1])  # beyond the range: all weight on the end bin
        above = torch.bucketize(y, self.bins, right=True).clamp(1, len(self.bins) - 1)
        low, high = self.bins[above - 1], self.bins[above]
        weight = (y - low) / (high - low)  # of the upper bin
        picked = logits.gather(-1, torch.stack([above - 1, above], -1))  # (…, 2)
        return logits.logsumexp(-1) - (1 - weight) * picked[..., 0] - weight * picked[..., 1]

    def mean(self, logits: Tensor) -> Tensor:
        """Expected value of softmax(logits) (…, V) -> (…,). Mirror bins are paired first: uniform gives exactly 0."""
        probs = logits.float().softmax(-1)
        half = len(self.bins) // 2
        pairs = probs[..., half + 1 :] - probs[..., :half].flip(-1)  # the bins are symmetric, the middle one is 0
        mean = (pairs * self.bins[half + 1 :]).sum(-1)
        return symexp(mean) if self.symlog_targets else mean


# --- 2. distributions (float32 whatever the networks' precision) ------------------------------------------------------


def sample_index(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sample: probs (…, K), u (…,) uniform in [0, 1) -> class indices (…,).

    One uniform number per categorical; three times cheaper on a CPU than Gumbel noise. Counting the cumulative sums up
    to u, without the last, always gives a valid index.
    """
    return (probs.cumsum(-1)[..., :-1] <= u.unsqueeze(-1)).sum(-1)


class OneHot:
    """Categorical over the last axis of logits (…, K), with `unimix` uniform probability mixed in (paper: 1 %)."""

    def __init__(self, logits: Tensor, unimix: float):
        probs = logits.float().softmax(-1)
        self.probs = (1 - unimix) * probs + unimix / probs.shape[-1]
        self.log_probs = self.probs.log() if unimix else logits.float().log_softmax(-1)

    def detach(self) -> "OneHot":
        other = object.__new__(OneHot)
        other.probs, other.log_probs = self.probs.detach(), self.log_probs.detach()
        return other

    def sample(self, u: Tensor) -> Tensor:
        """One-hot sample (…, K) from uniform noise u (…,), with straight-through gradients into the probabilities."""
        sample = F.one_hot(sample_index(self.probs.detach(), u), self.probs.shape[-1]).to(self.probs.dtype)
        return sample + (self.probs - self.probs.detach())

    def log_prob(self, onehot: Tensor) -> Tensor:
        return (self.log_probs * onehot).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.probs * self.log_probs).sum(-1)

    def kl(self, other: "OneHot") -> Tensor:
        """KL(self || other), (…,)."""
        return (self.probs * (self.log_probs - other.log_probs)).sum(-1)


class MultiOneHot:
    """Independent categoricals, one per action component; an action is their one-hot vectors side by side (…, A)."""

    def __init__(self, logits: list[Tensor], unimix: float):
        self.parts = [OneHot(x, unimix) for x in logits]
        self.sizes = [x.shape[-1] for x in logits]

    def sample(self, u: Tensor) -> Tensor:
        return torch.cat([part.sample(u[..., i]) for i, part in enumerate(self.parts)], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        return sum(part.log_prob(x) for part, x in zip(self.parts, action.split(self.sizes, -1), strict=True))

    def entropy(self) -> Tensor:
        return sum(part.entropy() for part in self.parts)


class Normal:
    """Diagonal normal over the last axis; samples are mean + std * noise, not squashed."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


# --- 3. layers --------------------------------------------------------------------------------------------------------


def init_kernel(kernel: Tensor, fan_in: int, outscale: float = 1.0) -> None:
    """In place: truncated normal, cut at 2 std, whose std after the cut is outscale / sqrt(fan_in)."""
    std = 1.1368 / math.sqrt(fan_in)  # 1.1368 undoes what the cut takes from the std
    nn.init.trunc_normal_(kernel, std=std, a=-2 * std, b=2 * std)  # torch's bounds are absolute
    with torch.no_grad():
        kernel.mul_(outscale)


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0):
        super().__init__(inputs, outputs)
        init_kernel(self.weight, inputs, outscale)
        nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """G independent linear maps. x (N, G*I) in blocks of I, shared (N, J) seen by every block -> (N, outputs)."""

    def __init__(self, inputs: int, outputs: int, blocks: int, shared: int = 0):
        super().__init__()
        self.blocks, self.inputs = blocks, inputs // blocks
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks + shared, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        init_kernel(self.weight, inputs + blocks * shared)  # the full input width, as in the official code

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        x = x.unflatten(-1, (self.blocks, self.inputs)).transpose(0, 1)  # (G, N, I)
        out = torch.bmm(x, self.weight[:, : self.inputs]).transpose(0, 1).flatten(1) + self.bias
        if shared is not None:  # one dense product instead of G copies of `shared` inside x
            out = out + shared @ self.weight[:, self.inputs :].transpose(0, 1).flatten(1)
        return out


class Conv(nn.Conv2d):
    """5x5 convolution, stride 1, same size."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 5, padding=2)
        init_kernel(self.weight, 25 * inputs)
        nn.init.zeros_(self.bias)


def upsample_conv(x: Tensor, conv: Conv) -> Tensor:
    """conv(nearest 2x upsampling of x): (N, C, h, w) -> (N, C', 2h, 2w), at 36 % of the multiplications.

    Every output pixel sees only 3x3 different input pixels, so each of the 4 output phases is a 3x3 convolution whose
    taps are sums of the 5x5 taps; pixel_shuffle interleaves the phases. Exact.
    """
    rows = [[[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]]
    taps = torch.tensor(rows, dtype=conv.weight.dtype, device=conv.weight.device)  # (phase, 3, 5)
    kernel = torch.einsum("aip,bjq,ocpq->oabcij", taps, taps, conv.weight).flatten(0, 2)  # (4C', C, 3, 3)
    return F.conv2d(x, kernel, conv.bias.repeat_interleave(4), padding=1)


def pixels_to_maps(x: Tensor) -> Tensor:
    """Images uint8 (N, h, w, C) -> [-0.5, 0.5] (N, C, h, w), channels last in memory."""
    return (x.float() / 255 - 0.5).permute(0, 3, 1, 2)


def maps_to_pixels(x: Tensor) -> Tensor:
    """Pixel-shuffled sigmoid: (N, 4C, h, w) -> (N, 2h, 2w, C), float32."""
    return torch.sigmoid(F.pixel_shuffle(x, 2).permute(0, 2, 3, 1).float())


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, then SiLU: (…, C) -> (…, C). Computed in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * (y.square().mean(-1, keepdim=True) + 1e-4).rsqrt() * self.scale
        return F.silu(y).to(x.dtype)

    def maps(self, x: Tensor) -> Tensor:
        """The same on maps (N, C, h, w) that are channels-last in memory."""
        return self(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def dense(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, RMSNorm, SiLU."""
    return nn.Sequential(Linear(inputs, outputs), RMSNorm(outputs))


class MLP(nn.Sequential):
    """`layers` times [Linear, RMSNorm, SiLU]: (…, inputs) -> (…, units)."""

    def __init__(self, inputs: int, units: int, layers: int):
        super().__init__(*[dense(inputs if i == 0 else units, units) for i in range(layers)])


class Head(nn.Module):
    """MLP, then one Linear: (…, inputs) -> (…, outputs), float32."""

    def __init__(self, inputs: int, units: int, layers: int, outputs: int, outscale: float = 1.0):
        super().__init__()
        self.mlp = MLP(inputs, units, layers)
        self.out = Linear(units, outputs, outscale)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mlp(x)).float()


class Actor(nn.Module):
    """Policy on feat (…, F). One Linear per categorical, or one each for mean and std of a normal."""

    def __init__(self, inputs: int, units: int, action: ActionSpec, unimix: float):
        super().__init__()
        self.action, self.unimix = action, unimix
        self.mlp = MLP(inputs, units, 3)
        self.outs = nn.ModuleList(Linear(units, n, 0.01) for n in action.nvec or (action.size, action.size))

    def forward(self, feat: Tensor) -> MultiOneHot | Normal:
        x = self.mlp(feat)
        outs = [out(x).float() for out in self.outs]
        if self.action.nvec:
            return MultiOneHot(outs, self.unimix)
        mean, std = outs
        return Normal(mean.tanh(), 0.9 * torch.sigmoid(std + 2) + 0.1)

    def noise(self, *shape: int) -> Tensor:
        """Noise for `sample` of an action batch of this shape: uniform (…, components) or normal (…, A)."""
        device = self.outs[0].weight.device
        if self.action.nvec:
            return torch.rand(*shape, len(self.action.nvec), device=device)
        return torch.randn(*shape, self.action.size, device=device)


# --- 4. encoder -------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Observations -> embed (…, E): vectors through an MLP, images through four conv stages, side by side."""

    def __init__(self, specs: dict[str, ObsSpec], size: Size):
        super().__init__()
        self.specs = specs
        self.vectors = sorted(k for k, s in specs.items() if not s.is_image)
        self.images = sorted(k for k, s in specs.items() if s.is_image)
        self.embed_size = 0
        if self.vectors:
            self.mlp = MLP(sum(specs[k].size for k in self.vectors), size.units, 3)
            self.embed_size += size.units
        if self.images:
            height, width, _ = specs[self.images[0]].shape
            channels = [sum(specs[k].shape[2] for k in self.images)] + [size.depth * m for m in (2, 3, 4, 4)]
            self.convs = nn.ModuleList(Conv(i, o) for i, o in zip(channels, channels[1:], strict=False))
            self.norms = nn.ModuleList(RMSNorm(c) for c in channels[1:])
            self.embed_size += (height // 16) * (width // 16) * channels[-1]

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts = []
        if self.vectors:
            flat = []
            for key in self.vectors:
                x, spec = obs[key], self.specs[key]
                lead = x.shape[: x.ndim - len(spec.shape)]
                x = F.one_hot(x.long(), spec.classes).float() if spec.classes else symlog(x)
                flat.append(x.reshape(*lead, spec.size))
            parts.append(self.mlp(torch.cat(flat, -1)))  # (…, U)
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1)  # (…, h, w, C)
            lead = x.shape[:-3]
            x = pixels_to_maps(x.flatten(0, -4))  # (N, C, h, w)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm.maps(F.max_pool2d(conv(x), 2))  # (N, C', h/2, w/2)
            parts.append(x.permute(0, 2, 3, 1).flatten(1).unflatten(0, lead))  # (…, h/16 * w/16 * C)
        return torch.cat(parts, -1)  # (…, E)


# --- 5. recurrent state-space model (paper: "World model learning") ---------------------------------------------------


class RSSM(nn.Module):
    """Sequence model h_t = core(h_{t-1}, z_{t-1}, a_{t-1}), posterior z_t ~ q(z | h_t, x_t), prior z_t ~ p(z | h_t)."""

    def __init__(self, embed: int, action: int, size: Size, unimix: float):
        super().__init__()
        self.groups, self.classes, self.unimix = size.groups, size.classes, unimix
        deter, hidden, flat = size.deter, size.hidden, size.groups * size.classes
        self.deter = deter
        self.in_deter, self.in_stoch, self.in_action = (dense(n, hidden) for n in (deter, flat, action))
        self.hid = BlockLinear(deter, deter, size.blocks, shared=3 * hidden)
        self.hid_norm = RMSNorm(deter)
        self.gru = BlockLinear(deter, 3 * deter, size.blocks)
        self.post = nn.Sequential(dense(deter + embed, hidden), Linear(hidden, flat))
        self.prior = nn.Sequential(dense(deter, hidden), dense(hidden, hidden), Linear(hidden, flat))

    def initial(self, batch: int) -> tuple[Tensor, Tensor]:
        """Zero state: deter (batch, D), stoch (batch, S, K)."""
        device = self.hid.bias.device
        return torch.zeros(batch, self.deter, device=device), torch.zeros(
            batch, self.groups, self.classes, device=device
        )

    def core(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """Block-diagonal GRU: (N, D), (N, S, K), (N, A) -> (N, D)."""
        action = action / action.detach().abs().clamp(min=1)
        x = torch.cat(
            [self.in_deter(deter), self.in_stoch(stoch.flatten(-2)), self.in_action(action)], -1
        )  # (N, 3*hidden)
        x = self.hid_norm(self.hid(deter, x))  # (N, D)
        gates = self.gru(x).float().unflatten(-1, (self.hid.blocks, 3, -1))  # (N, G, 3, D/G)
        reset, cand, update = (gate.flatten(1) for gate in gates.unbind(2))  # (N, D) each
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        return update * cand + (1 - update) * deter

    def prior_logits(self, deter: Tensor) -> Tensor:
        """(…, D) -> (…, S, K), float32."""
        return self.prior(deter).float().unflatten(-1, (self.groups, self.classes))

    def posterior_logits(self, deter: Tensor, embed: Tensor) -> Tensor:
        """(…, D), (…, E) -> (…, S, K), float32."""
        return self.post(torch.cat([deter, embed], -1)).float().unflatten(-1, (self.groups, self.classes))

    def observe_step(self, deter, stoch, action, embed, is_first, u):
        """One step of filtering. State (N, D), (N, S, K) and action (N, A) of the step before, embed (N, E),
        is_first (N,) bool, noise u (N, S) uniform -> deter, stoch, posterior logits (N, S, K)."""
        keep = ~is_first.unsqueeze(-1)  # an episode starts: state and action of the step before are zeroed
        deter = self.core(deter * keep, stoch * keep.unsqueeze(-1), action * keep)
        logits = self.posterior_logits(deter, embed)
        return deter, OneHot(logits, self.unimix).sample(u), logits

    def imagine_step(self, deter, stoch, action, u):
        """One step of prediction: state (N, D), (N, S, K), action (N, A), noise u (N, S) -> deter, stoch."""
        deter = self.core(deter, stoch, action)
        return deter, OneHot(self.prior_logits(deter), self.unimix).sample(u)

    def observe(self, deter, stoch, action, embed, is_first):
        """Filter a batch of sequences. deter (B, D), stoch (B, S, K): state before the first step; action (B, T, A): the
        one *before* each step; embed (B, T, E); is_first (B, T) -> deter (B, T, D), stoch and logits (B, T, S, K)."""
        u = torch.rand(*is_first.shape, self.groups, device=deter.device)  # (B, T, S)
        outs = []
        for step in zip(*(x.unbind(1) for x in (action, embed, is_first, u)), strict=True):
            deter, stoch, logits = self.observe_step(deter, stoch, *step)
            outs.append((deter, stoch, logits))
        return tuple(torch.stack(x, 1) for x in zip(*outs, strict=True))


# --- 6. decoder -------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """(deter, stoch) -> one prediction per observation key: images after the sigmoid (…, h, w, c), vectors in symlog
    space (…, n), discrete keys as logits (…, *shape, classes)."""

    def __init__(self, specs: dict[str, ObsSpec], size: Size):
        super().__init__()
        self.specs = specs
        self.vectors = sorted(k for k, s in specs.items() if not s.is_image)
        self.images = sorted(k for k, s in specs.items() if s.is_image)
        flat = size.groups * size.classes
        if self.vectors:
            self.mlp = MLP(flat + size.deter, size.units, 3)
            self.outs = nn.ModuleList(Linear(size.units, specs[k].size) for k in self.vectors)
        if self.images:
            height, width, _ = specs[self.images[0]].shape
            depths = [size.depth * m for m in (4, 4, 3, 2)]
            self.map_shape = (height // 16, width // 16, depths[0])
            self.from_deter = BlockLinear(size.deter, math.prod(self.map_shape), size.blocks)
            self.from_stoch = nn.Sequential(
                dense(flat, 2 * size.units), Linear(2 * size.units, math.prod(self.map_shape))
            )
            self.norms = nn.ModuleList(RMSNorm(c) for c in depths)
            self.channels = [specs[k].shape[2] for k in self.images]
            channels = [*depths, sum(self.channels)]
            self.convs = nn.ModuleList(Conv(i, o) for i, o in zip(channels, channels[1:], strict=False))

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        lead = deter.shape[:-1]
        deter, stoch = deter.flatten(0, -2), stoch.flatten(-2).flatten(0, -2)  # (N, D), (N, S*K)
        preds = {}
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            for key, out in zip(self.vectors, self.outs, strict=True):
                spec = self.specs[key]
                shape = (*spec.shape, spec.classes) if spec.classes else spec.shape
                preds[key] = out(x).float().reshape(*lead, *shape)
        if self.images:
            height, width, depth = self.map_shape
            blocks = self.from_deter.blocks
            x = self.from_deter(deter).unflatten(-1, (blocks, height, width, depth // blocks))
            x = x.permute(0, 2, 3, 1, 4).flatten(3)  # (N, h, w, G*c)
            x = x + self.from_stoch(stoch).unflatten(-1, self.map_shape)
            x = x.permute(0, 3, 1, 2)  # (N, C, h, w), channels last in memory
            for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
                x = upsample_conv(norm.maps(x if i == 0 else F.pixel_shuffle(x, 2)), conv)  # (N, 4C', h, w)
            x = maps_to_pixels(x).unflatten(0, lead)  # (…, height, width, channels)
            preds |= dict(zip(self.images, x.split(self.channels, -1), strict=True))
        return preds
