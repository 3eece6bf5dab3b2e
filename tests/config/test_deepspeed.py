"""The user's DeepSpeed JSON: what is refused, and what DeepSpeed is given in the end."""

from pathlib import Path

import pytest

from vitds.config.deepspeed import DsConfig, load_ds_config, resolve_ds_config
from vitds.config.tree import Settings
from vitds.errors import SettingsError

SETTINGS = Settings.model_validate(
    {"batch": {"global_images": 192, "chunk_images": 8}, "optimizer": {"clip_norm": 0.5}}
)
STEP = dict(micro_images=24, accumulation=4, ranks=2)
ZERO = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
PACKAGED = [*ZERO, "large_1gpu", "large_8gpu", "large_64gpu"]


@pytest.fixture
def written(tmp_path):
    """Write a JSON text and load it."""

    def write(text: str) -> DsConfig:
        file = tmp_path / "ds.json"
        file.write_text(text)
        return load_ds_config(str(file))

    return write


def refusal(load, *words: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load(*words)
    return str(caught.value)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_file_leaves_to_the_recipe_what_the_recipe_decides(name):
    resolved = resolve_ds_config(load_ds_config(name), SETTINGS, **STEP, precision="fp32")
    assert resolved["train_batch_size"] == 192
    assert resolved["train_micro_batch_size_per_gpu"] == 24
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 0.5
    assert "auto" not in resolved.values()
    # DeepSpeed's timer would wait for the device twice a step.
    assert resolved["timers"] == {"throughput": {"enabled": False}}
    assert {resolved[block]["enabled"] for block in ("bf16", "fp16", "torch_autocast")} == {False}


def test_packaged_names_say_stage_and_offload():
    table = {name: load_ds_config(name) for name in ZERO}
    assert [config.zero_stage for config in table.values()] == [0, 1, 2, 2, 3, 3]
    assert [name for name, config in table.items() if config.offloads_optimizer] == [
        "zero2_offload",
        "zero3_offload",
    ]
    assert [name for name, config in table.items() if config.offloads_parameters] == ["zero3_offload"]


def test_without_a_file_nothing_is_sharded():
    assert load_ds_config(None) == load_ds_config("zero0")


def test_path_and_name_give_the_same_file():
    checkout = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
    assert load_ds_config(str(checkout)).values == load_ds_config("zero2").values


def test_clipping_is_written_when_the_file_lacks_it(written):
    # DeepSpeed 0.19 clips at 1.0 where the key is absent.
    settings = SETTINGS.model_copy(
        update={"optimizer": SETTINGS.optimizer.model_copy(update={"clip_norm": 0.0})}
    )
    assert resolve_ds_config(written("{}"), settings, **STEP, precision="fp32")["gradient_clipping"] == 0.0


def test_resolving_leaves_the_loaded_file_as_it_was(written):
    config = written('{"fp16": {"enabled": "auto", "hysteresis": 3}}')
    assert resolve_ds_config(config, SETTINGS, **STEP, precision="fp16")["fp16"] == {
        "enabled": True,
        "hysteresis": 3,
    }
    assert config.values == {"fp16": {"enabled": "auto", "hysteresis": 3}}


def test_bf16_is_autocast_over_fp32_parameters():
    resolved = resolve_ds_config(load_ds_config("zero0"), SETTINGS, **STEP, precision="bf16")
    assert resolved["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not resolved["bf16"]["enabled"] and not resolved["fp16"]["enabled"]


def test_bf16_parameters_with_fp32_masters_when_the_file_asks_for_them(written):
    config = written('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}}')
    resolved = resolve_ds_config(config, SETTINGS, **STEP, precision="bf16")
    assert config.precision == "bf16"
    assert resolved["bf16"]["enabled"] and not resolved["torch_autocast"]["enabled"]


@pytest.mark.parametrize(
    "text, precision",
    [
        ("{}", None),
        ('{"fp16": {"enabled": true}}', "fp16"),
        ('{"torch_autocast": {"enabled": true}}', "bf16"),
        ('{"fp16": {"enabled": false}}', None),
    ],
)
def test_precision_that_the_file_itself_switches_on(written, text, precision):
    assert written(text).precision == precision


@pytest.mark.parametrize(
    "entry, message",
    [
        ('"train_batch_size": 128', "train_batch_size is 128, but the recipe has batch.global_images 192"),
        (
            '"train_micro_batch_size_per_gpu": 8',
            "train_micro_batch_size_per_gpu is 8, but the recipe has batch.micro_images 24",
        ),
        (
            '"gradient_accumulation_steps": 1',
            "gradient_accumulation_steps is 1, but the recipe has batch.global_images / (batch.micro_images "
            "x 2 ranks) 4",
        ),
        ('"gradient_clipping": 1.0', "gradient_clipping is 1.0, but the recipe has optimizer.clip_norm 0.5"),
        ('"fp16": {"enabled": true}', "fp16.enabled is true, but the recipe has engine.precision bf16"),
        (
            '"torch_autocast": {"enabled": false}',
            "torch_autocast.enabled is false, but the recipe has engine.precision bf16",
        ),
    ],
)
def test_contradiction_names_line_key_and_both_values(written, entry, message):
    config = written(f'{{\n  "steps_per_print": 10,\n  {entry}\n}}')
    text = refusal(lambda: resolve_ds_config(config, SETTINGS, **STEP, precision="bf16"))
    assert text == f'{config.path}:3: {message}; write "auto" in the file or change one'


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            '"optimizer": {"type": "AdamW"}',
            '"optimizer" is decided by the recipe\'s optimizer section: optimizer.lr_peak',
        ),
        ('"scheduler": {}', '"scheduler" is decided by the recipe\'s epochs and schedule.warmup_epochs'),
        ('"amp": {"enabled": true}', '"amp" is decided by the recipe\'s engine.precision'),
        (
            '"activation_checkpointing": {}',
            '"activation_checkpointing" is decided by the recipe\'s engine.activation_checkpointing',
        ),
        (
            '"zero_optimisation": {"stage": 2}',
            'unknown key "zero_optimisation"; did you mean "zero_optimization"?',
        ),
        ('"zero_optimization": {"stages": 2}', 'unknown key "stages"; did you mean "stage"?'),
        ('"zero_optimization": 2', '"zero_optimization" must be an object, got 2'),
        ('"fp16": true', '"fp16" must be an object, got true'),
        ('"zero_optimization": {"stage": 4}', "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
        ('"zero_optimization": {"stage": "2"}', 'zero_optimization.stage must be 0, 1, 2 or 3, got "2"'),
        (
            '"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}',
            "offload_optimizer to nvme needs ZeRO stage 3",
        ),
        (
            '"zero_optimization": {"offload_optimizer": {"device": "cpu"}}',
            "to cpu needs ZeRO stage 1 or higher, this is stage 0",
        ),
        (
            '"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}',
            "offload_param to cpu needs ZeRO stage 3",
        ),
        (
            '"zero_optimization": {"stage": 3, "offload_param": "cpu"}',
            'must be an object with "device": "none", "cpu" or "nvme"',
        ),
        (
            '"zero_optimization": {"cpu_offload": true}',
            '"cpu_offload" is an old name; write "offload_optimizer": {"device": "cpu"}',
        ),
        ('"bf16": {"enabled": true}', "bf16.enabled at ZeRO stage 0 has no fp32 masters and drifts"),
        (
            '"torch_autocast": {"enabled": true, "dtype": "float16"}',
            'torch_autocast.dtype must be "bfloat16" or "auto", got "float16"',
        ),
    ],
)
def test_refused_entry_is_named_with_its_line(written, entry, message, tmp_path):
    text = refusal(written, f'{{\n  "steps_per_print": 10,\n  {entry}\n}}')
    assert text.startswith(f"{tmp_path / 'ds.json'}:3: ") and message in text


