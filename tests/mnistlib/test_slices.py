"""Slices of a batch: the same bits on any number of threads, every image counting alike."""

import copy
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from core_helpers import LOOP, same, state_in
from torch import nn

from mnistlib import augment, build, evaluate, train
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


def batch(n, seed=0):
    """Return pixels `(N, 1, 28, 28)` and labels `(N,)`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, 28, 28, generator=generator)
    return images, torch.randint(0, 10, (n,), generator=generator)


def sliced(model, n, images, labels, threads=1, loss=F.cross_entropy):
    """Take gradients in slices; return losses and logits."""
    with side_by_side(threads) as each:
        return Slices(model, n, each).backward(images, labels, loss)


@pytest.mark.parametrize(("n", "sizes"), [(8, [4, 4]), (7, [4, 3]), (1, [1])])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_the_mean_over_all_images(n, sizes, reduction):
    """A plain loop over the same slices, in double precision, each normalised by itself."""
    torch.manual_seed(0)
    model = build("reference", dropout=0.0).double()
    images, labels = batch(n)
    twin = copy.deepcopy(model)
    expected = torch.cat([twin(part) for part in images.split(sizes)])
    each = F.cross_entropy(expected, labels, reduction="none")
    each.mean().backward()
    losses, logits = sliced(
        model, 2, images, labels, loss=partial(F.cross_entropy, reduction=reduction)
    )
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-9, atol=1e-9)
    if reduction == "none":
        torch.testing.assert_close(losses, each.detach(), rtol=1e-9, atol=1e-9)
    for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert not found.grad.requires_grad
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [8, 7])
def test_running_statistics_move_towards_the_mean_of_the_slices_by_images(n):
    images, labels = batch(n)
    images = images * torch.arange(1.0, n + 1)[:, None, None, None]  # slices that differ
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10))
    sliced(model, 3, images, labels)
    weighted = [(len(part) / n, part) for part in images.chunk(3)]
    mean = sum(share * part.mean().item() for share, part in weighted)
    var = sum(share * part.var().item() for share, part in weighted)
    assert model[0].running_mean.item() == pytest.approx(0.1 * mean, rel=1e-5)
    assert model[0].running_var.item() == pytest.approx(0.9 + 0.1 * var, rel=1e-5)
    assert var != pytest.approx(images.var().item(), rel=1e-2)
    assert model[0].num_batches_tracked == 1


def test_every_step_begins_from_the_networks_own_statistics():
    """Not from those that a replica was left with, so a step depends on the network alone."""
    torch.manual_seed(0)
    model = build("early", dropout=0.0)
    with side_by_side(1) as each:
        slices = Slices(model, 2, each)
        slices.backward(*batch(8), F.cross_entropy)
        twin = copy.deepcopy(model)
        slices.backward(*batch(6, seed=1), F.cross_entropy)
        Slices(twin, 2, each).backward(*batch(6, seed=1), F.cross_entropy)
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("late", [0, 2])
def test_whichever_slice_is_done_last_the_bits_are_the_same(late):
    """Gradients are added in the order of the slices, not in that of their ends."""
    results, done = [], threading.Semaphore(0)
    images, labels = batch(9)
    order = iter(images.chunk(3))
    firsts = [float(next(order)[0, 0, 0, 0]) for _ in range(3)]

    class Waiting(nn.Module):
        def __init__(self, inner, waits):
            super().__init__()
            self.inner, self.waits = inner, waits

        def forward(self, x):
            if self.waits and float(x[0, 0, 0, 0]) == firsts[late]:
                assert all(done.acquire(timeout=20) for _ in range(2))
            logits = self.inner(x)
            done.release()
            return logits

    for waits in (False, True):
        torch.manual_seed(0)
        model = Waiting(build("early", dropout=0.0), waits)
        for _ in range(3):
            done.acquire(blocking=False)
        sliced(model, 3, images, labels, threads=3)
        results.append([p.grad for p in model.parameters()])
    assert same(*results)


# Whole runs


@pytest.fixture
def sliced_config(tiny_config):
    """Three slices of 9, 9 and 7 images, with everything on that slices allow."""
    return replace(
        tiny_config, slices=3, dropout=0.0, epoch_images=100, batch_size=25, focus=0.5, threads=2
    )


def test_a_run_has_the_same_bits_on_any_number_of_threads(sliced_config, tiny_digits, tmp_path):
    first, *others = (
        train(
            replace(sliced_config, threads=threads), tiny_digits, folder=tmp_path / f"{threads}",
            eval_every=3, verbose=False,
        )
        for threads in (1, 2, 4)
    )  # fmt: skip
    assert first.versions["threads"] == "1"
    for run in others:
        assert run.curve == first.curve
        assert same(state_in(run.checkpoint), state_in(first.checkpoint))
    whole = train(replace(sliced_config, slices=1), tiny_digits, save=False, verbose=False)
    assert first.curve["lr"] == whole.curve["lr"]
    assert first.curve["loss"] != whole.curve["loss"]  # another training, by its statistics
    assert first.curve["loss"][0] == pytest.approx(whole.curve["loss"][0], rel=0.1)


def test_augmentation_is_drawn_for_the_whole_batch(sliced_config, tiny_digits, monkeypatch):
    seen = {}
    for slices in (1, 3):
        batches = seen[slices] = []

        def watched(images, keep=batches, **amounts):
            keep.append(augment(images, **amounts))
            return keep[-1]

        monkeypatch.setattr(LOOP, "augment", watched)
        config = replace(sliced_config, slices=slices, epochs=1)
        train(config, tiny_digits, save=False, verbose=False)
    assert same(seen[1], seen[3])
    assert [len(images) for images in seen[3]] == [25] * 4


def test_more_slices_than_images_are_one_image_each(sliced_config, tiny_digits):
    config = replace(sliced_config, slices=64, batch_size=4, epoch_images=18, epochs=1)
    run = train(config, tiny_digits, save=False, verbose=False)
    assert len(run.history) == 1
    assert len(run.curve["loss"]) == 5


# Evaluation


@pytest.mark.parametrize("n", [1, 129])
def test_evaluation_has_the_same_bits_on_any_number_of_threads(tiny_digits, torch_threads, n):
    torch.manual_seed(0)
    model = build("reference").eval()
    images, labels = tiny_digits.train_images[:n], tiny_digits.train_labels[:n]
    first = predict_logits(model, images, 1)
    assert first.shape == (n, 10)
    for threads in (2, 4):
        assert same(predict_logits(model, images, threads), first)
        assert evaluate(model, images, labels, threads) == evaluate(model, images, labels, 1)
        torch_threads(threads)
        assert same(predict_logits(model, images), first)
        assert torch.get_num_threads() == threads


def test_evaluation_uses_the_threads_it_is_given():
    together = threading.Barrier(2)

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            assert torch.is_inference_mode_enabled()
            together.wait(timeout=20)
            return x.flatten(1)[:, :10].float() * self.weight

    assert predict_logits(Meeting(), torch.zeros(256, 1, 28, 28), 2).shape == (256, 10)
