"""Networks of DreamerV3 (Hafner et al., Nature 2025): what the equations in dreamerv3.py call.

From top to bottom: what observations, actions and sizes are; symlog and twohot, distributions,
layers (with the actor), encoder, recurrent state-space model (RSSM), decoder. Nothing here knows
about loss weights, flags or the replay buffer.

Symbols: B batch, T sequence length, N any flat batch, D deterministic state, S groups, K classes
per group, E encoder output, A action size, G blocks, V bins, U units, C channels; "…" stands for
any leading shape, usually (B, T).
"""

import math
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ObsSpec(NamedTuple):
    """One observation key: image (height, width, channels), vector (n,), or with classes > 0
    integers of any shape."""

    shape: tuple[int, ...]
    classes: int = 0

    @property
    def is_image(self) -> bool:
        """Whether convolutions see it; everything else is a vector."""
        return self.classes == 0 and len(self.shape) == 3

    @property
    def dtype(self) -> str:
        """The type of its arrays and tensors, a name that NumPy and torch share."""
        if self.is_image:
            return "uint8"
        return "int32" if self.classes else "float32"

    @property
    def size(self) -> int:
        """Width of this key as a flat vector; discrete keys count their one-hot encoding."""
        return math.prod(self.shape) * max(1, self.classes)


def split_keys(specs: dict[str, ObsSpec]) -> tuple[list[str], list[str]]:
    """Sorted keys of vectors (and discrete values), and of images."""
    vectors = sorted(key for key, spec in specs.items() if not spec.is_image)
    images = sorted(key for key, spec in specs.items() if spec.is_image)
    return vectors, images


class ActionSpec(NamedTuple):
    """Flat actions of `size` numbers (A): one-hot vectors of `nvec` classes side by side, or, with
    nvec (), real numbers."""

    nvec: tuple[int, ...]
    size: int


class Size(NamedTuple):
    """Widths of one model size."""

    deter: int  # D
    hidden: int  # of the RSSM's layers
    units: int  # U, of all MLPs
    classes: int  # K
    depth: int  # channels of a convolution are multiples of it
    groups: int  # S
    blocks: int  # G


# --- 1. symlog and twohot (paper: "Robust predictions") -------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): squashes large values of either sign, the identity near 0."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of symlog."""
    return x.sign() * x.abs().expm1()


