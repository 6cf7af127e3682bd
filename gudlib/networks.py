"""Networks that take images and a vector of noise levels, `network(images, gamma) -> image`, and know no schedule.

`images` are (batch, inputs, height, width); `gamma` is (batch, channel, height, width), one noise level for each
component in the layout of its basis. A network is told which components belong together (`groups`, see
`bases.groups_by`) and sees gamma in one of four ways:

* `film`: the group means of gamma scale and shift the features of every block;
* `attention`: each group is a token, and the image attends to the tokens (the paper's way, section 5.1);
* `map`: gamma is a further input image, which suits bases whose layout is the image's own;
* `local`: as `film`, at every place with the noise levels that act there. For a basis U, group G and patch P,

      gamma_GP = sum_{i in G} E_iP gamma_i / sum_{i in G} E_iP,     E_iP = mean of U_ip^2 over p in P:

  gamma itself in pixels, a map for each level of wavelets, nearly the group means for principal components.

A `Transformer` is told one noise level for each patch, by scales and shifts of that patch's features. Its patches all
see each other or, block by block, what is finished.

Beside its blocks, a network may have a path that is linear in what it sees: filters gated by the noise levels, which
need not travel through nonlinear layers to do what a Wiener filter does.

What is to start at zero does, so an untrained network answers 0.

References:
    Scalable Diffusion Models with Transformers, W. Peebles, S. Xie, 2022, https://arxiv.org/abs/2212.09748
    PixArt-alpha, J. Chen et al., 2023, https://arxiv.org/abs/2310.00426 (one modulation for all blocks)
    Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion, B. Chen et al., 2024,
    https://arxiv.org/abs/2407.01392 (a noise level for each token)
    ACDiT: Interpolating Autoregressive Conditional Modeling and Diffusion Transformer, J. Hu et al., 2024,
    https://arxiv.org/abs/2412.07720 (blocks that see finished ones, whose keys and values are kept)
    Variational Diffusion Models, D. P. Kingma et al., 2021, https://arxiv.org/abs/2107.00630, appendix C (waves of the
    noised image)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from torch.nn import functional

from gudlib import checks
from gudlib.doors import door, inner

KINDS = ("unet", "transformer")
CONDITIONINGS = ("film", "attention", "map", "local")
EMBEDDED = ("film", "local")  # those with an embedding of the noise levels in every block
OCTAVES = range(2, 8)  # of the waves: from one grey level to the next, 1/128 away, 2^7 pi y grows by pi


@inner
def energies(
    inverse: Callable[[Tensor], Tensor], shape: tuple[int, int, int], patch: int
) -> Float[Tensor, "n rows columns"]:
    """Where components act: E_iP, the energy U_ip^2 of component i, summed over colours, a mean over each patch.

    Arguments:
        inverse: images U^T chi of components chi, both (batch, c, h, w); linear.
        shape: (c, h, w), of n = c h w components.
        patch: side of the patches, which divides h and w.

    Raises:
        ValueError: if it does not.
    """
    patch = checks.whole("patch", patch)
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(f"patch must divide height and width; got {patch} for {shape}")
    n = shape[0] * shape[1] * shape[2]
    units = (functional.one_hot(part, n).float().unflatten(1, shape) for part in torch.arange(n).split(256))
    return torch.cat([functional.avg_pool2d(inverse(unit).square().sum(1), patch) for unit in units])


class GammaGroups(nn.Module):
    """Noise levels as features of groups of components: (batch, group, 9), or so at every place.

    Beyond `reach` a component is clean or gone for every practical purpose, and all levels there count as one: so a
    network trained over a range of schedules can be asked about steeper ones.

    Arguments:
        groups: consecutive group indices 0 .. g-1, (c, h, w).
        energy: of each component at each place, (c h w, rows, columns), by which it counts there; where a group has
            none, its components count equally. By default they do everywhere, and there are no places.
    """

    reach = 12.0

    @door
    def __init__(self, groups: Int[Tensor, "c h w"], energy: Float[Tensor, "n rows columns"] | None = None) -> None:
        super().__init__()
        if not 0 <= int(groups.min()) <= int(groups.max()) < groups.numel():
            raise ValueError(
                f"groups must be numbered from 0, at most one for each component; got {groups.min()} to {groups.max()}"
            )
        self.groups: Tensor
        self.pool: Tensor
        self.frequencies: Tensor
        self.share: Tensor | None
        self.shape = tuple(groups.shape)
        self.register_buffer("groups", groups)
        member = functional.one_hot(groups.flatten()).float()
        self.register_buffer("pool", member / member.sum(0), persistent=False)
        self.register_buffer("frequencies", 2 * torch.pi / torch.tensor([8.0, 16.0, 32.0, 64.0]), persistent=False)
        if energy is not None:
            energy = energy.double() + 1e-3 * energy.double().mean()
            energy = (energy / torch.einsum("ng,nyx->gyx", member.double(), energy)[groups.flatten()]).float()
        self.register_buffer("share", energy, persistent=False)

    @inner
    def forward(self, gamma: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *place g 9"]:
        """The mean level of each group, and its sine and cosine at four frequencies; `place` is (rows, columns)."""
        gamma = gamma.to(self.pool.dtype).clamp(-self.reach, self.reach).flatten(1)
        if self.share is None:
            mean = gamma @ self.pool
        else:
            with torch.autocast(gamma.device.type, enabled=False):
                mean = (gamma[:, None] * (self.pool.mT > 0)) @ self.share.flatten(1)
            mean = mean.unflatten(2, self.share.shape[1:]).movedim(1, -1)
        return self.features(mean)

    def features(self, mean: Float[Tensor, "*b"]) -> Float[Tensor, "*b 9"]:
        """What the network is told of mean levels."""
        phase = mean[..., None] * self.frequencies
        return torch.cat([mean[..., None] / 10, phase.sin(), phase.cos()], dim=-1)


class ConvBlock(nn.Module):
    """Two convolutions with a residual path; an embedding, if there is one, scales and shifts in between."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs) if embedding else None
        self.norm2 = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """`x` (b, inputs, h, w) to (b, outputs, h, w); embedding (b, dim, h, w), or (b, dim, 1, 1) for all places."""
        y = self.norm2(self.conv1(functional.silu(self.norm1(x))))
        if self.film is not None and embedding is not None:
            scale, shift = _pointwise(self.film, embedding).chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(functional.silu(y)))


