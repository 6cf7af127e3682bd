r"""What a diffusion loss is compared with: heads that say a token's distribution outright, as a mixture of normals.

Around the same trunk, with z what it says of a token x of D numbers,

    code      x is rounded to the nearest of k codewords, fixed beforehand by k-means; cross-entropy of which one
    mixture   k normals with variances for each number, all chosen by z: their NLL (GIVT)
    mean      one normal: its mean chosen by z, one spread for all tokens. Its NLL is the mean square error, scaled

All have a density in closed form, p(x | z) = sum_j w_j N(x; m_j, s_j^2), so the chain rule gives the NLL of dequantised
images exactly; codewords, for that, have the spread of what is rounded to them. Pictures are drawn as published: a
codeword as it is, a mixture with its noise, and the mean without any at temperature 0.

References:
    Autoregressive Image Generation without Vector Quantization, T. Li, Y. Tian, H. Li, M. Deng, K. He, 2024,
    https://arxiv.org/abs/2406.11838, table 1 (cross-entropy) and appendix D.3 (mean)
    GIVT: Generative Infinite-Vocabulary Transformers, M. Tschannen, C. Eastwood, F. Mentzer, 2023,
    https://arxiv.org/abs/2312.02116
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import functional

from gudlib import checks, denoiser
from gudlib.data import dequantise
from gudlib.doors import door, inner
from gudlib.likelihood import bits_per_dim
from gudlib.mar.model import Autoregressor, permutations
from gudlib.mar.networks import Labels, Network, Permutation, Tokens
from gudlib.mar.sampling import in_order, rounds
from gudlib.mar.training import MarTrainingConfig, TokenTrainer
from gudlib.process import Batch
from gudlib.references import Reference
from gudlib.training import Data

LOSSES = ("code", "mixture", "mean")
NARROWEST = 1e-3  # spread of a normal, in units of the tokens'


class MixtureHead(nn.Module):
    """A multilayer perceptron that chooses a mixture of normals.

    Arguments:
        loss: `code`, `mixture` or `mean`.
        dim: D; context: size of z; width and depth.
        components: k, 1 for `mean`.
    """

    @inner
    def __init__(self, loss: str, dim: int, context: int, width: int, depth: int, components: int) -> None:
        super().__init__()
        self.loss, self.dim, self.components = loss, dim, components
        answers = {"code": components, "mixture": components * (1 + 2 * dim), "mean": dim}[loss]
        sizes = [context, *[width] * depth]
        hidden = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, answers))
        spread = torch.zeros(())
        self.log_spread = nn.Parameter(spread) if loss == "mean" else nn.Buffer(spread)
        self.centres = nn.Buffer(torch.zeros(components if loss == "code" else 0, dim))

    @inner
    def forward(self, z: Float[Tensor, "*n context"]) -> MixtureSameFamily:
        """p(x | z) of white tokens (*n, D)."""
        y, spread = self.body(z), self.log_spread.exp()
        if self.loss == "code":
            weight, mean = y, self.centres.expand(*z.shape[:-1], -1, -1)
        elif self.loss == "mean":
            weight, mean = torch.zeros_like(y[..., :1]), y.unflatten(-1, (1, self.dim))
        else:
            weight, rest = y[..., : self.components], y[..., self.components :]
            mean, log_spread = rest.unflatten(-1, (self.components, 2, self.dim)).unbind(-2)
            spread = log_spread.clamp(min=math.log(NARROWEST)).exp()
        normal = Normal(mean, spread.expand_as(mean), validate_args=False)
        return MixtureSameFamily(
            Categorical(logits=weight, validate_args=False), Independent(normal, 1), validate_args=False
        )


class MixtureNetwork(Network):
    """Trunk and a head that chooses a mixture.

    Arguments:
        loss: `code`, `mixture` or `mean`.
        kind, image, size, options: as for `Network`; `head` is (depth, width) of the perceptron.
        components: k, of codewords or normals.

    Raises:
        ValueError: for an unknown loss, components below 1 or other than 1 for `mean`, and as `Network`.
    """

    @door
    def __init__(
        self, loss: str, kind: str, image: Sequence[int], size: int, components: int = 1, **options: object
    ) -> None:
        checks.one_of("loss", loss, LOSSES)
        components = checks.whole("components", components, most=1 if loss == "mean" else None)
        super().__init__(kind, image, size, **options)  # type: ignore[arg-type]
        self.config |= {"loss": loss, "components": components}
        depth, width = self.config["head"]
        self.head = MixtureHead(loss, image[0] * size**2, self.config["width"], width, depth, components)  # type: ignore[assignment]
        self.float()

    @inner
    def forward(  # type: ignore[override]
        self,
        tokens: Tokens,
        permutation: Permutation,
        start: int,
        stop: int,
        labels: Labels,
        cache: list[list[Tensor]] | None = None,
    ) -> MixtureSameFamily:
        """p of white tokens permutation[:, start:stop], (b, stop - start, D)."""
        return self.head(self.trunk(tokens, permutation, start, stop, labels, cache))


@door
def codewords(tokens: Float[Tensor, "n d"], k: int, seed: int = 0, rounds: int = 20) -> Float[Tensor, "k d"]:
    """The centres of `k` clusters of white tokens, by k-means from k-means++ beginnings.

    Raises:
        ValueError: for tokens that are not finite, or fewer than k.
    """
    k, seed, rounds = checks.whole("k", k), checks.seed("seed", seed), checks.whole("rounds", rounds)
    if len(checks.finite("tokens", tokens)) < k:
        raise ValueError(f"tokens must be at least k, {k}; got {len(tokens)}")
    centres, _ = kmeans2(tokens.double().cpu().numpy(), k, rounds, minit="++", rng=seed % 2**32)
    return torch.as_tensor(centres).to(tokens)


class MixtureAutoregressor(Autoregressor):
    """An autoregressor whose tokens have a density in closed form.

    Arguments:
        network: with a mixture for each token.
        reference: of the tokens: its basis and prior are used, its distribution is not.
    """

    network: MixtureNetwork

    @door
    def __init__(self, network: MixtureNetwork, reference: Reference) -> None:
        super().__init__(network, reference)

    def check_codewords(self, fitted: bool = True) -> None:
        """Raise a ValueError unless the head is one for codewords, if `fitted` with codewords, or needs none."""
        head = self.network.head
        if head.loss != "code" and not fitted:
            raise ValueError(f"codewords are of a network of loss 'code'; this one is of {head.loss!r}")
        if head.loss == "code" and fitted and not bool(head.centres.any()):  # type: ignore[operator]
            raise ValueError("codewords must be fitted first: model.fit_codewords(images)")

    @door
    def fit_codewords(self, images: UInt8[Tensor, "n c h w"], sample: int = 20_000, seed: int = 0) -> None:
        """Codewords for a head `code`, from a sample of the images' tokens, dequantised."""
        self.check_codewords(fitted=False)
        head, generator = self.network.head, torch.Generator(images.device).manual_seed(checks.seed("seed", seed))
        checks.grey("images", images, self.network.image)
        sample = checks.whole("sample", sample, head.components)  # type: ignore[arg-type]
        tokens = self.tokens(dequantise(images, generator)).flatten(0, 1)
        some = tokens[torch.randperm(len(tokens), generator=generator, device=images.device)[:sample]]
        centres = codewords(some, head.components, seed)
        off = some - centres[torch.cdist(some, centres).argmin(1)]
        head.centres.copy_(centres)  # type: ignore[operator]
        head.log_spread.copy_(off.square().mean().sqrt().clamp(min=NARROWEST).log())  # type: ignore[operator]

    @door
    def rounded(self, images: Batch) -> Batch:
        """Data (b, c, h, w) with every token replaced by its codeword: the best that a head `code` can draw."""
        self.check_codewords(fitted=False)
        self.check_codewords()
        images = checks.data("images", images, self.network.image).float()
        tokens, centres = self.tokens(images), self.network.head.centres
        return self.images(centres[nearest(tokens, centres)])  # type: ignore[index]

    @door
    @torch.no_grad()
    def bits(
        self, images: UInt8[Tensor, "n c h w"], steps: int | None = None, seed: int = 0, chunk: int = 64
    ) -> Float[Tensor, " n"]:
        """NLL in bits per dimension of each image, dequantised, its tokens taken in `steps` steps (None: one by one).

        Unless in reading order it is of one random order for each image; tokens of one step are independent given those
        before.

        Raises:
            ValueError: for other images, sizes out of range, several tokens a step of a causal model, or codewords that
                have not been fitted.
        """
        network, chunk = self.network, checks.whole("chunk", chunk)
        self.check_codewords()
        generator = torch.Generator(images.device).manual_seed(checks.seed("seed", seed))
        cuts = rounds(network.kind, network.count, steps)
        cuts = cuts if network.kind == "masked" else [0, network.count]  # of a causal one all at once are one by one
        data = dequantise(checks.grey("images", images, network.image), generator)
        orders = permutations(network.kind == "raster", len(images), network.count, generator)
        found = []
        for part, permutation in zip(data.split(chunk), orders.split(chunk), strict=True):
            tokens = self.tokens(part)
            labels = permutation.new_full((len(part),), network.classes)
            nats = torch.zeros(len(part), dtype=torch.float64, device=images.device)
            for start, stop in pairwise(cuts):
                asked = tokens.take_along_dim(permutation[:, start:stop, None], 1)
                nats -= network(tokens, permutation, start, stop, labels).log_prob(asked).double().sum(1)
            found.append(nats + network.count * self.prior.log_volume)
        return torch.as_tensor(bits_per_dim(torch.cat(found), images[0].numel()))

    @door
    @torch.no_grad()
    def generate(
        self, n: int, generator: torch.Generator, steps: int | None = None, temperature: float = 1.0
    ) -> tuple[Batch, Permutation]:
        """Draw `n` images, data (n, c, h, w), and in which order.

        Arguments:
            n: number of images; generator: of all randomness.
            steps: of the trunk, as for `mar.generate`.
            temperature: divides the logits of a `code`, scales the spread of the others' normals.

        Raises:
            ValueError: for sizes out of range, several tokens a step of a causal model, or a negative temperature.
        """
        n, temperature = checks.whole("n", n), checks.real("temperature", temperature, least=0)
        self.check_codewords()
        network, cache = self.network, self.network.trunk.cache()
        labels = torch.full((n,), network.classes, device=generator.device)

        def draw(tokens: Tokens, permutation: Permutation, start: int, stop: int) -> Tensor:
            found = network(tokens, permutation, start, stop, labels, cache)
            return _drawn(found, network.head.loss == "code", temperature, generator)

        return in_order(self, n, rounds(network.kind, network.count, steps), generator, draw)


