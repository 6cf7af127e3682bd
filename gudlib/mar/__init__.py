r"""Autoregression over continuous tokens with a diffusion loss: MAR, and two causal models to compare it with.

An image is cut into L tokens, patches of D = c p p numbers. In the order of a permutation pi the chain rule reads

    -log p(x) = -sum_k log p(x_pi(k) | x_pi(1), ..., x_pi(k-1)),

and a diffusion model gives each factor: a transformer, the *trunk*, turns the tokens known so far into a vector z for
one that is not, and a small network, the *head*, denoises that token alone, `eps_hat = head(chi_t, gamma, z)`. A head
with its z is a model like any other here, so noise, samplers and bound are those of the other modules. The loss is
E (eps - eps_hat)^2 / D, and the bounds of the factors add up to one of -log p(x).

    raster   a causal transformer, tokens in reading order
    random   the same in a new order each time; it is told where the next token goes
    masked   MAR: an encoder sees the known tokens, in no order, and a decoder asks for any of the others: several may
             be drawn in one step, as if independent given the known ones

Beside the published model, ours takes the mean off its tokens and answers through `Denoiser`'s Gaussian skip path; its
head is told the mean of its gamma, not a time step; it has no learnt variance (the bound needs none); its optimiser is
that of `gudlib.training`. The loss is along whatever schedule one gives. The published one is `schedules.cosine` to
gamma = 19.8: cut it at 7 or so, or the first of 100 sampling steps multiplies the head's error by 316.

References:
    Autoregressive Image Generation without Vector Quantization, T. Li, Y. Tian, H. Li, M. Deng, K. He, 2024,
    https://arxiv.org/abs/2406.11838
"""

from gudlib.mar.likelihood import ChainRuleLikelihood, chain_rule_bound
from gudlib.mar.model import Autoregressor, load, patchify, save, unpatchify
from gudlib.mar.networks import Network
from gudlib.mar.sampling import generate, unmasking
from gudlib.mar.training import MarTrainer, MarTrainingConfig, mask_ratio

__all__ = [
    "Autoregressor", "ChainRuleLikelihood", "MarTrainer", "MarTrainingConfig", "Network", "chain_rule_bound",
    "generate", "load", "mask_ratio", "patchify", "save", "unmasking", "unpatchify",
]  # fmt: skip
