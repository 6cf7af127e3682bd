"""Networks: every conditioning runs, starts at zero, listens to gamma and lets gradients through; options are exact."""

import itertools
import os
import shutil
import sysconfig
from pathlib import Path

import cases
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional

from gudlib import bases, networks
from gudlib.networks import ConvBlock, GammaGroups, Transformer, UNet
from gudlib.schedules import patch_order

LAST = torch.channels_last
each_conditioning = pytest.mark.parametrize("conditioning", networks.CONDITIONINGS)
RICH = dict(fourier=True, maps=True, linear=4)


def unet(shape=(1, 8, 8), conditioning="film", **options):
    torch.manual_seed(0)
    basis = bases.DCT(shape)
    groups = bases.groups_by(basis.label("wavenumber"), 5)
    options = dict(width=16, inputs=2 * shape[0], inverse=basis.inverse) | options
    return UNet(shape, groups, conditioning=conditioning, **options)


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
@pytest.mark.parametrize(
    "options", [dict(patch=1), dict(multipliers=(1,)), dict(multipliers=(1, 1, 2)), dict(patch=4), dict(maps=True)]
)
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


def test_local_levels_keep_gammas_place():
    shape = (1, 8, 8)
    inverse, groups = bases.Pixel(shape).inverse, torch.zeros(shape, dtype=torch.long)
    network = stir(UNet(shape, groups, inputs=2, width=16, conditioning="local", linear=2, inverse=inverse))
    (images, gamma), told = inputs(shape, 1), []
    network.gate.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    changed = gamma.clone()
    changed[..., :2, :2] += 3
    network(images, gamma), network(images, changed)
    difference = (told[1] - told[0]).abs().amax((0, 3))
    assert difference[0, 0] > 1e-2 and difference.flatten()[1:].max() < 0.02 * difference[0, 0]