class MixtureTrainer(TokenTrainer):
    """Trains an autoregressor whose tokens have a density: NLL, or for a head `code` the cross-entropy of codewords."""

    model: MixtureAutoregressor

    @inner
    def __init__(
        self,
        model: MixtureAutoregressor,
        images: Data,
        labels: Int64[Tensor, " n"] | None,
        config: MarTrainingConfig,
        checkpoint: str | Path | None = None,
    ) -> None:
        model.check_codewords()
        super().__init__(model, images, labels, config, checkpoint)

    @inner
    def loss(self, index: int) -> tuple[Tensor, Tensor]:
        """The loss, in nats a number, and that of each token (b m, 1, 1, 1), on the batch of step `index`."""
        generator, mine = self.stream(index), self.mine
        tokens, permutation, start, labels = self.batch(index, generator)
        target = tokens.take_along_dim(permutation[:, start:, None], 1)[mine]
        with self.seeded(generator):
            found = self.denoiser.network(tokens[mine], permutation[mine], start, permutation.shape[1], labels[mine])
        head = self.model.network.head
        if head.loss == "code":
            which = nearest(target, head.centres)  # type: ignore[arg-type]
            logits = found.mixture_distribution.logits
            nats = functional.cross_entropy(logits.flatten(0, 1), which.flatten(), reduction="none")
        else:
            nats = -found.log_prob(target).flatten()
        nats = nats / target.shape[-1]
        return nats.mean(), nats.view(-1, 1, 1, 1)


