"""Bases: exact, orthonormal, differentiable, and labelled truthfully."""

import pytest
import pywt
import torch
from cases import randn
from hypothesis import given
from hypothesis import strategies as st

from gudlib import bases

KINDS = ("pixel", "pca", "pca per channel", "fourier", "dct", "haar once", "haar to the end")
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def build(kind, shape):
    generator = torch.Generator().manual_seed(1)
    name, _, option = kind.partition(" ")
    if name == "pca":
        images = torch.randn(40, *shape, generator=generator, dtype=torch.float64).cumsum(-1)
        return bases.make(name, shape, images, per_channel=option == "per channel")
    if name == "haar":
        most = max((max(shape[1:]) - 1).bit_length(), 1)
        return bases.make(name, shape, levels=1 if option == "once" else most)
    return bases.make(name, shape)


def images_of(shape, n=2, dtype=torch.float64):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def matrix(basis):
    """Rows of U, found by sending every single pixel through."""
    n = torch.Size(basis.shape).numel()
    return basis(torch.eye(n, dtype=torch.float64).reshape(n, *basis.shape)).reshape(n, n).T


def relative(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes)
def test_inverse_undoes_forward_to_rounding(kind, shape):
    basis = build(kind, shape)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = images_of(shape, dtype=dtype)
        for there, back in ((basis, basis.inverse), (basis.inverse, basis)):
            y = there(x)
            assert y.dtype == dtype and y.shape == x.shape
            assert relative(back(y), x) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes)
def test_the_map_is_orthonormal_and_its_inverse_the_transpose(kind, shape):
    basis = build(kind, shape)
    u = matrix(basis)
    identity = torch.eye(len(u), dtype=u.dtype)
    torch.testing.assert_close(u @ u.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.inverse(identity.reshape(-1, *shape)).reshape(u.shape), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_both_ways(kind):
    basis = build(kind, (2, 3, 5))
    x = images_of(basis.shape, 1).requires_grad_()
    assert torch.autograd.gradcheck(basis, x)
    assert torch.autograd.gradcheck(basis.inverse, x)
    weight = images_of(basis.shape, 1)
    (grad,) = torch.autograd.grad((weight * basis.inverse(basis(x))).sum(), x)
    torch.testing.assert_close(grad, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_matter(kind):
    basis = build(kind, (3, 4, 6))
    x = images_of(basis.shape, 5)
    torch.testing.assert_close(basis(x.to(memory_format=torch.channels_last)), basis(x))
    torch.testing.assert_close(basis.inverse(x.to(memory_format=torch.channels_last)), basis.inverse(x))


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes)
def test_every_label_has_the_components_shape(kind, shape):
    basis = build(kind, shape)
    assert basis.labels and all(v.shape == shape and v.dtype == torch.float64 for v in basis.labels.values())
    assert ("channel" in basis.labels) == (kind != "pca" or shape[0] == 1)
    if kind != "pca":
        assert torch.equal(basis.label("channel")[:, 0, 0], torch.arange(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "pca"])
def test_colours_are_not_mixed_unless_asked(kind):
    basis = build(kind, (3, 4, 5))
    x = images_of(basis.shape)
    x[:, 1] = 0
    assert (basis(x)[:, 1] == 0).all()


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("pca")])
def test_a_basis_can_be_made_again_from_its_spec(kind):
    basis = build(kind, (2, 7, 6))
    x = images_of(basis.shape)
    assert torch.equal(bases.make(**basis.spec, shape=basis.shape)(x), basis(x))


def test_pixel_labels_are_the_coordinates():
    basis = bases.Pixel((2, 3, 4))
    assert basis.label("row")[1, 2, 3] == 2 and basis.label("column")[1, 2, 3] == 3
    assert basis.label("channel")[1, 2, 3] == 1


# Fourier


def fourier_case(shape, ny, nx, phase):
    """A plane wave with ny and nx cycles across the image, and its wave vector in radians per pixel."""
    _, h, w = shape
    ky, kx = 2 * torch.pi * ny / h, 2 * torch.pi * nx / w
    y, x = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(w, dtype=torch.float64)
    return torch.cos(ky * y + kx * x + phase).expand(1, *shape), ky, kx


