"""Many seeds trained side by side as one wide network, for a GPU that would idle with one."""

import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistlib import Config, Digits, Evaluation, Run, evaluate, load_mnist
from mnistlib.augment import augment
from mnistlib.checkpoint import checkpoint_content, save_checkpoint
from mnistlib.distill import distillation_loss, load_pool
from mnistlib.errors import CheckpointError, ConfigError, TrainingError
from mnistlib.optim import learning_rates, make_optimizer
from mnistlib.paths import only_here, runs_folder
from mnistlib.runtime import pick_device, run_context, versions
from mnistlib.slices import side_by_side
from mnistlib.state import TrainingState, WeightAverage, history_row

from .ledger import check_ledger, collect, commit, record
from .sweep import runs_left

EAGER = 3  # steps of each batch size before its CUDA graph is captured


def train_stacked(configs: Sequence[Config], digits: Digits) -> list[Run]:
    """Train the same Config with several seeds at once and return a Run for each.

    A seed's weights, order of images and augmentation are those that it has alone, so that on one
    device seed 3 is seed 3 whatever it is stacked with, up to rounding. On CUDA each step is
    captured as a graph, and convolutions compute in bfloat16. There are no checkpoints on the way
    and no validation before the end. The `seconds` of a Run are its share: those of the whole stack
    by the number of seeds.

    Args:
        configs: runs that differ in their seed only, with sgd, constant momentum, one slice and no
            dropout.
        digits: data.

    Raises:
        ConfigError: the Configs cannot be stacked, or the device is not available.
        TrainingError: a loss or a weight is no longer finite.
    """
    config, n_seeds = configs[0], len(configs)
    if any(replace(c, seed=config.seed) != config for c in configs):
        raise ConfigError("the Configs differ in more than their seed; stack those that do not")
    check_stackable(config)
    device = pick_device(config.device)
    train_ids, val_ids = digits.split(config.split)
    val = digits.train_images[val_ids], digits.train_labels[val_ids]
    per_epoch = config.steps_per_epoch(len(train_ids))
    about = versions() | {"device": device.type, "threads": "1"}
    states = []
    for one in configs:
        with run_context(one.seed):
            states.append(TrainingState(one, len(train_ids), device))
    rates, stacked = learning_rates(config, per_epoch), _Stacked(config, states, digits, device)
    samplers, curves, began = [state.sampler for state in states], [], time.perf_counter()
    # sorting 60,000 losses for each seed in turn would take longer than training on them
    with side_by_side() as each, torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for epoch in range(config.epochs):
            order = torch.stack(list(each(lambda s: train_ids[s.sample_epoch()], samplers)))
            batches = order.to(device).split(config.batch_size, dim=1)
            pairs = zip(batches, rates[epoch * per_epoch :], strict=False)
            steps = [stacked.step(*pair) for pair in pairs]
            losses = torch.cat([found for found, _ in steps], dim=1).cpu()  # (S, size)
            right = torch.stack([correct for _, correct in steps]).sum(0).tolist()  # (S,)
            curves.append(torch.stack([found.mean(1) for found, _ in steps], dim=1))
            seconds, lr = (time.perf_counter() - began) / n_seeds, rates[(epoch + 1) * per_epoch]
            for state, own, correct in zip(states, losses, right, strict=True):
                state.sampler.epoch_loss = own.bfloat16()
                state.sampler.end_epoch()
                measured = float(own.mean()), 100 * correct / len(own), lr, seconds
                state.progress.history.append(history_row(epoch + 1, *measured, None))
    models, some = stacked.models(), digits.train_images[train_ids[: config.norm_images]]
    if config.norm_images:
        with side_by_side() as each:
            list(each(lambda model: WeightAverage(model, 0).renew_statistics(some), models))
    runs = []
    parts = configs, states, torch.cat(curves, dim=1).tolist(), models
    for one, state, curve, model in zip(*parts, strict=True):
        if not all(v.isfinite().all() for v in model.state_dict().values()):
            raise TrainingError(f"the weights of seed {one.seed} are not finite; lower max_lr")
        rows = state.progress.history
        if len(val_ids):
            seen = evaluate(model, *val)
            rows[-1] |= {"val_loss": seen.loss, "val_acc": seen.accuracy}
        lines = {"loss": curve, "lr": rates[: len(curve)], "eval_step": [], "eval_error": []}
        spent = rows[-1]["seconds"]
        runs.append(Run(one, digits.source, model, rows, lines, spent, len(val_ids), None, about))
    return runs