@door
def load(path: str | Path) -> MixtureAutoregressor:
    """The model of a file written by `mar.save`, in float32 on the CPU, ready to draw.

    Raises:
        ValueError: if the file is not a complete checkpoint, or one of another network.
    """
    tensors, header = denoiser.read_saved(path)
    with denoiser.naming(path):
        if "loss" not in header["network"]:
            raise ValueError(f"{path} holds no mixture; use mar.load or denoiser.load")
        network = denoiser.saved_network(lambda: MixtureNetwork(**header["network"]), tensors)
        return MixtureAutoregressor(network, denoiser.saved_reference(tensors, header)).eval()


@inner
def nearest(tokens: Float[Tensor, "*n d"], centres: Float[Tensor, "k d"]) -> Tensor:
    """Which codeword is nearest to each token, (*n)."""
    if not len(centres):
        raise ValueError("centres must be at least one; got none")
    tokens, centres = checks.single(tokens), checks.single(centres)
    return torch.cdist(tokens.flatten(0, -2), centres.to(tokens)).argmin(1).view(tokens.shape[:-1])


def _drawn(found: MixtureSameFamily, code: bool, temperature: float, generator: torch.Generator) -> Tensor:
    logits, normal = found.mixture_distribution.logits, found.component_distribution.base_dist  # type: ignore[attr-defined]
    if code and temperature == 0:
        which = logits.argmax(-1, keepdim=True)
    else:
        chances = (logits / temperature if code else logits).softmax(-1)
        which = torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(*chances.shape[:-1], 1)
    mean, spread = (each.take_along_dim(which[..., None], -2).squeeze(-2) for each in (normal.loc, normal.scale))
    if code:
        return mean
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + temperature * spread * noise