@given(shape=shapes, data=st.data())
def test_a_plane_wave_lands_only_in_fourier_components_of_its_wavenumber(shape, data):
    ny, nx = (data.draw(st.integers(-(n // 2), n // 2)) for n in shape[1:])
    phase = data.draw(st.floats(-3, 3))
    wave, ky, kx = fourier_case(shape, ny, nx, phase)
    basis = bases.Fourier(shape)
    found = basis(wave)[0].abs() > 1e-9
    expected = (ky**2 + kx**2) ** 0.5
    assert (basis.label("wavenumber")[found] - expected).abs().le(1e-12).all()
    along = torch.stack([basis.label("ky")[found], basis.label("kx")[found]])
    assert (along.abs() - torch.tensor([[abs(ky)], [abs(kx)]], dtype=torch.float64)).abs().le(1e-12).all()


@given(shape=shapes)
def test_fourier_packs_the_power_of_each_wave_and_its_mirror_image(shape):
    x = images_of(shape)
    chi, spectrum = bases.Fourier(shape)(x), torch.fft.fft2(x, norm="ortho")
    mirrored = chi.flip(-2, -1).roll((1, 1), (-2, -1))  # chi_{-k}
    torch.testing.assert_close(chi**2 + mirrored**2, 2 * spectrum.abs() ** 2)


def pixel_covariance(basis, variance):
    rows = basis.inverse(variance.sqrt().flatten().diag().reshape(-1, *basis.shape)).flatten(1)
    return (rows.T @ rows).reshape(*basis.shape, *basis.shape)


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 4, 7)])
def test_stationary_variances_are_powers_and_their_noise_has_a_circulant_covariance(shape):
    x, basis = images_of(shape, 200).cumsum(-1).cumsum(-2), bases.Fourier(shape)
    variance = basis(x).var(0)
    power = basis.stationary(variance)
    torch.testing.assert_close(power, torch.fft.fft2(x - x.mean(0), norm="ortho").abs().square().sum(0) / 199)
    for values, circulant in ((power, True), (variance, False)):
        covariance = pixel_covariance(basis, values)
        for by in ((1, 0), (0, 1), (2, 3)):
            moved = covariance.roll((*by, *by), (1, 2, 4, 5))
            assert (relative(moved, covariance) < 1e-10) == circulant
    torch.testing.assert_close(basis.stationary(power), power)


def test_fourier_component_is_the_image_against_cosine_plus_sine():
    basis = bases.Fourier((1, 4, 6))
    x = images_of(basis.shape, 1)[0, 0]
    y, z = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)
    for i, j in ((0, 0), (1, 2), (3, 5), (2, 3)):
        angle = basis.label("ky")[0, i, j] * y + basis.label("kx")[0, i, j] * z
        expected = (x * (angle.cos() + angle.sin())).sum() / 24**0.5
        torch.testing.assert_close(basis(x[None, None])[0, 0, i, j], expected)


def test_fourier_power_is_that_of_the_authors_complex_transform(golden):
    # their trailing axis holds two channels, transformed one by one
    x = golden["fourier__x"].reshape(5, 4, 6, 2).permute(0, 3, 1, 2)
    theirs = golden["fourier__comp"].reshape(5, 4, 6, 2).permute(0, 3, 1, 2)
    chi = bases.Fourier((2, 4, 6))(x)
    mirrored = chi.flip(-2, -1).roll((1, 1), (-2, -1))
    torch.testing.assert_close(chi**2 + mirrored**2, 2 * theirs.abs() ** 2, rtol=1e-10, atol=1e-12)


def test_fourier_filter_with_an_even_scale_is_the_authors_filter(golden):
    x = golden["fourier__x"].reshape(5, 4, 6, 2).permute(0, 3, 1, 2)
    theirs = golden["fourier__data_white"].reshape(5, 4, 6, 2).permute(0, 3, 1, 2)
    basis = bases.Fourier((2, 4, 6))
    filtered = basis.inverse(basis(x) / golden["fourier__power"].sqrt())
    torch.testing.assert_close(filtered, theirs, rtol=1e-10, atol=1e-10)


def test_fourier_survives_scales_that_differ_between_a_wave_and_its_mirror_image():
    """A complex transform loses the round trip here: its images would not be real."""
    basis = bases.Fourier((1, 5, 6))
    x, scale = images_of(basis.shape), images_of(basis.shape, 1).exp()
    white_data = basis.inverse(basis(x) / scale)
    torch.testing.assert_close(basis.inverse(basis(white_data) * scale), x, rtol=0, atol=1e-12)


# DCT


