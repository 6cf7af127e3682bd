"""Patches in any order: schedules, orders drawn for each image, bounds and samples."""

import itertools
import math

import pytest
import torch
from cases import randn, times
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from gudlib import bases, exact, families, likelihood, priors, samplers, schedules
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
