"""The audit: a true row is found true to the last digit, a false one false."""

import json

import pandas as pd
import pytest

from mnistlib import Config, TrainingError, evaluate, train
from mniststudy.cli import main
from mniststudy.runs import audit
from mniststudy.runs.ledger import LedgerError, append_rows, record


@pytest.fixture(scope="module")
def row(tiny_digits, tmp_path_factory):
    """The row of a short run."""
    config = Config(epochs=1, batch_size=50, max_lr=0.02, seed=1, device="cpu", threads=1)
    run = train(config, tiny_digits, save=False, verbose=False)
    return record(run, evaluate(run.model, *tiny_digits.test), tmp_path_factory.mktemp("made"))


@pytest.fixture
def ledger(row, tmp_path, tiny_digits, monkeypatch):
    """A ledger with that row, as in a clone."""
    monkeypatch.setattr(audit, "load_mnist", lambda source: tiny_digits)
    append_rows(tmp_path / "runs.csv", list(row), [row])
    return tmp_path


def falsify(folder, **values):
    table = pd.read_csv(folder / "runs.csv", dtype={"config_hash": str})
    table.assign(**values).to_csv(folder / "runs.csv", index=False)


def test_a_true_row_is_equal_to_the_last_digit(ledger, capsys):
    assert audit.audit(ledger)
    said = capsys.readouterr().out
    assert "custom, reference, seed 1, hash " in said
    for column in ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy"):
        assert f"\n{column} " in said
    assert said.endswith("equal to the last digit\n")


def test_each_row_has_its_turn(ledger, row, monkeypatch):
    def chosen(config, *args, **settings):
        raise TrainingError(f"{config.seed}")

    monkeypatch.setattr(audit, "train", chosen)
    config = json.dumps(json.loads(row["config"]) | {"seed": 2})
    append_rows(ledger / "runs.csv", list(row), [row | {"seed": 2, "config": config}])
    seen = set()
    for _ in range(40):  # all alike once in 500,000,000,000
        with pytest.raises(TrainingError) as error:
            audit.audit(ledger)
        seen.add(str(error.value))
    assert seen == {"1", "2"}


def test_a_row_changed_in_its_last_digit_is_not_equal_and_a_false_accuracy_exits_with_1(
    ledger, row, capsys
):
    falsify(ledger, val_loss=row["val_loss"] + 1e-6)
    assert audit.audit(ledger)  # no farther off than another seed
    assert "not the same bits, but accuracies lie within" in capsys.readouterr().out
    falsify(ledger, test_accuracy=98.0, n_val=25)  # 98 of 100: seeds spread by a point
    audit.audit(ledger)
    assert "within 5.66 points" in capsys.readouterr().out
    falsify(ledger, val_accuracy=98.0, n_val=400, n_test=None)
    audit.audit(ledger)
    assert "within 2.83 points" in capsys.readouterr().out
    falsify(ledger, test_accuracy=1.0, n_test=100)
    assert main(["audit", "--ledger", str(ledger)]) == 1
    assert "DO NOT lie within" in capsys.readouterr().out


def test_a_row_from_a_gpu_is_another_draw_and_only_chosen_if_asked_for(ledger, row, capsys):
    """By its hash: a recipe's settings may have changed; the old ones are in the row."""
    falsify(ledger, device="cuda", val_loss=row["val_loss"] + 1e-6, recipe="fast")
    with pytest.raises(LedgerError, match="no run of any recipe took 10 minutes or less"):
        audit.audit(ledger)
    with pytest.raises(LedgerError, match="no run of fast took"):
        audit.audit(ledger, recipe="fast")
    assert audit.audit(ledger, recipe=row["config_hash"])
    assert "because torch or the machine differs; accuracies" in capsys.readouterr().out


@pytest.mark.parametrize("values", [{"seconds": 1000}, {"n_val": 0, "n_test": None}])
def test_a_run_that_took_too_long_or_has_no_accuracy_is_not_chosen(ledger, values):
    falsify(ledger, **values)
    with pytest.raises(LedgerError, match="no run of any recipe"):
        audit.audit(ledger)


def test_an_interrupted_audit_judges_nothing(ledger, monkeypatch):
    def stopped(*args, **settings):
        run = train(*args, **settings, verbose=False)
        run.signal = 2
        return run

    monkeypatch.setattr(audit, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        audit.audit(ledger)
