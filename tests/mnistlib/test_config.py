"""Settings: cast or refused with a sentence, frozen, hashed; the recipes."""

import dataclasses
import math

import pytest

from mnistlib import MODELS, RECIPES, Config, ConfigError, MnistlibError, configure
from mnistlib.config import read_settings

# for every field that changes the result, a value that is not its default
OTHER = {
    "focus": 0.5, "slices": 2,
    "model": "reference-pooled", "epochs": 4, "batch_size": 64, "epoch_images": 1000,
    "optimizer": "sgd", "max_lr": 0.02, "pct_start": 0.3,
    "anneal": "linear", "cycle_momentum": False, "weight_decay": 0.0, "dropout": 0.1,
    "label_smoothing": 0.1, "elastic": 0.5,
    "degrees": 5.0, "pixels": 1.0, "scale": 0.1, "shear": 3.0,
    "ema_decay": 0.9, "norm_images": 500, "pool": "0123abcd", "start": "best",
    "split": "last", "seed": 1,
}  # fmt: skip
NO_RESULT = {"device": "cpu", "threads": 2}


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("max_lr", "1e-2", 0.01), ("max_lr", 1, 1.0), ("max_lr", " 0.5 ", 0.5),
        ("epochs", 20.0, 20), ("epochs", "20.0", 20), ("seed", "1e3", 1000), ("threads", "0", 0),
        ("degrees", "-0", 0.0), ("optimizer", " sgd ", "sgd"), ("cycle_momentum", "False", False),
        ("model", " c16k5s2  r1 p r2 r2\tfull", "c16k5s2 r1 p r2 r2 full"),
    ],
)  # fmt: skip
def test_values_from_papermill_are_cast_and_have_one_hash(name, given, kept):
    config = Config(**{name: given})
    assert getattr(config, name) == kept
    assert type(getattr(config, name)) is type(kept)
    assert config.hash("mnist") == Config(**{name: kept}).hash("mnist")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "from 1 to"), ("epochs", "-1", "from 1 to"),
        *(("epochs", v, "a whole number") for v in ("3.5", True, None, math.inf, [3])),
        pytest.param("epochs", 10**400, "a whole number", id="epochs-larger than a float"),
        ("batch_size", 1, "from 2 to 60,000"), ("max_lr", 0.0, "from 1e-08 to 100"),
        *(("max_lr", v, "a finite number") for v in ("abc", "", math.nan, "-inf", True)),
        ("ema_decay", 1.0, "from 0 to 0.999999"), ("cycle_momentum", "no", "true or false"),
        ("model", "resnet", "choose one of " + ", ".join(MODELS)), ("model", 3, "a name"),
        ("model", "c16k5s2 q p full", "'q' is no layer"),
        ("device", "tpu", "one of auto, cpu, cuda, mps, xpu"),
        ("pool", "0123456G", "eight hex digits"),
        ("start", "a/b.pth", "the name of a recipe"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as refused:
        Config(**{name: value})
    text = str(refused.value)
    assert text.startswith((f"{name} is {value!r}, ", f"{name} is {value}, "))  # as given or cast
    assert allowed in text
    assert isinstance(refused.value, MnistlibError)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"focus": 0.5}, "focus is 0.5, but .* set epoch_images"),
        ({"slices": 2}, r"^dropout is 0\.05 with 2 slices; .*: set it to 0$"),
        ({"anneal": "step"}, "cycle_momentum is True with anneal step: set it to false"),
        ({"pool": "01234567", "degrees": 5}, "set augmentation and label_smoothing to 0"),
        ({"pool": "01234567", "label_smoothing": 0.1}, "its own targets"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_a_remedy(settings, said):
    with pytest.raises(ConfigError, match=said):
        Config(**settings)


def test_an_unknown_recipe_or_setting_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"^recipe is 'quick'.* one of " + ", ".join(RECIPES)):
        configure("quick")
    with pytest.raises(ConfigError, match=r"no setting 'epoch'; choose from .*epochs"):
        configure("fast", epoch=5)


