"""The audit: a true row is found true to the last digit, a false one false."""

import shutil

import pandas as pd
import pytest

from mnistlib import Config, evaluate, train
from mniststudy.cli import main
from mniststudy.runs import sweep
from mniststudy.runs.ledger import LedgerError, collect, record


@pytest.fixture
def ledger(tmp_path, tiny_digits, monkeypatch):
    """A ledger of three short runs, one seed each."""
    monkeypatch.setattr(sweep, "load_mnist", lambda source: tiny_digits)
    folder = tmp_path / "results"
    for seed in range(3):
        config = Config(epochs=2, batch_size=50, max_lr=0.02, seed=seed, device="cpu", threads=1)
        run = train(config, tiny_digits, save=False, verbose=False)
        test = evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels)
        record(run, test, folder)
    collect(folder)
    for made in folder.glob("*/"):  # the table alone is left, as in a clone
        shutil.rmtree(made)
    return folder


def falsify(folder, column, change):
    table = pd.read_csv(folder / "runs.csv")
    table[column] = change(table[column])
    table.to_csv(folder / "runs.csv", index=False)


def test_a_true_row_is_equal_to_the_last_digit(ledger, capsys):
    found = sweep.audit(ledger, pick=0)
    assert found.equal
    assert found.passed
    assert set(found.figures) == {
        "train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy"
    }  # fmt: skip
    assert repr(found).endswith("equal to the last digit")
    assert "custom, reference, seed" in capsys.readouterr().out


def test_each_row_has_its_turn(ledger):
    assert {sweep.audit(ledger, pick=pick).name.split("seed ")[1][0] for pick in range(8)} == set(
        "012"
    )


def test_a_row_from_a_gpu_is_another_draw_and_only_chosen_if_asked_for(ledger):
    falsify(ledger, "device", lambda values: "cuda")
    falsify(ledger, "val_loss", lambda values: values + 1e-6)
    with pytest.raises(LedgerError, match="no run of any recipe"):
        sweep.audit(ledger)
    (chosen,) = pd.read_csv(ledger / "runs.csv").query("seed == 1")["config_hash"]
    found = sweep.audit(ledger, recipe=chosen)
    assert found.passed
    assert "because torch or the machine differs" in repr(found)


@pytest.mark.parametrize("column", ["val_loss", "test_accuracy", "train_loss"])
def test_a_row_changed_in_its_last_digit_is_not_equal(ledger, column):
    falsify(ledger, column, lambda values: values + 1e-6)
    found = sweep.audit(ledger)
    assert not found.equal
    assert found.passed  # no farther off than another seed
    assert "not the same bits, but accuracies lie within" in repr(found)


def test_a_false_accuracy_exits_with_1(ledger, capsys):
    falsify(ledger, "test_accuracy", lambda values: 99.9 - 60 * (values > 50))
    assert main(["audit", "--ledger", str(ledger)]) == 1
    assert "DO NOT lie within" in capsys.readouterr().out
    falsify(ledger, "seconds", lambda values: values + 1000)
    assert main(["audit", "--ledger", str(ledger)]) == 1
    assert "no run of any recipe took 10 minutes or less" in capsys.readouterr().err


def test_another_torch_is_said(ledger):
    falsify(ledger, "torch", lambda values: ["1.0"] * len(values))
    falsify(ledger, "val_loss", lambda values: values + 1e-6)
    assert "because torch or the machine differs; accuracies" in repr(sweep.audit(ledger))


def test_only_the_recipe_asked_for_is_chosen(ledger):
    with pytest.raises(LedgerError, match="no run of fast took"):
        sweep.audit(ledger, recipe="fast")


def test_a_run_can_be_named_by_its_hash_whatever_its_recipe_was_called(ledger):
    """A recipe's settings may have changed; the old ones are in the row."""
    falsify(ledger, "recipe", lambda values: ["fast", "fast", "sprint"])
    row = pd.read_csv(ledger / "runs.csv").iloc[1]
    found = sweep.audit(ledger, recipe=row["config_hash"])
    assert found.equal
    assert row["config_hash"] in found.name
    with pytest.raises(LedgerError, match="no run of fast took"):
        sweep.audit(ledger, recipe="fast")


def test_a_ledger_that_is_not_there_is_a_sentence(tmp_path, capsys):
    assert main(["audit", "--ledger", str(tmp_path / "nowhere")]) == 1
    assert "runs.csv is not there" in capsys.readouterr().err


def test_a_run_without_any_accuracy_is_not_chosen(ledger):
    falsify(ledger, "n_val", lambda values: 0)
    falsify(ledger, "n_test", lambda values: None)
    with pytest.raises(LedgerError, match="no run of any recipe"):
        sweep.audit(ledger)


def test_an_interrupted_audit_judges_nothing(ledger, monkeypatch):
    def stopped(*args, **settings):
        run = train(*args, **settings, verbose=False)
        run.signal = 2
        return run

    monkeypatch.setattr(sweep, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep.audit(ledger)
