"""What is known, and pictures that grow: `inpaint` and `extend` on normal fields, whose conditionals are known.

Nothing is drawn. A linear model makes a sampler linear, so unit vectors in the place of noise tell its law exactly.
"""

import math
from itertools import islice, pairwise

import pytest
import torch
from cases import BASES, COLUMN, COVARIANCE, D, matrix, moments, randn

from gudlib import bases, designs, priors, samplers, schedules
from gudlib.exact import gaussian
from gudlib.process import Process

W = 8


def apart(n):
    return (torch.arange(n)[:, None] - torch.arange(n)).double().abs()


def correlations(width):
    """Of two stationary fields, one a Markov chain and one that is not, (width, width) each."""
    i = apart(width)
    return 0.7**i, 0.98 * (-((i / 2) ** 2) / 2).exp() + 0.02 * (i == 0)


MARKOV, LONG = correlations(W)
LOW, HIGH = -14.0, 14.0


def law(monkeypatch, run, shape, root):
    """What `run(images)` returns for images 0, and how it responds to the normals behind images and noise.

    Arguments:
        run: from images (n, *shape) to a tensor (n, ...).
        root: responses of images to independent normals, (k, *shape).
    """
    size = 0

    def count(shape, **_):
        nonlocal size
        size += math.prod(shape[1:])
        return torch.zeros(shape, dtype=torch.float64)

    def units(shape, **_):
        nonlocal row
        new, size = torch.zeros(shape, dtype=torch.float64), math.prod(shape[1:])
        new.view(len(new), -1)[row : row + size] = torch.eye(size, dtype=torch.float64)
        row += size
        return new

    monkeypatch.setattr(torch, "randn", count)
    offset, row = run(torch.zeros(1, *shape, dtype=torch.float64)), len(root)
    monkeypatch.setattr(torch, "randn", units)
    out = run(torch.cat([root, torch.zeros(size, *shape, dtype=torch.float64)]))
    monkeypatch.undo()
    assert row == len(out)
    return offset.double().flatten(), (out - offset).double().flatten(1)


