"""Settings: cast or refused with a sentence, frozen, hashed; the recipes."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch

from mnistlib import MODELS, RECIPES, Config, ConfigError, MnistlibError, configure
from mnistlib.config import AUGMENTATIONS

# for every field that changes the result, a value that is not its default
OTHER = {
    "focus": 0.5, "slices": 2,
    "model": "reference-pooled", "epochs": 4, "batch_size": 64, "epoch_images": 1000,
    "optimizer": "sgd", "max_lr": 0.02, "pct_start": 0.3,
    "anneal": "linear", "cycle_momentum": False, "weight_decay": 0.0, "dropout": 0.1,
    "label_smoothing": 0.1, "elastic": 0.5,
    "degrees": 5.0, "pixels": 1.0, "scale": 0.1, "shear": 3.0,
    "ema_decay": 0.9, "norm_images": 500, "pool": "0123abcd", "split": "last", "seed": 1,
}  # fmt: skip
NO_RESULT = {"device": "cpu", "threads": 2}

every_recipe = pytest.mark.parametrize("name", list(RECIPES))


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("max_lr", "1e-2", 0.01),
        ("max_lr", 1, 1.0),
        ("max_lr", " 0.5 ", 0.5),
        ("epochs", 20.0, 20),
        ("epochs", "20", 20),
        ("epochs", "20.0", 20),
        ("seed", "1e3", 1000),
        ("seed", 1e3, 1000),
        ("threads", "0", 0),
        ("degrees", "0", 0.0),
        ("optimizer", " sgd ", "sgd"),
    ],
)
def test_values_from_papermill_are_cast(name, given, kept):
    value = getattr(Config(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "from 1 to"),
        ("epochs", "-1", "from 1 to"),
        ("epochs", "3.5", "a whole number"),
        ("epochs", 3.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", None, "a whole number"),
        ("epochs", math.inf, "a whole number"),
        pytest.param("epochs", 10**400, "a whole number", id="epochs-larger than a float"),
        ("epochs", [3], "a whole number"),
        ("batch_size", 1, "from 2 to 60,000"),
        ("seed", -1, "from 0 to"),
        ("seed", "nan", "a whole number"),
        ("max_lr", "abc", "a finite number"),
        ("max_lr", "", "a finite number"),
        ("max_lr", math.nan, "a finite number"),
        ("max_lr", "nan", "a finite number"),
        ("max_lr", math.inf, "a finite number"),
        ("max_lr", "-inf", "a finite number"),
        ("max_lr", True, "a finite number"),
        ("max_lr", 0.0, "from 1e-08 to 100"),
        ("dropout", 1.0, "from 0 to 0.95"),
        ("pct_start", -0.1, "from 0 to 0.95"),
        ("ema_decay", 1.0, "from 0 to 0.999999"),
        ("focus", 1.5, "from 0 to 1"),
        ("model", "resnet", "choose one of " + ", ".join(MODELS)),
        ("model", "c16k5s2 r1", "must end in a head (full, "),
        ("model", "c0k5s2 p full", "'c0k5s2' is no layer"),
        ("model", "c16k5s2 q p full", "'q' is no layer"),
        ("model", "c16k5s2 r1 p r2", "here it is 'r2' on 7x7"),
        ("model", "full", "choose one of"),
        ("model", 3, "a name"),
        ("device", "tpu", "one of auto, cpu, cuda, mps, xpu"),
        ("split", "half", "one of random, last, writers, writers-1, writers-2"),
        ("optimizer", "lion", "one of adamw, adam, sgd, muon"),
    ],
)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as refused:
        Config(**{name: value})
    text = str(refused.value)
    assert text.startswith((f"{name} is {value!r}, ", f"{name} is {value}, "))  # as given or cast
    assert allowed in text


def test_an_unknown_recipe_or_setting_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"^recipe is 'quick'.* one of " + ", ".join(RECIPES)):
        configure("quick")
    with pytest.raises(ConfigError, match=r"no setting 'epoch'; choose from .*epochs"):
        configure("fast", epoch=5)


def test_a_momentum_that_cycles_needs_a_schedule_that_cycles_it():
    with pytest.raises(ConfigError, match=r"cycle_momentum is True.* step: set it to false"):
        Config(anneal="step")
    assert Config(anneal="step", cycle_momentum=False).anneal == "step"


def test_a_spec_is_one_however_it_is_spaced_and_checking_it_draws_nothing():
    random_state = torch.get_rng_state()
    config = Config(model=" c16k5s2  r1 p r2 r2\tfull")
    assert config.model == "c16k5s2 r1 p r2 r2 full"
    assert torch.equal(torch.get_rng_state(), random_state)


def test_focus_without_a_part_to_draw_is_refused():
    with pytest.raises(ConfigError, match=r"focus is 0.5, but .* set epoch_images"):
        Config(focus=0.5)


def test_a_refusal_is_a_value_error_and_one_of_the_packages_own():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, MnistlibError)


def test_a_config_is_frozen():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 5


def test_every_field_that_changes_the_result_changes_the_hash():
    assert {f.name for f in dataclasses.fields(Config)} == OTHER.keys() | NO_RESULT.keys()
    hashes = [Config().hash("mnist"), Config().hash("sample")]
    # those that need another
    part = {"focus": {"epoch_images": OTHER["epoch_images"]}, "slices": {"dropout": 0.0}}
    hashes += [
        Config(**{name: value, **part.get(name, {})}).hash("mnist") for name, value in OTHER.items()
    ]
    assert len(set(hashes)) == len(OTHER) + 2
    assert all(len(h) == 8 and int(h, 16) >= 0 for h in hashes)


@pytest.mark.parametrize("name", list(NO_RESULT))
def test_device_and_threads_do_not_change_the_hash(name):
    config = Config(**{name: NO_RESULT[name]})
    assert config != Config()
    assert config.hash("mnist") == Config().hash("mnist")


def test_a_value_has_one_hash_however_it_is_written():
    assert Config(max_lr="2e-2", epochs=4.0) == Config(max_lr=0.02, epochs="4")
    written = {Config(max_lr=v).hash("mnist") for v in (0.02, "0.02", "2e-2")}
    assert len(written) == 1


def test_hashes_are_those_in_the_ledger_whatever_is_renamed_or_added():
    """Hundreds of rows name their runs by them; a Config that hashes anew would orphan these."""
    assert {name: c.hash("mnist") for name, c in RECIPES.items()} == {
        "reference": "3e42c577", "reference-fast": "81f829ec", "fast": "74cd13f4",
        "sprint": "67e73c71", "smoothed": "21989fa6", "smoothed-20k": "9d1f8129",
        "teacher": "4edc002f", "best": "7a85a099", "best-20k": "ad29e5aa",
        "best-7918": "d319e013", "best-6174": "864a45d3", "best-3500": "7fe310e4",
        "best-1936": "9e00bd18", "best-1000": "dab8b274", "best-697": "50eb7ccc",
    }  # fmt: skip
    # the runs made before there were slices
    old = {"slices": 1, "pct_start": 0.2}
    assert replace(RECIPES["fast"], epochs=16, **old).hash("mnist") == "62262f61"
    assert replace(RECIPES["sprint"], epoch_images=10_000, **old).hash("mnist") == "d8b5c051"
    assert (Config().hash("mnist"), Config(seed=3).hash("sample")) == ("b552b688", "4f9a22cf")


def test_equal_configs_have_equal_hashes():
    assert Config(degrees="-0") == Config(degrees=0)
    assert Config(degrees="-0").hash("mnist") == Config(degrees=0).hash("mnist")


@every_recipe
def test_none_keeps_the_recipes_own_value(name):
    nothing = dict.fromkeys([*OTHER, *NO_RESULT])
    assert configure(name, **nothing) == configure(name) == RECIPES[name]
    assert configure(name, **(nothing | {"epochs": "7"})).epochs == 7


def test_without_a_name_the_recipe_trains_the_published_network():
    assert configure() == RECIPES["reference-fast"]


@every_recipe
def test_seed_device_and_threads_leave_a_recipe_what_it_is(name):
    assert configure(name).recipe == name
    assert configure(name, seed=7, device="cpu", threads=1).recipe == name


@every_recipe
@pytest.mark.parametrize("field", [f for f in OTHER if f != "seed"])
def test_any_other_change_makes_it_custom(name, field):
    values = {OTHER[field], getattr(Config(), field)} - {getattr(RECIPES[name], field)}
    # a part of the images and the focus on some of them go together, dropout and slices do not
    more = {"focus": {"epoch_images": 1000}, "epoch_images": {"focus": 0.0}}
    more |= {"slices": {"dropout": 0.0}, "dropout": {"slices": 1}}
    own = dict.fromkeys((*AUGMENTATIONS, "label_smoothing"), 0.0)  # a pool brings these
    more |= {"pool": own} | {setting: {"pool": ""} for setting in own}
    more = more.get(field, {})
    for value in values:
        assert configure(name, **{field: value}, **more).recipe == "custom"
    assert values


def test_a_run_is_named_after_its_source_recipe_hash_and_seed():
    config = configure("reference", seed=3)
    assert config.run_name("mnist") == f"reference-{config.hash('mnist')}-seed3"
    assert config.run_name("sample") == f"sample-reference-{config.hash('sample')}-seed3"


@pytest.mark.parametrize("name", ["degrees", "pixels", "scale", "shear", "elastic"])
def test_any_amount_above_zero_augments_and_all_are_handed_on(name):
    amounts = {"degrees": 0.0, "pixels": 0.0, "scale": 0.0, "shear": 0.0, "elastic": 0.0}
    assert Config(**{name: 0.5}).augmentation == amounts | {name: 0.5}


def test_without_an_amount_nothing_is_augmented():
    assert Config(dropout=0.5, focus=0.5, epoch_images=10).augmentation == {}


@pytest.mark.parametrize(
    ("settings", "n_train", "steps"),
    [
        ({}, 50_000, 391),
        ({}, 60_000, 469),
        ({"batch_size": 100}, 600, 6),
        ({"batch_size": 100}, 601, 7),
        ({"batch_size": 100, "epoch_images": 250}, 600, 3),
        ({"batch_size": 100, "epoch_images": 1_200}, 600, 12),
    ],
)
def test_an_epoch_has_as_many_steps_as_batches_the_last_perhaps_short(settings, n_train, steps):
    assert Config(**settings).steps_per_epoch(n_train) == steps


def test_the_reference_recipe_takes_391_batches_from_50000_images():
    recipe = RECIPES["reference"]
    assert (recipe.epoch_images, recipe.split) == (0, "random")
    assert recipe.steps_per_epoch(50_000) == 391