@each_conditioning
def test_images_of_a_batch_do_not_see_one_another(conditioning):
    network, (images, gamma) = stir(unet(conditioning=conditioning)), inputs((1, 8, 8))
    together = network(images, gamma)
    for i in range(3):
        torch.testing.assert_close(network(images[i : i + 1], gamma[i : i + 1])[0], together[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "conditioning, options", [*((each, {}) for each in networks.CONDITIONINGS), ("film", RICH), ("local", RICH)]
)
def test_gradients_reach_every_parameter(conditioning, options):
    network, (images, gamma) = stir(unet(conditioning=conditioning, **options)), inputs((1, 8, 8))
    network(images, gamma).square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert silent == []
    # scale and shift are two halves of one layer
    assert all((p.grad != 0).all() for name, p in network.named_parameters() if name.endswith("film.bias"))


@pytest.mark.parametrize(
    "conditioning, options", [*((each, {}) for each in networks.CONDITIONINGS), ("film", RICH), ("local", RICH)]
)
def test_an_untrained_unet_can_learn(conditioning, options):
    """The zeros at the start must not block one another."""
    network, (images, gamma) = unet(conditioning=conditioning, **options), inputs((1, 8, 8))
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


@pytest.mark.parametrize("conditioning", ["film", "attention", "local"])
def test_levels_beyond_reach_are_one(conditioning):
    network, (images, gamma) = stir(unet(conditioning=conditioning)), inputs((1, 8, 8))
    for end in (-GammaGroups.reach, GammaGroups.reach):
        gamma[..., :4] = end
        answer = network(images, gamma)
        gamma[..., :4] = 3 * end
        assert torch.equal(network(images, gamma), answer)
        gamma[..., :4] = 0.9 * end
        assert not torch.equal(network(images, gamma), answer)


# Where components act


@pytest.mark.parametrize("basis", cases.BASES)
def test_energies_are_squares_of_the_basis(basis):
    u = cases.matrix(cases.BASES[basis]())
    found = networks.energies(cases.BASES[basis]().inverse, cases.SHAPE, 1)
    torch.testing.assert_close(found.double(), u.square().view(cases.D, 2, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("basis", [bases.Pixel, bases.Haar])
def test_energies_are_means_over_patches_and_sums_over_colours(basis, patch):
    shape = (3, 8, 4)
    n, basis = 96, basis(shape)
    rows = basis(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).flatten(1).T  # U
    found = networks.energies(basis.inverse, shape, patch)
    assert found.shape == (n, 8 // patch, 4 // patch)
    for y, x in itertools.product(range(8 // patch), range(4 // patch)):
        place = torch.zeros(shape, dtype=torch.bool)
        place[:, patch * y : patch * (y + 1), patch * x : patch * (x + 1)] = True
        expected = rows[:, place.flatten()].square().sum(1) / patch**2
        torch.testing.assert_close(found[:, y, x].double(), expected, rtol=1e-5, atol=1e-6)


def test_local_levels_are_means_of_gamma_by_energy():
    shape, patch = (1, 8, 8), 2
    basis = bases.Haar(shape, 2)
    groups = basis.label("level").long()
    energy = networks.energies(basis.inverse, shape, patch)
    gamma = 3 * cases.randn(3, *shape).float()
    features = GammaGroups(groups, energy)(gamma)
    assert features.shape == (3, 4, 4, 3, 9)
    weight = energy.double() + 1e-3 * energy.double().mean()
    for b, g, y, x in itertools.product(range(3), range(3), range(4), range(4)):
        i = groups.flatten() == g
        mean = (weight[i, y, x] * gamma[b].flatten()[i]).sum() / weight[i, y, x].sum()
        phase = mean * 2 * torch.pi / torch.tensor([8.0, 16.0, 32.0, 64.0])
        expected = torch.cat([mean[None] / 10, phase.sin(), phase.cos()])
        torch.testing.assert_close(features[b, y, x, g].double(), expected, rtol=1e-4, atol=1e-5)


def test_local_levels_are_gamma_in_pixels_and_nearly_the_groups_mean_in_waves():
    shape = (1, 8, 8)
    gamma, groups = 4 * cases.randn(3, *shape).float().clamp(-3, 3), torch.zeros(shape, dtype=torch.long)
    in_pixels, in_waves = (
        10 * GammaGroups(groups, networks.energies(basis(shape).inverse, shape, 1))(gamma)[..., 0, 0]
        for basis in (bases.Pixel, bases.Fourier)
    )
    torch.testing.assert_close(in_pixels, gamma[:, 0], rtol=1e-2, atol=1e-2)
    mean = gamma.mean((1, 2, 3))
    assert (in_waves.mean((1, 2)) - mean).abs().max() < 1e-3
    assert (in_waves - mean[:, None, None]).std() < 0.3 < 3 < (gamma - mean[:, None, None, None]).std()


def test_where_a_group_has_no_energy_its_components_count_equally():
    groups = torch.tensor([[[0, 0], [1, 1]]])
    energy = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]], [[2.0, 2.0]], [[2.0, 2.0]]])
    found = 10 * GammaGroups(groups, energy)(torch.tensor([[[[4.0, -8.0], [1.0, 2.0]]]]))[0, 0, :, :, 0]
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.5], [-2.0, 1.5]]), rtol=2e-3, atol=2e-3)


def test_local_levels_are_exact_under_autocast():
    levels, gamma = unet(conditioning="local").levels, 12 * torch.rand(3, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(levels(gamma), levels(gamma).float())
        found = levels(gamma)
    assert torch.equal(found, levels(gamma))


def test_an_embedding_scales_and_shifts_at_its_place():
    torch.manual_seed(0)
    block = stir(ConvBlock(8, 16, 5))
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 5, 4, 4)
    scale, shift = torch.stack(
        [torch.stack([block.film(embedding[:, :, i, j]) for j in range(4)], -1) for i in range(4)], -2
    ).split(16, 1)
    y = block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))
    expected = block.skip(x) + block.conv2(nn.functional.silu(y * (1 + scale) + shift))
    torch.testing.assert_close(block(x, embedding), expected)
    one = embedding[:, :, :1, :1]
    torch.testing.assert_close(block(x, one), block(x, one.expand(2, 5, 4, 4)))


def test_blocks_of_coarser_resolutions_are_told_averages():
    network = stir(unet((1, 16, 16), "local", multipliers=(1, 1, 2)))
    told = {}
    for name, part in network.named_modules():
        if isinstance(part, ConvBlock):
            part.register_forward_pre_hook(lambda _, given, name=name: told.setdefault(name, given))
    network(*inputs((1, 16, 16)))
    finest = told["down.0"][1]
    assert len(told) == 3 + 2 + 6 and finest.shape[2:] == (8, 8) and finest.std((2, 3)).mean() > 1e-3
    for x, embedding in told.values():
        fold = 8 // x.shape[-1]
        expected = finest.unflatten(3, (-1, fold)).unflatten(2, (-1, fold)).mean((3, 5))
        torch.testing.assert_close(embedding, expected)


