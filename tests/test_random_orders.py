"""Patches in any order: schedules, orders drawn for each image, bounds, samples, and what a model does with them."""

import itertools
import math

import pytest
import torch
from cases import randn, times
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from gudlib import bases, exact, families, likelihood, priors, samplers, schedules
from gudlib.model import GUD
from gudlib.process import Process

SHAPE, SIZE, COUNT, D = (1, 2, 6), 2, 3, 12
PIXEL = bases.Pixel(SHAPE)
EVEN = priors.Prior(priors.Moments(torch.zeros(SHAPE).double(), torch.ones(SHAPE).double()), torch.ones(SHAPE).double())
ORDERS = torch.tensor(list(itertools.permutations(range(COUNT))))
APART = torch.arange(D, dtype=torch.float64)[:, None] - torch.arange(D)
C = 0.8 * (-APART.square() / 20).exp() + 0.15 * 0.7 ** APART.abs() + 0.05 * torch.eye(D, dtype=torch.float64)


def even(b=None, shape=SHAPE, order="random"):
    """Patches that are all alike, from gamma -14 to 5."""
    one = torch.ones(shape, dtype=torch.float64)
    prior = priors.Prior(priors.Moments(0 * one, one), one)
    return families.Sequential(bases.Pixel(shape), prior, "patches 2", b, finest=math.exp(-7.0), order=order)


def cut(components):
    """(..., c, h, w) to (..., L, numbers of a patch)."""
    return functional.pixel_unshuffle(components, SIZE).flatten(-2).mT


# Schedules


@given(st.permutations(range(6)), st.floats(1 / 6, 1.0))
def test_another_order_is_the_raster_schedule_with_patches_exchanged(order, b):
    family, t = even(shape=(3, 4, 6)), times(13)
    raster, other = family.schedule(b), family.schedule(b, torch.tensor(order))
    for one, exchanged in ((raster.gamma(t), other.gamma(t)), (raster.dgamma_dt(t), other.dgamma_dt(t))):
        assert torch.equal(cut(exchanged)[:, order], cut(one))
    assert torch.equal(other.kinks, raster.kinks)


@given(st.permutations(range(6)), st.floats(1 / 6, 1.0))
def test_components_keep_their_own_ends_in_any_order(order, b):
    """The schedule of a label that says when each patch is generated."""
    shape = (1, 4, 6)
    variance = torch.linspace(2, 0.1, 24, dtype=torch.float64).view(shape)
    prior = priors.interpolated(priors.Moments(torch.zeros(shape, dtype=torch.float64), variance), 0.5)
    family = families.Sequential(bases.Pixel(shape), prior, "patches 2", order="random")
    label = torch.tensor(order).argsort()[schedules.patch_order(shape, 2).long()]
    expected = schedules.sequential(label, b, family.low, family.high)
    assert torch.equal(family.schedule(b, torch.tensor(order)).gamma(times(9)), expected.gamma(times(9)))


def test_each_image_may_have_an_order_and_a_softness_of_its_own():
    family, b = even(), torch.linspace(0.4, 1, len(ORDERS), dtype=torch.float64)
    t = times(len(ORDERS), 0.2, 0.7)
    for order, softness in ((ORDERS, b), (ORDERS, 0.5), (ORDERS[3], b)):
        many = family.schedule(softness, order)
        each = [family.schedule(*one) for one in zip(b.tolist() if softness is b else [0.5] * len(b),
                                                     order.expand(len(b), -1), strict=True)]  # fmt: skip
        assert many.batch == (len(b),)
        assert torch.equal(many.gamma(t), torch.stack([one.gamma(x) for one, x in zip(each, t, strict=True)]))


def test_all_at_once_no_order_matters():
    family = even()
    assert torch.equal(family.schedule(1.0, ORDERS).gamma(0.4), family.schedule(1.0).gamma(0.4).expand(6, *SHAPE))


# What is drawn in training


def found(gamma):
    """The order of patches by their noise, (n, L)."""
    return cut(gamma).mean(-1).argsort(1)


def numbers(orders):
    """Which of all orders each is."""
    return (orders[:, None] == ORDERS).all(-1).long().argmax(1)


