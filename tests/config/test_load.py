"""Recipe, --set, flags and Python arguments become one settings tree, or one message with every mistake."""

from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitds.config.load import differences, dump_settings, load_settings, read_settings
from vitds.config.methods import DEFAULT_METHODS, METHODS
from vitds.config.recipes import DEFAULT_RECIPES, list_recipes, read_header, read_recipe
from vitds.config.tree import Settings
from vitds.config.yaml_text import dump_yaml, parse_yaml
from vitds.errors import SettingsError

RECIPE = """\
method: idmm
epochs: 7
data: {train: own.beton, test: own-test.beton}
views:
  crop_px: 48
  groups:
  - {name: global, views: 2, scale: [0.14, 1.0]}
backbone:
  options: {depth: 6, num_heads: 3}
"""


@pytest.fixture
def recipe(tmp_path):
    """A small recipe file."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    return str(tmp_path / "r.yaml")


def load(recipe=None, *assignments, command="pretrain", flags=None, **extra) -> Settings:
    return load_settings(
        recipe=recipe, command=command, assignments=assignments, flags=flags or {}, extra=extra
    )


def refusal(*words, **more) -> str:
    with pytest.raises(SettingsError) as caught:
        load(*words, **more)
    return str(caught.value)


# merging


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


# values as YAML 1.2 reads them


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3),
        ("5E4", 5e4),
        (".5", 0.5),
        ("-3", -3),
        ("off", "off"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
    ]
    + [
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'3'", "3"),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: no}", {"a": "no"}),
    ],
)
def test_scalar_is_what_a_person_expects(text, value):
    assert parse_yaml(text, "--set") == value and type(parse_yaml(text, "--set")) is type(value)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
)


@settings(deadline=None)
@given(
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3)
        ),
    )
)
def test_written_yaml_reads_back_to_the_same_values(value):
    assert parse_yaml(dump_yaml(value), "text") == value


def test_exponent_without_a_dot_is_a_number(recipe):
    assert load(recipe, "optimizer.lr_peak=1e-3").optimizer.lr_peak == 0.001


def test_off_is_a_word(recipe):
    assert load(recipe, "engine.compile=off").engine.compile == "off"


# mistakes


def test_unknown_recipe_gets_the_nearest_name():
    assert refusal("idmm_digit").startswith("recipe idmm_digit is unknown; did you mean idmm_digits?")


def test_missing_recipe_file_is_named():
    assert refusal("nowhere/r.yaml") == "recipe nowhere/r.yaml: no such file"


def test_recipe_that_is_not_yaml_is_named_with_line_and_column(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: 3\nviews: [1\n")
    assert refusal(str(tmp_path / "r.yaml")).startswith(
        f"{tmp_path / 'r.yaml'}:3:1: not valid YAML: expected"
    )


def test_recipe_with_a_control_character_is_named_with_its_line(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: 3\nseed: \x01\n")
    assert refusal(str(tmp_path / "r.yaml")).startswith(f"{tmp_path / 'r.yaml'}:2: not valid YAML: character")


def test_recipe_that_is_no_text_or_no_mapping_is_named(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert refusal(str(file)) == f"{file}: cannot be read: not UTF-8 text"
    file.write_text("- 1\n")
    assert refusal(str(file)) == f"{file}: holds no settings; expected lines like `epochs: 100`"


def test_key_that_stands_twice_in_a_recipe_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: 3\nseed: 1\nepochs: 4\n")
    assert (
        refusal(str(tmp_path / "r.yaml"))
        == f"{tmp_path / 'r.yaml'}:3:1: not valid YAML: key epochs stands twice"
    )


def test_recipe_of_the_other_command_is_refused_with_that_commands_name():
    text = refusal("finetune_digits")
    assert text.startswith("recipe finetune_digits is for `vitds finetune` (method supervised)")
    others = [
        name for name, _ in list_recipes() if METHODS[read_recipe(name)["method"]].command == "pretrain"
    ]
    assert "idmm_digits" in others and text.endswith(f"recipes for `vitds pretrain`: {', '.join(others)}")


def test_set_word_without_a_value_shows_the_form(recipe):
    assert (
        refusal(recipe, "epochs") == "--set epochs: write --set key=value, as in --set optimizer.lr_peak=1e-3"
    )
    assert "write --set key=value" in refusal(recipe, "=3")


def test_set_value_that_is_not_yaml_is_named(recipe):
    assert refusal(recipe, "views.scale=[0.1").startswith("--set views.scale=[0.1: not valid YAML: expected")


def test_key_set_to_two_values_is_refused(recipe):
    assert (
        refusal(recipe, "epochs=3", "epochs=4")
        == "epochs is set twice: --set epochs=3 and --set epochs=4; leave one out"
    )
    assert load(recipe, "epochs=3", "epochs=3").epochs == 3


def test_key_below_a_single_value_is_refused(recipe):
    assert refusal(recipe, "epochs.first=3") == (
        "epochs.first (from --set epochs.first=3): epochs is one value, 7, and has no keys; set it whole"
    )


@pytest.mark.parametrize(
    "word, message",
    [
        ("epochs=0", "epochs: must be greater than or equal to 1, got 0"),
        ("epochs=true", "epochs: must be a whole number, got True"),
        ("epochs='3'", "epochs: must be a whole number, got '3'"),
        ("views.flip=2", "views.flip: must be less than or equal to 1, got 2"),
        ("optimizer.lr_peak=.nan", "optimizer.lr_peak: must be a finite number, got nan"),
        ("mix.kind=cut", "mix.kind: must be 'none', 'cutmix', 'mixup' or 'alternate', got 'cut'"),
        (
            "method=byol",
            "method: must be 'idmm', 'supervised', 'simclr', 'mocov3', 'lejepa', 'supcon', 'dino' "
            "or 'mae', got 'byol'",
        ),
        (
            "batch.micro_images=many",
            "batch.micro_images: must be 'auto', or must be a whole number, got 'many'",
        ),
        (
            "views.blur_sigma=[3, 1]",
            "views.blur_sigma: must satisfy 0 < low <= high <= 4 pixels, got [3.0, 1.0]",
        ),
        (
            "views.groups=[{name: a, scale: [0.5, 0.2]}]",
            "views.groups.0.scale: must satisfy 0 < low <= high <= 1, got [0.5, 0.2]",
        ),
        ("views.groups=[{name: a}, {name: a}]", "views.groups: group names must differ, got ['a', 'a']"),
        ("views.groups=1", "views.groups: must be a list of groups, got 1"),
        ("backbone.frozen=x", "backbone.frozen: must be a list, got 'x'"),
        ("backbone.options=3", "backbone.options: must be a mapping, {key: value}, got 3"),
        ("log.tensorboard=1", "log.tensorboard: must be true or false, got 1"),
        ("backbone.name=3", "backbone.name: must be text, got 3"),
        ("views.mean=[a, 0, 0]", "views.mean.0: must be a number, got 'a'"),
        ("optimizer.betas=[0, 0, 0]", "optimizer.betas: must have at most 2 items, not 3, got [0, 0, 0]"),
        ("schedule=3", "schedule: must be a section with the keys warmup_epochs, got 3"),
        ("views.groups=[{views: 2}]", "views.groups.0.name: must be given"),
        (
            "views.groups=[{name: a, scales: 1}]",
            "views.groups.0.scales: unknown key; did you mean views.groups.0.scale?",
        ),
        ("views.crp_px=3", "views.crp_px: unknown key; did you mean views.crop_px?"),
        ("crop_px=3", "crop_px: unknown key; did you mean views.crop_px?"),
        ("kind=none", "kind: unknown key; did you mean mix.kind or head.kind?"),
        ("crop=3", "crop: unknown key; did you mean views.crop_px?"),
        ("log.zzz=1", "log.zzz: unknown key; the keys here are tensorboard, page"),
    ],
)
def test_wrong_setting_is_named_with_value_what_is_allowed_and_origin(recipe, word, message):
    assert refusal(recipe, word) == f"{message} (from --set {word})"


def test_origin_of_a_wrong_value_is_its_recipe_flag_or_argument(recipe, tmp_path):
    (tmp_path / "bad.yaml").write_text("epochs: 0\n")
    assert refusal(str(tmp_path / "bad.yaml")).endswith(f"(from recipe {tmp_path / 'bad.yaml'})")
    assert refusal(recipe, flags={"epochs": 0}).endswith("(from --epochs)")
    assert refusal(recipe, epochs=0).endswith("(from argument epochs)")


def test_all_mistakes_stand_in_one_message(recipe):
    assert refusal(recipe, "epochs=0", "views.flip=-1", "log.tensorbord=true").splitlines() == [
        "3 settings are wrong:",
        "  epochs: must be greater than or equal to 1, got 0 (from --set epochs=0)",
        "  views.flip: must be greater than or equal to 0, got -1 (from --set views.flip=-1)",
        "  log.tensorbord: unknown key; did you mean log.tensorboard? (from --set log.tensorbord=true)",
    ]


def test_rule_between_two_keys_names_both_and_what_fits(recipe):
    assert refusal(recipe, "batch.global_images=12", "batch.chunk_images=5") == (
        "batch.global_images 12 is not a multiple of batch.chunk_images 5; chunk_images may be [1, 2, 3, 4, "
        "6, 12]"
    )


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


# a recipe's base


def write_derived(folder, text):
    (folder / "derived.yaml").write_text(text)
    return str(folder / "derived.yaml")


def test_recipe_with_a_base_says_what_differs(recipe, tmp_path):
    derived = load(write_derived(tmp_path, f"base: {recipe}\nviews: {{crop_px: 64}}\nepochs: 3\n"))
    assert (derived.epochs, derived.views.crop_px) == (3, 64)
    assert derived.views.groups == load(recipe).views.groups
    assert derived == load(recipe, "epochs=3", "views.crop_px=64")


def test_options_of_a_base_are_replaced_whole(recipe, tmp_path):
    derived = load(write_derived(tmp_path, f"base: {recipe}\nbackbone: {{options: {{depth: 2}}}}\n"))
    assert derived.backbone.options == {"depth": 2}


def test_base_that_is_unknown_or_has_a_base_itself_is_refused(recipe, tmp_path):
    assert refusal(write_derived(tmp_path, "base: idmm_digit\n")).startswith("recipe idmm_digit is unknown")
    path = write_derived(tmp_path, "base: idmm_t2t_vit_7\n")
    assert refusal(path) == (
        f"recipe {path}: its base idmm_t2t_vit_7 has a base itself, idmm_deit_tiny; one step is all there is"
    )


def test_wrong_setting_of_a_base_is_named_with_the_recipe_that_has_it(tmp_path):
    (tmp_path / "bad.yaml").write_text("epochs: 0\n")
    path = write_derived(tmp_path, f"base: {tmp_path / 'bad.yaml'}\nseed: 1\n")
    assert refusal(path) == f"epochs: must be greater than or equal to 1, got 0 (from recipe {path})"


# packaged recipes


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_packaged_recipe_is_valid_and_starts_with_command_time_and_expectation(name):
    settings = load(name, command=None)
    header = read_header(files("vitds") / "recipes" / f"{name}.yaml")
    command = f"vitds {METHODS[settings.method].command}"
    assert list(header) == ["Command", "Time", "Expect", "About"]
    assert header["Command"].startswith(f"{command} --recipe {name}")


def test_chunks_of_the_digits_recipes_divide_over_the_usual_ranks():
    for command in DEFAULT_RECIPES:
        settings = load(command=command)
        chunks = settings.batch.global_images // settings.batch.chunk_images
        assert [ranks for ranks in (1, 2, 3, 4, 6, 8) if chunks % ranks] == []


def test_both_arms_of_the_digits_have_one_backbone():
    assert load(command="pretrain").backbone.options == load(command="finetune").backbone.options


def test_paper_recipe_has_the_papers_numbers():
    # DeiT-Tiny in the authors' code: 800 epochs, batch 256 over 4 processes, AdamW 5e-4 and 1e-3, 2 + 4 crops
    # of 112 px.
    recipe = read_recipe("idmm_deit_tiny")
    assert (recipe["epochs"], recipe["batch"]["global_images"], recipe["batch"]["chunk_images"]) == (
        800,
        256,
        64,
    )
    assert (recipe["optimizer"]["lr_peak"], recipe["optimizer"]["weight_decay"]) == (5e-4, 1e-3)
    assert [(group["views"], group["scale"]) for group in recipe["views"]["groups"]] == [
        (2, [0.14, 1.0]),
        (4, [0.05, 0.4]),
    ]


# The authors' scripts: peak rate and warm-up epochs of pretraining, rate at 224 px, images and rate at 448
# px, images of one process in pretraining. DeiT-Base, PVTv2-B3 and T2T-ViT-7 have none of their own; they
# take those of their family.
PAPERS = {
    "deit_tiny": ("deit_tiny_patch16_224", 5e-4, 2, 5e-4, 128, 5e-5, 64),
    "deit_base": ("deit_base_patch16_224", 5e-4, 2, 5e-4, 128, 5e-5, 64),
    "pvt_v2_b0": ("pvt_v2_b0", 1e-3, 10, 1e-3, 128, 5e-5, 64),
    "pvt_v2_b3": ("pvt_v2_b3", 1e-3, 10, 1e-3, 128, 5e-5, 64),
    "t2t_vit_7": ("t2t_vit_7", 1e-3, 10, 1e-3, 32, 1.25e-5, 16),
    "t2t_vit_14": ("t2t_vit_14", 1e-3, 10, 1e-3, 32, 1.25e-5, 16),
}


@pytest.mark.parametrize("key", PAPERS)
def test_recipes_of_the_papers_backbones_have_the_scripts_numbers(key):
    name, rate, warmup, rate_224, images_448, rate_448, chunk = PAPERS[key]
    first = load(f"idmm_{key}")
    second, third = (load(f"finetune_{key}_{side}", command="finetune") for side in (224, 448))
    stages = (first, second, third)
    assert {stage.backbone.name for stage in stages} == {name}
    assert {stage.backbone.drop_path for stage in stages} == {0.1}
    assert {stage.optimizer.weight_decay for stage in stages} == {1e-3}
    assert {stage.schedule.warmup_epochs for stage in stages} == {warmup}
    assert [stage.views.crop_px for stage in stages] == [112, 224, 448]
    assert [stage.epochs for stage in stages] == [800, 800, 100]
    assert [stage.optimizer.lr_peak for stage in stages] == [rate, rate_224, rate_448]
    assert [stage.batch.global_images for stage in stages] == [256, 256, images_448]
    assert first.batch.chunk_images == chunk and first.views.count == 6
