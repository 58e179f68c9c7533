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


def measure(n=200, size=(28, 28), picture=None, **ranges):
    """Augment ramps; return what each image's ramps say: source = matrix @ target + offset.

    Both in pixels (x, y) from the middle of the image, y downwards. Bilinear interpolation of a
    ramp is exact, so the matrices are, to rounding. A picture rides along as a fourth channel.
    """
    height, width = size
    images = ramps(n, height, width)
    if picture is not None:
        images = torch.cat((images, picture.expand(n, 1, height, width)), 1)
    out = augment(images, generator=seeded(), **ranges).numpy()
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
    assert (first.shape, first.dtype) == (images.shape, images.dtype)
    assert 0 <= first.min() <= first.max() <= 1 + 1e-6
    assert not torch.equal(augment(images, **amounts, generator=generator), first)  # it goes on
    assert torch.equal(augment(images, **amounts, generator=seeded(1)), first)
    pixels = (255 * images).byte()
    same = augment(pixels / 255, **amounts, generator=seeded(1))
    assert torch.equal(augment(pixels, **amounts, generator=seeded(1)), same)
    assert torch.equal(augment(pixels), pixels / 255)  # floats, whatever the amounts
    halves = augment(images, **amounts, generator=[seeded(1), seeded(2)])
    for half, part, seed in zip(halves.split(3), images.split(3), (1, 2), strict=True):
        torch.testing.assert_close(half, augment(part, **amounts, generator=seeded(seed)))
    assert torch.equal(augment(images), images)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(images, kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # without a generator
        torch.testing.assert_close(augment(images, **amounts), first)


@pytest.mark.parametrize("size", [(28, 28), (20, 36)])
def test_each_amount_does_what_it_is_named_after_and_nothing_else(size):
    """Of `source = matrix @ target + offset`: what is as it was, image by image, and what moved."""
    found = {name: measure(size=size, **{name: amount}) for name, amount in ALL.items()}
    one = np.broadcast_to(np.eye(2), (200, 2, 2))
    turned, zoomed, slanted = (found[name][0] for name in ("degrees", "scale", "shear"))
    np.testing.assert_allclose(found["pixels"][0], one, atol=1e-6)
    np.testing.assert_allclose(turned @ turned.transpose(0, 2, 1), one, atol=1e-6)
    np.testing.assert_allclose(zoomed[:, [0, 1], [1, 0]], 0, atol=1e-6)
    np.testing.assert_allclose(slanted[:, [0, 1, 1], [0, 0, 1]], [[1, 0, 1]] * 200, atol=1e-6)
    amounts = {
        "degrees": np.degrees(np.arctan2(turned[:, 1, 0], turned[:, 0, 0])),
        "pixels": found["pixels"][1],
        "scale": 1 / zoomed[:, [0, 1], [0, 1]] - 1,
        "shear": np.degrees(np.arctan(slanted[:, 0, 1])),
    }
    for name, each in amounts.items():
        if name != "pixels":
            np.testing.assert_allclose(found[name][1], 0, atol=1e-6)
        assert len(np.unique(each.round(9))) == each.size  # each image its own
        uniform = scipy.stats.uniform(-ALL[name], 2 * ALL[name])
        assert scipy.stats.kstest(each.ravel(), uniform.cdf).pvalue > 0.01
        assert 0.97 * ALL[name] < np.abs(each).max() <= ALL[name] + 1e-5


def test_pictures_are_resampled_as_scipy_does_with_zeros_beyond_the_border():
    picture = torch.rand(28, 28, generator=seeded(9), dtype=torch.float64)
    matrices, offsets, out = measure(n=10, picture=picture, **ALL)
    for matrix, offset, image in zip(matrices, offsets, out, strict=True):
        rows_first = matrix[::-1, ::-1]  # scipy counts (row, column), from the corner
        corner = 13.5 - rows_first @ [13.5, 13.5] + offset[::-1]
        expected = scipy.ndimage.affine_transform(
            picture.numpy(), rows_first, corner, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(image[3], expected, atol=1e-5)


def test_elastic_displacements_have_their_standard_deviation_and_are_smooth():
    ramp = ramps(200, 28, 28)
    out = augment(ramp, elastic=0.8, generator=seeded()).numpy()
    moved = (out - ramp.numpy())[:, :2, 9:19, 9:19] * 27  # columns and rows, in pixels; inside
    assert len(np.unique(moved[:, 0, 0, 0])) == 200  # each image its own
    assert abs(moved.mean()) < 0.05
    # between the points it is a mean of several, so a little less; the same along both axes
    across, down = moved[:, 0].std(), moved[:, 1].std()
    assert 0.4 < min(across, down) <= max(across, down) < 0.9
    assert across == pytest.approx(down, rel=0.1)
    neighbours = np.diff(moved, axis=-1)
    assert neighbours.std() < 0.4 * moved.std()
    correlation = np.corrcoef(moved[:, 0].ravel(), moved[:, 1].ravel())[0, 1]
    assert abs(correlation) < 0.05  # the two directions are drawn apart


def test_elastic_displacements_come_on_top_of_the_rest():
    picture = torch.rand(5, 1, 28, 28, generator=seeded())
    plain = augment(picture, **ALL, generator=seeded())
    both = augment(picture, **ALL, elastic=1e-6, generator=seeded())
    torch.testing.assert_close(both, plain, atol=1e-4, rtol=0)  # the affine draws are the same
