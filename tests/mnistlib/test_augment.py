"""Random augmentation, measured: ramps of known values say where each pixel came from."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnistlib import augment

ALL = {"degrees": 20, "pixels": 2, "scale": 0.2, "shear": 10}
few = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ramps(n, height, width):
    """Three channels: column and row, each from 0 to 1, and ones that show the border."""
    x = torch.linspace(0, 1, width, dtype=torch.float64).expand(height, width)
    y = torch.linspace(0, 1, height, dtype=torch.float64).unsqueeze(1).expand(height, width)
    return torch.stack((x, y, torch.ones_like(x))).expand(n, 3, height, width)


def measure(n=50, size=(28, 28), seed=0, picture=None, **ranges):
    """Augment ramps; return what each image's ramps say: source = matrix @ target + offset.

    Both in pixels (x, y) from the middle of the image, y downwards. Bilinear interpolation of a
    ramp is exact, so the matrices are, to rounding. A picture rides along as a fourth channel.
    """
    height, width = size
    images = ramps(n, height, width)
    if picture is not None:
        images = torch.cat((images, picture.expand(n, 1, height, width)), 1)
    out = augment(images, generator=seeded(seed), **ranges).numpy()
    y, x = np.mgrid[:height, :width]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    matrices, offsets = [], []
    for image in out:
        inside = image[2] > 1 - 1e-9  # nothing from beyond the border is mixed in
        source = np.stack((image[0] * (width - 1), image[1] * (height - 1)), -1)[inside] - middle
        target = np.stack((x, y), -1)[inside] - middle
        known = np.column_stack((target, np.ones(len(target))))
        solution, *_ = np.linalg.lstsq(known, source)
        np.testing.assert_allclose(known @ solution, source, atol=1e-6)  # affine, all of it
        matrices.append(solution[:2].T)
        offsets.append(solution[2])
    return np.array(matrices), np.array(offsets), out


def test_nothing_happens_when_all_ranges_are_zero():
    images = torch.rand(4, 1, 28, 28, generator=seeded())
    random_state = torch.get_rng_state()
    assert torch.equal(augment(images), images)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("ranges", [{name: value} for name, value in ALL.items()], ids=list(ALL))
def test_each_image_gets_its_own_amounts(ranges):
    matrices, offsets, _ = measure(n=20, **ranges)
    rows = np.column_stack((matrices.reshape(20, 4), offsets))
    assert len(np.unique(rows.round(9), axis=0)) == 20


def test_all_channels_of_an_image_move_together():
    image = torch.rand(3, 1, 28, 28, generator=seeded())
    out = augment(image.expand(3, 4, 28, 28), **ALL, generator=seeded())
    assert all(torch.equal(out[:, 0], out[:, c]) for c in range(1, 4))


def test_a_generator_reproduces_it_and_leaves_the_global_random_state_alone():
    images = torch.rand(5, 1, 28, 28, generator=seeded())
    random_state = torch.get_rng_state()
    first = augment(images, **ALL, generator=seeded(1))
    assert torch.equal(augment(images, **ALL, generator=seeded(1)), first)
    assert not torch.equal(augment(images, **ALL, generator=seeded(2)), first)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_generator_goes_on_from_call_to_call():
    images, generator = torch.rand(5, 1, 28, 28, generator=seeded()), seeded()
    first = augment(images, **ALL, generator=generator)
    assert not torch.equal(augment(images, **ALL, generator=generator), first)


def test_without_a_generator_torchs_seed_reproduces_it():
    images = torch.rand(5, 1, 28, 28, generator=seeded())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = augment(images, **ALL)
        second = augment(images, **ALL)
        torch.manual_seed(0)
        assert torch.equal(augment(images, **ALL), first)
    assert not torch.equal(first, second)


@few
@given(pixels=st.floats(0.01, 6), seed=st.integers(0, 1000))
def test_translation_moves_by_at_most_so_many_pixels_and_does_nothing_else(pixels, seed):
    matrices, offsets, _ = measure(seed=seed, pixels=pixels)
    np.testing.assert_allclose(matrices, np.broadcast_to(np.eye(2), (50, 2, 2)), atol=1e-6)
    assert np.abs(offsets).max() <= pixels + 1e-6


@few
@given(degrees=st.floats(0.1, 60), seed=st.integers(0, 1000))
def test_rotation_turns_about_the_middle_and_keeps_all_distances(degrees, seed):
    matrices, offsets, _ = measure(seed=seed, degrees=degrees)
    products = matrices @ matrices.transpose(0, 2, 1)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(2), (50, 2, 2)), atol=1e-6)
    np.testing.assert_allclose(offsets, 0, atol=1e-6)
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert np.abs(angles).max() <= degrees + 1e-4
    assert angles.min() < 0 < angles.max()


@pytest.mark.parametrize("size", [(28, 28), (20, 36)])
def test_a_rotation_is_one_on_images_of_any_shape(size):
    matrices, _, _ = measure(size=size, degrees=30)
    products = matrices @ matrices.transpose(0, 2, 1)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(2), (50, 2, 2)), atol=1e-6)


@few
@given(scale=st.floats(0.01, 0.6), seed=st.integers(0, 1000))
def test_zoom_stretches_each_axis_within_its_range_and_keeps_the_middle(scale, seed):
    matrices, offsets, _ = measure(seed=seed, scale=scale)
    np.testing.assert_allclose(matrices[:, [0, 1], [1, 0]], 0, atol=1e-6)
    np.testing.assert_allclose(offsets, 0, atol=1e-6)
    zooms = 1 / matrices[:, [0, 1], [0, 1]]
    assert 1 - scale - 1e-6 <= zooms.min() < 1 < zooms.max() <= 1 + scale + 1e-6


@few
@given(shear=st.floats(0.1, 40), seed=st.integers(0, 1000))
def test_shear_slants_sideways_within_its_angle_and_keeps_the_rows(shear, seed):
    matrices, offsets, _ = measure(seed=seed, shear=shear)
    np.testing.assert_allclose(matrices[:, [0, 1], [0, 1]], 1, atol=1e-6)
    np.testing.assert_allclose(matrices[:, 1, 0], 0, atol=1e-6)
    np.testing.assert_allclose(offsets, 0, atol=1e-6)
    assert np.abs(matrices[:, 0, 1]).max() <= math.tan(math.radians(shear)) + 1e-6


@pytest.mark.parametrize("name", list(ALL))
def test_amounts_are_uniform_over_the_whole_range(name):
    matrices, offsets, _ = measure(n=400, **{name: ALL[name]})
    amounts = {
        "degrees": np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])),
        "pixels": offsets,
        "scale": 1 / matrices[:, [0, 1], [0, 1]] - 1,
        "shear": np.degrees(np.arctan(matrices[:, 0, 1])),
    }[name].ravel()
    test = scipy.stats.kstest(amounts, scipy.stats.uniform(-ALL[name], 2 * ALL[name]).cdf)
    assert test.pvalue > 0.01
    assert np.abs(amounts).max() > 0.98 * ALL[name]


any_ranges = st.fixed_dictionaries(
    {
        "degrees": st.floats(0, 40),
        "pixels": st.floats(0.1, 4),
        "scale": st.floats(0, 0.4),
        "shear": st.floats(0, 25),
    }
)


@few
@given(ranges=any_ranges, seed=st.integers(0, 1000))
def test_nothing_is_ever_mirrored_and_areas_stay_within_the_zooms(ranges, seed):
    matrices, _, _ = measure(seed=seed, **ranges)
    areas = 1 / np.linalg.det(matrices)  # of the picture, after : before
    low, high = (1 - ranges["scale"]) ** 2, (1 + ranges["scale"]) ** 2
    assert 0 < low - 1e-6 <= areas.min() <= areas.max() <= high + 1e-6


def test_an_asymmetric_picture_keeps_its_handedness():
    hook = torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    hook[..., 6:22, 9:12] = 1  # the letter L
    hook[..., 19:22, 9:20] = 1
    out = augment(hook.expand(100, 1, 28, 28), **ALL, generator=seeded())
    alike, mirrored = (out * hook).sum((1, 2, 3)), (out * hook.flip(3)).sum((1, 2, 3))
    assert (alike > mirrored).all()


@pytest.mark.parametrize("given_ranges", [{name: ALL[name]} for name in ALL] + [ALL])
def test_pictures_are_resampled_as_scipy_does(given_ranges):
    picture = torch.rand(28, 28, generator=seeded(9), dtype=torch.float64)
    matrices, offsets, out = measure(n=10, picture=picture, **given_ranges)
    for matrix, offset, image in zip(matrices, offsets, out, strict=True):
        rows_first = matrix[::-1, ::-1]  # scipy counts (row, column), from the corner
        corner = 13.5 - rows_first @ [13.5, 13.5] + offset[::-1]
        expected = scipy.ndimage.affine_transform(
            picture.numpy(), rows_first, corner, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(image[3], expected, atol=1e-5)


def test_the_centre_of_mass_of_a_dot_moves_as_measured():
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    dot = torch.exp(-((x - 17) ** 2 + (y - 10) ** 2) / 8)
    matrices, offsets, out = measure(n=30, picture=dot.double(), **ALL)
    for matrix, offset, image in zip(matrices, offsets, out, strict=True):
        weight = image[3] / image[3].sum()
        found = (weight * x.numpy()).sum() - 13.5, (weight * y.numpy()).sum() - 13.5
        expected = np.linalg.solve(matrix, np.array([17 - 13.5, 10 - 13.5]) - offset)
        np.testing.assert_allclose(found, expected, atol=0.02)


def test_zeros_come_in_from_beyond_the_border():
    out = augment(torch.ones(50, 1, 28, 28), pixels=6, generator=seeded())
    border = torch.cat((out[..., 0, :], out[..., -1, :], out[..., 0], out[..., -1]), -1)
    assert (border.amin(-1) < 0.5).all()
    assert (out[..., 8:20, 8:20] > 0.999).all()


@few
@given(ranges=any_ranges, seed=st.integers(0, 1000))
def test_values_stay_between_0_and_1(ranges, seed):
    images = torch.rand(8, 1, 28, 28, generator=seeded(seed)).round(decimals=1)
    out = augment(images, **ranges, generator=seeded(seed))
    assert 0 <= out.min() <= out.max() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (7, 3, 28, 28), (2, 1, 20, 36)])
def test_shape_and_dtype_are_kept(dtype, shape):
    out = augment(torch.rand(shape, dtype=dtype), **ALL, generator=seeded())
    assert out.shape == shape
    assert out.dtype == dtype


def test_the_given_images_are_not_changed():
    images = torch.rand(5, 1, 28, 28, generator=seeded())
    kept = images.clone()
    augment(images, **ALL, generator=seeded())
    assert torch.equal(images, kept)


def test_elastic_displacements_have_their_standard_deviation_and_are_smooth():
    ramp = ramps(400, 28, 28)
    out = augment(ramp, elastic=0.8, generator=seeded()).numpy()
    moved = (out - ramp.numpy())[:, :2, 9:19, 9:19] * 27  # columns and rows, in pixels; inside
    assert abs(moved.mean()) < 0.05
    assert 0.4 < moved.std() < 0.9  # between the points it is a mean of several, so a little less
    neighbours = np.diff(moved, axis=-1)
    assert neighbours.std() < 0.4 * moved.std()
    correlation = np.corrcoef(moved[:, 0].ravel(), moved[:, 1].ravel())[0, 1]
    assert abs(correlation) < 0.05  # the two directions are drawn apart


def test_elastic_displacements_differ_from_image_to_image_and_come_on_top_of_the_rest():
    picture = torch.rand(1, 1, 28, 28, generator=seeded()).expand(5, 1, 28, 28)
    out = augment(picture, elastic=0.5, generator=seeded())
    assert len({image.numpy().tobytes() for image in out}) == 5
    plain = augment(picture, **ALL, generator=seeded())
    both = augment(picture, **ALL, elastic=1e-6, generator=seeded())
    torch.testing.assert_close(both, plain, atol=1e-4, rtol=0)  # the affine draws are the same
