"""Slices of a batch: the same bits on any number of threads, every image counting alike."""

import copy
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from core_helpers import same, state_in
from torch import nn

from mnistlib import build, evaluate, train
from mnistlib.evaluate import predict_logits
from mnistlib.slices import Slices, side_by_side

# Side by side


@pytest.fixture
def torch_threads():
    """Set torch's number of threads for a test."""
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


@pytest.mark.parametrize(("threads", "usual"), [(1, 2), (2, 1), (0, 2)])
def test_calls_run_in_so_many_threads_each_with_one_of_torchs(torch_threads, threads, usual):
    torch_threads(usual)
    n = threads or usual
    barrier = threading.Barrier(n)

    def call(i):
        barrier.wait(timeout=20)  # which all must reach at the same time
        return i, threading.get_ident(), torch.get_num_threads()

    with side_by_side(threads) as each:
        found = list(each(call, range(n)))
    assert [i for i, _, _ in found] == list(range(n))
    assert len({thread for _, thread, _ in found}) == n
    assert {inner for _, _, inner in found} == {1}
    assert torch.get_num_threads() == usual


def test_results_come_in_order_whichever_is_done_first():
    first = threading.Event()

    def call(i):
        return first.wait(20) and i if i == 0 else first.set() or i

    with side_by_side(2) as each:
        assert list(each(call, range(5))) == [0, 1, 2, 3, 4]


def test_an_error_reaches_the_caller_and_torchs_threads_are_put_back(torch_threads):
    torch_threads(3)
    for threads in (1, 2):
        with pytest.raises(ZeroDivisionError), side_by_side(threads) as each:
            list(each(lambda i: 1 / i, [1, 0]))
        assert torch.get_num_threads() == 3


# One step, computed by hand


def batch(n):
    """Return pixels `(N, 1, 28, 28)` and labels `(N,)`."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, 28, 28, generator=generator)
    return images, torch.randint(0, 10, (n,), generator=generator)


@pytest.mark.parametrize(("n", "sizes"), [(8, [4, 4]), (7, [4, 3]), (1, [1])])
def test_gradients_are_those_of_the_mean_over_all_images(n, sizes):
    """A plain loop over the same slices, in double precision, each normalised by itself."""
    torch.manual_seed(0)
    model = build("reference", dropout=0.0).double()
    images, labels = batch(n)
    twin = copy.deepcopy(model)
    expected = torch.cat([twin(part) for part in images.split(sizes)])
    each = F.cross_entropy(expected, labels, reduction="none")
    each.mean().backward()
    loss = partial(F.cross_entropy, reduction="none")
    losses, logits = Slices(model, 2, map).backward(images, labels, loss)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses, each.detach(), rtol=1e-9, atol=1e-9)
    for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert not found.grad.requires_grad
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [8, 7])
def test_running_statistics_move_towards_the_mean_of_the_slices_by_images(n):
    images, labels = batch(n)
    images = images * torch.arange(1.0, n + 1)[:, None, None, None]  # slices that differ
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10))
    Slices(model, 3, map).backward(images, labels, F.cross_entropy)
    weighted = [(len(part) / n, part) for part in images.chunk(3)]
    mean = sum(share * part.mean().item() for share, part in weighted)
    var = sum(share * part.var().item() for share, part in weighted)
    assert model[0].running_mean.item() == pytest.approx(0.1 * mean, rel=1e-5)
    assert model[0].running_var.item() == pytest.approx(0.9 + 0.1 * var, rel=1e-5)
    assert var != pytest.approx(images.var().item(), rel=1e-2)
    assert model[0].num_batches_tracked == 1


# Whole runs


def test_a_run_has_the_same_bits_on_any_number_of_threads(tiny_config, tiny_digits, tmp_path):
    """Three slices of 9, 9 and 7 images, with everything on that slices allow."""
    config = replace(
        tiny_config, slices=3, dropout=0.0, epoch_images=100, batch_size=25, focus=0.5
    )  # fmt: skip
    first, *others = (
        train(
            replace(config, threads=threads), tiny_digits, folder=tmp_path / f"{threads}",
            eval_every=3, verbose=False,
        )
        for threads in (1, 2, 4)
    )  # fmt: skip
    assert first.versions["threads"] == "1"
    for run in others:
        assert run.curve == first.curve
        assert same(state_in(run.checkpoint), state_in(first.checkpoint))


@pytest.mark.parametrize("n", [1, 129])
def test_evaluation_has_the_same_bits_on_any_number_of_threads(tiny_digits, torch_threads, n):
    model = build("reference").eval()
    images, labels = tiny_digits.train_images[:n], tiny_digits.train_labels[:n]
    first = predict_logits(model, images, 1)
    assert first.shape == (n, 10)
    for threads in (2, 4):
        assert same(predict_logits(model, images, threads), first)
        assert evaluate(model, images, labels, threads) == evaluate(model, images, labels, 1)
        torch_threads(threads)
        assert same(predict_logits(model, images), first)
