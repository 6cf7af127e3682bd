r"""Orthonormal bases: the first of the three choices, `chi = U phi` (Gerdes, Welling and Cheng 2024).

A basis is a real orthonormal map between images `phi` and components `chi`, both of shape (batch, channel, height,
width). It has no parameters to learn and no scale: length, volume and white noise are the same on both sides,

    |chi| = |phi|,   |det U| = 1,   eps ~ N(0, I)  <=>  U eps ~ N(0, I).

Every basis names its components: `basis.labels["wavenumber"][c, i, j]` belongs to the component `chi[:, c, i, j]`.
Labels order the components for schedules and are the axes of plots.

References:
    GUD: Generation with Unified Diffusion, M. Gerdes, M. Welling, M. C. N. Cheng, 2024,
    https://arxiv.org/abs/2410.02667
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gudlib import checks, statistics
from gudlib.doors import door, inner

Images = Float[Tensor, "b c h w"]
Shape = tuple[int, int, int]


class Basis(nn.Module, ABC):
    """A real orthonormal map `U` on images of one shape.

    Arguments:
        shape: the image shape (channel, height, width).
    """

    name: str

    @door
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape: Shape = shape

    @abstractmethod
    def _analyse(self, images: Images) -> Images: ...

    @abstractmethod
    def _synthesise(self, components: Images) -> Images: ...

    @abstractmethod
    def _label(self) -> dict[str, Tensor]: ...

    @inner
    def forward(self, images: Images) -> Images:
        """Components `chi = U phi` of `images` (b, c, h, w), in their dtype and on their device.

        Raises:
            ValueError: if the image shape is not the basis's shape.
        """
        return self._analyse(images)

    @inner
    def inverse(self, components: Images) -> Images:
        """Images `phi = U^T chi` of `components` (b, c, h, w).

        Raises:
            ValueError: if the component shape is not the basis's shape.
        """
        return self._synthesise(components)

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        """Named labels, each of shape (c, h, w), float64; `channel` exists wherever colours are not mixed."""
        return self._label()

    @door
    def label(self, name: str) -> Float[Tensor, "c h w"]:
        """One label by name.

        Raises:
            ValueError: if this basis has no such label; the message lists those it has.
        """
        if name not in self.labels:
            raise ValueError(f"{type(self).__name__} has no label {name!r}; it has {sorted(self.labels)}")
        return self.labels[name]

    @property
    def spec(self) -> dict[str, Any]:
        """What `make` needs, beside the shape, to build this basis again."""
        return {"name": self.name}

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Channel, row and column of every place in the (c, h, w) array."""
        axes = [torch.arange(n, dtype=torch.float64) for n in self.shape]
        return tuple(torch.meshgrid(*axes, indexing="ij"))  # type: ignore[return-value]


class Pixel(Basis):
    """The identity: a component is a pixel. Labels: `channel`, `row`, `column`."""

    name = "pixel"

    def _analyse(self, images: Images) -> Images:
        return images

    def _synthesise(self, components: Images) -> Images:
        return components

    def _label(self) -> dict[str, Tensor]:
        channel, row, column = self._grid()
        return {"channel": channel, "row": row, "column": column}


