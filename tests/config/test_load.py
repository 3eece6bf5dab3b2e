"""Recipe, --set, flags and Python arguments become one settings tree, which is saved and read back."""

import pytest

from tests.config.loading import load
from vitds.config.load import differences, dump_settings, load_settings, read_settings
from vitds.config.methods import DEFAULT_METHODS
from vitds.config.recipes import DEFAULT_RECIPES
from vitds.errors import SettingsError


def test_without_a_recipe_the_methods_default_on_the_digits():
    for command, name in DEFAULT_RECIPES.items():
        settings = load(command=command)
        assert settings == load(name, command=command)
        assert (settings.method, settings.data.train, settings.data.test) == (
            DEFAULT_METHODS[command],
            "digits",
            "digits",
        )


def test_later_source_wins_key_by_key(recipe):
    assert load(recipe).epochs == 7
    assert load(recipe, "epochs=8").epochs == 8
    assert load(recipe, "epochs=8", flags={"epochs": 9}).epochs == 9
    assert load(recipe, "epochs=8", flags={"epochs": 9}, epochs=10).epochs == 10


def test_keys_that_a_later_source_does_not_name_stay(recipe):
    settings = load(recipe, "views.flip=0.25", views={"filter": "bicubic"})
    assert (settings.views.crop_px, settings.views.flip, settings.views.filter) == (48, 0.25, "bicubic")


def test_section_given_whole_by_set_merges_like_its_keys(recipe):
    settings = load(recipe, "views={flip: 0, filter: bicubic}")
    assert (settings.views.crop_px, settings.views.flip, settings.views.filter) == (48, 0.0, "bicubic")


def test_list_is_replaced_whole(recipe):
    groups = load(recipe, "views.groups=[{name: a, views: 3}, {name: b}]").views.groups
    assert [(group.name, group.views) for group in groups] == [("a", 3), ("b", 1)]


def test_backbone_options_are_one_value_whose_keys_can_be_set_singly(recipe):
    assert load(recipe, "backbone.options.depth=2").backbone.options == {"depth": 2, "num_heads": 3}
    assert load(recipe, backbone={"options": {"depth": 2}}).backbone.options == {"depth": 2}
    assert load(recipe, "backbone.options={}").backbone.options == {}


def test_flags_that_were_not_given_change_nothing(recipe):
    assert load(recipe, flags=dict.fromkeys(["data", "test", "init", "epochs", "seed"])) == load(recipe)


def test_flags_reach_their_keys(recipe):
    settings = load(
        recipe, flags={"data": "a.beton", "test": "b.beton", "init": "runs/a", "epochs": 3, "seed": 5}
    )
    assert (settings.data.train, settings.data.test, settings.init) == ("a.beton", "b.beton", "runs/a")
    assert (settings.epochs, settings.seed) == (3, 5)


def test_own_data_drops_the_recipes_test_set_which_belongs_to_the_recipes_data(recipe):
    assert load(recipe).data.test == "own-test.beton"
    assert load(recipe, flags={"data": "mine.beton"}).data.test is None
    assert load(recipe, "data.train=mine.beton", "data.test=x.beton").data.test == "x.beton"


def test_one_set_word_may_come_as_a_plain_string(recipe):
    assert load_settings(recipe=recipe, command="pretrain", assignments="epochs=3", flags={}).epochs == 3


def test_recipe_without_a_method_is_taken_for_the_command(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: 3\n")
    assert load(str(tmp_path / "r.yaml"), command="finetune").method == "supervised"


def test_fine_tuning_takes_one_group_of_views():
    word = "views.groups=[{name: a}, {name: b}]"
    with pytest.raises(SettingsError, match="views.groups: method supervised takes 1 group, got 2"):
        load("finetune_digits", word, command="finetune")


def test_without_a_method_the_recipe_decides():
    assert load("finetune_digits", command=None).method == "supervised"


def test_settings_are_frozen(recipe):
    with pytest.raises(ValueError, match="frozen"):
        load(recipe).epochs = 3


# saved settings


def test_saved_settings_read_back_equal(recipe, tmp_path):
    settings = load(
        recipe,
        "optimizer.eps=1e-9",
        "optimizer.lr_peak=0.30000000000000004",
        "engine.compile=off",
        "init='1e-3'",
    )
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert read_settings(tmp_path / "settings.yaml") == settings


def test_mistake_in_saved_settings_names_the_file(tmp_path):
    (tmp_path / "settings.yaml").write_text("epochs: -1\n")
    with pytest.raises(SettingsError) as caught:
        read_settings(tmp_path / "settings.yaml")
    assert str(caught.value).endswith(f"got -1 (from {tmp_path / 'settings.yaml'})")


def test_resume_with_other_settings_names_keys_and_both_values(recipe):
    assert differences(
        load(recipe), load(recipe, "epochs=9", "optimizer.lr_peak=1e-3", "backbone.options.depth=2")
    ) == [
        ("epochs", 7, 9),
        ("backbone.options", {"depth": 6, "num_heads": 3}, {"depth": 2, "num_heads": 3}),
        ("optimizer.lr_peak", 0.0005, 0.001),
    ]


def test_resume_may_change_what_changes_no_number(recipe):
    free = [
        "checkpoint.keep=5",
        "log.tensorboard=false",
        "eval.every_epochs=1",
        "data.workers=2",
        "batch.micro_images=64",
    ]
    assert differences(load(recipe), load(recipe, *free)) == []


def test_given_auto_stands_for_what_the_run_resolved(recipe):
    saved = load(recipe, "engine.precision=bf16", "head.kind=dense", "engine.compile=off")
    assert differences(saved, load(recipe)) == []
    assert differences(saved, load(recipe, "engine.precision=fp32")) == [("engine.precision", "bf16", "fp32")]
