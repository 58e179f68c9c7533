"""Random affine and elastic augmentation of a batch, different for each image."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = 6  # along each side, so about five pixels apart


@cache
def _between_points(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the matrix `(36, height * width)` that interpolates from 6x6 points to all pixels."""
    units = torch.eye(POINTS**2).view(POINTS**2, 1, POINTS, POINTS)
    maps = F.interpolate(units, (height, width), mode="bicubic", align_corners=True)
    return maps.flatten(1).to(device, dtype)


def augment(
    images: Tensor,
    degrees: float = 0.0,
    pixels: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    elastic: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Rotate, shift, zoom, shear and bend each image by its own random amount.

    torchvision's v2 transforms draw once per call, so a whole batch gets one rotation. Here each
    image has its own six random numbers, and the batch is resampled in one call on its device.
    Nothing is flipped, because a mirrored 2 is not a digit.

    Args:
        images: `(N, C, H, W)` float, or uint8, which become floats from 0 to 1; pixels beyond the
            border count as zero.
        degrees: rotation, uniform in ±degrees.
        pixels: translation along each axis, uniform in ±pixels, before the rotation.
        scale: zoom along each axis, uniform in 1 ± scale.
        shear: horizontal shear angle, uniform in ±shear degrees.
        elastic: standard deviation in pixels of displacements drawn at 6x6 points across the image
            and interpolated smoothly between them: a cheap form of the elastic distortion of
            P. Simard, D. Steinkraus and J. Platt, ICDAR 2003.
        generator: random generator; by default torch's own on the images' device. Or several, one
            for each equal part of the images.

    Returns:
        Augmented images of the same shape, float.
    """
    images = images if images.is_floating_point() else images.float() / 255
    n, _, height, width = images.shape
    if not any((degrees, pixels, scale, shear, elastic)):
        return images
    generators = generator if isinstance(generator, Sequence) else [generator]
    part = n // len(generators)

    def draw(kind: Callable[..., Tensor], *shape: int) -> Tensor:
        """Return random numbers `(..., N, k)`, each part of the images from its own generator."""
        place = images.device
        drawn = [kind(*shape, generator=g, device=g.device if g else place) for g in generators]
        return torch.cat(drawn, dim=-2).to(images.device, images.dtype)

    u = draw(torch.rand, part, 6) * 2 - 1  # (N, 6) in ±1
    angle = u[:, 0] * math.radians(degrees)
    slant = torch.tan(u[:, 1] * math.radians(shear))
    # affine_grid maps output to input coordinates, so dividing by the zoom enlarges the digit
    zoom_x, zoom_y = 1 / (1 + u[:, 2] * scale), 1 / (1 + u[:, 3] * scale)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # coordinates run from -1 to 1 along both sides, so a shift of p pixels is 2p / width, and
    # terms that mix the axes must be scaled by the ratio of the sides
    tall = height / width
    to_x = cos * zoom_x, (cos * slant - sin) * zoom_y * tall, u[:, 4] * 2 * pixels / width
    to_y = sin * zoom_x / tall, (sin * slant + cos) * zoom_y, u[:, 5] * 2 * pixels / height
    # as F.affine_grid, but in one product for all images, which is many times faster
    x = torch.linspace(1 / width - 1, 1 - 1 / width, width, device=images.device)  # pixel centres
    y = torch.linspace(1 / height - 1, 1 - 1 / height, height, device=images.device)
    here = torch.stack((x.repeat(height), y.repeat_interleave(width), x.new_ones(height * width)))
    rows = torch.cat((torch.stack(to_x, 1), torch.stack(to_y, 1)))  # (2N, 3)
    there = rows @ here.to(images.dtype)  # (2N, 3) x (3, H * W) -> (2N, H * W)
    if elastic:
        points = elastic * draw(torch.randn, 2, part, POINTS**2).flatten(0, 1)  # (2N, 36)
        points[:n] *= 2 / width  # x, then y, in the coordinates of the grid
        points[n:] *= 2 / height
        there += points @ _between_points(height, width, images.device, images.dtype)
    grid = there.view(2, n, height, width).permute(1, 2, 3, 0)  # -> (N, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)  # (N, C, H, W)