class Attention(nn.Module):
    """The image attends to itself, or to tokens (batch, token, dim); residual, starting as the identity."""

    heads = 4

    def __init__(self, channels: int, tokens: int | None = None) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(tokens or channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """`x` (b, c, h, w), changed by what its places find among themselves or among the tokens."""
        b, c, h, w = x.shape
        places = self.norm(x).flatten(2).mT
        key, value = self.key_value(places if tokens is None else tokens).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(places), key, value))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y).mT.reshape(b, c, h, w)


class Doubling(nn.Conv2d):
    """Each place becomes 2 x 2 equal ones, which a 3 x 3 convolution sees; in one step, at 4/9 of the multiplications.

    Not `nn.Upsample`: compiled under autocast on a CPU, it may pass no gradient on (torch 2.13).
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` (b, c, h, w) to (b, c, 2 h, 2 w)."""
        # Weights that meet copies of the same place are summed beforehand
        kernel = functional.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)
        return functional.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)


class UNet(nn.Module):
    """A small U-Net whose full-resolution work is one pixel-unshuffle: it sees `patch` x `patch` pixels as channels.

    Arguments:
        shape: output image shape (channel, height, width).
        groups: group index of every component, (c, h, w).
        inputs: number of input channels.
        width: channels at the finest resolution.
        multipliers: channels at each resolution, in units of `width`; each step halves the resolution.
        patch: side of the squares that the stem folds into channels; 1 keeps full resolution, at four times the cost
            (less with half the width and a further multiplier, at equal numbers of parameters).
        conditioning: `film`, `attention`, `map` or `local`.
        fourier: also see sin, cos(2^n pi y), n = 2 .. 7, of the last c input channels y, the noised image in data
            units: a convolution of the plain values tells no grey level from the next.
        maps: also see gamma, confined to [-15, 15], and alpha^2 as images, where the basis has the image's layout.
        linear: number of filters for each colour in the linear path; 0 is none. They are 7 x 7, start at zero, and each
            is gated by the noise levels, at each place if these are local.
        linear_all: the filters see all inputs, also waves and maps, which are not linear in the data.
        dropout: probability that a feature is dropped inside a block in training; the masks are drawn by torch's
            global generator.
        inverse: images of components, as `Basis.inverse`, on the CPU; what `local` needs to know where they act. It
            is used at once and not kept.

    Raises:
        ValueError: for sizes below 1, or a dropout outside [0, 1); if height or width cannot be folded and halved that
            often, or the width not be divided among the heads of attention; for an unknown conditioning, for `local`
            without `inverse`, or for a linear path without an embedding to gate it (`film`, `local`).
    """

    @door
    def __init__(
        self,
        shape: tuple[int, int, int],
        groups: Int[Tensor, "c h w"],
        inputs: int,
        width: int = 48,
        multipliers: tuple[int, ...] = (1, 2),
        patch: int = 2,
        conditioning: str = "film",
        fourier: bool = False,
        maps: bool = False,
        linear: int = 0,
        linear_all: bool = False,
        dropout: float = 0.0,
        inverse: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        inputs, width, patch = (checks.whole(*x) for x in (("inputs", inputs), ("width", width), ("patch", patch)))
        if not isinstance(multipliers, list | tuple) or not multipliers:
            raise ValueError(f"multipliers must hold a number for each resolution; got {multipliers!r}")
        multipliers = tuple(checks.whole("multipliers", m) for m in multipliers)
        linear, dropout = checks.whole("linear", linear, 0), checks.real("dropout", dropout, least=0, below=1)
        channels, height, w = shape
        attending = multipliers if conditioning == "attention" else multipliers[-1:]
        if any(width * m % Attention.heads for m in attending):
            raise ValueError(
                f"width must be such that {Attention.heads} heads of attention divide {attending} times it; got {width}"
            )
        fold = patch * 2 ** (len(multipliers) - 1)
        if height % fold or w % fold:
            raise ValueError(
                f"height and width must be multiples of {fold} (patch {patch}, {len(multipliers)} resolutions); "
                f"got {height} x {w}"
            )
        checks.one_of("conditioning", conditioning, CONDITIONINGS)
        if conditioning == "local" and inverse is None:
            raise ValueError("conditioning 'local' needs inverse, the map from components to images; got None")
        if linear and conditioning not in EMBEDDED:
            raise ValueError(f"linear = {linear} needs a conditioning of {EMBEDDED}; got {conditioning!r}")
        self.config: dict[str, Any] = {
            "kind": "unet", "shape": list(shape), "inputs": inputs, "width": width,
            "multipliers": list(multipliers), "patch": patch, "conditioning": conditioning,
            "fourier": fourier, "maps": maps, "linear": linear, "linear_all": linear_all, "dropout": dropout,
        }  # fmt: skip
        self.patch, self.conditioning, self.channels = patch, conditioning, channels
        self.fourier, self.maps, self.linear, self.linear_all = fourier, maps, linear, linear_all
        energy = energies(inverse, shape, patch) if inverse is not None and conditioning == "local" else None
        self.levels = GammaGroups(groups, energy)
        count, dim = self.levels.pool.shape[1], (4 if energy is None else 2) * width
        if conditioning in EMBEDDED:
            self.embed = nn.Sequential(nn.Linear(count * 9, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        elif conditioning == "attention":
            self.embed = nn.Sequential(nn.Linear(9, dim), nn.SiLU(), nn.Linear(dim, dim))
            self.token = nn.Parameter(torch.randn(count, dim) * 0.02)
        embedding = dim if conditioning in EMBEDDED else 0
        tokens = dim if conditioning == "attention" else None

        sizes = [width * m for m in multipliers]
        given = inputs
        inputs += channels * ((conditioning == "map") + 2 * maps + 2 * len(OCTAVES) * fourier)
        self.octaves: Tensor
        self.register_buffer("octaves", torch.pi * 2.0 ** torch.tensor(OCTAVES), persistent=False)
        self.stem = nn.Conv2d(inputs * patch**2, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(width, height // patch, w // patch))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        stack, now = [width], width
        for i, size in enumerate(sizes):
            self.down.append(ConvBlock(now, size, embedding, dropout))
            stack.append(size)
            now = size
            if i + 1 < len(sizes):
                self.down.append(nn.Conv2d(size, size, 3, stride=2, padding=1))
                stack.append(size)
        self.middle = nn.ModuleList(
            [ConvBlock(now, now, embedding, dropout), Attention(now), ConvBlock(now, now, embedding, dropout)]
        )
        self.cross = nn.ModuleList([Attention(size, tokens) for size in sizes] if tokens else [])
        for i, size in reversed(list(enumerate(sizes))):
            self.up.append(ConvBlock(now + stack.pop(), size, embedding, dropout))
            self.up.append(ConvBlock(size + stack.pop(), size, embedding, dropout))
            now = size
            if i > 0:
                self.up.append(nn.Sequential(nn.Identity(), Doubling(size, size, 3)))  # `up.2.1`, as in older files
        self.norm = _norm(now)
        self.head = nn.Conv2d(now, channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        if linear:
            self.filters = nn.Conv2d(inputs if linear_all else given, linear * channels, 7, padding=3, bias=False)
            self.gate = nn.Linear(dim, linear)
            nn.init.zeros_(self.filters.weight)
        self.float()  # whatever torch's default is
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 15 % faster on a CPU

    @inner
    def forward(
        self, images: Float[Tensor, "b inputs h w"], gamma: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """An image for each input and each noise level."""
        seen, told, tokens = _seen(self, images, gamma), self._told(gamma), None
        if self.conditioning == "attention":
            tokens = self.embed(self.levels(gamma)) + self.token
        x = functional.pixel_unshuffle(seen, self.patch).contiguous(memory_format=torch.channels_last)
        x = self.stem(x) + self.place
        skips, resolution = [x], 0
        for layer in self.down:
            if isinstance(layer, ConvBlock):
                x = layer(x, told[resolution])
                x = self.cross[resolution](x, tokens) if tokens is not None else x
            else:
                x, resolution = layer(x), resolution + 1
            skips.append(x)
        for layer in self.middle:
            x = layer(x, told[-1]) if isinstance(layer, ConvBlock) else layer(x)
        for layer in self.up:
            if isinstance(layer, ConvBlock):
                x = layer(torch.cat([x, skips.pop()], dim=1), told[resolution])
            else:
                x, resolution = layer(x), resolution - 1
        answer = functional.pixel_shuffle(self.head(functional.silu(self.norm(x))), self.patch)
        if told[0] is not None and self.linear:
            answer = answer + self._filtered(seen if self.linear_all else images, told[0])
        return answer

    def _told(self, gamma: Tensor) -> list[Tensor] | list[None]:
        """The embedding of the noise levels for each resolution, (b, dim, 1, 1) or a map, if there is one."""
        count = len(self.config["multipliers"])
        if self.conditioning not in EMBEDDED:
            return [None] * count
        embedding = self.embed(self.levels(gamma).flatten(-2))
        if self.conditioning == "film":
            return [embedding[:, :, None, None]] * count
        told = [embedding.movedim(-1, 1)]
        while len(told) < count:
            told.append(functional.avg_pool2d(told[-1], 2))
        return told

    def _filtered(self, seen: Tensor, embedding: Tensor) -> Tensor:
        """What the filters make of the image, weighted by their gates at each place."""
        gate = _pointwise(self.gate, embedding)
        for axis in (2, 3):
            gate = gate.repeat_interleave(seen.shape[axis] // gate.shape[axis], axis)
        maps = self.filters(seen.contiguous(memory_format=torch.channels_last))
        return (maps.unflatten(1, (-1, self.linear)) * gate[:, None]).sum(2)


Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block, (b, heads, k, width / heads)
SLACK = 1e-4  # of a noise level, which float32 rounds


class Transformer(nn.Module):
    """A transformer over the patches of an image, every one of which is told its own noise level.

    One modulation is computed for each patch, from the mean of its gamma, and shared by the blocks, each of which adds
    its own offset. By default every patch sees all others. With `between` attention is *block-causal*, for schedules
    of patches in reading order, all from one level to another: a patch is finished where its gamma has come down to
    the lower of the two, waits until it leaves the upper, and moves in between.

    | who | sees | is answered |
    |---|---|---|
    | finished | itself, and those finished before it in reading order | 0: the reference |
    | moving | all finished, all moving | as ever |
    | waiting | itself | 0: the reference |

    What a finished patch tells others is then settled for good, which `windows.generate` makes use of.

    Arguments:
        shape: output image shape (channel, height, width).
        inputs: number of input channels.
        patch: side of the patches, the tokens.
        width, depth, heads: of the blocks.
        between: lowest and highest gamma of the schedules, for block-causal attention.

    It sees the noised image's waves and the noise levels, as a `UNet` with `fourier` and `maps`.

    Raises:
        ValueError: if a size is below 1, the patches don't divide the image, heads the width, or levels don't rise.
    """

    fourier = maps = True

    @door
    def __init__(
        self,
        shape: tuple[int, int, int],
        inputs: int,
        patch: int = 4,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        between: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        channels, h, w = shape
        sizes = {"inputs": inputs, "patch": patch, "width": width, "depth": depth, "heads": heads}
        inputs, patch, width, depth, heads = (checks.whole(name, size) for name, size in sizes.items())
        if h % patch or w % patch:
            raise ValueError(f"height and width must be multiples of the patch, {patch}; got {h} x {w}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, {heads}; got {width}")
        if between is not None and not between[0] < between[1]:
            raise ValueError(f"between must be the lowest and highest gamma; got {between}")
        self.config: dict[str, Any] = {
            "kind": "transformer", "shape": list(shape), "inputs": inputs, "patch": patch, "width": width,
            "depth": depth, "heads": heads,
        }  # fmt: skip
        if between is not None:
            self.config["between"] = list(between)
        self.patch, self.heads, self.channels, self.between = patch, heads, channels, between
        rows, columns = h // patch, w // patch
        place = torch.arange(rows * columns, device="cpu").view(rows, columns)
        place = place.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        self.levels = GammaGroups(place.expand(shape).contiguous())
        self.octaves: Tensor
        self.register_buffer("octaves", torch.pi * 2.0 ** torch.tensor(OCTAVES), persistent=False)
        inputs += channels * (2 + 2 * len(OCTAVES))
        self.stem = nn.Linear(inputs * patch**2, width)
        self.place = nn.Parameter(0.02 * torch.randn(rows * columns, width))
        self.level = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulation, self.offset = nn.Linear(width, 6 * width), nn.Parameter(torch.zeros(depth, 6 * width))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(width, n * width) for _ in range(depth)) for n in (3, 1))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.last, self.head = nn.Linear(width, 2 * width), nn.Linear(width, channels * patch**2)
        for layer in (self.modulation, self.last, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.float()  # whatever torch's default is

    @inner
    def forward(
        self, images: Float[Tensor, "b inputs h w"], gamma: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """An image for each input and each noise level."""
        tokens = functional.pixel_unshuffle(_seen(self, images, gamma), self.patch).flatten(2).mT
        x, told = self.stem(tokens) + self.place, self.level(self.levels(gamma))
        if self.between is None:
            answer = self._answer(x, told, functional.scaled_dot_product_attention)
        else:
            finished, waiting = self.states(functional.pixel_unshuffle(gamma, self.patch).flatten(2).mT)
            mask = visible(finished, waiting)[:, None]
            answer = self._answer(x, told, partial(functional.scaled_dot_product_attention, attn_mask=mask))
            answer = answer.masked_fill((finished | waiting)[..., None], 0.0)
        rows = images.shape[-2] // self.patch
        return functional.pixel_shuffle(answer.mT.unflatten(2, (rows, -1)), self.patch)

    @inner
    def states(self, gamma: Float[Tensor, "*b k d"]) -> tuple[Bool[Tensor, "*b k"], Bool[Tensor, "*b k"]]:
        """Which patches are finished, and which wait, by the noise levels of their pixels; for block-causal ones."""
        assert self.between is not None
        low, high = self.between
        return gamma.amax(-1) <= low + SLACK, gamma.amin(-1) >= high - SLACK

    @inner
    def window(
        self,
        images: Float[Tensor, "b k inputs p p"],
        gamma: Float[Tensor, "b k c p p"],
        places: Int64[Tensor, " k"],
        past: Cache,
    ) -> Float[Tensor, "b k c p p"]:
        """The answers for some patches only, given keys and values of earlier ones, by a block-causal transformer.

        Arguments:
            images, gamma: of the patches; in gamma, all images of the batch alike.
            places: of the patches, in reading order, those that are finished first.
            past: keys and values of finished patches, all before these; those finished here are added. Empty at first.
        """
        tokens = _seen(self, images.flatten(0, 1), gamma.flatten(0, 1)).unflatten(0, images.shape[:2]).flatten(2)
        told = self.levels.features(gamma.clamp(-self.levels.reach, self.levels.reach).flatten(2).mean(2))
        finished, waiting = self.states(gamma[0].flatten(1))
        before, done, earlier = past[0][0].shape[2] if past else 0, int(finished.sum()), iter(past)
        sees = torch.cat([(~waiting)[:, None].expand(-1, before), visible(finished, waiting)], 1)
        kept: Cache = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if past:
                k, v = (torch.cat(pair, 2) for pair in zip(next(earlier), (k, v), strict=True))
            kept.append((k[:, :, : before + done], v[:, :, : before + done]))
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)

        answer = self._answer(self.stem(tokens) + self.place[places], self.level(told), attend)
        past[:] = kept
        return answer.masked_fill((finished | waiting)[:, None], 0.0).unflatten(2, gamma.shape[2:])

    def _answer(self, x: Tensor, told: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Of tokens (b, k, width) that are told levels (b, k, width); `attend` gets queries, keys and values."""
        shared = self.modulation(told)
        for offset, qkv, out, mlp in zip(self.offset, self.qkv, self.out, self.mlp, strict=True):
            scale1, shift1, gate1, scale2, shift2, gate2 = (shared + offset).chunk(6, -1)
            y = qkv(_plain_norm(x) * (1 + scale1) + shift1)
            q, k, v = y.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + (1 + gate1) * out(attend(q, k, v).transpose(1, 2).flatten(2))
            x = x + (1 + gate2) * mlp(_plain_norm(x) * (1 + scale2) + shift2)
        scale, shift = self.last(told).chunk(2, -1)
        return self.head(_plain_norm(x) * (1 + scale) + shift)


@inner
def visible(finished: Bool[Tensor, "*b k"], waiting: Bool[Tensor, "*b k"]) -> Bool[Tensor, "*b k k"]:
    """Who sees whom in block-causal attention, [..., i, j]: whether patch i sees patch j. Everyone sees itself.

    >>> visible(torch.tensor([True, True, False, False, False]), torch.tensor([False, False, False, False, True])).int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 1, 0],
            [0, 0, 0, 0, 1]], dtype=torch.int32)
    """
    count = finished.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=finished.device)
    before = torch.ones_like(itself).tril()
    done, moving = finished[..., None, :], ~(finished | waiting)
    return itself | (finished[..., None] & done & before) | (moving[..., None] & ~waiting[..., None, :])


def _seen(network: UNet | Transformer, images: Tensor, gamma: Tensor) -> Tensor:
    """All that the blocks of a network see, at full resolution."""
    images = images.to(network.levels.pool.dtype)
    seen = [images]
    if network.fourier:
        phase = (images[:, -network.channels :, None] * network.octaves[:, None, None]).flatten(1, 2)
        seen += [phase.sin(), phase.cos()]
    if network.config.get("conditioning") == "map":
        seen.append(gamma / 10)
    if network.maps:
        seen += [gamma.clamp(-15, 15) / 10, torch.sigmoid(-gamma)]
    return torch.cat(seen, dim=1)


def _plain_norm(x: Tensor) -> Tensor:
    """Layer norm without weights of its own."""
    return functional.layer_norm(x, x.shape[-1:])


def _pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer of channels at each place, `x` (b, c, h, w)."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(n for n in (8, 4, 2, 1) if channels % n == 0), channels)