def sweep_stacked(
    configs: Sequence[Config],
    ledger: Path | None = None,
    *,
    data: str = "auto",
    test: bool = False,
    keep: Path | None = None,
) -> tuple[int, int]:
    """Train and record each Config that is not in the ledger; return the runs done and failed.

    The seeds of each Config are trained side by side. If the sweep is stopped, the same call again
    does the rest; a stack that was cut off starts anew.

    Args:
        configs: the runs.
        ledger: folder of the ledger; by default `runs_folder()`.
        data: as for `load_mnist`.
        test: evaluate the final weights of each run on the test set.
        keep: folder to which the final weights of each run are saved, as checkpoints that cannot
            be resumed.

    Raises:
        CheckpointError: a checkpoint cannot be saved, or another process trains the same stack.
        ConfigError: a Config cannot be stacked, or the device is not available.
        DatasetError: the digits are missing or damaged.
        LedgerError: the ledger is damaged or cannot be written to.
    """
    folder = ledger or runs_folder()
    check_ledger(folder, configs)
    commit()  # cached now, because files may change before the runs end
    digits = load_mnist(data)
    left = runs_left(configs, folder, digits, test)
    stacks: dict[Config, list[Config]] = {}
    for config in left:
        stacks.setdefault(replace(config, seed=0), []).append(config)
    for config in stacks:
        check_stackable(config)
    failed = 0
    for own in stacks.values():
        try:
            place = folder / own[0].run_name(digits.source)
            with only_here(place, ".training", CheckpointError, wait=False):
                for run in train_stacked(own, digits):
                    seen = evaluate(run.model, *digits.test) if test and digits.test else None
                    if keep:  # first, because a run in the ledger is not trained again
                        save_weights(run, seen, keep)
                    record(run, seen, folder)
                    print(f"{run.config.recipe} seed {run.config.seed}: {run}", flush=True)
        except TrainingError as error:
            failed += len(own)
            print(f"FAILED: {own[0].recipe}, {len(own)} seeds: {error}", file=sys.stderr)
    collect(folder)
    return len(left) - failed, failed


def save_weights(run: Run, seen: Evaluation | None, folder: Path) -> None:
    """Save the final weights of a run in its folder below `folder`; they cannot be resumed."""
    accuracy = seen.accuracy if seen else math.nan
    content = checkpoint_content(run.config, run.source, run.model, run.history, accuracy)
    progress = {"step": len(run.curve["loss"]), "seconds": run.seconds}
    content |= {"training": {"progress": progress}, "versions": run.versions}
    save_checkpoint(content, folder / run.config.run_name(run.source))


def check_stackable(config: Config) -> None:
    """Raise ConfigError unless the seeds of a Config can be stacked."""
    odd = config.dropout or config.cycle_momentum or config.start
    if (config.optimizer, config.slices) != ("sgd", 1) or odd:
        fault = "only sgd with constant momentum, one slice, no dropout and no start can be stacked"
        raise ConfigError(f"{fault}; set optimizer=sgd, cycle_momentum=false, slices=1, dropout=0")


