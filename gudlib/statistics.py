r"""Mean and covariance of images; those of dequantised grey levels are exact, though no noise is drawn.

A grey level x in {0, ..., 255} is dequantised to y = (x + u) / 128 - 1 with u uniform in [0, 1), independent of x and
for each pixel on its own. So over both the images and the noise

    E y = (E x + 1/2) / 128 - 1,      Cov y = Cov x / 128^2 + I / (12 * 128^2):

grey levels count at their centres, and the noise within a level adds `WITHIN_LEVEL` to every variance, in any
orthonormal basis.

*Symmetries* g of the square, such as the exchange of left and right, permute pixels by P_g. Statistics of the images
together with all their mirror images, for which few images then stand for more, are averages over g:

    m = mean_g P_g E y,      C = mean_g E P_g (y - m) (y - m)^T P_g^T.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gudlib import checks
from gudlib.doors import door, inner

Images = Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]
Plane = tuple[int, int]  # the dimensions that hold height and width

WITHIN_LEVEL = 1 / (12 * 128**2)  # variance of the noise within a grey level, in squared units of the data
CHUNK = 1024  # images at a time
SYMMETRIES = ("none", "mirror", "all")


@inner
def centres(images: Images) -> Float[Tensor, "b c h w"]:
    """Grey levels at their centres, (x + 1/2) / 128 - 1, float32 and exact; floating-point images as they are."""
    return images if images.is_floating_point() else (images.float() + 0.5) / 128 - 1


@inner
def mirrored(images: Images, symmetries: str = "none") -> Float[Tensor, "gb c h w"] | UInt8[Tensor, "gb c h w"]:
    """Images (b, c, h, w) and all that symmetries make of them, (gb, c, h, w).

    Arguments:
        images: any.
        symmetries: `none` (g = 1), `mirror` (the image and its left-right mirror image, g = 2), or `all` (the eight
            symmetries of the square: mirror images, and those with rows and columns exchanged).

    Raises:
        ValueError: for other symmetries, or `all` of images that are not square.
    """
    for move in _moves(symmetries, checks.batch("images", images).shape):
        images = torch.cat([images, move(images, (2, 3))])
    return images


@inner
def randomly_mirrored(images: Images, symmetries: str, generator: torch.Generator) -> Images:
    """Each image (b, c, h, w) after one of its symmetries, drawn at random; what `mirrored` gives all of.

    Raises:
        ValueError: as `mirrored`.
    """
    for move in _moves(symmetries, checks.batch("images", images).shape):
        moved = torch.randint(2, (len(images), 1, 1, 1), generator=generator, device=images.device) > 0
        images = torch.where(moved, move(images, (2, 3)), images)
    return images


@door
def covariance(
    images: Images, symmetries: str = "none", per_channel: bool = False
) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "g n n"]]:
    """Mean and covariance of images in float64, uint8 counting as dequantised (see above), for b - 1 of b images.

    Arguments:
        images: at least two images (b, c, h, w), uint8 or in units of the data.
        symmetries: as in `mirrored`; then b counts the mirror images too.
        per_channel: each channel's covariance (g = c, n = h w) instead of that of all numbers (g = 1, n = c h w).

    Raises:
        ValueError: if there are fewer than two images, they are neither grey levels nor data, or as `mirrored`.
    """
    checks.images("images", images, least=2)
    b, c, h, w = images.shape
    g, n = (c, h * w) if per_channel else (1, c * h * w)
    moves, grey = _moves(symmetries, images.shape), images.dtype == torch.uint8
    first = images.new_zeros((c, h, w), dtype=torch.float64)
    if not grey:
        first += sum(part.double().sum(0) for part in images.split(CHUNK))
        for move in moves:
            first = (first + move(first, (1, 2))) / 2
    centre, first = first / b, torch.zeros_like(first)
    second = first.new_zeros(g, c // g, h, w, c // g, h, w)
    for part in images.split(CHUNK):
        # Grey levels less 128 are whole numbers up to 2^7: float32 is exact for sums of 2^10 of their products
        x = part.float() - 128 if grey else part.double() - centre
        first += x.sum(0)
        x = x.reshape(-1, g, n).transpose(0, 1)
        second += (x.mT @ x).view_as(second)
    for move in moves:
        b, first, second = 2 * b, first + move(first, (1, 2)), second + move(second, (2, 3), (5, 6))
    mean = first / b
    centred = second.reshape(g, n, n) - b * mean.reshape(g, n, 1) * mean.reshape(g, 1, n)
    if not grey:
        return centre + mean, centred / (b - 1)
    noise = WITHIN_LEVEL * torch.eye(n, dtype=torch.float64, device=images.device)
    return (mean + 0.5) / 128, centred / (128**2 * (b - 1)) + noise


def _moves(symmetries: str, shape: torch.Size) -> list[Callable[..., Tensor]]:
    """Symmetries whose products are all of them, each a function of a tensor and the planes that it moves."""
    if symmetries not in SYMMETRIES:
        raise ValueError(f"symmetries must be one of {SYMMETRIES}; got {symmetries!r}")
    if symmetries == "all" and shape[-2] != shape[-1]:
        raise ValueError(f"symmetries 'all' are those of square images; got height {shape[-2]}, width {shape[-1]}")
    return [_left_right, _up_down, _transposed][: (0, 1, 3)[SYMMETRIES.index(symmetries)]]


def _left_right(x: Tensor, *planes: Plane) -> Tensor:
    return x.flip([w for _, w in planes])


def _up_down(x: Tensor, *planes: Plane) -> Tensor:
    return x.flip([h for h, _ in planes])


def _transposed(x: Tensor, *planes: Plane) -> Tensor:
    for plane in planes:
        x = x.transpose(*plane)
    return x