# What it sees


def seen_by(part, network, images, gamma):
    given = []
    handle = part.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    network(images, gamma)
    handle.remove()
    return given[0]


@pytest.mark.parametrize("maps", [False, True])
def test_waves_of_the_last_channels_and_maps_are_seen(maps):
    network = unet((2, 8, 8), inputs=6, fourier=True, maps=maps)
    images, gamma = cases.randn(3, 6, 8, 8).float(), 8 * cases.randn(3, 2, 8, 8).float()
    seen = nn.functional.pixel_shuffle(seen_by(network.stem, network, images, gamma), 2)
    expected = [images]
    for wave in (torch.sin, torch.cos):
        expected += [wave(2**n * torch.pi * images[:, [c]].double()) for c in (4, 5) for n in range(2, 8)]
    if maps:
        assert gamma.abs().max() > 15
        expected += [gamma.clamp(-15, 15) / 10, 1 / (1 + gamma.double().exp())]  # alpha^2
    torch.testing.assert_close(seen, torch.cat([x.float() for x in expected], 1), rtol=1e-3, atol=2e-4)


def test_neighbouring_grey_levels_are_opposite_in_the_finest_wave():
    network = unet((1, 2, 2), inputs=1, fourier=True, patch=1, multipliers=(1,))
    grey = (torch.arange(256.0)[:, None, None, None] + 0.3).expand(-1, 1, 2, 2) / 128 - 1
    seen = seen_by(network.stem, network, grey, torch.zeros(256, 1, 2, 2))
    for finest in (seen[:, 6], seen[:, 12]):
        torch.testing.assert_close(finest[1:], -finest[:-1], rtol=0, atol=1e-3)
        assert finest.abs().min() > 0.5


@pytest.mark.parametrize("conditioning", ["film", "local"])
@pytest.mark.parametrize("linear_all", [False, True])
def test_the_linear_path_adds_gated_filters(conditioning, linear_all):
    shape, options = (2, 8, 8), dict(inputs=6, fourier=True, maps=True, linear=3, linear_all=linear_all)
    network = unet(shape, conditioning, **options)
    images, gamma = cases.randn(3, 6, 8, 8).float(), 2 * cases.randn(3, *shape).float()
    assert (network(images, gamma) == 0).all()  # as it starts
    nn.init.normal_(network.filters.weight)
    seen = nn.functional.pixel_shuffle(seen_by(network.stem, network, images, gamma), 2) if linear_all else images
    gate = network.gate(network.embed(network.levels(gamma).flatten(-2)))  # (b, l), or at each patch
    gate = gate.view(3, *(1, 1, 3) if conditioning == "film" else (4, 4, 3)).expand(3, 4, 4, 3)
    expected = torch.zeros(3, *shape)
    for c, k in itertools.product(range(2), range(3)):
        answer = nn.functional.conv2d(seen, network.filters.weight[[3 * c + k]], padding=3)[:, 0]
        for y, x in itertools.product(range(8), range(8)):
            expected[:, c, y, x] += gate[:, y // 2, x // 2, k] * answer[:, y, x]
    torch.testing.assert_close(network(images, gamma), expected, rtol=1e-4, atol=1e-3)


def test_dropout_is_of_training_only_and_of_features_before_the_second_convolution():
    network, (images, gamma) = stir(unet(dropout=0.25)), inputs((1, 8, 8))
    block = network.down[0]
    assert torch.equal(network.eval()(images, gamma), stir(unet())(images, gamma))
    whole = seen_by(block.conv2, network, images, gamma)
    assert not torch.equal(network.train()(images, gamma), network(images, gamma))
    torch.manual_seed(0)
    first = seen_by(block.conv2, network, images, gamma)
    dropped = (first == 0) & (whole != 0)
    assert abs(dropped.float().mean() - 0.25) < 0.03
    torch.testing.assert_close(first[~dropped], whole[~dropped] / 0.75)
    torch.manual_seed(0)
    assert torch.equal(seen_by(block.conv2, network, images, gamma), first)


@each_conditioning
def test_a_network_is_made_again_from_its_config_its_groups_and_the_basis(conditioning):
    options = dict(fourier=True, maps=True, dropout=0.1, patch=1, multipliers=(1, 1))
    options |= dict(linear=2, linear_all=True) if conditioning in networks.EMBEDDED else {}
    network, (images, gamma) = stir(unet(conditioning=conditioning, **options)).eval(), inputs((1, 8, 8))
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in network.config.items() if k != "kind"}
    state = network.state_dict()
    again = UNet(groups=state["levels.groups"], inverse=bases.DCT((1, 8, 8)).inverse, **config)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(images, gamma), network(images, gamma))
    assert state.keys() == {"levels.groups", *(name for name, _ in network.named_parameters())}


