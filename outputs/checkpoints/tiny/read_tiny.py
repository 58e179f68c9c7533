"""Read digits with a tiny network, in plain numpy: python read_tiny.py NAME.tiny IMAGES.npy."""

import sys

import numpy as np


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve maps (N, C, H, W) with a kernel (out, C, 3, 3)."""
    x = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    return np.tensordot(x, kernel, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)


def read(raw: bytes, images: np.ndarray) -> np.ndarray:
    """Return the logits (N, 10) of images (N, 28, 28), with pixels from 0 to 255."""
    spec, _, rest = raw.partition(b"\n")
    left, signs, octaves, halves = int.from_bytes(rest, "big"), [1] * 2, [1] * 16, [1] * 16

    def take(counts: list[int], *shape: int, learn: int = 1) -> np.ndarray:
        nonlocal left
        found = np.zeros(shape, "f4")  # numbers below len(counts), likely those that are frequent
        for i in np.ndindex(shape):
            (left, below), k = divmod(left, sum(counts)), 0
            while below >= counts[k]:
                below, k = below - counts[k], k + 1
            left, found[i], counts[k] = left * counts[k] + below, k, counts[k] + learn
        return found

    def fine(counts: list[int], n: int) -> np.ndarray:  # for each channel, in 32nds
        return take(counts, n, 1, 1) + take([1] * 32, n, 1, 1, learn=0) / 32

    def factors(n: int) -> np.ndarray:
        return (1 - 2 * take(signs, n, 1, 1)) * 2 ** (fine(octaves, n) - 12)

    x = (images[:, None].astype("f4") / 255 - 0.1307) / 0.3081
    for word in spec.decode().split()[:-1]:
        kind, size, c, side = word[0], int(word[1:] or 0), *x.shape[1:3]
        if kind == "w":
            levels = size
        elif kind == "p":
            x = x[:, :, : side & -2, : side & -2]  # of an odd number the last is left out
            x = x.reshape(-1, c, side // 2, 2, side // 2, 2).max((3, 5))
        else:  # a convolution, a residual block, or with = the last one of them again
            if kind != "=":
                block, shape = kind == "r", (c if kind == "r" else size, c, 3, 3)
                kernels = [
                    take([1] * levels, *shape) - levels // 2 for _ in range(block * size or 1)
                ]
            y = x
            for i, k in enumerate(kernels, 1):
                y = convolve(y, k) * factors(len(k)) + fine(halves, len(k)) / 2 - 4
                y = np.maximum(y + x if block and i == len(kernels) else y, 0)
            x = y
    window, classes = (take([1] * levels, *s) - levels // 2 for s in (x.shape[2:], (10, len(x[0]))))
    return np.einsum("nchw,hw,oc->no", x, window, classes * factors(10)[:, 0])


if __name__ == "__main__":
    print(*read(np.fromfile(sys.argv[1], "u1").tobytes(), np.load(sys.argv[2])).argmax(1))
