"""Networks that take images and a vector of noise levels, `network(images, gamma) -> image`, and know no schedule.

`images` are (batch, inputs, height, width); `gamma` is (batch, channel, height, width), one noise level for each
component in the layout of its basis. A network is told which components belong together (`groups`, see
`bases.groups_by`) and sees gamma in one of three ways:

* `film`: the group means of gamma scale and shift the features of every block;
* `attention`: each group is a token, and the image attends to the tokens (the paper's way, section 5.1);
* `map`: gamma is a further input image, which suits bases whose layout is the image's own.

The last layer starts at zero, so an untrained network answers 0.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

CONDITIONINGS = ("film", "attention", "map")


class GammaGroups(nn.Module):
    """Noise levels as features of groups of components: (batch, group, 9).

    Beyond `reach` a component is clean or gone for every practical purpose, and all levels there count as one: so a
    network trained over a range of schedules can be asked about steeper ones.

    Arguments:
        groups: consecutive group indices 0 .. g-1, (c, h, w).
    """

    reach = 12.0

    def __init__(self, groups: Int[Tensor, "c h w"]) -> None:
        super().__init__()
        self.groups: Tensor
        self.pool: Tensor
        self.frequencies: Tensor
        self.register_buffer("groups", groups)
        member = functional.one_hot(groups.flatten()).float()
        self.register_buffer("pool", member / member.sum(0), persistent=False)
        self.register_buffer("frequencies", 2 * torch.pi / torch.tensor([8.0, 16.0, 32.0, 64.0]), persistent=False)

    def forward(self, gamma: Float[Tensor, "b c h w"]) -> Float[Tensor, "b g 9"]:
        """The mean level of each group, and its sine and cosine at four frequencies."""
        mean = (gamma.clamp(-self.reach, self.reach).flatten(1) @ self.pool)[..., None]
        phase = mean * self.frequencies
        return torch.cat([mean / 10, phase.sin(), phase.cos()], dim=-1)


class ConvBlock(nn.Module):
    """Two convolutions with a residual path; an embedding, if there is one, scales and shifts in between."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs) if embedding else None
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """`x` (b, inputs, h, w) to (b, outputs, h, w); embedding (b, dim)."""
        y = self.norm2(self.conv1(functional.silu(self.norm1(x))))
        if self.film is not None:
            scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return self.skip(x) + self.conv2(functional.silu(y))


class Attention(nn.Module):
    """The image attends to itself, or to tokens (batch, token, dim); residual, starting as the identity."""

    def __init__(self, channels: int, tokens: int | None = None, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
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
        conditioning: `film`, `attention` or `map`.

    Raises:
        ValueError: if height or width cannot be folded and halved that often, or for an unknown conditioning.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        groups: Int[Tensor, "c h w"],
        inputs: int,
        width: int = 48,
        multipliers: tuple[int, ...] = (1, 2),
        patch: int = 2,
        conditioning: str = "film",
    ) -> None:
        super().__init__()
        channels, height, w = shape
        fold = patch * 2 ** (len(multipliers) - 1)
        if height % fold or w % fold:
            raise ValueError(
                f"height and width must be multiples of {fold} (patch {patch}, {len(multipliers)} resolutions); "
                f"got {height} x {w}"
            )
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {CONDITIONINGS}; got {conditioning!r}")
        self.config: dict[str, Any] = {
            "kind": "unet", "shape": list(shape), "inputs": inputs, "width": width,
            "multipliers": list(multipliers), "patch": patch, "conditioning": conditioning,
        }  # fmt: skip
        self.patch, self.conditioning = patch, conditioning
        self.levels = GammaGroups(groups)
        count, dim = self.levels.pool.shape[1], 4 * width
        if conditioning == "film":
            self.embed = nn.Sequential(nn.Linear(count * 9, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        elif conditioning == "attention":
            self.embed = nn.Sequential(nn.Linear(9, dim), nn.SiLU(), nn.Linear(dim, dim))
            self.token = nn.Parameter(torch.randn(count, dim) * 0.02)
        embedding = dim if conditioning == "film" else 0
        tokens = dim if conditioning == "attention" else None

        sizes = [width * m for m in multipliers]
        inputs += channels if conditioning == "map" else 0
        self.stem = nn.Conv2d(inputs * patch**2, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(width, height // patch, w // patch))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        stack, now = [width], width
        for i, size in enumerate(sizes):
            self.down.append(ConvBlock(now, size, embedding))
            stack.append(size)
            now = size
            if i + 1 < len(sizes):
                self.down.append(nn.Conv2d(size, size, 3, stride=2, padding=1))
                stack.append(size)
        self.middle = nn.ModuleList([ConvBlock(now, now, embedding), Attention(now), ConvBlock(now, now, embedding)])
        self.cross = nn.ModuleList([Attention(size, tokens) for size in sizes] if tokens else [])
        for i, size in reversed(list(enumerate(sizes))):
            self.up.append(ConvBlock(now + stack.pop(), size, embedding))
            self.up.append(ConvBlock(size + stack.pop(), size, embedding))
            now = size
            if i > 0:
                self.up.append(nn.Sequential(nn.Identity(), Doubling(size, size, 3)))  # `up.2.1`, as in older files
        self.norm = _norm(now)
        self.head = nn.Conv2d(now, channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 15 % faster on a CPU

    def forward(
        self, images: Float[Tensor, "b inputs h w"], gamma: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """An image for each input and each noise level."""
        embedding, tokens = None, None
        if self.conditioning == "film":
            embedding = self.embed(self.levels(gamma).flatten(1))
        elif self.conditioning == "attention":
            tokens = self.embed(self.levels(gamma)) + self.token
        else:
            images = torch.cat([images, gamma / 10], dim=1)
        x = functional.pixel_unshuffle(images, self.patch).contiguous(memory_format=torch.channels_last)
        x = self.stem(x) + self.place
        skips, resolution = [x], 0
        for layer in self.down:
            if isinstance(layer, ConvBlock):
                x = layer(x, embedding)
                x = self.cross[resolution](x, tokens) if tokens is not None else x
            else:
                x, resolution = layer(x), resolution + 1
            skips.append(x)
        for layer in self.middle:
            x = layer(x, embedding) if isinstance(layer, ConvBlock) else layer(x)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=1), embedding) if isinstance(layer, ConvBlock) else layer(x)
        return functional.pixel_shuffle(self.head(functional.silu(self.norm(x))), self.patch)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(n for n in (8, 4, 2, 1) if channels % n == 0), channels)
