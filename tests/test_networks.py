"""Networks: every conditioning runs, starts at zero, listens to gamma and lets gradients through."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from gudlib import bases, networks
from gudlib.networks import GammaGroups, UNet

LAST = torch.channels_last
each_conditioning = pytest.mark.parametrize("conditioning", networks.CONDITIONINGS)


def unet(shape=(1, 8, 8), conditioning="film", **options):
    torch.manual_seed(0)
    groups = bases.groups_by(bases.DCT(shape).label("wavenumber"), 5)
    return UNet(shape, groups, inputs=2 * shape[0], conditioning=conditioning, **(dict(width=16) | options))


def stir(network):
    """Move every parameter away from its zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return network


def inputs(shape, b=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, 2 * shape[0], *shape[1:], generator=generator)
    return images, 2 * torch.randn(b, *shape, generator=generator)


@each_conditioning
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28), (1, 32, 32), (3, 32, 32)])
def test_an_untrained_unet_answers_zero_in_the_images_shape(shape, conditioning):
    images, gamma = inputs(shape, 2)
    answer = unet(shape, conditioning, width=8)(images, gamma)
    assert answer.shape == (2, *shape) and (answer == 0).all()


@each_conditioning
@pytest.mark.parametrize("options", [dict(patch=1), dict(multipliers=(1,)), dict(multipliers=(1, 1, 2)), dict(patch=4)])
def test_other_sizes_run_too(options, conditioning):
    images, gamma = inputs((1, 16, 16))
    answer = stir(unet((1, 16, 16), conditioning, **options))(images, gamma)
    assert answer.shape == (3, 1, 16, 16) and answer.std() > 0


@each_conditioning
def test_a_trained_unet_listens_to_gamma_of_every_group(conditioning):
    network, (images, gamma) = stir(unet(conditioning=conditioning)), inputs((1, 8, 8))
    answer = network(images, gamma)
    for group in range(5):
        changed = gamma + 2.0 * (network.levels.groups == group)
        assert (network(images, changed) - answer).abs().mean() > 1e-4
    assert (network(images + 1, gamma) - answer).abs().mean() > 1e-3


@pytest.mark.parametrize("conditioning", ["film", "attention"])
def test_only_the_mean_of_gamma_in_a_group_counts(conditioning):
    network, (images, gamma) = stir(unet(conditioning=conditioning)), inputs((1, 8, 8))
    groups = network.levels.groups
    shifted = torch.zeros_like(gamma)
    for group in range(5):
        member = groups == group
        noise = torch.randn(int(member.sum()), generator=torch.Generator().manual_seed(group))
        shifted[:, member] = noise - noise.mean()
    torch.testing.assert_close(network(images, gamma + shifted), network(images, gamma), rtol=1e-4, atol=1e-5)


def test_a_map_keeps_gammas_place():
    network, (images, gamma) = stir(unet(conditioning="map", multipliers=(1,))), inputs((1, 8, 8), 1)
    changed = gamma.clone()
    changed[..., :2, :2] += gamma[..., :2, :2].flip(-1) + 1  # whatever its group's mean
    assert (network(images, changed) - network(images, gamma)).abs().mean() > 1e-4


@each_conditioning
def test_images_of_a_batch_do_not_see_one_another(conditioning):
    network, (images, gamma) = stir(unet(conditioning=conditioning)), inputs((1, 8, 8))
    together = network(images, gamma)
    for i in range(3):
        torch.testing.assert_close(network(images[i : i + 1], gamma[i : i + 1])[0], together[i], rtol=1e-3, atol=1e-4)


@each_conditioning
def test_gradients_reach_every_parameter(conditioning):
    network, (images, gamma) = stir(unet(conditioning=conditioning)), inputs((1, 8, 8))
    network(images, gamma).square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert silent == []
    # scale and shift are two halves of one layer
    assert all((p.grad != 0).all() for name, p in network.named_parameters() if name.endswith("film.bias"))


@each_conditioning
def test_an_untrained_unet_can_learn(conditioning):
    """The zeros at the start must not block one another."""
    network, (images, gamma) = unet(conditioning=conditioning), inputs((1, 8, 8))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = (network(images, gamma) - images[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gamma_groups_hold_means_and_waves_of_them():
    groups = torch.tensor([[[0, 0, 1], [1, 1, 2]]])
    gamma = torch.tensor([[[[1.0, 3.0, -6.0], [0.0, 3.0, 5.0]]]])
    features = GammaGroups(groups)(gamma)
    assert features.shape == (1, 3, 9)
    mean = torch.tensor([2.0, -1.0, 5.0])
    phase = mean[:, None] * 2 * torch.pi / torch.tensor([8.0, 16.0, 32.0, 64.0])
    expected = torch.cat([mean[:, None] / 10, phase.sin(), phase.cos()], 1)
    torch.testing.assert_close(features[0], expected)


@pytest.mark.parametrize("conditioning", ["film", "attention"])
def test_levels_beyond_reach_are_one(conditioning):
    network, (images, gamma) = stir(unet(conditioning=conditioning)), inputs((1, 8, 8))
    for end in (-GammaGroups.reach, GammaGroups.reach):
        gamma[..., :4] = end
        answer = network(images, gamma)
        gamma[..., :4] = 3 * end
        assert torch.equal(network(images, gamma), answer)
        gamma[..., :4] = 0.9 * end
        assert not torch.equal(network(images, gamma), answer)


def gradients_under_autocast(run, network, *images):
    network.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(*images).float().square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


def assert_compiled_gradients_are_right(network, images, backend):
    eager = gradients_under_autocast(network, network, *images)
    compiled = gradients_under_autocast(torch.compile(network, backend=backend), network, *images)
    wrong = {name: (compiled[name] - g).norm() / g.norm() for name, g in eager.items()}
    assert {name: error for name, error in wrong.items() if not error < 0.05} == {}


@pytest.mark.usefixtures("unchecked")
def test_compiled_gradients_are_the_eager_ones():
    """What inductor would compile (far slower) is run as it is, and has no scatter, after which inductor goes wrong."""
    operations = set()

    def backend(graph, _):
        operations.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=backend, decompositions=select_decomp_table)
    network, images = stir(unet(width=32)), inputs((1, 8, 8), 8)
    assert_compiled_gradients_are_right(network, images, backend)
    assert "aten.convolution_backward.default" in operations
    assert [name for name in operations if "index_put" in name or "scatter" in name] == []


def test_doubling_passes_gradients_on_when_compiled():
    """In this place `nn.Upsample` passes zeros on, if inductor finds a compiler to compile with (torch 2.13)."""
    part = nn.Sequential(nn.Conv2d(2, 64, 3, padding=1), stir(unet(width=32)).up[2]).to(memory_format=LAST)
    images = inputs((1, 2, 2), 4)[0].contiguous(memory_format=LAST)
    compiler = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
    assert_compiled_gradients_are_right(part, [images], "inductor" if compiler else "aot_eager")


def test_doubling_is_upsampling_and_a_convolution():
    torch.manual_seed(0)
    double, images = networks.Doubling(3, 5, 3), torch.randn(2, 3, 4, 6)
    expected = nn.functional.conv2d(nn.functional.interpolate(images, scale_factor=2), double.weight, double.bias, 1, 1)
    torch.testing.assert_close(double(images), expected)


@pytest.mark.usefixtures("unchecked")
def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 8 \(patch 2, 3 resolutions\); got 28 x 28"):
        unet((1, 28, 28), multipliers=(1, 2, 2))
    with pytest.raises(ValueError, match="'film', 'attention', 'map'.*got 'concat'"):
        unet(conditioning="concat")