class _Stacked:
    """The networks of several seeds as one, and its training step."""

    def __init__(
        self, config: Config, states: Sequence[TrainingState], digits: Digits, device: torch.device
    ) -> None:
        self.config, self.n = config, len(states)
        self.single = copy.deepcopy(states[0].model)
        self.images, self.labels = digits.train_images.to(device), digits.train_labels.to(device)
        self.pool = load_pool(config, digits, device) if config.pool else None
        if self.pool and len(self.pool.others):
            fault = f"pool {config.pool} has images without a digit, which cannot be stacked"
            raise ConfigError(f"{fault}; train the seeds one by one")
        self.draws = [state.random.augmentation for state in states]
        self.model = stack([state.model for state in states])
        self.model.to(memory_format=torch.channels_last)
        self.average = WeightAverage(self.model, config.ema_decay)
        self.optimizer = make_optimizer(self.model, config)
        self.rate = torch.tensor(config.max_lr, device=device)  # a tensor, so that graphs read it
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.weights = list(self.model.parameters())
        self.eager: dict[int, int] = {}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]] = {}

    def step(self, ids: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Train on the images `ids` `(S, N)`; return losses `(S, N)` and correct answers `(S,)`."""
        self.rate.fill_(rate)
        size = ids.shape[1]
        self.eager[size] = self.eager.get(size, 0) + 1
        if not ids.is_cuda or self.eager[size] <= EAGER:
            return self._step(ids)
        if size not in self.graphs:
            graph, place = torch.cuda.CUDAGraph(), ids.clone()
            for generator in self.draws:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                found = self._step(place)
            self.graphs[size] = graph, place, found
        graph, place, (losses, right) = self.graphs[size]
        place.copy_(ids)
        graph.replay()
        return losses.clone(), right.clone()  # the next step writes into the same memory

    def _step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        n = ids.shape[1]
        labels = self.labels[ids].long().T.flatten()  # (N * S,)
        if self.pool:
            drawn = [self.pool.draw(own, g) for own, g in zip(ids, self.draws, strict=True)]
            batch = torch.cat([images for images, _ in drawn]).float() / 255
            targets = torch.stack([own for _, own in drawn], dim=1).flatten(0, 1)  # (N * S, 10)
        else:
            batch = self.images.index_select(0, ids.flatten())  # (S * N, 1, 28, 28)
        if self.config.augmentation:
            batch = augment(batch, **self.config.augmentation, generator=self.draws)
        batch = batch.view(self.n, n, 28, 28).transpose(0, 1)  # -> (N, S, 28, 28)
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
            logits = self.model(batch)  # (N, S * 10)
        # from bfloat16 on a GPU; elsewhere they have the dtype of the weights already
        logits = logits.to(self.weights[0].dtype).view(n * self.n, 10)
        smoothing = self.config.label_smoothing
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        total = losses
        if self.pool:
            truth = torch.cat((targets, labels[:, None]), dim=1)
            total, losses = distillation_loss(logits, truth), losses.detach()
        gradients = torch.autograd.grad(total.sum() / n, self.weights)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self.optimizer.step()
        self.average.update()
        right = (logits.detach().argmax(1) == labels).view(n, self.n).sum(0)
        return losses.detach().view(n, self.n).T, right

    def models(self) -> list[nn.Module]:
        """Return the seeds' networks, on the CPU in eval mode, with averaged weights if any."""
        found = []
        for k in range(self.n):
            model = copy.deepcopy(self.single).cpu().to(memory_format=torch.contiguous_format)
            parts = {}
            for name, value in self.average.model.state_dict().items():
                parts[name] = value.chunk(self.n)[k] if value.ndim else value
            model.load_state_dict(parts)
            found.append(model.eval())
        return found


def stack(models: Sequence[nn.Module]) -> nn.Module:
    """Return networks of one kind as one: S times the channels, in groups that do not mix.

    It takes images `(N, S, 28, 28)` and returns logits `(N, S * 10)`. A BatchNorm over S times the
    channels is exactly S of them.
    """
    wide = copy.deepcopy(models[0])
    for layer, *own in zip(wide.modules(), *(m.modules() for m in models), strict=True):
        for name, _ in [*own[0].named_parameters(recurse=False)]:
            values = [getattr(one, name).detach() for one in own]
            setattr(layer, name, nn.Parameter(torch.cat(values)))
        for name, value in [*own[0].named_buffers(recurse=False)]:
            if value.ndim:
                setattr(layer, name, torch.cat([getattr(one, name) for one in own]))
        if isinstance(layer, nn.Conv2d):
            for name in ("in_channels", "out_channels", "groups"):
                setattr(layer, name, getattr(layer, name) * len(models))
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_features *= len(models)
    return wide