class TwoHot(nn.Module):
    """A scalar as a softmax over V fixed bins; targets put their weight on the two bins around
    them.

    bins: V, odd and at least 3. space: "symexp" (Nature paper, official code) interpolates in raw
    space between bins symexp(linspace(-20, 20, V)); "symlog" (2023 preprint) interpolates
    symlog(target) between linspace(-20, 20, V). mean: "rounded" (the official program on a CPU) or
    "exact", see `mean`.
    """

    def __init__(self, bins: int = 255, space: str = "symexp", mean: str = "rounded"):
        super().__init__()
        self.symlog_targets = space == "symlog"
        self.rounded = mean == "rounded"
        half = torch.linspace(-20, 0, bins // 2 + 1, dtype=torch.float64)
        if space == "symexp":
            half = symexp(half)
        half = half.float()
        symmetric = torch.cat([half, -half[:-1].flip(0)])  # (V,), exactly
        self.register_buffer("bins", symmetric, persistent=False)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy between logits (…, V) and the twohot encoding of target (…,): -> (…,).

        The two logits are gathered rather than building the V-wide target: six times faster.
        """
        logits = logits.float()
        y = symlog(target) if self.symlog_targets else target
        y = y.clamp(self.bins[0], self.bins[-1])  # beyond: all weight on the end bin
        above = torch.bucketize(y, self.bins, right=True).clamp(1, len(self.bins) - 1)
        below = above - 1  # (…,): indices of the bins around y
        width = self.bins[above] - self.bins[below]
        weight = (y - self.bins[below]) / width  # of the upper bin
        picked = logits.gather(-1, torch.stack([below, above], -1))  # (…, 2)
        expected = (1 - weight) * picked[..., 0] + weight * picked[..., 1]
        return logits.logsumexp(-1) - expected

    def mean(self, logits: Tensor) -> Tensor:
        """Expected bin under softmax(logits) (…, V) -> (…,); symexp of it when targets are symlogs.

        A sum over mirrored pairs of bins, (p_high - p_low) * bin, so that large bins cancel. With
        "exact", uniform logits give exactly 0. "rounded" adds the rounding error of the official
        program on a CPU, whose compiler fuses one product of each pair into a multiply-add: that
        product is exact, the other is rounded to float32. Symexp bins reach 4.85e8, so the error is
        up to 0.17 for uniform logits, and noise of zero mean until the far bins have lost their
        probability, after 1,000 to 2,500 updates. (With symlog bins it is below 1e-5.) The actor's
        first updates depend on it; results/rounding.md says how.

        Mirrored probabilities that differ by at most 2^-18 of their size, 32 units in the last
        place, count as equal: sums in another order make such differences, and one unit is worth
        0.1 to 1 in the mean.
        """
        probs = logits.float().softmax(-1)
        half = len(self.bins) // 2
        low = probs[..., :half].flip(-1)  # (…, half), of the bins at -upper
        high = probs[..., half + 1 :]
        upper = self.bins[half + 1 :]  # (half,): the bins are symmetric, the middle one is 0
        difference = high - low
        difference = torch.where(difference.abs() <= 2.0**-18 * high, 0.0, difference)
        terms = difference * upper
        if self.rounded:
            product = (high * upper).double()
            exact_product = high.double() * upper.double()  # 24 x 24 bits fit into float64's 53
            terms = terms + (product - exact_product).float()
        mean = terms.sum(-1)  # (…,)
        return symexp(mean) if self.symlog_targets else mean


# --- 2. distributions (float32 whatever the networks' precision) ----------------------------------


def sample_index(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sample: probs (…, K), u (…,) uniform in [0, 1) -> class indices (…,).

    One uniform number per categorical, cheaper than Gumbel noise; leaving out the last sum keeps
    the index below K.
    """
    return (probs.cumsum(-1)[..., :-1] <= u.unsqueeze(-1)).sum(-1)


def one_hot(index: Tensor, classes: int) -> Tensor:
    """Class indices (…,) -> (…, classes) float32. F.one_hot would check their range, and so wait
    for the device."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).float()


class OneHot:
    """Categorical over the last axis of logits (…, K), with `unimix` uniform probability mixed in
    (paper: 1 %)."""

    def __init__(self, logits: Tensor, unimix: float):
        logits = logits.float()
        self.probs = (1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]
        self.log_probs = self.probs.log() if unimix else logits.log_softmax(-1)

    def sample(self, u: Tensor) -> Tensor:
        """One-hot sample (…, K) from uniform noise u (…,), with straight-through gradients into the
        probabilities."""
        probs = self.probs.detach()
        return one_hot(sample_index(probs, u), probs.shape[-1]) + (self.probs - probs)

    def log_prob(self, onehot: Tensor) -> Tensor:
        """ln p of a one-hot (…, K): (…,)."""
        return (self.log_probs * onehot).sum(-1)

    def entropy(self) -> Tensor:
        """In nats, (…,)."""
        return -(self.probs * self.log_probs).sum(-1)

    def kl(self, other: "OneHot") -> Tensor:
        """KL(self || other), (…,)."""
        return (self.probs * (self.log_probs - other.log_probs)).sum(-1)


class MultiOneHot:
    """Independent categoricals, one per action component; an action is their one-hot vectors side
    by side (…, A).

    sample(u (…, components)) and mode() -> (…, A); log_prob(action (…, A)) and entropy() -> (…,),
    summed over components.
    """

    def __init__(self, logits: list[Tensor], unimix: float):
        self.parts = [OneHot(x, unimix) for x in logits]
        self.sizes = [x.shape[-1] for x in logits]

    def sample(self, u: Tensor) -> Tensor:
        samples = [part.sample(u[..., i]) for i, part in enumerate(self.parts)]
        return torch.cat(samples, -1)

    def mode(self) -> Tensor:
        modes = [one_hot(part.probs.argmax(-1), part.probs.shape[-1]) for part in self.parts]
        return torch.cat(modes, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        pairs = zip(self.parts, action.split(self.sizes, -1), strict=True)
        return sum(part.log_prob(onehot) for part, onehot in pairs)

    def entropy(self) -> Tensor:
        return sum(part.entropy() for part in self.parts)


class Normal:
    """Diagonal normal over the last axis; samples are mean + std * noise (…, A), not squashed.

    sample(standard normal noise (…, A)) and mode() -> (…, A); log_prob(action (…, A)) and
    entropy() -> (…,), summed over components.
    """

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean = mean
        self.std = std

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) / self.std
        density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return density.sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


# --- 3. layers ------------------------------------------------------------------------------------


def init(layer: nn.Module, fan_in: int, outscale: float = 1.0) -> nn.Module:
    """Kernel from a normal cut at 2 std, whose std after the cut is outscale / sqrt(fan_in); zero
    bias."""
    std = 1.1368 / math.sqrt(fan_in)  # 1.1368 undoes what the cut takes from the std
    cut = 2 * std  # torch's bounds are absolute
    nn.init.trunc_normal_(layer.weight, std=std, a=-cut, b=cut)
    layer.weight.data.mul_(outscale)
    nn.init.zeros_(layer.bias)
    return layer


def linear(inputs: int, outputs: int, outscale: float = 1.0) -> nn.Linear:
    """(…, inputs) -> (…, outputs), initialized by `init`."""
    return init(nn.Linear(inputs, outputs), inputs, outscale)


def conv5(inputs: int, outputs: int) -> nn.Conv2d:
    """5x5 convolution, stride 1, same size."""
    return init(nn.Conv2d(inputs, outputs, 5, padding=2), 25 * inputs)


class BlockLinear(nn.Module):
    """G independent linear maps. x (N, G*I) in blocks of I, shared (N, J) seen by every block ->
    (N, outputs)."""

    def __init__(self, inputs: int, outputs: int, blocks: int, shared: int = 0):
        super().__init__()
        self.blocks = blocks
        self.width = inputs // blocks  # I
        weight = torch.empty(blocks, self.width + shared, outputs // blocks)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(outputs))
        init(self, inputs + blocks * shared)  # the full input width, as officially

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        x = x.unflatten(-1, (self.blocks, self.width)).transpose(0, 1)  # (G, N, I)
        out = torch.bmm(x, self.weight[:, : self.width])  # (G, N, outputs/G)
        out = out.transpose(0, 1).flatten(1) + self.bias  # (N, outputs)
        if shared is not None:
            shared = shared.expand(self.blocks, -1, -1)  # (G, N, J), not a copy
            more = torch.bmm(shared, self.weight[:, self.width :])  # (G, N, outputs/G)
            out = out + more.transpose(0, 1).flatten(1)
        return out


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(F.interpolate(x, scale_factor=2)) for a conv5: (N, C, h, w) -> (N, C', 2h, 2w), channels
    last in memory.

    Computed on the small map. An output pixel sees only 3x3 different inputs, so each of the four
    pixels that one input becomes is a 3x3 convolution whose weights are sums of the 5x5 weights.
    Exact, with 36 % of the multiplications.
    """

    def fold(w: Tensor) -> Tensor:
        """(…, 5) -> (2, …, 3): sums of the weights that meet the same input, for the first and the
        second pixel."""
        a, b, c, d, e = w.unbind(-1)
        first = torch.stack([a + b, c + d, e], -1)
        second = torch.stack([a, b + c, d + e], -1)
        return torch.stack([first, second])

    columns = fold(conv.weight)  # (2, C', C, 5, 3)
    kernel = fold(columns.mT).mT  # (2, 2, C', C, 3, 3), rows first
    kernel = kernel.flatten(0, 2)  # (4C', C, 3, 3)
    x = F.conv2d(x, kernel, conv.bias.repeat(4), padding=1)  # (N, 4C', h, w)
    n, _, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h, w, 2, -1)  # (N, h, w, 2, 2C')
    x = x.transpose(2, 3).reshape(n, 2 * h, 2 * w, -1)  # (N, 2h, 2w, C')
    return x.permute(0, 3, 1, 2)