def test_settings_in_one_line_are_those_of_a_config_and_quotes_keep_spaces():
    written = "epochs=3 max_lr=1e-2 model='c8 r1 p r2 p full' cycle_momentum=false"
    config = configure("reference", **read_settings(written))
    asked = config.epochs, config.max_lr, config.model, config.cycle_momentum
    assert asked == (3, 0.01, "c8 r1 p r2 p full", False)
    assert read_settings("") == {}
    assert read_settings("model=c8=2") == {"model": "c8=2"}


@pytest.mark.parametrize("text", ["epochs", "epochs 3", "model='c8 p", 3, None])
def test_a_line_of_settings_that_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"^settings is .*, but it must be like 'epochs=3 "):
        read_settings(text)


def test_every_field_that_changes_the_result_changes_the_hash_and_no_other_does():
    assert {f.name for f in dataclasses.fields(Config)} == OTHER.keys() | NO_RESULT.keys()
    # those that need another
    part = {"focus": {"epoch_images": OTHER["epoch_images"]}, "slices": {"dropout": 0.0}}
    configs = [Config(**{name: value, **part.get(name, {})}) for name, value in OTHER.items()]
    hashes = [Config().hash("mnist"), Config().hash("sample"), *(c.hash("mnist") for c in configs)]
    assert len(set(hashes)) == len(OTHER) + 2
    assert Config(**NO_RESULT) != Config()
    assert Config(**NO_RESULT).hash("mnist") == Config().hash("mnist")


def test_hashes_are_those_in_the_ledger_whatever_is_renamed_or_added():
    """Hundreds of rows name their runs by them; a Config that hashes anew would orphan these."""
    assert {name: c.hash("mnist") for name, c in RECIPES.items()} == {
        "reference": "3e42c577", "reference-fast": "81f829ec", "fast": "74cd13f4",
        "sprint": "67e73c71", "smoothed": "21989fa6", "smoothed-20k": "9d1f8129",
        "teacher": "4edc002f", "best": "7a85a099", "best-20k": "ad29e5aa",
        "best-7918": "d319e013", "best-6174": "864a45d3", "best-3500": "7fe310e4",
        "best-1936": "9e00bd18", "best-1000": "dab8b274",
        "best-682": "8f2d0f70", "best-920": "58325507", "best-1816": "c34b1a09",
        "best-3466": "27f3d9a5", "tiny": "ad2e82ff", "careful": "2d0ea807",
    }  # fmt: skip
    assert (Config().hash("mnist"), Config(seed=3).hash("sample")) == ("b552b688", "4f9a22cf")


def test_none_keeps_a_recipes_own_value_and_a_recipe_must_be_named():
    with pytest.raises(TypeError, match="recipe"):  # its values would be others than `Config()` has
        configure(epochs=3)
    nothing = dict.fromkeys([*OTHER, *NO_RESULT])
    for name, recipe in RECIPES.items():
        assert configure(name, **nothing) == recipe
        assert configure(name, **(nothing | {"epochs": "7"})).epochs == 7


def test_a_run_is_named_after_its_source_recipe_hash_and_seed():
    for name in RECIPES:
        config = configure(name, seed=3, device="cpu", threads=1)
        assert config.run_name("mnist") == f"{name}-{config.hash('mnist')}-seed3"
        assert config.run_name("sample") == f"sample-{name}-{config.hash('sample')}-seed3"
    for field in OTHER.keys() - {"seed", "focus", "slices"}:
        assert configure("reference", **{field: OTHER[field]}).recipe == "custom", field


def test_any_amount_above_zero_augments_and_all_are_handed_on():
    amounts = dict.fromkeys(("degrees", "pixels", "scale", "shear", "elastic"), 0.0)
    for name in amounts:
        assert Config(**{name: 0.5}).augmentation == amounts | {name: 0.5}
    assert Config(dropout=0.5).augmentation == {}


def test_an_epoch_has_as_many_steps_as_batches_the_last_perhaps_short():
    found = {n: Config(epoch_images=n).steps_per_epoch(50_000) for n in (0, 128, 129, 60_000)}
    assert found == {0: 391, 128: 1, 129: 2, 60_000: 469}