def test_orders_in_a_batch_are_independent_and_all_are_as_likely(generator):
    n = 3600
    drawn = numbers(found(even((1 / 3, 0.34))(n, generator).gamma(torch.full((n,), 0.5, dtype=torch.float64))))
    assert ((drawn.bincount(minlength=6) - n / 6).square() / (n / 6)).sum() < 20.5  # one in a thousand
    pairs = 6 * drawn[::2] + drawn[1::2]  # of neighbours
    assert ((pairs.bincount(minlength=36) - n / 72).square() / (n / 72)).sum() < 66.6


def test_orders_know_nothing_of_softness_and_leave_it_as_it_is():
    """Of the same generator: the schedules of raster order, each with its patches exchanged."""
    n, t = 500, torch.full((500,), 0.5, dtype=torch.float64)
    raster, other = (even(order=o)(n, torch.Generator().manual_seed(3)).gamma(t) for o in ("raster", "random"))
    assert torch.equal(cut(raster).sort(1).values, cut(other).sort(1).values) and not torch.equal(raster, other)
    assert torch.equal(found(raster), torch.arange(3).expand(n, 3))
    spread = cut(raster)[:, 2, 0] - cut(raster)[:, 0, 0]  # the larger, the smaller b
    first = (found(other)[:, 0] == 0).double()
    assert torch.corrcoef(torch.stack([spread, first]))[0, 1].abs() < 0.12


# Likelihood


def information(order, covariance, b, low=-14.0, high=14.0):
    """What each patch adds along an order, in nats, by its place, for the exact denoiser."""
    family = even(shape=SHAPE)
    family.low, family.high = torch.full_like(family.low, low), torch.full_like(family.high, high)
    schedule = family.schedule(b, order)
    return cut(exact.information(schedule, lambda gamma: exact.gaussian_error(gamma, covariance))).sum(-1)