@given(shape=shapes, data=st.data())
def test_a_cosine_lands_in_one_dct_component(shape, data):
    _, h, w = shape
    i, j = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    basis = bases.DCT(shape)
    ky, kx = basis.label("ky")[0, i, j], basis.label("kx")[0, i, j]
    torch.testing.assert_close(torch.stack([ky, kx]), torch.tensor([i / h, j / w], dtype=torch.float64) * torch.pi)
    torch.testing.assert_close(basis.label("wavenumber")[0, i, j], (ky**2 + kx**2).sqrt())
    y, x = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(w, dtype=torch.float64)
    wave = (torch.cos(ky * (y + 0.5)) * torch.cos(kx * (x + 0.5))).expand(1, *shape)
    chi = basis(wave)[0]
    torch.testing.assert_close(chi[:, i, j], wave.square().sum((0, 2, 3)).sqrt())
    chi[:, i, j] = 0
    assert chi.abs().max() < 1e-12 * h * w


# Haar


def test_haar_of_four_pixels_by_hand():
    basis = bases.Haar((1, 2, 2), levels=1)
    a, b, c, d = 1.0, 2.0, 5.0, 11.0
    chi = basis(torch.tensor([[[[a, b], [c, d]]]], dtype=torch.float64))[0, 0]
    expected = torch.tensor([[a + b + c + d, a - b + c - d], [a + b - c - d, a - b - c + d]], dtype=torch.float64) / 2
    torch.testing.assert_close(chi, expected)
    assert basis.label("orientation")[0].tolist() == [[0, 1], [2, 3]]
    assert basis.label("level")[0].tolist() == [[0, 1], [1, 1]]


@given(shape=shapes, data=st.data())
def test_a_constant_image_has_only_haar_averages(shape, data):
    levels = data.draw(st.integers(1, max((max(shape[1:]) - 1).bit_length(), 1)))
    basis = bases.Haar(shape, levels)
    chi, level = basis(torch.ones(1, *shape, dtype=torch.float64))[0], basis.label("level")
    assert chi[level > 0].abs().sum() < 1e-12 and (chi[level == 0] > 0).all()
    assert level.max() <= levels


def test_haar_averages_are_scaled_block_means():
    x = images_of((2, 8, 12))
    averages = bases.Haar((2, 8, 12), levels=2)(x)[..., :2, :3]
    torch.testing.assert_close(averages, 4 * torch.nn.functional.avg_pool2d(x, 4))