class PCA(Basis):
    """Principal components: the basis in which the data's covariance is diagonal. One matrix product each way.

    Arguments:
        matrix: orthonormal rows of shape (g, n, n), `g = 1` with `n = c h w` (colours mixed) or `g = c` with
            `n = h w` (each channel for itself).
        shape: the image shape (channel, height, width).
        eigenvalues: variance along each row, shape (g, n), in squared units of the data.

    Labels: `rank` (0 = largest variance), `eigenvalue`; `channel` if colours are kept apart. Component `k` lies at
    place `k` of the flattened (c, h, w) array, or of its channel's (h, w) array.

    Raises:
        ValueError: if the sizes of matrix, eigenvalues and shape do not fit together, or the rows are not orthonormal.
    """

    name = "pca"

    @door
    def __init__(
        self, matrix: Float[Tensor, "g n n"], shape: Shape, eigenvalues: Float[Tensor, "g n"] | None = None
    ) -> None:
        super().__init__(shape)
        c, h, w = self.shape
        if tuple(matrix.shape) not in {(1, c * h * w, c * h * w), (c, h * w, h * w)}:
            raise ValueError(
                f"matrix must have shape (1, {c * h * w}, {c * h * w}) or ({c}, {h * w}, {h * w}) "
                f"for images of shape {self.shape}; got {tuple(matrix.shape)}"
            )
        n = matrix.shape[1]
        probe = torch.randn(2, n, 1, generator=torch.Generator().manual_seed(0)).to(matrix)
        off = float(
            (matrix[:, None] @ (matrix[:, None].mT @ probe) - probe).abs().max()
        )  # M M^T x = x costs n^2, not n^3
        if not off < 1e-3:
            raise ValueError(
                f"matrix must have {n} orthonormal rows; matrix @ matrix.T is off the identity by {off:.2g}"
            )
        if eigenvalues is None:
            eigenvalues = matrix.new_ones(matrix.shape[:2])
        self.matrix: Tensor
        self.eigenvalues: Tensor
        self.register_buffer("matrix", matrix)
        self.register_buffer("eigenvalues", eigenvalues)

    @classmethod
    @door
    def fit(cls, images: statistics.Images, per_channel: bool = False, symmetries: str = "none") -> "PCA":
        """Principal axes of `images`, by eigendecomposition of their covariance in float64.

        Each axis's sign is fixed by making its largest entry positive, so that a fit is reproducible.

        Arguments:
            images: at least two images (b, c, h, w); uint8 grey levels count as dequantised, exactly
                (`statistics.covariance`).
            per_channel: fit each channel for itself instead of mixing colours.
            symmetries: `none`, `mirror` or `all`, fit all mirror images too (`statistics.mirrored`).

        Raises:
            ValueError: if there are fewer than two images, symmetries are unknown, or `all` of images not square.
        """
        return cls.of(statistics.covariance(images, symmetries, per_channel)[1], _shape_of(images))

    @classmethod
    @door
    def of(cls, covariance: Float[Tensor, "g n n"], shape: Shape) -> "PCA":
        """Principal axes of a covariance, of all components (g = 1) or of each channel's, by eigendecomposition."""
        c, h, w = shape
        if covariance.shape[:2] not in {(1, c * h * w), (c, h * w)}:
            wanted = f"(1, {c * h * w}, {c * h * w}) or ({c}, {h * w}, {h * w})"
            raise ValueError(f"covariance must have shape {wanted}; got {tuple(covariance.shape)}")
        values, vectors = torch.linalg.eigh(checks.single(covariance))
        return cls(_signed(vectors.mT.flip(1)).contiguous(), shape, values.flip(1).clamp(min=0))

    @classmethod
    @door
    def of_waves(cls, covariance: Float[Tensor, "1 n n"], shape: Shape) -> "PCA":
        """Principal axes of what of a covariance tells apart wavenumbers of the cosine transform and, at each, colours.

        It has (c + 1) / 2 numbers for each component, which few images settle, and is as blind to where in the picture
        something is as to which waves come together.
        """
        c, h, w = shape
        if covariance.shape[1] != c * h * w:
            raise ValueError(f"covariance must be of the {c * h * w} numbers of {shape}; got {checks.what(covariance)}")
        cosines, half = DCT(shape), checks.single(covariance).reshape(-1, c, h, w)
        for _ in range(2):  # U C, then U C U^T; C is symmetric
            half = cosines(half).flatten(1).T.reshape(-1, c, h, w)
        colours = half.reshape(c, h * w, c, h * w).diagonal(dim1=1, dim2=3).permute(2, 0, 1)  # (wave, c, c)
        values, vectors = torch.linalg.eigh(colours)
        axes = torch.einsum("kie,kl->keil", vectors, torch.eye(h * w).to(vectors))
        rows, order = cosines.inverse(axes.reshape(-1, *shape)).flatten(1), values.flatten().argsort(descending=True)
        return cls(_signed(rows[order][None]), shape, values.flatten()[order][None].clamp(min=0))

    def _analyse(self, images: Images) -> Images:
        groups = images.reshape(images.shape[0], self.matrix.shape[0], -1).transpose(0, 1)
        return (groups @ self.matrix.to(images).mT).transpose(0, 1).reshape(images.shape)

    def _synthesise(self, components: Images) -> Images:
        groups = components.reshape(components.shape[0], self.matrix.shape[0], -1).transpose(0, 1)
        return (groups @ self.matrix.to(components)).transpose(0, 1).reshape(components.shape)

    def _label(self) -> dict[str, Tensor]:
        g, n = self.eigenvalues.shape
        labels = {
            "rank": torch.arange(n, dtype=torch.float64).expand(g, n).reshape(self.shape),
            "eigenvalue": self.eigenvalues.double().cpu().reshape(self.shape),
        }
        return labels | ({"channel": self._grid()[0]} if g == self.shape[0] else {})


