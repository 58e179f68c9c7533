"""Random augmentation, measured: ramps of known values say where each pixel came from."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from mnistlib import augment

ALL = {"degrees": 20, "pixels": 2, "scale": 0.2, "shear": 10}


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


def test_a_generator_reproduces_it_and_leaves_images_and_the_global_random_state_alone():
    images = torch.rand(6, 1, 28, 28, generator=seeded())
    kept, random_state, generator = images.clone(), torch.get_rng_state(), seeded(1)
    amounts = ALL | {"elastic": 0.5}
    first = augment(images, **amounts, generator=generator)
    assert not torch.equal(augment(images, **amounts, generator=generator), first)  # it goes on
    assert torch.equal(augment(images, **amounts, generator=seeded(1)), first)
    halves = augment(images, **amounts, generator=[seeded(1), seeded(2)])
    for half, part, seed in zip(halves.split(3), images.split(3), (1, 2), strict=True):
        torch.testing.assert_close(half, augment(part, **amounts, generator=seeded(seed)))
    assert torch.equal(augment(images), images)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(images, kept)


def test_without_a_generator_torchs_seed_reproduces_it():
    images = torch.rand(5, 1, 28, 28, generator=seeded())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = augment(images, **ALL), augment(images, **ALL)
        torch.manual_seed(0)
        assert torch.equal(augment(images, **ALL), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [(28, 28), (20, 36)])
def test_each_amount_does_what_it_is_named_after_and_nothing_else(size):
    """Of `source = matrix @ target + offset`: what may differ from doing nothing, and how."""
    one = np.eye(2)
    matrices, offsets, _ = measure(size=size, pixels=4)
    np.testing.assert_allclose(matrices, np.broadcast_to(one, (50, 2, 2)), atol=1e-6)
    for name, amount in {"degrees": 40, "scale": 0.4, "shear": 25}.items():
        matrices, offsets, _ = measure(size=size, **{name: amount})
        np.testing.assert_allclose(offsets, 0, atol=1e-6)
        assert len(np.unique(matrices.round(9), axis=0)) == 50  # each image its own
        if name == "degrees":
            products = matrices @ matrices.transpose(0, 2, 1)
            np.testing.assert_allclose(products, np.broadcast_to(one, (50, 2, 2)), atol=1e-6)
        else:
            kept = {"scale": ([0, 1], [1, 0]), "shear": ([0, 1, 1], [0, 0, 1])}[name]
            np.testing.assert_allclose(
                matrices[:, *kept], np.broadcast_to(one[*kept], (50, len(kept[0]))), atol=1e-6
            )


@pytest.mark.parametrize("name", list(ALL))
def test_amounts_are_uniform_over_the_whole_range(name):
    matrices, offsets, _ = measure(n=200, **{name: ALL[name]})
    amounts = {
        "degrees": np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])),
        "pixels": offsets,
        "scale": 1 / matrices[:, [0, 1], [0, 1]] - 1,
        "shear": np.degrees(np.arctan(matrices[:, 0, 1])),
    }[name].ravel()
    test = scipy.stats.kstest(amounts, scipy.stats.uniform(-ALL[name], 2 * ALL[name]).cdf)
    assert test.pvalue > 0.01
    assert 0.97 * ALL[name] < np.abs(amounts).max() <= ALL[name] + 1e-5


def test_an_asymmetric_picture_keeps_its_handedness():
    hook = torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    hook[..., 6:22, 9:12] = 1  # the letter L
    hook[..., 19:22, 9:20] = 1
    out = augment(hook.expand(100, 1, 28, 28), **ALL, generator=seeded())
    alike, mirrored = (out * hook).sum((1, 2, 3)), (out * hook.flip(3)).sum((1, 2, 3))
    assert (alike > mirrored).all()


@pytest.mark.parametrize("given_ranges", [{"degrees": 20}, ALL])
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


def test_zeros_come_in_from_beyond_the_border():
    out = augment(torch.ones(50, 1, 28, 28), pixels=6, generator=seeded())
    border = torch.cat((out[..., 0, :], out[..., -1, :], out[..., 0], out[..., -1]), -1)
    assert (border.amin(-1) < 0.5).all()
    assert (out[..., 8:20, 8:20] > 0.999).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 3, 28, 28), (2, 1, 20, 36)])
def test_shape_and_dtype_are_kept_and_values_stay_between_0_and_1(dtype, shape):
    images = torch.rand(shape, generator=seeded()).round(decimals=1).to(dtype)
    out = augment(images, **ALL, elastic=0.5, generator=seeded())
    assert (out.shape, out.dtype) == (shape, dtype)
    assert 0 <= out.min() <= out.max() <= 1 + 1e-6


def test_elastic_displacements_have_their_standard_deviation_and_are_smooth():
    ramp = ramps(200, 28, 28)
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
