"""The figure of notebook 03."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from mnistlib import Config, train
from mniststudy.figures import training


def test_onecycle_has_the_peak_between_its_phases_and_every_evaluation(tiny_digits):
    config = Config(
        model="c4k5s2p pooled", epochs=3, epoch_images=200, batch_size=50, max_lr=0.02, device="cpu"
    )
    run = train(config, tiny_digits, eval_every=3, save=False, verbose=False)
    training.onecycle(run, "title")
    rate, loss, error = plt.gcf().axes
    assert rate.lines[0].get_ydata().tolist() == run.curve["lr"]
    raw, smooth = (line.get_ydata() for line in loss.lines)
    assert len(raw) == len(smooth) == 12
    assert min(raw) <= smooth.min() <= smooth.max() <= max(raw)
    assert error.lines[0].get_xdata().tolist() == [3, 4, 6, 8, 9, 12]
    final = 100 - run.history[-1]["val_acc"]
    assert error.lines[0].get_ydata()[-1] == pytest.approx(final)
    shown = [t.get_text() for ax in (rate, loss, error) for t in ax.texts]
    assert shown == ["warm-up", "annealing", f"{final:.2f} %"]
    for row in run.history[:-1]:  # as if validated after the last epoch only
        row["val_acc"] = math.nan
    training.onecycle(replace(run, curve=run.curve | {"eval_step": [], "eval_error": []}), "title")
    assert plt.gcf().axes[2].lines[0].get_xdata().tolist() == [12]
    run.history[-1]["val_acc"] = math.nan
    training.onecycle(replace(run, curve=run.curve | {"eval_step": [], "eval_error": []}), "title")
    assert [ax.get_ylabel() for ax in plt.gcf().axes] == ["learning rate", "training loss (nats)"]