def _shape_of(images: Tensor) -> Shape:
    return images.shape[1], images.shape[2], images.shape[3]


def _signed(rows: Float[Tensor, "g n n"]) -> Float[Tensor, "g n n"]:
    """Each row with its largest entry positive, so that a fit is reproducible."""
    return rows * rows.gather(2, rows.abs().argmax(dim=2, keepdim=True)).sign()


class Fourier(Basis):
    r"""The two-dimensional discrete Fourier transform, packed into as many real numbers as there are pixels.

    The packing is Hartley's, `chi_k = Re F_k - Im F_k` with the unitary transform `F`: for real images the pair
    `chi_k, chi_{-k}` carries real and imaginary part of `F_k`, `chi_k^2 + chi_{-k}^2 = 2 |F_k|^2`, every component is
    independent, none is redundant, and the transform is its own inverse at any size. Cost O(n log n).

    Labels: `wavenumber` |k| and `ky`, `kx` in radians per pixel; `channel`.

    References:
        A More Symmetrical Fourier Analysis Applied to Transmission Problems, R. V. L. Hartley, 1942,
        https://doi.org/10.1109/JRPROC.1942.234333
    """

    name = "fourier"

    @door
    def stationary(self, variance: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """Variances with which independent components are stationary noise: the power Var F_k, shared by k and -k.

        It is the mean of the variances of the two, which themselves differ by 4 Cov(Re F_k, Im F_k): by where in the
        picture things are. With it the covariance of two pixels depends only on the way from one to the other, around
        periodic borders.
        """
        opposite = torch.roll(variance.flip(1, 2), (1, 1), (1, 2))  # of -k
        return (variance + opposite) / 2

    def _analyse(self, images: Images) -> Images:
        short = images.dtype in (torch.half, torch.bfloat16)  # of which no transform is known
        spectrum = torch.fft.fft2(images.float() if short else images, norm="ortho")
        return (spectrum.real - spectrum.imag).to(images.dtype)

    def _synthesise(self, components: Images) -> Images:
        return self._analyse(components)

    def _label(self) -> dict[str, Tensor]:
        c, h, w = self.shape
        ky = 2 * torch.pi * torch.fft.fftfreq(h, dtype=torch.float64)[None, :, None].expand(c, h, w)
        kx = 2 * torch.pi * torch.fft.fftfreq(w, dtype=torch.float64)[None, None, :].expand(c, h, w)
        return {"channel": self._grid()[0], "wavenumber": _exact_ties(torch.hypot(ky, kx)), "ky": ky, "kx": kx}


class DCT(Basis):
    """The orthonormal discrete cosine transform (DCT-II): Fourier without periodic borders.

    Two small matrix products, O(n (h + w)), which at image sizes is faster than going through an FFT.
    Labels: `wavenumber` |k| and `ky`, `kx` in radians per pixel; `channel`.
    """

    name = "dct"

    @door
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", _cosines(self.shape[1]), persistent=False)
        self.register_buffer("columns", _cosines(self.shape[2]), persistent=False)

    def _analyse(self, images: Images) -> Images:
        return self.rows.to(images) @ images @ self.columns.to(images).T

    def _synthesise(self, components: Images) -> Images:
        return self.rows.to(components).T @ components @ self.columns.to(components)

    def _label(self) -> dict[str, Tensor]:
        channel, row, column = self._grid()
        ky, kx = torch.pi * row / self.shape[1], torch.pi * column / self.shape[2]
        return {"channel": channel, "wavenumber": _exact_ties(torch.hypot(ky, kx)), "ky": ky, "kx": kx}


def _exact_ties(label: Tensor) -> Tensor:
    """Without the float noise by which equal labels of different components differ."""
    return label.round(decimals=12)


def _cosines(n: int) -> Tensor:
    k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None, :]
    matrix = (2 / n) ** 0.5 * torch.cos(torch.pi * k * (x + 0.5) / n)
    matrix[0] /= 2**0.5
    return matrix