# Gradients when compiled


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
@pytest.mark.parametrize("conditioning, options", [("film", {}), ("local", RICH | dict(multipliers=(1,)))])
def test_compiled_gradients_are_the_eager_ones(conditioning, options):
    """What inductor would compile (far slower) is run as it is, and has no scatter, after which inductor goes wrong."""
    operations = set()

    def backend(graph, _):
        operations.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=backend, decompositions=select_decomp_table)
    network, images = stir(unet(conditioning=conditioning, width=32, **options)), inputs((1, 8, 8), 8)
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
    with pytest.raises(ValueError, match="'film', 'attention', 'map', 'local'.*got 'concat'"):
        unet(conditioning="concat")
    with pytest.raises(ValueError, match="'local' needs inverse"):
        unet(conditioning="local", inverse=None)
    with pytest.raises(ValueError, match="linear = 2 needs a conditioning of .'film', 'local'.; got 'map'"):
        unet(conditioning="map", linear=2)
    with pytest.raises(ValueError, match="dropout must be a finite number at least 0 and below 1; got 1.5"):
        unet(dropout=1.5)


# Transformer


def transformer(shape=(3, 8, 12), **options):
    torch.manual_seed(0)
    return Transformer(shape, 3 * shape[0], **(dict(patch=4, width=16, depth=2, heads=2) | options))


