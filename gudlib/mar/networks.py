r"""Transformers over an image's tokens, and the head that denoises one token.

A *trunk* turns the tokens known so far into a vector z for each of those asked for. Tokens are (b, L, D), taken in the
order of a permutation of their places, (b, L), one for each image. The *head* is a network like those of
`gudlib.networks`, on single tokens, with z as a third argument. Its last layer starts at zero, so an untrained network
answers 0.

References:
    Autoregressive Image Generation without Vector Quantization, T. Li, Y. Tian, H. Li, M. Deng, K. He, 2024,
    https://arxiv.org/abs/2406.11838
    Masked Autoencoders Are Scalable Vision Learners, K. He et al., 2021, https://arxiv.org/abs/2111.06377
    Scalable Diffusion Models with Transformers, W. Peebles, S. Xie, 2022, https://arxiv.org/abs/2212.09748
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from gudlib import checks
from gudlib.doors import door, inner
from gudlib.networks import GammaGroups

KINDS = ("raster", "random", "masked")

Tokens = Float[Tensor, "b l d"]
Permutation = Int64[Tensor, "b l"]
Labels = Int64[Tensor, " b"]
Cache = list[list[Tensor]]


@door
def patch_count(height: int, width: int, size: int) -> int:
    """How many squares of side `size` make an image.

    Raises:
        ValueError: if the size does not divide height and width.
    """
    size = checks.whole("size", size)
    if height % size or width % size:
        raise ValueError(f"size of a patch must divide height {height} and width {width}; got {size}")
    return height * width // size**2


class TransformerBlock(nn.Module):
    """A pre-norm transformer block on (b, l, width).

    With a list `past`, where it keeps keys and values, it takes one new token at a time, which may see all before.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, {heads}; got {width}")
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, causal: bool = False, past: list[Tensor] | None = None) -> Tensor:
        """`x` (b, l, width), changed by what its tokens find among themselves and in the past."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
            k, v = past
        drop = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal and past is None, dropout_p=drop)
        x = x + functional.dropout(self.out(y.transpose(1, 2).flatten(2)), drop)
        return x + functional.dropout(self.mlp(self.norm2(x)), drop)


class Causal(nn.Module):
    """The trunk of the causal models: place k of its sequence holds token k - 1 (first the class) and asks for token k.

    Every place is told where its token is and where the next one goes: in reading order the latter adds nothing.

    Arguments:
        count, dim: L and D; classes: labels are 0 .. classes - 1, and `classes` is none.
        width, depth, heads, dropout: of 2 depth transformer blocks.
    """

    def __init__(self, count: int, dim: int, classes: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.label, self.embed = nn.Embedding(classes + 1, width), nn.Linear(dim, width)
        self.place, self.target = nn.Embedding(count, width), nn.Embedding(count, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(2 * depth))
        self.norm = nn.LayerNorm(width)

    def cache(self) -> Cache:
        """An empty one, with which tokens start = 0, 1, 2, ... are to be asked for one after another."""
        return [[] for _ in self.blocks]

    def forward(
        self,
        tokens: Tokens,
        permutation: Permutation,
        start: int,
        stop: int,
        labels: Labels,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b m width"]:
        """z for tokens permutation[:, start:stop], each from those before it in the permutation."""
        first = 0 if cache is None else start
        before = permutation[:, max(first - 1, 0) : stop - 1]
        x = self.embed(tokens.take_along_dim(before[..., None], 1)) + self.place(before)
        x = x if first else torch.cat([self.label(labels)[:, None], x], 1)
        x = x + self.target(permutation[:, first:stop])
        for i, block in enumerate(self.blocks):
            x = block(x, causal=True, past=cache[i] if cache is not None else None)
        return self.norm(x[:, start - stop :])


class Masked(nn.Module):
    """The trunk of MAR: an encoder of the known tokens, and a decoder that also has a mask for each unknown one.

    Both see a buffer of copies of the class, without which the encoder would have next to nothing to compute with
    while few tokens are known. Places are told three times: to the encoder, to the decoder and to the head.

    Arguments:
        buffer: number of copies; depth: of the encoder, and of the decoder. The others are as for `Causal`.
    """

    def __init__(
        self, count: int, dim: int, classes: int, width: int, depth: int, heads: int, dropout: float, buffer: int
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self.label, self.embed = nn.Embedding(classes + 1, width), nn.Linear(dim, width)
        self.encoder_place, self.decoder_place = (nn.Embedding(buffer + count, width) for _ in range(2))
        self.head_place, self.mask = nn.Embedding(count, width), nn.Embedding(1, width)
        self.encoder, self.decoder = (
            nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth)) for _ in range(2)
        )
        self.norm_in, self.norm, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.bridge = nn.Linear(width, width)

    def cache(self) -> None:
        """None: what a token finds changes with every further one that is known."""

    def forward(
        self, tokens: Tokens, permutation: Permutation, start: int, stop: int, labels: Labels, cache: None = None
    ) -> Float[Tensor, "b m width"]:
        """z for tokens permutation[:, start:stop], all from permutation[:, :start]."""
        b = len(permutation)
        copies = torch.arange(self.buffer, device=permutation.device).expand(b, -1)
        places = torch.cat([copies, self.buffer + permutation], 1)
        seen = self.buffer + start
        known = self.embed(tokens.take_along_dim(permutation[:, :start, None], 1))
        x = torch.cat([self.label(labels)[:, None].expand(-1, self.buffer, -1), known], 1)
        x = self.norm_in(x + self.encoder_place(places[:, :seen]))
        for block in self.encoder:
            x = block(x)
        x = self.bridge(self.norm(x))
        x = torch.cat([x, self.mask.weight.expand(b, permutation.shape[1] - start, -1)], 1) + self.decoder_place(places)
        for block in self.decoder:
            x = block(x)
        return self.norm_out(x[:, seen : seen + stop - start]) + self.head_place(permutation[:, start:stop])


class HeadLayer(nn.Module):
    """A residual layer of the head, whose shift, scale and gate a condition sets (AdaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`x` (n, width) under the condition `y` (n, width)."""
        shift, scale, gate = self.modulation(functional.silu(y)).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Head(nn.Module):
    """A multilayer perceptron that denoises tokens, each given its z and the mean of its gamma.

    Arguments:
        shape: of a token, (c, p, p); context: size of z; width and depth.
    """

    def __init__(self, shape: tuple[int, int, int], context: int, width: int, depth: int) -> None:
        super().__init__()
        dim = math.prod(shape)
        self.shape, self.levels = shape, GammaGroups(torch.zeros(shape, dtype=torch.long, device="cpu"))
        self.level = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width))
        self.context, self.stem = nn.Linear(context, width), nn.Linear(2 * dim, width)
        self.layers = nn.ModuleList(HeadLayer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, dim)

    def forward(
        self, images: Float[Tensor, "n inputs p p"], gamma: Float[Tensor, "n c p p"], z: Float[Tensor, "n context"]
    ) -> Float[Tensor, "n c p p"]:
        """As a network of `gudlib.networks`, on patches."""
        y = self.level(self.levels(gamma).flatten(1)) + self.context(z)
        x = self.stem(images.flatten(1))
        for layer in self.layers:
            x = layer(x, y)
        shift, scale = self.modulation(functional.silu(y)).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift).unflatten(1, self.shape)


class Network(nn.Module):
    """Trunk and head.

    Arguments:
        kind: `raster`, `random` or `masked`.
        image: image shape (c, h, w); size: side p of a patch.
        classes: number of labels, 0 for none.
        width, depth, heads, dropout: of the trunk, which has 2 depth blocks.
        buffer: copies of the class that a masked trunk sees.
        head: (depth, width) of the head.

    Raises:
        ValueError: for an unknown kind, sizes below 1, classes below 0, a dropout outside [0, 1), a patch size that
            does not divide the image, or heads that don't the width.
    """

    @door
    def __init__(
        self, kind: str, image: Sequence[int], size: int, classes: int = 0, width: int = 128, depth: int = 2,
        heads: int = 4, buffer: int = 4, head: Sequence[int] = (3, 128), dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.one_of("kind", kind, KINDS)
        if len(image) != 3 or len(head) != 2:
            raise ValueError(f"image must be (c, h, w) and head (depth, width); got {tuple(image)} and {tuple(head)}")
        sizes = {"size": size, "width": width, "depth": depth, "heads": heads, "buffer": buffer}
        size, width, depth, heads, buffer = (checks.whole(name, value) for name, value in sizes.items())
        classes, dropout = checks.whole("classes", classes, 0), checks.real("dropout", dropout, least=0, below=1)
        image, head = (
            [checks.whole(*pair) for pair in zip(names, values, strict=True)]
            for names, values in (
                (("channels", "height", "width of the image"), image),
                (("depth of the head", "width of the head"), head),
            )
        )
        self.config: dict[str, Any] = {
            "kind": kind, "image": list(image), "size": size, "classes": classes, "width": width, "depth": depth,
            "heads": heads, "buffer": buffer, "head": list(head), "dropout": dropout,
        }  # fmt: skip
        token = (image[0], size, size)
        self.kind, self.image, self.size, self.classes = kind, (image[0], image[1], image[2]), size, classes
        self.count = patch_count(image[1], image[2], size)
        options = self.count, math.prod(token), classes, width, depth, heads, dropout
        self.trunk = Masked(*options, buffer) if kind == "masked" else Causal(*options)
        self.head = Head(token, width, head[1], head[0])
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        for part in (*(layer.modulation for layer in self.head.layers), self.head.modulation, self.head.out):
            nn.init.zeros_(part.weight)  # type: ignore[arg-type]
        self.float()  # whatever torch's default is

    @inner
    def forward(
        self,
        images: Tensor,
        gamma: Tensor,
        tokens: Tokens,
        permutation: Permutation,
        start: int,
        labels: Labels,
        repeats: int,
    ) -> Tensor:
        """The head's answers for all tokens from `start` on, each noised `repeats` times: (b m repeats, c, p, p)."""
        z = self.trunk(tokens, permutation, start, permutation.shape[1], labels)
        return self.head(images, gamma, z.flatten(0, 1).repeat_interleave(repeats, 0))