class Haar(Basis):
    """The two-dimensional Haar wavelet transform: block averages, then what each finer level adds. Cost O(n).

    Coefficients lie in the usual pyramid: coarse averages at the top left, finer details outwards. A row or column
    left over at an odd size joins the averages with its own weight (the unbalanced Haar transform), so every size is
    allowed, the map stays orthonormal, and a constant image has no detail.

    Arguments:
        shape: the image shape (channel, height, width).
        levels: how often averages are split again, at least 1.

    Labels: `level` (0 = averages, 1 = coarsest detail, `levels` = finest), `orientation` (0 average, 1 difference
    along the columns, 2 along the rows, 3 both), `row`, `column` (centre of the support, in pixels), `channel`.

    Raises:
        ValueError: if there are more levels than the image can be split.

    References:
        Unbalanced Haar Technique for Nonparametric Function Estimation, P. Fryzlewicz, 2007,
        https://doi.org/10.1198/016214507000000860
    """

    name = "haar"

    @door
    def __init__(self, shape: Shape, levels: int = 3) -> None:
        super().__init__(shape)
        most = (max(self.shape[1:]) - 1).bit_length()
        self.levels = levels = checks.whole(f"levels, for shape {self.shape},", levels, most=max(most, 1))
        for axis, size in (("h", self.shape[1]), ("w", self.shape[2])):
            weight = torch.ones(size, dtype=torch.float64)
            for level in range(levels):
                left, right, rest = weight[0 : size // 2 * 2 : 2], weight[1::2], weight[size // 2 * 2 :]
                rotation = torch.stack([left, right]).sqrt() / (left + right).sqrt()
                self.register_buffer(f"{axis}{level}", rotation, persistent=False)
                weight = torch.cat([left + right, rest])
                size = len(weight)

    @property
    def spec(self) -> dict[str, Any]:
        """Name and number of levels."""
        return {"name": self.name, "levels": self.levels}

    def _analyse(self, images: Images) -> Images:
        return self._down(images, 0)

    def _synthesise(self, components: Images) -> Images:
        return self._up(components, 0)

    def _down(self, x: Tensor, level: int) -> Tensor:
        if level == self.levels:
            return x
        x = _split(_split(x, self._rotation("h", level, x), -2), self._rotation("w", level, x), -1)
        h, w = (x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2
        top = torch.cat([self._down(x[..., :h, :w], level + 1), x[..., :h, w:]], dim=-1)
        return torch.cat([top, x[..., h:, :]], dim=-2)

    def _up(self, x: Tensor, level: int) -> Tensor:
        if level == self.levels:
            return x
        h, w = (x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2
        top = torch.cat([self._up(x[..., :h, :w], level + 1), x[..., :h, w:]], dim=-1)
        x = torch.cat([top, x[..., h:, :]], dim=-2)
        return _merge(_merge(x, self._rotation("w", level, x), -1), self._rotation("h", level, x), -2)

    def _rotation(self, axis: str, level: int, x: Tensor) -> Tensor:
        return self.get_buffer(f"{axis}{level}").to(x)

    def _label(self) -> dict[str, Tensor]:
        c, h, w = self.shape
        channel, row, column = self._grid()
        level = torch.zeros(self.shape, dtype=torch.float64)
        orientation = torch.zeros(self.shape, dtype=torch.float64)
        for depth in range(self.levels):
            low_h, low_w = (h + 1) // 2, (w + 1) // 2
            for part, code in (((slice(low_h), slice(low_w, w)), 1), ((slice(low_h, h), slice(low_w)), 2),
                               ((slice(low_h, h), slice(low_w, w)), 3)):  # fmt: skip
                level[:, part[0], part[1]] = self.levels - depth
                orientation[:, part[0], part[1]] = code
            h, w = low_h, low_w
        # The squared atoms are weights that sum to one: with them a centre of support is an average position.
        power = self.inverse(torch.eye(row.numel(), dtype=torch.float64).reshape(-1, *self.shape)) ** 2
        return {
            "channel": channel,
            "level": level,
            "orientation": orientation,
            "row": _exact_ties((power * row).sum(dim=(1, 2, 3)).reshape(self.shape)),
            "column": _exact_ties((power * column).sum(dim=(1, 2, 3)).reshape(self.shape)),
        }


def _split(x: Tensor, rotation: Tensor, dim: int) -> Tensor:
    """One Haar step along `dim`: weighted averages first, then differences."""
    x = x.movedim(dim, -1)
    pairs = 2 * rotation.shape[1]
    (p, q), a, b = rotation, x[..., 0:pairs:2], x[..., 1:pairs:2]
    return torch.cat([p * a + q * b, x[..., pairs:], q * a - p * b], dim=-1).movedim(-1, dim)


def _merge(x: Tensor, rotation: Tensor, dim: int) -> Tensor:
    """The inverse of `_split`, its transpose."""
    x = x.movedim(dim, -1)
    n = rotation.shape[1]
    (p, q), average, rest, difference = rotation, x[..., :n], x[..., n : x.shape[-1] - n], x[..., x.shape[-1] - n :]
    pairs = torch.stack([p * average + q * difference, q * average - p * difference], dim=-1).flatten(-2)
    return torch.cat([pairs, rest], dim=-1).movedim(-1, dim)


class Blocks(Basis):
    """One orthonormal matrix inside each block: every column of an image, or every patch, by itself.

    With the same noise for all of a block's components the process is that of pixels, whatever the matrix; what changes
    is which correlations a reference with independent components knows.

    Arguments:
        matrix: orthonormal rows, (m, m), m = c h for columns, c size^2 for patches.
        shape: the image shape (channel, height, width).
        size: of square patches; 0: columns.

    Labels: `row`, `column` of the place. Component `k` of column x lies at place (k // h, k mod h, x), the rest of a
    patch where its pixels lie, in the order channel, row, column.

    Raises:
        ValueError: if the patches don't tile the image, or the matrix is of another size or not orthonormal.
    """

    name = "blocks"

    @door
    def __init__(self, matrix: Float[Tensor, "m m"], shape: Shape, size: int = 0) -> None:
        super().__init__(shape)
        c, h, w = self.shape
        size = checks.whole("size", size, 0)
        if size and (h % size or w % size):
            raise ValueError(f"size must be that of patches which tile {h} x {w}, or 0 for columns; got {size}")
        m = c * size**2 if size else c * h
        if tuple(matrix.shape) != (m, m):
            raise ValueError(f"matrix must have shape ({m}, {m}) for such blocks; got {tuple(matrix.shape)}")
        off = float((matrix @ matrix.mT - torch.eye(m).to(matrix)).abs().max())
        if not off < 1e-3:
            raise ValueError(f"matrix must have orthonormal rows; matrix @ matrix.T is off the identity by {off:.2g}")
        self.size = size
        self.matrix: Tensor
        self.register_buffer("matrix", matrix)

    @classmethod
    @door
    def pca(cls, images: statistics.Images, size: int = 0) -> "Blocks":
        """Principal components of the blocks of `images` (b, c, h, w), the same for all blocks.

        Raises:
            ValueError: if images are neither grey levels nor data, or fewer than two; or as the class.
        """
        checks.images("images", images, least=2)
        size = checks.whole("size", size, 0)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        m = shape[0] * size**2 if size else shape[0] * shape[1]
        plain = cls(torch.eye(m, dtype=torch.float64, device=images.device), shape, size)
        vectors = torch.linalg.eigh(torch.cov(plain.split(images.double()).flatten(0, 1).T).reshape(m, m))[1]
        return cls(_signed(vectors.mT.flip(0)[None])[0].contiguous(), shape, size)

    @classmethod
    @door
    def waves(cls, shape: Shape) -> "Blocks":
        """Cosine waves along every column, colour by colour: for columns whose statistics don't depend on height."""
        return cls(torch.block_diag(*[_cosines(shape[1])] * shape[0]), shape)

    @property
    def spec(self) -> dict[str, Any]:
        """Name and size; the matrix is a tensor of its own."""
        return {"name": self.name, "size": self.size}

    @inner
    def split(self, x: Images) -> Float[Tensor, "b n m"]:
        """The n blocks of an image, or of components, each of m numbers."""
        if self.size:
            return nn.functional.pixel_unshuffle(x, self.size).flatten(2).mT
        return x.permute(0, 3, 1, 2).flatten(2)

    @inner
    def join(self, blocks: Float[Tensor, "b n m"]) -> Images:
        """The inverse of `split`.

        Raises:
            ValueError: for another number of blocks, or of numbers in each.
        """
        c, h, w = self.shape
        m = len(self.matrix)
        if blocks.shape[1:] != (c * h * w // m, m):
            raise ValueError(f"blocks must have shape (b, {c * h * w // m}, {m}); got {checks.what(blocks)}")
        if self.size:
            places = blocks.mT.unflatten(2, (h // self.size, w // self.size))
            return nn.functional.pixel_shuffle(places, self.size)
        return blocks.unflatten(2, (c, h)).permute(0, 2, 3, 1)

    def _analyse(self, images: Images) -> Images:
        return self.join(self.split(images) @ self.matrix.to(images).mT)

    def _synthesise(self, components: Images) -> Images:
        return self.join(self.split(components) @ self.matrix.to(components))

    def _label(self) -> dict[str, Tensor]:
        _, row, column = self._grid()
        return {"row": row, "column": column}


@door
def make(name: str, shape: Shape, images: statistics.Images | None = None, **options: Any) -> Basis:
    """A basis by name: `pixel`, `pca`, `fourier`, `dct` or `haar`.

    Arguments:
        name: one of the names above.
        shape: the image shape (channel, height, width).
        images: what `pca` is fitted to (b, c, h, w), as in `PCA.fit`; the others make no use of it.
        options: passed on (`levels` for `haar`, `per_channel` and `symmetries` for `pca`).

    Raises:
        ValueError: for an unknown name, or for `pca` without images or with images of another shape.

    >>> make("haar", (1, 28, 28), levels=2).label("level").unique().tolist()
    [0.0, 1.0, 2.0]
    """
    fixed = {kind.name: kind for kind in (Pixel, Fourier, DCT, Haar)}
    if name not in (*fixed, "pca"):
        raise ValueError(f"name must be one of {sorted([*fixed, 'pca'])}; got {name!r}")
    known = {"haar": ("levels",), "pca": ("per_channel", "symmetries")}.get(name, ())
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"options of {name!r} are {', '.join(known) or 'none'}; got {', '.join(unknown)}")
    if name in fixed:
        return fixed[name](shape, **options)
    if images is None:
        raise ValueError("the basis 'pca' is fitted to data: give images")
    if tuple(checks.images("images", images, least=2).shape[1:]) != tuple(shape):
        raise ValueError(f"images must have the basis's shape, {tuple(shape)}; got {tuple(images.shape[1:])}")
    return PCA.fit(images, **options)


@door
def groups_by(label: Float[Tensor, "c h w"], count: int) -> Int64[Tensor, "c h w"]:
    """Group indices 0 .. count-1 of shape (c, h, w) along a label, of as equal sizes as ties allow.

    Components with equal labels stay together, so there may be fewer groups than asked for; indices are consecutive.

    >>> groups_by(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), 2).tolist()
    [[[0, 0, 1, 1]]]
    >>> groups_by(torch.tensor([[[0.0, 1.0, 1.0, 1.0]]]), 2).tolist()
    [[[0, 1, 1, 1]]]

    Raises:
        ValueError: for a count below 1, or a label that is not finite.
    """
    count = checks.whole("count", count)
    checks.finite("label", label)
    values, inverse, sizes = label.unique(return_inverse=True, return_counts=True)
    before = sizes.cumsum(0) - sizes
    group = (before + 0.5 * sizes) * count / label.numel()
    return group.long().unique(return_inverse=True)[1][inverse]