def told(shape, b=2, seed=2):
    """Three images, and noise levels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, 3 * shape[0], *shape[1:], generator=generator)
    return images, 2 * torch.randn(b, *shape, generator=generator)


@pytest.mark.parametrize("options", [{}, dict(patch=2, heads=4), dict(depth=1)])
def test_a_transformer_answers_zero_and_then_an_image(options):
    images, gamma = told((3, 8, 12))
    network = transformer(**options)
    assert (network(images, gamma) == 0).all()
    answer = stir(network)(images, gamma)
    assert answer.shape == (2, 3, 8, 12) and answer.std() > 0
    config = network.config | {"shape": tuple(network.config["shape"])}
    assert config.pop("kind") == "transformer"
    again = Transformer(**config)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images, gamma), answer)


def test_every_patch_of_a_transformer_hears_every_other_and_its_level():
    shape, network = (1, 8, 12), stir(transformer((1, 8, 12)))
    images, gamma = told(shape)
    answer = network(images, gamma)
    for patch in range(6):
        inside = network.levels.groups == patch
        for changed in (network(images + inside, gamma), network(images, gamma + inside)):
            moved = (changed - answer).abs().mean((0, 1))
            by_patch = [moved[(network.levels.groups == k)[0]].mean() for k in range(6)]
            assert min(by_patch) > 1e-6 and max(by_patch) == by_patch[patch]


def test_patches_of_a_transformer_are_those_of_patch_order():
    network, order = transformer((3, 8, 12)), patch_order((3, 8, 12), 4)
    assert torch.equal(network.levels.groups, (order - order.min()).long())


def sees(network, states):
    """The table of block-causal attention, patch by patch; without it everyone sees everyone."""
    mask = torch.zeros(len(states), len(states), dtype=torch.bool)
    for i, j in itertools.product(range(len(states)), repeat=2):
        if network.between is None or i == j:
            mask[i, j] = True
        elif states[i] == "finished":
            mask[i, j] = states[j] == "finished" and j < i
        elif states[i] == "moving":
            mask[i, j] = states[j] != "waiting"
    return mask


def plainly(network, images, gamma):
    """A transformer of one colour as its docstring says it, one image and one patch at a time."""
    p, answers = network.patch, []
    for x, g in zip(images, gamma, strict=True):
        waves = [f(2.0**n * torch.pi * x[-1:]) for f in (torch.sin, torch.cos) for n in range(2, 8)]
        seen = torch.cat([x, *waves, g.clamp(-15, 15) / 10, 1 / (1 + g.exp())])
        tokens, levels, states = [], [], []
        rows, columns = x.shape[1] // p, x.shape[2] // p
        for r, c in itertools.product(range(rows), range(columns)):
            inside = (..., slice(r * p, r * p + p), slice(c * p, c * p + p))
            tokens.append(network.stem(seen[inside].flatten()) + network.place[r * columns + c])
            low, high = network.between or (-torch.inf, torch.inf)
            states.append("finished" if g[inside].max() <= low else "waiting" if g[inside].min() >= high else "moving")
            m = g[inside].clamp(-12, 12).mean()
            phase = m * 2 * torch.pi / torch.tensor([8.0, 16.0, 32.0, 64.0])
            levels.append(network.level(torch.cat([m[None] / 10, phase.sin(), phase.cos()])))
        y = torch.stack(tokens)
        told, mask = torch.stack(levels), sees(network, states)
        for i in range(network.config["depth"]):
            a1, b1, c1, a2, b2, c2 = (network.modulation(told) + network.offset[i]).chunk(6, 1)
            q, k, v = network.qkv[i](nn.functional.layer_norm(y, y.shape[1:]) * (1 + a1) + b1).chunk(3, 1)
            heads = []
            for h in torch.arange(q.shape[1]).chunk(network.heads):
                share = (q[:, h] @ k[:, h].T / len(h) ** 0.5).masked_fill(~mask, -torch.inf).softmax(1)
                heads.append(share @ v[:, h])
            y = y + (1 + c1) * network.out[i](torch.cat(heads, 1))
            y = y + (1 + c2) * network.mlp[i](nn.functional.layer_norm(y, y.shape[1:]) * (1 + a2) + b2)
        a, b = network.last(told).chunk(2, 1)
        out = network.head(nn.functional.layer_norm(y, y.shape[1:]) * (1 + a) + b)
        if network.between:
            out = torch.stack([x if s == "moving" else 0 * x for x, s in zip(out, states, strict=True)])
        answers.append(out.view(rows, columns, p, p).permute(0, 2, 1, 3).reshape(1, rows * p, columns * p))
    return torch.stack(answers)


def test_a_transformer_is_what_it_says():
    network, (images, gamma) = stir(transformer((1, 8, 12))), told((1, 8, 12))
    torch.testing.assert_close(network(images, 4 * gamma), plainly(network, images, 4 * gamma), rtol=1e-4, atol=1e-4)


LOW, HIGH = -6.0, 5.0


def block_causal(shape=(1, 8, 12), **options):
    return stir(transformer(shape, between=(LOW, HIGH), **options))


def staged(states, patch=4, rows=2):
    """Noise levels (1, 1, h, w) of patches that are finished (f), moving (m) or waiting (w)."""
    level = torch.tensor([{"f": LOW, "m": 0.7, "w": HIGH}[s] for s in states]) + torch.arange(len(states)) * 0.01
    level = torch.where(level > 4, HIGH, torch.where(level < -4, LOW, level)).view(rows, -1)
    return level.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[None, None]


@pytest.mark.parametrize("states", ["ffmmww", "mmmmmm", "fmwmfw", "ffffff", "wwwwww", "ffffmf"])
def test_a_block_causal_transformer_is_what_its_table_says(states):
    network, (images, _) = block_causal(), told((1, 8, 12), 1)
    gamma = staged(states)
    answer = network(images, gamma)
    torch.testing.assert_close(answer, plainly(network, images, gamma), rtol=1e-4, atol=1e-4)
    moving = torch.tensor([s == "m" for s in states])[network.levels.groups]
    assert (answer[0][~moving] == 0).all() and (answer[0][moving] != 0).all()
    assert network.config["between"] == [LOW, HIGH]


def influence(network, images, gamma):
    """[i, j]: the largest derivative of patch i's features, and of its answer, by patch j's input."""
    inside = functional.one_hot(network.levels.groups[0].flatten()).T.bool()  # (patch, pixel)
    seen = []
    hook = network.qkv[-1].register_forward_hook(lambda module, given, result: seen.append(result))

    def features(x):
        answer = functional.pixel_unshuffle(network(x, gamma), network.patch).flatten(2).mT[0]
        return seen.pop()[0], answer

    parts = torch.autograd.functional.jacobian(features, images)
    hook.remove()
    out = []
    for part in parts:  # (patch, features, 1, inputs, h, w)
        each = part.abs().amax((1, 2, 3)).flatten(1)
        out.append(torch.stack([each[:, pixels].amax(1) for pixels in inside], 1))
    return out


def test_nothing_leaks_from_what_is_not_finished():
    """Derivatives are exactly zero where the table says so, and none is elsewhere."""
    network, (images, _) = block_causal(depth=3), told((1, 8, 12), 1)
    states = "ffmmww"
    features, answer = influence(network, images, staged(states))
    mask = sees(network, ["finished"] * 2 + ["moving"] * 2 + ["waiting"] * 2)
    assert torch.equal(features > 0, mask)
    assert torch.equal(answer > 0, mask & torch.tensor([s == "m" for s in states])[:, None])


def test_a_block_causal_transformer_of_permuted_movers_is_permuted():
    """Without its places, those that move know no order, and those that are finished do not matter to each other's."""
    network, (images, _) = block_causal(), told((1, 8, 12), 1)
    with torch.no_grad():
        network.place.zero_()
    gamma = staged("fffmmm")
    gamma[..., 4:, :] = 0.7
    answer = network(images, gamma)[..., 4:, :]
    rolled = torch.cat([images[..., :4, :], images[..., 4:, :].roll(4, -1)], 2)
    torch.testing.assert_close(network(rolled, gamma)[..., 4:, :], answer.roll(4, -1), rtol=1e-4, atol=1e-5)