@torch.compile(dynamic=False)
def scale_pixels(x: Tensor) -> Tensor:
    """Images uint8 (N, h, w, C) -> [-0.5, 0.5] (N, C, h, w), channels last in memory."""
    return (x.float() / 255 - 0.5).permute(0, 3, 1, 2)


class NormSiLU(nn.Module):
    """RMSNorm, x / rms(x) * scale over the last axis, then SiLU: (…, C) -> (…, C). Computed in
    float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * (y.square().mean(-1, keepdim=True) + 1e-4).rsqrt() * self.scale
        return F.silu(y).to(x.dtype)

    @torch.compile(dynamic=False)
    def on_maps(self, x: Tensor) -> Tensor:
        """The same over the channels of maps (N, C, h, w) that are channels-last in memory."""
        return self(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def dense(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, RMSNorm, SiLU."""
    return nn.Sequential(linear(inputs, outputs), NormSiLU(outputs))


def mlp(inputs: int, units: int, layers: int) -> nn.Sequential:
    """`layers` times [Linear, RMSNorm, SiLU]: (…, inputs) -> (…, units)."""
    widths = [inputs] + [units] * layers
    return nn.Sequential(*[dense(i, o) for i, o in pairwise(widths)])


def head(
    inputs: int, units: int, layers: int, outputs: int, outscale: float = 1.0
) -> nn.Sequential:
    """MLP, then one Linear: (…, inputs) -> (…, outputs)."""
    return nn.Sequential(mlp(inputs, units, layers), linear(units, outputs, outscale))


