"""What the machine gives, for notebook 08: its products, two processes, time by operator.

Sharing the gradients of one run between processes is measured here and used nowhere.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from .config import Config
from .data import Digits, load_mnist
from .process import settings, workers
from .state import TrainingState
from .train import train

WARM = 10  # steps before a clock starts
# torch's names of operators hold these words; what holds none of them is the rest
OPERATORS = {
    "convolution": ("convolution",),
    "BatchNorm": ("batch_norm",),
    "ReLU, addition": ("relu", "threshold", "clamp", "aten::add"),
    "pooling": ("pool",),
    "distortion": ("grid_sampler", "affine_grid"),
    "optimizer, averaging": ("fused_", "_foreach", "lerp"),
}


def matmul(threads: int) -> float:
    """Time 20 products of 1024x1024 matrices: what the machine multiplies at best."""
    a, b = torch.rand(2, 1024, 1024)
    with settings(threads, 0):
        for _ in range(5):
            a @ b
        began = time.perf_counter()
        for _ in range(20):
            a @ b
        return time.perf_counter() - began


def pair_seconds(job: Callable[[Config, int, Digits], tuple[float, float]], processes: int,
                 config: Config, images: int, data: str = "mnist") -> float:  # fmt: skip
    """Do `side_by_side` or `shared` in processes; return the time from first start to last end."""
    work = partial(job, config, images)
    with TemporaryDirectory() as folder:
        where = f"file://{folder}/meet"
        with workers(processes) as pool:
            jobs = [pool.submit(_meet, work, i, processes, where, data) for i in range(processes)]
            spans = [job.result() for job in jobs]
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def _meet(
    work: Callable[[Digits], tuple[float, float]], rank: int, world: int, where: str, data: str
) -> tuple[float, float]:
    """Join the other processes and do the work, whose clock starts when all are ready."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    try:
        return work(load_mnist(data))
    finally:
        dist.destroy_process_group()


def side_by_side(config: Config, images: int, digits: Digits) -> tuple[float, float]:
    """Train a network of one's own by our loop; return begin and end."""
    short = replace(config, epochs=1, split="none", threads=1, epoch_images=images)
    warm = replace(short, epoch_images=WARM * short.batch_size)
    train(warm, digits, save=False, verbose=False)
    dist.barrier()
    began = time.perf_counter()
    return began, began + train(short, digits, save=False, verbose=False).seconds


def shared(config: Config, images: int, digits: Digits) -> tuple[float, float]:
    """Train on this rank's half of every batch, gradients averaged; return begin and end.

    Each rank normalises by the statistics of its own half, so this is not quite the same training.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    with settings(1, config.seed):
        t = TrainingState(config, torch.device("cpu"), len(digits.train_labels))
        order = t.draw_order(len(digits.train_labels))
        for step in range(WARM + images // config.batch_size):
            if step == WARM:
                dist.barrier()
                began = time.perf_counter()
            ids = order[step * config.batch_size :][rank : config.batch_size : world]
            logits = t.model(digits.train_images[ids])  # (N / world, 1, 28, 28) -> (N / world, 10)
            t.optimizer.zero_grad()
            F.cross_entropy(logits, digits.train_labels[ids].long()).backward()
            grads = [p.grad for p in t.model.parameters()]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for grad, mean in zip(
                grads, (flat / world).split([g.numel() for g in grads]), strict=True
            ):
                grad.copy_(mean.view_as(grad))
            t.optimizer.step()
            t.scheduler.step()
    return began, time.perf_counter()


def operators(config: Config, images: int, digits: Digits, group: str) -> float:
    """Return the time that a group of operators takes of a short run on one thread."""
    short = replace(config, epochs=1, split="none", epoch_images=images, threads=1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        train(short, digits, save=False, verbose=False)
    seconds = dict.fromkeys((*OPERATORS, "the rest"), 0.0)
    for event in profiled.key_averages():
        fits = [g for g, words in OPERATORS.items() if any(w in event.key for w in words)]
        seconds[fits[0] if fits else "the rest"] += event.self_cpu_time_total / 1e6
    return seconds[group]
