"""Two processes of one thread each: two runs side by side, or one run whose gradients they share.

Measured for notebook 08. Sharing gradients is used nowhere else: a network of 14,000 parameters has
too little work in a step to be worth the wait for the other half.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .config import Config
from .data import Digits, load_mnist
from .process import settings
from .state import TrainingState
from .train import train

WARM = 10  # steps before a clock starts


def pair_seconds(job: Callable[[Config, int, Digits], tuple[float, float]], processes: int,
                 config: Config, images: int, data: str = "mnist") -> float:  # fmt: skip
    """Do `side_by_side` or `shared` in processes; return the time from first start to last end."""
    work = partial(job, config, images)
    with TemporaryDirectory() as folder:
        where = f"file://{folder}/meet"
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
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