class Actor(nn.Module):
    """Policy on features (…, inputs): one Linear per categorical, or one each for mean and std of a
    normal."""

    def __init__(self, inputs: int, units: int, action: ActionSpec, unimix: float):
        super().__init__()
        self.action = action
        self.unimix = unimix
        self.mlp = mlp(inputs, units, 3)
        widths = action.nvec or (action.size, action.size)
        self.outs = nn.ModuleList(linear(units, n, outscale=0.01) for n in widths)

    def forward(self, feat: Tensor) -> MultiOneHot | Normal:
        x = self.mlp(feat)
        outs = [out(x).float() for out in self.outs]
        if self.action.nvec:
            return MultiOneHot(outs, self.unimix)
        mean, std = outs
        return Normal(mean.tanh(), 0.9 * torch.sigmoid(std + 2) + 0.1)

    def noise(self, *shape: int) -> Tensor:
        """What `sample` of an action batch of this shape needs: uniform (…, components) or normal
        (…, A)."""
        device = self.outs[0].weight.device
        if self.action.nvec:
            return torch.rand(*shape, len(self.action.nvec), device=device)
        return torch.randn(*shape, self.action.size, device=device)


# --- 4. encoder -----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Observations -> embed (…, E): vectors through an MLP, images through four conv stages, side
    by side."""

    def __init__(self, specs: dict[str, ObsSpec], size: Size):
        super().__init__()
        self.specs = specs
        self.embed_size = 0
        self.vectors, self.images = split_keys(specs)
        if self.vectors:
            self.mlp = mlp(sum(specs[k].size for k in self.vectors), size.units, 3)
            self.embed_size += size.units
        if self.images:
            height, width, _ = specs[self.images[0]].shape
            colors = sum(specs[k].shape[2] for k in self.images)
            d = size.depth
            channels = [colors, 2 * d, 3 * d, 4 * d, 4 * d]
            self.convs = nn.ModuleList(conv5(i, o) for i, o in pairwise(channels))
            self.norms = nn.ModuleList(NormSiLU(c) for c in channels[1:])
            self.embed_size += (height // 16) * (width // 16) * channels[-1]

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts = []
        if self.vectors:
            flat = []
            for key in self.vectors:
                spec = self.specs[key]
                if spec.classes:
                    encoded = one_hot(obs[key], spec.classes)  # (…, *shape, classes)
                    flat.append(encoded.flatten(-1 - len(spec.shape)))
                else:
                    flat.append(symlog(obs[key]))
            parts.append(self.mlp(torch.cat(flat, -1)))  # (…, U)
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1)  # (…, h, w, C)
            lead = x.shape[:-3]
            x = scale_pixels(x.flatten(0, -4))  # (N, C, h, w)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm.on_maps(F.max_pool2d(conv(x), 2))  # (N, C', h/2, w/2)
            x = x.permute(0, 2, 3, 1).flatten(1)  # (N, h/16 * w/16 * C)
            parts.append(x.unflatten(0, lead))
        return torch.cat(parts, -1)  # (…, E)


# --- 5. recurrent state-space model (paper: "World model learning") -------------------------------


class RSSM(nn.Module):
    """Sequence model h_t = core(h_{t-1}, z_{t-1}, a_{t-1}), posterior z_t ~ q(z | h_t, x_t), prior
    z_t ~ p(z | h_t)."""

    def __init__(self, embed_size: int, action_size: int, size: Size, unimix: float):
        super().__init__()
        self.size = size
        self.action_size = action_size
        self.unimix = unimix
        deter = size.deter
        hidden = size.hidden
        flat = size.groups * size.classes
        self.in_deter = dense(deter, hidden)
        self.in_stoch = dense(flat, hidden)
        self.in_action = dense(action_size, hidden)
        self.hid = BlockLinear(deter, deter, size.blocks, shared=3 * hidden)
        self.hid_norm = NormSiLU(deter)
        self.gru = BlockLinear(deter, 3 * deter, size.blocks)
        to_groups = nn.Unflatten(-1, (size.groups, size.classes))  # (…, S*K) -> (…, S, K)
        layers = [dense(deter + embed_size, hidden), linear(hidden, flat)]
        self.post = nn.Sequential(*layers, to_groups)
        layers = [dense(deter, hidden), dense(hidden, hidden), linear(hidden, flat)]
        self.prior = nn.Sequential(*layers, to_groups)

    def initial(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """What precedes a first step, zeros: deter (batch, D), stoch (batch, S, K), action (batch,
        A)."""
        zeros = self.hid.bias.new_zeros  # on its device
        deter = zeros(batch, self.size.deter)
        stoch = zeros(batch, self.size.groups, self.size.classes)
        return deter, stoch, zeros(batch, self.action_size)

    def core(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """Block-diagonal GRU: (N, D), (N, S, K), (N, A) -> (N, D)."""
        action = action / action.detach().abs().clamp(min=1)  # stored ones are not clipped
        x_deter = self.in_deter(deter)  # (N, hidden)
        x_stoch = self.in_stoch(stoch.flatten(-2))
        x_action = self.in_action(action)
        x = self.hid(deter, torch.cat([x_deter, x_stoch, x_action], -1))
        x = self.hid_norm(x)  # (N, D)
        gates = self.gru(x).float().unflatten(-1, (self.size.blocks, 3, -1))  # (N, G, 3, D/G)
        reset, candidate, update = gates.unbind(2)  # (N, G, D/G) each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        before = deter.unflatten(-1, (self.size.blocks, -1))  # (N, G, D/G)
        after = update * candidate + (1 - update) * before
        return after.flatten(1)  # (N, D)

    @torch.compile(dynamic=False)
    def observe_step(self, deter, stoch, prev_action, embed, is_first, u):
        """One step of filtering. State (N, D), (N, S, K) and action (N, A) of the step before,
        embed (N, E), is_first (N,) bool, noise u (N, S) uniform -> deter, stoch, posterior logits
        (N, S, K)."""
        keep = ~is_first.unsqueeze(-1)  # where an episode starts, what was before is zeroed
        deter = self.core(deter * keep, stoch * keep.unsqueeze(-1), prev_action * keep)
        logits = self.post(torch.cat([deter, embed], -1)).float()
        stoch = OneHot(logits, self.unimix).sample(u)
        return deter, stoch, logits

    def predict_step(self, deter, stoch, action, u):
        """One step of prediction: state (N, D), (N, S, K), action (N, A), noise u (N, S) -> deter,
        stoch."""
        deter = self.core(deter, stoch, action)
        logits = self.prior(deter).float()
        stoch = OneHot(logits, self.unimix).sample(u)
        return deter, stoch

    def observe(self, deter, stoch, prev_action, embed, is_first):
        """Filter sequences. deter (B, D), stoch (B, S, K): the state before the first step;
        prev_action (B, T, A): the one before each step; embed (B, T, E); is_first (B, T) -> deter
        (B, T, D), stoch and logits (B, T, S, K)."""
        # this gradient is not used: it spares a second compilation of observe_step, for step 0
        deter = deter.detach().requires_grad_()
        stoch = stoch.detach().requires_grad_()
        u = torch.rand(*is_first.shape, self.size.groups, device=embed.device)  # (B, T, S)
        # on a CPU, products of B rows with weights smaller than those of 12m are faster in float32
        small = embed.device.type == "cpu" and self.size.deter < 1024
        precision = torch.autocast("cpu", enabled=False) if small else nullcontext()
        deters = []
        stochs = []
        all_logits = []
        with precision:
            for t in range(is_first.shape[1]):
                deter, stoch, logits = self.observe_step(
                    deter, stoch, prev_action[:, t], embed[:, t], is_first[:, t], u[:, t]
                )
                deters.append(deter)
                stochs.append(stoch)
                all_logits.append(logits)
        deter = torch.stack(deters, 1)
        stoch = torch.stack(stochs, 1)
        return deter, stoch, torch.stack(all_logits, 1)


# --- 6. decoder -----------------------------------------------------------------------------------


class Decoder(nn.Module):
    """(deter, stoch) -> the prediction of every observation key: images in [0, 1] (…, h, w, C),
    vectors in symlog space (…, n), discrete keys as logits (…, *shape, classes)."""

    def __init__(self, specs: dict[str, ObsSpec], size: Size):
        super().__init__()
        self.specs = specs
        self.vectors, self.images = split_keys(specs)
        flat = size.groups * size.classes
        if self.vectors:
            self.mlp = mlp(flat + size.deter, size.units, 3)
            self.outs = nn.ModuleList(linear(size.units, specs[k].size) for k in self.vectors)
        if self.images:
            height, width, _ = specs[self.images[0]].shape
            colors = sum(specs[k].shape[2] for k in self.images)
            d = size.depth
            channels = [4 * d, 4 * d, 3 * d, 2 * d, colors]
            self.map_shape = (height // 16, width // 16, channels[0])
            area = math.prod(self.map_shape)
            self.from_deter = BlockLinear(size.deter, area, size.blocks)
            self.from_stoch = nn.Sequential(
                dense(flat, 2 * size.units), linear(2 * size.units, area)
            )
            self.norms = nn.ModuleList(NormSiLU(c) for c in channels[:-1])
            self.convs = nn.ModuleList(conv5(i, o) for i, o in pairwise(channels))

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        lead = deter.shape[:-1]
        deter = deter.flatten(0, -2)  # (N, D)
        stoch = stoch.flatten(-2).flatten(0, -2)  # (N, S*K)
        preds = {}
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))  # (N, U)
            for key, out in zip(self.vectors, self.outs, strict=True):
                spec = self.specs[key]
                shape = spec.shape
                if spec.classes:
                    shape = (*shape, spec.classes)
                preds[key] = out(x).float().reshape(*lead, *shape)
        if self.images:
            height, width, _ = self.map_shape
            x = self.from_deter(deter).unflatten(-1, (self.from_deter.blocks, height, width, -1))
            x = x.permute(0, 2, 3, 1, 4).flatten(3)  # (N, h, w, C), all blocks side by side
            x = x + self.from_stoch(stoch).unflatten(-1, self.map_shape)
            x = x.permute(0, 3, 1, 2)  # (N, C, h, w), channels last in memory
            for norm, conv in zip(self.norms, self.convs, strict=True):
                x = upsample_conv(norm.on_maps(x), conv)  # (N, C', 2h, 2w)
            x = x.permute(0, 2, 3, 1).float().sigmoid().unflatten(0, lead)  # (…, h, w, C)
            colors = [self.specs[k].shape[2] for k in self.images]
            for key, image in zip(self.images, x.split(colors, -1), strict=True):
                preds[key] = image
        return preds