def root(covariance):
    """Rows that are responses to independent normals: root.T @ root = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()).T


# Known components


PATHS = {
    "common": lambda p: schedules.linear(p.mean.shape, LOW, 10.0),
    "columns": lambda p: schedules.sequential(COLUMN, 0.5, LOW, 10.0),
    "soft": lambda p: schedules.soft_conditioning(p.order, 1.5, p.log_variance, LOW, 10.0, LOW, 10.0),
}
SCATTERED = torch.tensor([1, 0, 0, 0, 1, 1]).bool().view(1, 2, 3)
HOLES = {
    "scattered pixels": ("pixel", SCATTERED),
    "coarse first": ("haar", BASES["haar"]().label("level") < 2),
    "a basis that stays coupled": ("dct", ~SCATTERED),
}


def coupled(basis, path):
    basis = BASES[basis]()
    prior = priors.interpolated(moments(basis), 0.6)
    u, s = matrix(basis), prior.scale.flatten()
    model = gaussian(randn(D, seed=20), (u @ COVARIANCE @ u.T) / s / s[:, None])
    return model, Process(basis, prior, PATHS[path](prior))


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("path, method, steps", [
    ("common", "heun", 80), ("columns", "heun", 160), ("soft", "gaussian-pc", 60), ("columns", "ancestral-mmse", 400),
])  # fmt: skip
def test_what_is_not_known_has_the_exact_conditional_distribution(monkeypatch, method, steps, holes, path):
    name, known = HOLES[holes]
    model, process = coupled(name, path)

    def run(images):
        return samplers.inpaint(model, process, images, known, steps, method).white

    units = torch.eye(D, dtype=torch.float64).view(D, *known.shape)
    offset, response = law(monkeypatch, run, known.shape, units)
    # exactly: x = a chi + s eps at t = 0, with the mean and covariance of chi those of the model
    gamma, k = process.schedule.gamma(torch.zeros((), dtype=torch.float64)).flatten(), known.flatten()
    a, s2 = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma)
    mean, covariance = a * model.means[0], a[:, None] * model.covariances[0] * a + s2.diag()
    gain = covariance[~k][:, k] @ covariance[k][:, k].inverse()
    left = covariance[~k][:, ~k] - gain @ covariance[k][:, ~k]
    given = a * process.white(torch.cat([torch.zeros(1, *known.shape), units])).flatten(1)
    wanted = mean[~k] + (given[:, k] - mean[k]) @ gain.T
    noise = response[D:]
    torch.testing.assert_close(torch.cat([offset[None], offset + response[:D]])[:, k], given[:, k])
    torch.testing.assert_close(noise[:, k].T @ noise[:, k], s2[k].diag())
    scale = covariance.diagonal()[~k].sqrt()
    assert ((offset[~k] - wanted[0]) / scale).abs().max() < 0.01
    assert ((response[:D, ~k] - (wanted[1:] - wanted[0])) / scale).abs().max() < 0.01
    error = noise[:, ~k].T @ noise[:, ~k] - left - gain @ s2[k].diag() @ gain.T
    size = left.diagonal().sqrt()
    assert (error / size / size[:, None]).abs().max() < 0.02


def test_each_image_may_have_its_own_mask_and_softness():
    model, process = coupled("pixel", "common")
    known = torch.stack([SCATTERED, ~SCATTERED, torch.ones_like(SCATTERED)])
    b, images = torch.tensor([0.4, 0.7, 1.0], dtype=torch.float64), randn(3, 1, 2, 3)
    many = process.along(schedules.sequential(COLUMN, b, LOW, 10.0))
    got = samplers.inpaint(model, many, images, known, 6, generator=torch.Generator().manual_seed(1)).white
    noise = randn(3, 1, 2, 3, seed=1)
    for i in range(3):
        path = schedules.held(schedules.sequential(COLUMN, b[i].item(), LOW, 10.0), known[i])
        gamma = path.gamma(torch.zeros((), dtype=torch.float64))
        clean = torch.sigmoid(-gamma).sqrt() * process.white(images) + torch.sigmoid(gamma).sqrt() * noise
        start = torch.where(known[i], clean, noise)[i : i + 1]
        torch.testing.assert_close(got[i : i + 1], samplers.sample(model, process.along(path), 1, 6, start=start).white)


def test_with_nothing_known_it_is_sampling_and_options_are_passed_on():
    model, process = coupled("dct", "soft")
    seeds = [torch.Generator().manual_seed(3) for _ in range(3)]
    options = dict(grid="adapted", keep=3, temperature=0.5)
    got = samplers.inpaint(
        model, process, randn(4, 1, 2, 3), torch.zeros_like(SCATTERED), 7, "ancestral", seeds[0], **options
    )
    plain = samplers.sample(model, process, 4, 7, "ancestral", seeds[1], **options)
    assert torch.equal(got.white, plain.white) and torch.equal(got.states, plain.states) and len(got.states) == 3
    default = samplers.inpaint(model, process, randn(4, 1, 2, 3), torch.zeros_like(SCATTERED), generator=seeds[2])
    start = randn(4, 1, 2, 3, seed=3)
    assert torch.equal(default.white, samplers.sample(model, process, 4, 50, "heun", start=start).white)


def test_unknown_pixels_may_be_anything():
    model, process = coupled("pixel", "common")
    images = randn(2, 1, 2, 3)
    holes = torch.where(SCATTERED, images, math.nan)
    one, other = (
        samplers.inpaint(model, process, x, SCATTERED, 8, generator=torch.Generator().manual_seed(0)).data
        for x in (images, holes)
    )
    assert torch.equal(one, other) and bool(one.isfinite().all())
    with pytest.raises(ValueError, match="images must be finite"):
        samplers.inpaint(model, process, torch.where(SCATTERED, math.nan, images), SCATTERED)


@pytest.mark.usefixtures("unchecked")
def test_masks_and_images_that_do_not_fit_are_refused():
    model, process = coupled("pixel", "common")
    images, b = randn(2, 1, 2, 3), torch.tensor([0.5, 0.6, 0.7])
    cases = [
        (dict(known=SCATTERED.expand(3, 1, 2, 3)), r"for all 2 images or for each; got \(3, 1, 2, 3\)"),
        (dict(process=process.along(schedules.sequential(COLUMN, b))), r"for all 2 images or for each"),
        (dict(known=SCATTERED[..., :2]), r"1, 2, 3\); got torch.bool of shape \(1, 2, 2\)"),
        (dict(known=SCATTERED.double()), "bool.* got torch.float64"),
        (dict(images=images[..., :2]), r"known must be bool of shape \(\*b, 1, 2, 2\); got .*\(1, 2, 3\)"),
        (dict(steps=0), "steps must be at least 1; got 0"),
        (dict(method="euler"), "got 'euler'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            samplers.inpaint(model, **(dict(process=process, images=images, known=SCATTERED) | options))


# Pictures that grow


def window(field, b, height=1):
    """A process for `height` rows of W columns, and the field whose rows have a correlation of 0.6, as a model."""
    shape = (1, height, W)
    mean, scale = torch.full(shape, 0.4, dtype=torch.float64), torch.full(shape, 0.7, dtype=torch.float64)
    prior = priors.Prior(priors.Moments(mean, scale**2), scale)
    schedule = schedules.sequential(bases.Pixel(shape).label("column"), b, LOW, HIGH)
    model = gaussian(torch.zeros(height * W, dtype=torch.float64), torch.kron(0.6 ** apart(height), field))
    return model, Process(bases.Pixel(shape), prior, schedule)


def strip(monkeypatch, field, b, context, steps, method, stride=1, columns=12, height=1):
    """Covariance, in white units, of the last `context` given columns and those that follow, (height, columns) each."""
    model, process = window(field, b, height)
    shape = (1, height, W)

    def run(images):
        made = samplers.extend(model, process, 0.7 * images + 0.4, context, steps, stride, method)
        made = list(islice(made, math.ceil(columns / stride)))
        assert all(part.shape == (len(images), 1, height, stride) and part.dtype == torch.float32 for part in made)
        return (torch.cat([0.7 * images[..., -context:] + 0.4, *made], dim=-1) - 0.4) / 0.7

    offset, response = law(monkeypatch, run, shape, root(model.covariances[0]).view(-1, *shape))
    assert offset.abs().max() < 1e-6
    return response.T @ response


def chain(field, b, context, stride=1, columns=12, height=1):
    """The same, exactly, for steps that are infinitely small and random.

    Each move draws the window as it is at the end from its conditional distribution given how it was at the start;
    nothing but the forward process on one window is known to it.
    """
    covariance = window(field, b, height)[0].covariances[0]
    column, lag = torch.arange(height * W) % W, (1 - b) / (W - 1)
    start, end = (W - context) * lag, (W - context - stride) * lag

    def marginal(t):
        gamma = LOW + (HIGH - LOW) * ((t - (1 - b) * (1 - column.double() / (W - 1))) / b).clamp(0, 1)
        a = torch.sigmoid(-gamma).sqrt()
        return a, a[:, None] * covariance * a + torch.sigmoid(gamma).diag()

    def draw(x, gain, left):
        fresh = torch.cat([x.new_zeros(len(x), len(left)), root(left)])
        return torch.cat([x @ gain.T, x.new_zeros(len(left), len(gain))]) + fresh, len(left)

    (a, then), (a_start, now) = marginal(end), marginal(start)
    known, old = column < context, column >= W - context
    given = root(covariance)[:, old]  # the last columns of an image, now the first
    seen = torch.cat([a[known] * given, (1 - a[known] ** 2).sqrt().diag()])
    gain = then[~known][:, known] @ then[known][:, known].inverse()
    unknown, new = draw(seen, gain, then[~known][:, ~known] - gain @ then[known][:, ~known])
    x = unknown.new_zeros(len(unknown), height * W)
    x[:, ~known], x[: len(seen), known] = unknown, seen
    parts = [given]
    gain = then * (a_start / a) @ now.inverse()
    left = then - gain @ now @ gain.T
    for _ in range(math.ceil(columns / stride)):
        parts.append(x[:, (column >= context) & (column < context + stride)])
        moved = torch.zeros(len(x) + height * stride, height * W, dtype=torch.float64)
        moved[: len(x), column < W - stride] = x[:, column >= stride]
        moved[len(x) :, column >= W - stride] = torch.eye(height * stride, dtype=torch.float64)
        x, _ = draw(moved, gain, left)
    parts = [torch.cat([p, p.new_zeros(len(x) - len(p), p.shape[1])]).view(len(x), height, -1) for p in parts]
    whole = torch.cat(parts, dim=-1).flatten(1)
    return whole.T @ whole


@pytest.mark.parametrize("b, method, steps", [(1 / W, "gaussian-pc", 24), (0.3, "heun", 40), (0.5, "gaussian-pc", 12)])
def test_of_a_markov_field_one_column_of_context_makes_a_strip_of_any_length(monkeypatch, b, method, steps):
    """No column is lost, doubled or cut off from its neighbour, and the last are like the first."""
    got = strip(monkeypatch, MARKOV, b, 1, steps, method, columns=14)
    assert (got - correlations(15)[0]).abs().max() < 0.005


def extrapolated(monkeypatch, *arguments, **options):
    """`strip` by a method of first order with infinitely many steps, from 10, 20 and 40."""
    few, more, many = (strip(monkeypatch, *arguments, steps, "ancestral-mmse", **options) for steps in (10, 20, 40))
    return (8 * many - 6 * more + few) / 3


@pytest.mark.parametrize("b, context, stride, height", [
    (0.3, 2, 1, 1), (0.5, 1, 1, 1), (0.3, 2, 2, 1), (0.3, 1, 3, 1), (0.3, 1, 2, 2),
])  # fmt: skip
def test_random_steps_draw_each_window_from_its_conditional_given_the_last(monkeypatch, b, context, stride, height):
    options = dict(stride=stride, columns=6, height=height)
    got, wanted = extrapolated(monkeypatch, LONG, b, context, **options), chain(LONG, b, context, **options)
    assert (got - wanted).abs().max() < 1e-3
    whole = torch.kron(0.6 ** apart(height), correlations(context + 6)[1])
    assert (wanted - whole).abs().max() > 0.01  # a longer memory would show


def test_columns_one_by_one_are_an_autoregression_of_the_order_of_the_context(monkeypatch):
    """Each is drawn from its exact conditional given the last `context`, all along; the more, the less is left open."""
    variances = []
    for context in (1, 2, 3, W - 1):
        columns = context + 8
        got = strip(monkeypatch, LONG, 1 / W, context, 24, "gaussian-pc", columns=8)
        weights = torch.linalg.solve(LONG[:context, :context], LONG[:context, context])
        variances.append(LONG[0, 0] - weights @ LONG[:context, context])
        response = torch.eye(columns, dtype=torch.float64)
        response[:context, :context] = root(LONG[:context, :context])
        for k in range(context, columns):
            response[:, k] = response[:, k - context : k] @ weights
            response[k, k] = variances[-1].sqrt()
        assert (got - response.T @ response).abs().max() < 0.01
        for lag in range(context + 1):  # as far as the window sees, the field's own, from beginning to end
            assert (got.diagonal(lag) - correlations(columns)[1].diagonal(lag)).abs().max() < 0.01
        gain = torch.linalg.solve(got[:context, :context], got[:context, context])
        assert float(LONG[0, 0] - gain @ got[:context, context]) == pytest.approx(float(variances[-1]), rel=0.02)
    assert all(a > b for a, b in pairwise(variances)) and variances[0] > 1.5 * variances[-1]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("b", [0.25, 0.3])
def test_what_is_finished_in_one_window_has_the_fields_own_law_wherever_the_window_is(monkeypatch, b, stride):
    """For deterministic steps too, whose memory of what has left the window is another."""
    context = 2
    got = strip(monkeypatch, LONG, b, context, 20, "gaussian-pc", stride, columns=10)
    wanted = correlations(context + 10)[1]
    for k in range(0, 10, stride):
        inside = slice(k, k + context + stride)
        assert (got[inside, inside] - wanted[inside, inside]).abs().max() < 0.003
    assert (got - wanted).abs().max() > 0.03


@pytest.mark.parametrize("b", [1 / W, 0.3])
@pytest.mark.parametrize("method", ["gaussian", "ancestral"])
def test_a_longer_stride_changes_nothing_for_methods_without_memory(monkeypatch, method, b):
    """Steps end at the same times; of a Markov field what leaves the window early is not missed."""
    one, *others = (strip(monkeypatch, MARKOV, b, 1, 10, method, stride) for stride in (1, 2, 3))
    for other in others:
        assert (other - one).abs().max() < 1e-3


def test_the_model_is_called_for_one_window_and_as_often_for_every_column():
    model, process = window(MARKOV, 0.3)
    calls = []

    def watched(white_t, gamma):
        calls.append(tuple(white_t.shape))
        return model(white_t, gamma)

    moving = 0.3 * (W - 1) / 0.7
    for stride, steps in ((1, 4), (2, 3), (3, 1)):
        calls.clear()
        columns = samplers.extend(watched, process, randn(2, 1, 1, 20), 2, steps, stride)
        next(columns)
        assert len(calls) == round((moving + stride - 1) * steps)
        for _ in range(3):
            calls.clear()
            next(columns)
            assert calls == [(2, 1, 1, W)] * stride * steps


@pytest.mark.parametrize("known", [2, 5, W, 20])
def test_only_the_last_columns_matter_and_the_generator_settles_the_rest(known):
    model, process = window(LONG, 0.3)
    images = randn(3, 1, 1, known)
    other = torch.cat([randn(3, 1, 1, 4, seed=8), images[..., -2:]], dim=-1)
    made = [samplers.extend(model, process, x, 2, generator=torch.Generator().manual_seed(seed))
            for x, seed in ((images, 5), (other, 5), (images, 6))]  # fmt: skip
    parts = [torch.cat(list(islice(columns, 4)), dim=-1) for columns in made]
    assert torch.equal(parts[0], parts[1]) and (parts[0] - parts[2]).abs().min() > 1e-3
    default = samplers.extend(model, process, images, 2, 2, 1, "gaussian", torch.Generator().manual_seed(5))
    assert torch.equal(parts[0][..., :1], next(default))


def test_blocks_that_are_columns_grow_as_their_pixels_do(monkeypatch):
    images, (model, pixels) = randn(3, 1, 4, 20), window(LONG, 0.3, height=4)
    waves, prior = bases.Blocks.waves((1, 4, W)), pixels.prior
    moments = priors.Moments(waves(prior.mean[None])[0], prior.moments.variance)
    columns = Process(waves, priors.Prior(moments, prior.scale), pixels.schedule)

    def turned(white_t, gamma):
        return waves(model(waves.inverse(white_t), gamma))

    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    strips = [
        torch.cat(list(islice(samplers.extend(net, process, images, 2, method="ddim"), 6)), dim=-1)
        for net, process in ((model, pixels), (turned, columns))
    ]
    torch.testing.assert_close(strips[1], strips[0], rtol=0, atol=1e-5)
    assert strips[0].std() > 1e-2


@pytest.mark.parametrize("conditioning", ["map", "grouped"])
def test_a_network_extends_colour_pictures(conditioning):
    textures = torch.randint(0, 256, (40, 3, 8, W), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fitted = designs.FittedDesign(designs.Design("plain", 0.0, (0.0, 0.0), conditioning), textures)
    process = designs.Process(fitted.basis, fitted.prior.float(), fitted.sequential(fitted.basis.label("column"), 0.3))
    made = samplers.extend(fitted.denoiser(8), process, torch.zeros(2, 3, 8, 5), 3, stride=2)
    for part in islice(made, 3):
        assert part.shape == (2, 3, 8, 2) and part.isfinite().all() and part.dtype == torch.float32
        assert not part.requires_grad
        assert 0.3 < part.std() / (textures.double() / 127.5 - 1).std() < 3


@pytest.mark.usefixtures("unchecked")
def test_strips_that_cannot_be_made_are_refused():
    model, process = window(MARKOV, 0.3)
    shape, prior = process.schedule.shape, process.prior
    column, images = bases.Pixel(shape).label("column"), randn(1, 1, 1, W)

    def with_prior(mean, scale):
        return Process(process.basis, priors.Prior(priors.Moments(mean, prior.variance), scale), process.schedule)

    tall = (1, 4, W)
    square = priors.isotropic(priors.Moments(torch.zeros(tall), torch.ones(tall)))
    rows = schedules.sequential(bases.Pixel(tall).label("row"), 0.3)
    patches, raster = (schedules.sequential(schedules.patch_order(tall, size), 0.3) for size in (2, 1))
    columns = "schedule of columns, each a lag behind its left"
    cases = [
        (dict(process=Process(bases.DCT(shape), prior, process.schedule)), "blocks that are columns, .*; got dct"),
        (dict(process=with_prior(prior.mean + column, prior.scale)), "prior the same for all columns; got pixel"),
        (dict(process=with_prior(prior.mean, prior.scale + column)), "prior the same for all columns"),
        *((dict(process=Process(bases.Pixel(tall), square, path)), columns) for path in (rows, patches)),
        (dict(process=Process(bases.Pixel(tall), square, raster)), r"images must have shape \(n, 1, 4, any width\)"),
        *((dict(process=process.along(path)), columns) for path in (
            schedules.linear(shape), schedules.sequential(column, 1.0), schedules.sequential(-column, 0.3),
            schedules.sequential(column**2, 0.3), schedules.sequential(column, torch.tensor([0.3])),
            schedules.sequential(column, 0.3, -5 - column), schedules.soft_conditioning(column, 0.5),
        )),
        (dict(context=0), "between 1 and 5 for this schedule, 8 columns and stride 1; got 0"),
        (dict(context=6), "between 1 and 5 for this schedule, 8 columns and stride 1; got 6"),
        (dict(context=5, stride=2), "between 1 and 4 for this schedule, 8 columns and stride 2; got 5"),
        (dict(context=3, images=images[..., :2]), "between 1 and 2 for this schedule, 2 columns and stride 1; got 3"),
        (dict(context=W, process=process.along(schedules.sequential(column, 1 / W))), "between 1 and 7 .*; got 8"),
        (dict(stride=0), "stride must be at least 1; got 0"),
        (dict(steps=0), "steps must be at least 1; got 0"),
        (dict(method="euler"), "got 'euler'"),
        (dict(images=images.expand(1, 1, 2, W)), r"images must have shape \(n, 1, 1, any width\); got .*1, 1, 2, 8"),
    ]  # fmt: skip
    for options, message in cases:
        made = samplers.extend(model, **(dict(process=process, images=images, context=2) | options))
        with pytest.raises(ValueError, match=message):
            next(made)
    for b, context in ((0.3, 5), (1 / W, W - 1), (0.5, 1)):  # the most that is possible
        made = samplers.extend(model, process.along(schedules.sequential(column, b)), images, context)
        assert next(made).isfinite().all()
    for width in (3, 58, 96, 257):  # however the kinks are rounded
        basis = bases.Pixel((1, 1, width))
        prior = priors.isotropic(priors.Moments(torch.zeros(1, 1, width), torch.ones(1, 1, width)))
        path = Process(basis, prior, schedules.sequential(basis.label("column"), 1 / width))
        made = samplers.extend(lambda x, gamma: x, path, randn(1, 1, 1, width), width - 1)
        assert next(made).isfinite().all()
