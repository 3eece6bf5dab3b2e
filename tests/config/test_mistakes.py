"""Every mistake of recipe, --set, flags and arguments, in one message."""

import pytest

from tests.config.loading import load, refusal
from vitds.config.load import load_settings
from vitds.config.methods import METHODS
from vitds.config.recipes import list_recipes, read_recipe


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


@pytest.mark.parametrize("order", [1, -1])
def test_value_set_whole_and_in_part_is_refused(recipe, order):
    words = ["backbone.options.depth=4", "backbone.options={embed_dim: 96}"]
    assert refusal(recipe, *words[::order]) == (
        f"backbone.options is set twice: --set {words[1]} and, in part, --set {words[0]}; write one of them"
    )


@pytest.mark.parametrize(
    "value, why",
    [
        ("&a {x: *a}", "found unconstructable recursive node"),
        ("!!int abc", "a value cannot be read: invalid literal for int"),
        ("!!timestamp x", "a value cannot be read: "),
        ("1" * 5000, "a value cannot be read: Exceeds the limit"),
        ("[" * 3000 + "]" * 3000, "a value cannot be read: maximum recursion depth exceeded"),
    ],
)
def test_set_value_that_yaml_cannot_build_is_named(recipe, value, why):
    said = refusal(recipe, f"backbone.options={value}")
    assert said.startswith(f"--set backbone.options={value}: not valid YAML: {why}") and "\n" not in said


def test_name_that_is_no_text_is_refused_within_a_list_too(recipe):
    said = refusal(recipe, flags={"data": ["b.beton", "a\udcff.beton"]})
    assert said.startswith(r"data.train: 'a\udcff.beton' is no UTF-8 text") and said.endswith("(from --data)")
    assert "is no UTF-8 text" in refusal(recipe, "a\udcff=3")
    assert "is no UTF-8 text" in refusal(recipe, backbone={"options": {"a\udcff": 1}})


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
        ("kind=none", "kind: unknown key; did you mean mix.kind or head.kind or optimizer.kind?"),
        ("crop=3", "crop: unknown key; did you mean views.crop_px?"),
        ("log.zzz=1", "log.zzz: unknown key; the keys here are tensorboard, page"),
    ],
)
def test_wrong_setting_is_named_with_value_what_is_allowed_and_origin(recipe, word, message):
    assert refusal(recipe, word) == f"{message} (from --set {word})"


def test_settings_that_would_have_no_effect_on_what_they_are_for_are_refused(recipe):
    assert refusal(recipe, "method=dino", "optimizer.average_decay=0.99") == (
        "optimizer.average_decay: the result of method dino is its teacher, an average of weights already; "
        "set dino.momentum"
    )
    lazy = ("head.lazy=true", "head.sample_rate=0.5", "head.bias=true")
    assert refusal(recipe, *lazy, "optimizer.decay=matrices") == (
        "optimizer.decay: rows that head.lazy leaves out make up for the weight decay of all their numbers; "
        "set it to all, or head.bias=false"
    )


def test_sgd_needs_a_head_that_takes_its_rate(recipe):
    assert refusal(recipe, "optimizer.kind=sgd") == (
        "optimizer.kind: rows of a sharded head move by AdamW, which has other rates than sgd; set "
        "head.kind=dense, got auto"
    )
    assert load(recipe, "optimizer.kind=sgd", "head.kind=dense").optimizer.kind == "sgd"


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


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixing_with_no_other_image_in_the_chunk_is_refused(recipe, kind):
    one = "batch.chunk_images=1"
    assert refusal(recipe, one, f"mix.kind={kind}") == (
        f"batch.chunk_images: {kind} mixes the images of a chunk, so it needs 2 or more, got 1; or set "
        "mix.kind=none"
    )
    load_settings(recipe=recipe, command="pretrain", assignments=[one, "mix.kind=none"], flags={})


def test_rule_between_two_keys_names_both_and_what_fits(recipe):
    assert refusal(recipe, "batch.global_images=12", "batch.chunk_images=5") == (
        "batch.global_images 12 is not a multiple of batch.chunk_images 5; chunk_images may be [1, 2, 3, 4, "
        "6, 12]"
    )