@pytest.mark.parametrize("b", [1 / COUNT, 0.6, 1.0])
def test_of_the_exact_denoiser_the_bound_does_not_depend_on_the_order(b):
    nats = torch.stack([information(order, C, b).sum() for order in ORDERS])
    torch.testing.assert_close(nats, nats[:1].expand(6), rtol=1e-9, atol=1e-9)
    noise = torch.tensor([-14.0, 14.0], dtype=torch.float64).exp()
    less, more = (0.5 * torch.logdet(C / x + torch.eye(D, dtype=torch.float64)) for x in noise)
    torch.testing.assert_close(nats[0], less - more, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_one_by_one_its_terms_are_those_of_the_chain_rule_in_that_order(order):
    """Half the log determinant of each patch's covariance given those generated before it."""
    terms, place = information(order, C, 1 / COUNT), cut(torch.arange(D).view(SHAPE))
    for k, patch in enumerate(order.tolist()):
        own, before = place[patch], place[order[:k]].flatten()
        gain = C[own][:, before] @ C[before][:, before].inverse()
        left = C[own][:, own] - gain @ C[before][:, own]
        ends = [torch.logdet(left * math.exp(-end) + torch.eye(4, dtype=torch.float64)) for end in (-14.0, 14.0)]
        assert terms[patch].item() == pytest.approx(float(ends[0] - ends[1]) / 2, abs=2e-4)
    if order.tolist() != [0, 1, 2]:
        assert (terms - information(ORDERS[0], C, 1 / COUNT)).abs().max() > 0.1


def test_a_bound_along_random_orders_is_the_average_over_all_orders():
    """For a model whose last patch alone listens to others, the better the later it comes; by quadrature for each."""
    family, alone = even(), C.diagonal().diag()
    last = cut(torch.arange(D).view(SHAPE))[-1]

    def matrix(gamma):
        deaf = exact.linear_eps(gamma, alone)
        deaf[:, last] = exact.linear_eps(gamma, C)[:, last]
        return deaf

    def model(white_t, gamma):
        return (matrix(gamma) @ white_t.flatten(1)[..., None]).view_as(white_t)

    def error(gamma):
        return exact.linear_error(matrix(gamma), gamma, C)

    def along(n, generator):
        orders.append(family.random_orders(n, generator))
        return family.schedule(0.4, orders[-1])

    each = torch.stack([exact.information(family.schedule(0.4, order), error).sum() for order in ORDERS])
    root = math.sqrt(D) * torch.linalg.cholesky(C).mT.reshape(D, *SHAPE)
    images = torch.cat([root, -root]).repeat(100, 1, 1, 1)  # of mean 0 and covariance C
    process = Process(PIXEL, EVEN, family.schedule(0.4))
    whole = likelihood.bound(model, process, images, 1)
    for importance in (False, True):
        orders = []
        got = likelihood.bound(model, process, images, 20, importance=importance, chunk=2000, schedules=along)
        assert [len(some) for some in orders] == [2000, 400] * 20 and not torch.equal(orders[0], orders[2])
        nats = got.diffusion.sum(-1).mean(1)
        apart, scatter = nats.mean() - each.mean(), nats.std() / math.sqrt(20)
        assert apart.abs() < 4 * scatter and 20 * scatter < each.max() - each.min()
        torch.testing.assert_close(got.prior[0], whole.prior[0])


@pytest.mark.usefixtures("unchecked")
def test_schedules_of_a_bound_must_end_where_the_process_does():
    model, family = exact.gaussian(torch.zeros(D, dtype=torch.float64), C), even()
    process, images = Process(PIXEL, EVEN, family.schedule(0.5)), 0.5 * randn(4, *SHAPE)
    for low, high, at in ((-13.0, 5.0, 0), (-14.0, 6.0, 1)):
        other = schedules.linear(SHAPE, low, high)
        with pytest.raises(ValueError, match=f"ends of the process's; at t = {at} gamma is 1 apart"):
            likelihood.bound(model, process, images, 1, schedules=lambda n, g, other=other: other)
    with pytest.raises(ValueError, match="steps must be None along schedules for each image; got 5"):
        likelihood.bound(model, process, images, 1, steps=5, schedules=family)


# Samples


@pytest.mark.parametrize("b", [1 / COUNT, 0.6])
def test_samples_in_every_order_have_the_mean_and_the_covariance_of_the_data(b):
    """Every image has an order of its own; nothing is drawn, unit vectors in the place of noise tell the law."""
    mean = torch.linspace(-1, 1, D, dtype=torch.float64)
    model, family = exact.gaussian(mean, C), even()
    start = torch.cat([torch.zeros(1, D), torch.eye(D)]).double().repeat(6, 1).view(-1, *SHAPE)
    process = Process(PIXEL, EVEN, family.schedule(b, ORDERS.repeat_interleave(D + 1, 0)))
    out = samplers.sample(model, process, len(start), round(40 / b), "heun", start=start).white.view(6, D + 1, D)
    response = out[:, 1:] - out[:, :1]
    covariance = response.mT @ response
    gone = process.schedule.alpha(1.0).max()  # of the mean, which the start knows nothing of
    assert (out[:, 0] - mean).abs().max() < 0.01 + 2 * gone and (covariance - C).abs().max() < 0.02
    assert (response[0] - response[5]).abs().max() > 0.1  # by other ways


# Models


def pictures(n=200, seed=0):
    """One pattern or its negative in all patches, and a little noise: any patch tells the others."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 2 - 1
    pattern = torch.randint(0, 2, (1, 4, 4), generator=torch.Generator().manual_seed(5)) * 2 - 1
    return (128 + 60 * sign * pattern + torch.randint(-20, 20, (n, 1, 4, 4), generator=generator)).to(torch.uint8)


def fitted(order="random", **options):
    options = {"blocks": "patches 2", "network": "transformer", "reference": "independent gaussian"} | options
    return GUD.fit(pictures(), order=order, width=16, depth=1, heads=2, verbose=False, **options)


@pytest.fixture(scope="module")
def model():
    """Not trained, but not silent."""
    made, generator = fitted(), torch.Generator().manual_seed(0)
    for part in made.denoiser.network.parameters():
        torch.nn.init.normal_(part, std=0.3, generator=generator)
    return made


@pytest.fixture
def told(model):
    """The order of each image in each call of the denoiser where all patches have noise levels of their own."""
    seen = []

    def watch(_, inputs):
        levels = cut(inputs[1].expand(len(inputs[0]), -1, -1, -1)).mean(-1)
        distinct = levels.sort(1).values.diff().min(1).values > 1e-3
        seen.extend(levels.argsort(1)[distinct].tolist())

    handle = model.denoiser.register_forward_pre_hook(watch)
    yield seen
    handle.remove()


GIVEN = torch.tensor([2, 0, 3, 1])
EACH = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 3, 1], [3, 2, 1, 0], [1, 0, 2, 3]])
NOTHING = torch.zeros(4, 4, dtype=torch.bool)


@pytest.mark.parametrize("fill", [False, True])
def test_pictures_are_drawn_in_the_orders_given_or_each_in_one_of_its_own(model, told, fill):
    def draw(**options):
        told.clear()
        if fill:
            return model.inpaint(pictures(5), NOTHING, b=0.6, steps=10, **options)
        return model.sample(5, b=0.6, steps=10, chunk=2, **options)

    draw(order=GIVEN)
    assert len(told) >= 5 and all(order == GIVEN.tolist() for order in told)
    draw(order=EACH)
    assert sorted(told) == sorted(EACH.tolist() * (len(told) // 5))  # the same images in each of their calls
    first = draw()
    orders, times = {tuple(order) for order in told}, len(told) // 5
    assert 3 <= len(orders) <= 5 and all(told.count(list(order)) % times == 0 for order in orders)
    assert torch.equal(draw(), first) and {tuple(order) for order in told} == orders
    assert not torch.equal(draw(seed=1), first) and {tuple(order) for order in told} != orders


def test_each_picture_goes_with_its_own_order(model):
    options = {"method": "ddim", "steps": 12, "b": 0.3, "chunk": 2}
    alone = torch.stack([model.sample(5, order=order, **options)[i] for i, order in enumerate(EACH)])
    own, others = (
        (model.sample(5, order=order, **options).int() - alone.int()).abs() for order in (EACH, EACH.roll(1, 0))
    )
    assert own.max() <= 1 and others.flatten(1).amax(1).min() > 9  # but for rounding


def test_a_bound_has_one_order_for_all_images_or_another_for_each_image_and_draw(model, told):
    images = pictures(30, seed=9)
    fixed = model.likelihood(images, b=0.9, draws=3, order=GIVEN)
    assert len(told) > 45 and all(order == GIVEN.tolist() for order in told)
    told.clear()
    drawn = model.likelihood(images, b=0.9, draws=3)
    assert len(told) > 45 and len({tuple(order) for order in told}) > 20
    assert drawn.bits == model.likelihood(images, b=0.9, draws=3).bits != fixed.bits
    assert model.bits_per_dim(images, b=0.9, draws=3) == drawn.bits
    assert torch.equal(model.nll(images, b=0.9, draws=3, order=GIVEN), fixed.nats.mean(0))


def test_a_process_is_in_reading_order_or_the_one_given(model):
    gamma = [model.process(b=0.6, order=order).schedule.gamma(0.5) for order in (None, GIVEN, EACH)]
    assert found(gamma[0][None]).tolist() == [[0, 1, 2, 3]] and found(gamma[1][None]).tolist() == [GIVEN.tolist()]
    assert torch.equal(found(gamma[2]), EACH) and model.recommended == {"b": 1.0}
    assert "in random orders" in repr(model) and "in random orders" not in repr(fitted("raster"))


def test_a_file_keeps_the_order_and_those_without_one_are_in_reading_order(model, tmp_path):
    model.save(tmp_path / "random")
    again = GUD.load(tmp_path / "random")
    assert again.family.spec == model.family.spec and again.family.spec["of"]["order"] == "random"
    assert torch.equal(again.sample(5, b=0.3, steps=8), model.sample(5, b=0.3, steps=8))
    assert torch.equal(*(m.sample(5, b=0.3, steps=8, order=EACH) for m in (again, model)))
    fitted("raster").save(tmp_path / "raster")
    plain = GUD.load(tmp_path / "raster")
    assert "order" not in plain.family.spec["of"]
    with pytest.raises(ValueError, match=r"order is for models of patches with order='random'"):
        plain.process(order=GIVEN)


def test_where_to_stop_is_chosen_along_random_orders_too(model):
    tuned = fitted(known=0.0)
    bits = tuned.choose_finest(pictures(20, seed=3), (0.35, 20.0), draws=2, b=0.5)
    assert set(bits) == {0.35, 20.0} and tuned.family.order == "random"


def test_training_in_random_orders_teaches_every_order():
    """24 of them, none of which was any more than the others in training: patches known tell the others in each."""
    model, unseen = fitted(known=0.0, b=(0.25, 0.5)), pictures(64, seed=9)
    before = model.bits_per_dim(unseen, b=0.25)
    for _ in model.train_steps(200, batch=32, lr=5e-3, progress=False):
        pass
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    after = [model.bits_per_dim(unseen, b=0.25, order=order) for order in orders]
    assert max(after) < before - 0.4, after
    assert model.bits_per_dim(unseen, b=0.25, draws=8) == pytest.approx(sum(after) / 24, abs=0.2)