def test_images_of_coarse_blocks_have_no_finer_haar_level():
    basis = bases.Haar((1, 8, 8), levels=3)
    level = basis.label("level")
    assert [int((level == n).sum()) for n in range(4)] == [1, 3, 12, 48]
    for block, silent in ((2, [3]), (4, [2, 3])):
        x = images_of((1, 8 // block, 8 // block)).repeat_interleave(block, -1).repeat_interleave(block, -2)
        power = [basis(x)[:, level == n].square().sum().item() for n in range(4)]
        assert all((power[n] < 1e-20) == (n in silent) for n in range(4))


def test_haar_orientation_names_the_direction_of_change():
    basis = bases.Haar((1, 7, 6), levels=3)
    orientation = basis.label("orientation")
    along_columns, along_rows = images_of((1, 1, 6)).expand(2, 1, 7, 6), images_of((1, 7, 1)).expand(2, 1, 7, 6)
    assert basis(along_columns)[:, orientation >= 2].abs().max() < 1e-12
    assert basis(along_columns)[:, orientation == 1].abs().max() > 0.1
    assert basis(along_rows)[:, (orientation == 1) | (orientation == 3)].abs().max() < 1e-12


def test_haar_row_and_column_are_the_centres_of_what_a_component_covers():
    basis = bases.Haar((2, 8, 8), levels=3)
    row, column = basis.label("row")[1], basis.label("column")[1]
    centres = {(0, 0): (3.5, 3.5), (0, 3): (1.5, 5.5), (1, 6): (2.5, 4.5)}  # of the image, a quarter, a 2 x 2 block
    for place, centre in centres.items():
        assert (row[place].item(), column[place].item()) == pytest.approx(centre)
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    x[..., 2:4, 4:6] = images_of((2, 2, 2), 1)
    assert basis(x)[0, 1, 1, 6].abs() > 1e-3 and basis(x)[0, 1, 6, 1].abs() < 1e-12


@pytest.mark.usefixtures("unchecked")
def test_haar_levels_beyond_the_image_are_refused():
    bases.Haar((1, 5, 8), levels=3)
    for levels in (0, 4):
        with pytest.raises(ValueError, match="between 1 and 3"):
            bases.Haar((1, 5, 8), levels=levels)


# PCA


def coupled_images(n=400, shape=(2, 3, 4)):
    d = torch.Size(shape).numel()
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (images_of((d,), n) @ mixing).reshape(n, *shape) + 2


@pytest.mark.parametrize("per_channel", [False, True])
def test_pca_makes_the_covariance_diagonal_with_falling_eigenvalues(per_channel):
    x = coupled_images()
    basis = bases.PCA.fit(x, per_channel)
    groups = basis(x).reshape(400, 2, 12).transpose(0, 1) if per_channel else basis(x).reshape(1, 400, 24)
    for chi, values in zip(groups, basis.eigenvalues, strict=True):
        torch.testing.assert_close(chi.T.cov(), values.diag(), rtol=0, atol=1e-10)
        assert (values.diff() < 0).all()


def test_pca_labels_follow_the_components():
    x = coupled_images()
    mixed, apart = bases.PCA.fit(x), bases.PCA.fit(x, per_channel=True)
    assert mixed.label("rank").flatten().tolist() == list(range(24))
    assert apart.label("rank")[1].flatten().tolist() == list(range(12))
    for basis in (mixed, apart):
        torch.testing.assert_close(basis.label("eigenvalue"), basis(x).var(0))


def test_pca_signs_are_fixed_by_the_largest_entry():
    x = coupled_images()
    rows = bases.PCA.fit(x).matrix[0]
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(bases.PCA.fit(-x.flip(0)).matrix[0], rows)


def test_pca_of_fewer_images_than_pixels_is_still_a_basis():
    basis = bases.PCA.fit(coupled_images(5))
    u = matrix(basis)
    torch.testing.assert_close(u @ u.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (basis.eigenvalues >= 0).all() and (basis.eigenvalues[0, 4:] < 1e-10).all()


def test_pca_agrees_with_the_authors(golden):
    root = torch.linalg.cholesky(golden["pca__cov"]).T
    images = (torch.cat([root, -root]) * (47 / 2) ** 0.5).reshape(48, 1, 4, 6)  # their covariance, exactly
    basis = bases.PCA.fit(images)
    theirs, scale = golden["pca__components"].flip(0), golden["pca__scale"].flip(0)  # they sort upwards
    torch.testing.assert_close(basis.eigenvalues[0].sqrt(), scale, rtol=1e-10, atol=0)
    sign = (basis.matrix[0] * theirs).sum(1).sign()
    torch.testing.assert_close(basis.matrix[0], sign[:, None] * theirs, rtol=0, atol=1e-10)
    x = golden["pca__x"].transpose(1, 2).reshape(10, 1, 4, 6)
    chi = golden["pca__comp"].flip(1).transpose(1, 2).reshape(10, 24)
    torch.testing.assert_close(basis(x).flatten(1), sign * chi, rtol=0, atol=1e-10)
    white = golden["pca__comp_white"].flip(1).transpose(1, 2).reshape(10, 24)
    torch.testing.assert_close(basis(x).flatten(1) / scale, sign * white, rtol=0, atol=1e-10)
    back = golden["pca__data_white"].transpose(1, 2).reshape(10, 1, 4, 6)
    torch.testing.assert_close(basis.inverse(basis(x) / scale.reshape(1, 4, 6)), back, rtol=0, atol=1e-10)


@pytest.mark.parametrize("per_channel", [False, True])
def test_pca_of_grey_levels_has_the_variance_of_their_centres_and_of_the_noise_within_a_level(per_channel):
    grey = (20 * coupled_images(60)).clamp(0, 255).to(torch.uint8)
    found = bases.make("pca", (2, 3, 4), grey, per_channel=per_channel)
    expected = bases.PCA.fit((grey.double() + 0.5) / 128 - 1, per_channel)
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues + (1 / 128) ** 2 / 12, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_channel", [False, True])
def test_pca_under_symmetries_is_that_of_all_mirror_images(per_channel):
    x = coupled_images(30, (2, 3, 3))
    every = torch.cat([y for k in range(4) for y in (x.rot90(k, (2, 3)), x.rot90(k, (2, 3)).flip(3))])
    for symmetry, images in (("mirror", torch.cat([x, x.flip(3)])), ("all", every)):
        found = bases.make("pca", (2, 3, 3), x, per_channel=per_channel, symmetries=symmetry)
        values = bases.PCA.fit(images, per_channel).eigenvalues
        torch.testing.assert_close(found.eigenvalues, values)
        chi = found(images).reshape(len(images), len(values), -1).transpose(0, 1)
        for group, variances in zip(chi, values, strict=True):
            torch.testing.assert_close(group.T.cov(), variances.diag(), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="square images; got height 3, width 4"):
        bases.PCA.fit(coupled_images(5), symmetries="all")


# Errors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_are_refused_with_both_shapes(kind):
    basis = build(kind, (1, 4, 6))
    for map_, what in ((basis, "images"), (basis.inverse, "components")):
        for wrong in ((2, 1, 6, 4), (1, 4, 6), (2, 3, 4, 6)):
            with pytest.raises(ValueError, match=what) as error:
                map_(torch.zeros(wrong))
            assert "(b, 1, 4, 6)" in str(error.value) and str(wrong) in str(error.value)


@pytest.mark.usefixtures("unchecked")
def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'dct', 'fourier', 'haar', 'pca', 'pixel'"):
        bases.make("wavelet", (1, 4, 4))
    with pytest.raises(ValueError, match="has no label 'level'.*'channel', 'column', 'row'"):
        bases.Pixel((1, 4, 4)).label("level")


@pytest.mark.usefixtures("unchecked")
def test_impossible_bases_are_refused():
    with pytest.raises(ValueError, match="give images"):
        bases.make("pca", (1, 4, 4))
    with pytest.raises(ValueError, match="n at least 2"):
        bases.PCA.fit(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) or \(2, 4, 4\)"):
        bases.PCA(torch.eye(4)[None], (2, 2, 2))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        bases.PCA(torch.eye(4).expand(2, 4, 4), (2, 2, 2), torch.ones(1, 8))
    for shape in ((4, 4), (0, 4, 4)):
        with pytest.raises(ValueError, match="channel, height, width"):
            bases.Pixel(shape)


# Groups


@given(n=st.integers(1, 40), count=st.integers(1, 12), ties=st.integers(1, 4))
def test_groups_follow_the_label_keep_ties_together_and_leave_no_gap(n, count, ties):
    label = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) // ties).double().reshape(1, 1, n)
    groups = bases.groups_by(label, count)
    used = groups.unique()
    assert used.tolist() == list(range(len(used))) and len(used) <= count
    order = label.flatten().argsort()
    assert (groups.flatten()[order].diff() >= 0).all()
    assert all(groups[label == value].unique().numel() == 1 for value in label.unique())
    if ties == 1:
        sizes = groups.flatten().bincount()
        assert len(used) == min(n, count) and sizes.max() - sizes.min() <= 1


@pytest.mark.usefixtures("unchecked")
def test_integer_images_are_refused_rather_than_truncated():
    with pytest.raises(ValueError, match="floating numbers.*uint8.*gudlib.data.scale"):
        bases.DCT((1, 4, 4))(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))


# Haar beside an independent library, where both are defined


@pytest.mark.parametrize(("shape", "levels"), [((1, 8, 8), 1), ((1, 8, 8), 3), ((3, 16, 32), 4), ((2, 4, 16), 2)])
def test_haar_is_that_of_pywavelets_at_powers_of_two(shape, levels):
    images = randn(3, *shape)
    ours = bases.Haar(shape, levels)(images)
    averages, *details = pywt.wavedec2(images.numpy(), "haar", level=levels)
    h, w = averages.shape[-2:]
    torch.testing.assert_close(ours[..., :h, :w], torch.from_numpy(averages))
    for along_rows, along_columns, both in details:  # coarse to fine; named by what is differenced
        torch.testing.assert_close(ours[..., :h, w : 2 * w], torch.from_numpy(along_columns))
        torch.testing.assert_close(ours[..., h : 2 * h, :w], torch.from_numpy(along_rows))
        torch.testing.assert_close(ours[..., h : 2 * h, w : 2 * w], torch.from_numpy(both))
        h, w = 2 * h, 2 * w


def test_labels_of_one_place_are_equal_to_the_last_bit():
    haar = bases.Haar((1, 28, 28), levels=3)
    assert len(haar.label("column").unique()) == len(haar.label("row").unique()) == 24
    assert torch.equal(haar.label("column"), haar.label("row").mT)
    for basis in (bases.DCT((1, 12, 12)), bases.Fourier((1, 12, 12))):
        k = basis.label("wavenumber")
        assert torch.equal(k, k.mT) and (k.unique().diff() > 1e-6).all()


@pytest.mark.usefixtures("unchecked")
def test_a_matrix_that_is_not_orthonormal_is_refused():
    rows = torch.linalg.qr(randn(1, 16, 16)).Q
    bases.PCA(rows, (1, 4, 4))
    bases.PCA(rows.float(), (1, 4, 4))
    skewed = rows.clone()
    skewed[0, 3] += 0.01 * skewed[0, 5]
    for wrong in (1.01 * rows, skewed, rows[:, [0, 0, *range(2, 16)]], torch.full_like(rows, torch.nan)):
        with pytest.raises(
            ValueError, match=r"matrix must (have 16 orthonormal rows; .* off the identity by|be finite)"
        ):
            bases.PCA(wrong, (1, 4, 4))


@pytest.mark.usefixtures("unchecked")
def test_images_of_another_shape_than_the_one_asked_for_are_refused():
    with pytest.raises(ValueError, match=r"images must have the basis's shape, \(1, 4, 4\); got \(1, 4, 6\)"):
        bases.make("pca", (1, 4, 4), randn(5, 1, 4, 6))


def test_components_of_waves_are_the_principal_colours_at_every_wavenumber(generator):
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    waves = torch.randn(40, 3, 4, 5, generator=generator, dtype=torch.float64)
    images = bases.DCT((3, 4, 5)).inverse(torch.einsum("ij,bjhw->bihw", mix, waves)) + 2
    basis = bases.PCA.of_waves(images.flatten(1).T.cov()[None], (3, 4, 5))
    chi = bases.DCT((3, 4, 5))(images).flatten(2)
    expected = torch.cat([torch.linalg.eigvalsh(chi[..., k].T.cov()) for k in range(20)]).sort(descending=True).values
    torch.testing.assert_close(basis.eigenvalues[0], expected)
    torch.testing.assert_close(basis(images).flatten(1).var(0), expected)  # along its axes
    rows = basis.matrix[0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(60, dtype=torch.float64))
    assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize(("shape", "size"), [((2, 3, 5), 0), ((3, 4, 6), 2), ((1, 6, 6), 3)])
def test_blocks_have_one_orthonormal_matrix_each(shape, size):
    images = images_of(shape, 60).cumsum(-2)
    basis = bases.Blocks.pca(images, size)
    u = matrix(basis)
    torch.testing.assert_close(u @ u.T, torch.eye(len(u), dtype=u.dtype), rtol=0, atol=1e-12)
    x = images_of(shape)
    torch.testing.assert_close(basis.inverse(basis(x)), x)
    torch.testing.assert_close(basis.split(basis(x)), basis.split(x) @ basis.matrix.T)
    torch.testing.assert_close(basis.join(basis.split(x)), x)
    place = basis.label("column") if not size else basis.label("row") // size * 100 + basis.label("column") // size
    for block in range(basis.split(x).shape[1]):  # a block of pixels becomes the same block of components
        one = torch.zeros_like(basis.split(x))
        one[:, block] = basis.split(x)[:, block]
        components = basis(basis.join(one))[0]
        assert len(place[components.abs() > 1e-12].unique()) == 1
    c = torch.cov(basis.split(basis(images)).flatten(0, 1).T)
    torch.testing.assert_close(c, c.diagonal().diag(), rtol=0, atol=1e-10)
    assert bool((c.diagonal().diff() <= 1e-9).all())


def test_waves_of_columns_are_cosines():
    basis, x = bases.Blocks.waves((2, 5, 3)), images_of((2, 5, 3))
    along = bases.DCT((2, 5, 3)).rows
    torch.testing.assert_close(basis(x), along @ x)


def test_blocks_that_do_not_fit_are_refused():
    eye = torch.eye(6)
    for call, message in (
        (
            lambda: bases.Blocks(eye, (2, 3, 4), 2),
            "size must be that of patches which tile 3 x 4, or 0 for columns; got 2",
        ),
        (lambda: bases.Blocks(eye, (2, 4, 4)), r"matrix must have shape \(8, 8\) for such blocks; got \(6, 6\)"),
        (lambda: bases.Blocks(2 * eye, (2, 3, 4)), "matrix must have orthonormal rows; .* off the identity by 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