def test_two_precisions_in_one_file_are_refused_with_both_lines(written, tmp_path):
    text = refusal(
        written,
        '{"zero_optimization": {"stage": 1},\n "bf16": {"enabled": true},\n "fp16": {"enabled": true}}',
    )
    file = tmp_path / "ds.json"
    assert text == f"bf16.enabled ({file}:2) and fp16.enabled ({file}:3) cannot both be true; keep one"


def test_malformed_json_is_named_with_line_and_column(written, tmp_path):
    assert (
        refusal(written, '{\n  "a": 1\n  "b": 2\n}')
        == f"{tmp_path / 'ds.json'}:3:3: not valid JSON: Expecting ',' delimiter"
    )


def test_key_that_stands_twice_is_refused(written):
    assert 'key "stage" stands twice in one object' in refusal(
        written, '{"zero_optimization": {"stage": 1, "stage": 2}}'
    )


def test_file_that_holds_no_object_is_refused(written):
    assert "a DeepSpeed configuration is one JSON object" in refusal(written, "[]")


def test_missing_and_unreadable_files_are_named(tmp_path):
    assert (
        refusal(load_ds_config, "nowhere/zero2.json")
        == "nowhere/zero2.json: cannot be read: No such file or directory"
    )
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    assert refusal(load_ds_config, str(tmp_path / "x.json")).endswith(
        "x.json: cannot be read: not UTF-8 text"
    )


def test_unknown_name_gets_the_nearest_packaged_one():
    assert refusal(load_ds_config, "zero22").startswith("ds_config zero22 is unknown; did you mean zero2?")
    assert f"one of: {', '.join(sorted(PACKAGED))}" in refusal(load_ds_config, "fsdp")


def test_keys_of_other_deepspeed_versions_pass(written):
    assert written('{"some_future_block": {"enabled": true}}').values == {
        "some_future_block": {"enabled": True}
    }


@pytest.mark.parametrize("key", ["gradient_clippin", r"gradient_clippi\u006e"])
def test_mistyped_key_is_named_with_its_own_line_and_not_a_nested_one(written, key):
    nested = '{"flops_profiler": {"x": ["gradient_clippin"], "gradient_clippin": "a: {"},'
    assert refusal(written, f'{nested}\n "{key}": 1}}').split(": ")[0].endswith("ds.json:2")