def cut(images, patch):
    """(b, c, h, w) to (b, patch, c, p, p)."""
    c = images.shape[1]
    return functional.pixel_unshuffle(images, patch).flatten(2).mT.unflatten(2, (c, patch, patch))


@pytest.mark.parametrize("jumps", [["wwwwww", "mwwwww", "fmwwww", "ffmwww", "fffmww", "ffffmw", "fffffm", "ffffff"],
                                   ["mmwwww", "fmmmww", "ffffmm"], ["mmmmmm", "ffffff"]])  # fmt: skip
def test_a_window_says_what_the_whole_says(jumps):
    network, past = block_causal(shape=(1, 8, 12), depth=3), []
    images, _ = told((1, 8, 12), 2)
    for k, states in enumerate(jumps):
        moving = torch.tensor([s != "f" for s in states])[network.levels.groups]
        images = torch.where(moving, told((1, 8, 12), 2, seed=k)[0], images)  # what is finished stays as it is
        gamma = staged(states).expand(2, -1, -1, -1)
        kept = past[0][0].shape[2] if past else 0
        places = torch.tensor([i for i, s in enumerate(states) if s == "m" or (s == "f" and i >= kept)] or [5])
        found = network.window(cut(images, 4)[:, places], cut(gamma, 4)[:, places], places, past)
        torch.testing.assert_close(found, cut(network(images, gamma), 4)[:, places], rtol=1e-5, atol=1e-5)
        assert all(key.shape == value.shape == (2, 2, states.count("f"), 8) for key, value in past)


def test_a_transformer_of_moved_patches_is_moved():
    """Without its places it knows no order: patches rolled by one give answers rolled by one."""
    shape, network = (1, 8, 12), stir(transformer((1, 8, 12)))
    with torch.no_grad():
        network.place.zero_()
    images, gamma = told(shape)
    rolled = network(images.roll((4, 8), (2, 3)), gamma.roll((4, 8), (2, 3)))
    torch.testing.assert_close(rolled, network(images, gamma).roll((4, 8), (2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_a_transformer_of_odd_sizes_is_refused():
    with pytest.raises(ValueError, match="multiples of the patch, 4; got 8 x 10"):
        transformer((1, 8, 10))
    with pytest.raises(ValueError, match="width must be a multiple of heads, 3; got 16"):
        transformer(heads=3)
    with pytest.raises(ValueError, match=r"between must be the lowest and highest gamma; got \(5, -5\)"):
        transformer(between=(5, -5))
    for name in ("patch", "width", "depth", "heads"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            transformer(**{name: 0})
