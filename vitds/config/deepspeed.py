"""The user's DeepSpeed JSON: read, checked, and completed from the recipe.

Checked is what DeepSpeed would take in silence.

The JSON says how the numbers are computed (ZeRO stage, offload, buckets), the recipe what is computed (batch,
optimizer, schedule, clipping, precision). `auto` in the JSON stands for the recipe's value; two different
values are an error that names both places. DeepSpeed itself is not imported.
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitds.config.names import did_you_mean, nearest
from vitds.config.tree import Settings
from vitds.errors import SettingsError

Precision = Literal["fp32", "bf16", "fp16"]
DEFAULT = "zero0"

# Blocks that would have a second owner beside the recipe, and what replaces them.
REPLACED = {
    "optimizer": "the recipe's optimizer section: optimizer.lr_peak, .weight_decay, .betas, .eps",
    "scheduler": "the recipe's epochs and schedule.warmup_epochs",
    "amp": "the recipe's engine.precision",
    "activation_checkpointing": "the recipe's engine.activation_checkpointing",
}
# DeepSpeed ignores a top-level key it does not know. Newer versions add keys, so only a near miss of one of
# these is refused.
TOP_KEYS = tuple(
    (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
        "zero_optimization bf16 fp16 torch_autocast zero_allow_untested_optimizer "
        "zero_force_ds_cpu_optimizer communication_data_type prescale_gradients gradient_predivide_factor "
        "gradient_allreduce_op data_types aio checkpoint comms_logger steps_per_print "
        "wall_clock_breakdown memory_breakdown dump_state flops_profiler log_level timers compile"
    ).split()
)
ZERO_KEYS = tuple(
    (
        "stage offload_param offload_optimizer overlap_comm contiguous_gradients reduce_scatter "
        "reduce_bucket_size allgather_partitions allgather_bucket_size round_robin_gradients sub_group_size "
        "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance zero_hpz_partition_size"
    ).split()
)
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]')
PRECISION_BLOCKS: dict[str, Precision] = {"bf16": "bf16", "torch_autocast": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class DsConfig:
    """A checked DeepSpeed JSON, still with its `auto` values."""

    path: Path
    values: Mapping[str, Any]
    text: str = field(repr=False, default="{}")

    @property
    def zero_stage(self) -> int:
        """0 (nothing sharded) to 3 (parameters, gradients and optimizer states sharded)."""
        return self.values.get("zero_optimization", {}).get("stage", 0)

    @property
    def offloads_optimizer(self) -> bool:
        """True if optimizer states live in host memory or on disk, where the optimizer then works."""
        return self.device("offload_optimizer") != "none"

    @property
    def offloads_parameters(self) -> bool:
        """True if parameters live in host memory or on disk between their uses."""
        return self.device("offload_param") != "none"

    @property
    def precision(self) -> Precision | None:
        """The precision the file itself switches on, None where it leaves it to the recipe."""
        return next((PRECISION_BLOCKS[block] for block in self.enabled_blocks()), None)

    def enabled_blocks(self) -> list[str]:
        """The precision blocks whose `enabled` is true; `load_ds_config` lets at most one pass."""
        return [block for block in PRECISION_BLOCKS if self.values.get(block, {}).get("enabled") is True]

    def device(self, offload: str) -> str:
        """none, cpu or nvme of `offload_optimizer` or `offload_param`."""
        return (self.values.get("zero_optimization", {}).get(offload) or {}).get("device", "none")

    def place(self, key: str) -> str:
        """`file:line` of a dotted key that the file has, to be shown to a person."""
        above: list[str | None] = []  # of each open object or list the last key; a list has none
        text = None
        for token in JSON_TOKEN.finditer(self.text):
            if token[0] in "{[":
                above.append(None)
            elif token[0] in "}]":
                above.pop()
            elif token[0] != ":":
                text = token
            else:
                above[-1] = json.loads(text[0])
                if ".".join(map(str, above)) == key:
                    return f"{self.path}:{self.text.count(chr(10), 0, text.start()) + 1}"
        return str(self.path)


def load_ds_config(path: str | None) -> DsConfig:
    """Read and check a DeepSpeed JSON.

    Args:
        path: a file, or the name of a packaged one (`zero2`); None is `zero0`, which shards nothing and
            serves one rank best.
    Raises: SettingsError if the file is missing, is not JSON (line and column), has a key twice, or holds
        what the recipe decides, what DeepSpeed would ignore in silence, or what is known to train wrongly
        (names file, line and key).
    """
    file = _find(path or DEFAULT)
    try:
        text = file.read_text("utf-8")
        values = json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(pairs, file))
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
        ) from None
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: a DeepSpeed configuration is one JSON object, {{...}}")
    config = DsConfig(file, values, text)
    _check_keys(config)
    _check_zero(config)
    _check_precision(config)
    return config


def _find(name: str) -> Path:
    if "/" in name or name.endswith(".json"):
        return Path(name)
    # A link to the checkout's ds_configs, and a folder of its own in an installed package.
    packaged = {
        path.stem: path for path in map(Path, (importlib.resources.files("vitds") / "ds_configs").iterdir())
    }
    if name not in packaged:
        raise SettingsError(
            f"ds_config {name} is unknown; {did_you_mean(name, packaged)} (a file of your own: its path, "
            "ending in .json)"
        )
    return packaged[name]


def _without_repeats(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise SettingsError(f'{file}: key "{twice}" stands twice in one object; leave one out')
    return dict(pairs)


def _check_keys(config: DsConfig) -> None:
    """Blocks that belong to the recipe, near misses of DeepSpeed's keys, values where a block is meant."""
    for key in config.values:
        if key in REPLACED:
            raise SettingsError(
                f'{config.place(key)}: "{key}" is decided by {REPLACED[key]}; remove the block'
            )
    for block in ("zero_optimization", *PRECISION_BLOCKS):
        if not isinstance(config.values.get(block, {}), dict):
            raise SettingsError(
                f'{config.place(block)}: "{block}" must be an object, got {json.dumps(config.values[block])}'
            )
    for above, known in (("", TOP_KEYS), ("zero_optimization", ZERO_KEYS)):
        for key in config.values.get(above, {}) if above else config.values:
            if key not in known and (near := nearest(key, known, cutoff=0.85)):
                place = config.place(f"{above}.{key}" if above else key)
                raise SettingsError(f'{place}: unknown key "{key}"; did you mean "{near}"?')


def _check_zero(config: DsConfig) -> None:
    """Stage and offload: what DeepSpeed would ignore, or fail on late."""
    zero = config.values.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        place = config.place("zero_optimization.stage")
        raise SettingsError(f"{place}: zero_optimization.stage must be 0, 1, 2 or 3, got {json.dumps(stage)}")
    for offload, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        key = f"zero_optimization.{offload}"
        if not isinstance(zero.get(offload) or {}, dict) or config.device(offload) not in (
            "none",
            "cpu",
            "nvme",
        ):
            raise SettingsError(
                f'{config.place(key)}: {key} must be an object with "device": "none", "cpu" or "nvme"'
            )
        device = config.device(offload)
        needed = 3 if device == "nvme" else lowest
        if device != "none" and stage < needed:
            raise SettingsError(
                f"{config.place(key)}: {key} to {device} needs ZeRO stage {needed} or higher, this is stage "
                f"{stage}, where DeepSpeed leaves everything in memory without a word; raise "
                "zero_optimization.stage or remove the block"
            )
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old in zero:
            raise SettingsError(
                f'{config.place(f"zero_optimization.{old}")}: "{old}" is an old name; write "{new}": '
                '{"device": "cpu"}'
            )


def _check_precision(config: DsConfig) -> None:
    """Precision blocks that contradict each other, or drift."""
    blocks = config.enabled_blocks()
    if len(blocks) > 1:
        places = " and ".join(f"{block}.enabled ({config.place(f'{block}.enabled')})" for block in blocks)
        raise SettingsError(f"{places} cannot both be true; keep one")
    if blocks == ["bf16"] and config.zero_stage == 0:
        raise SettingsError(
            f"{config.place('bf16.enabled')}: bf16.enabled at ZeRO stage 0 has no fp32 masters and drifts; "
            "set zero_optimization.stage to "
            f'1 or more, or use "torch_autocast": {{"enabled": true}}, which keeps fp32 parameters'
        )
    dtype = config.values.get("torch_autocast", {}).get("dtype", "auto")
    if dtype not in ("auto", "bfloat16"):
        raise SettingsError(
            f'{config.place("torch_autocast.dtype")}: torch_autocast.dtype must be "bfloat16" or "auto", got '
            f'{json.dumps(dtype)}; for half precision write "fp16": {{"enabled": true}}'
        )


def resolve_ds_config(
    config: DsConfig,
    settings: Settings,
    *,
    micro_images: int,
    accumulation: int,
    ranks: int,
    precision: Precision,
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: the file, with the recipe's values for `auto` and absent ones.

    Clipping is always written: DeepSpeed 0.19 clips at 1.0 where the key is absent.

    Args:
        config: the checked file.
        settings: of the recipe.
        micro_images: images a rank puts through the backbone at once.
        accumulation: micro batches a step.
        ranks: R.
        precision: resolved.
    Raises: SettingsError if the file has another value than the recipe (names file, line, key and value, and
        the recipe's key and value), or makes weights flat that Muon turns.
    """
    resolved = copy.deepcopy(dict(config.values))
    for key, recipe_key, value in (
        ("train_batch_size", "batch.global_images", settings.batch.global_images),
        ("train_micro_batch_size_per_gpu", "batch.micro_images", micro_images),
        (
            "gradient_accumulation_steps",
            f"batch.global_images / (batch.micro_images x {ranks} ranks)",
            accumulation,
        ),
        ("gradient_clipping", "optimizer.clip_norm", settings.optimizer.clip_norm),
    ):
        if resolved.get(key, "auto") not in ("auto", value):
            raise _contradiction(config, key, recipe_key, value)
        resolved[key] = value
    for block, wanted in _precision_blocks(config, precision).items():
        if config.values.get(block, {}).get("enabled", "auto") not in ("auto", wanted):
            raise _contradiction(config, f"{block}.enabled", "engine.precision", precision)
        resolved[block] = {**resolved.get(block, {}), "enabled": wanted}
    is_flat = config.zero_stage or resolved["bf16"]["enabled"] or precision == "fp16"
    if settings.optimizer.kind == "muon" and is_flat:
        raise SettingsError(
            f"optimizer.kind muon turns whole matrices, of which DeepSpeed makes flat pieces at ZeRO stage "
            f"{config.zero_stage} with engine.precision {precision}; take a DeepSpeed JSON of "
            'stage 0 without "bf16" and engine.precision bf16 or fp32, or set optimizer.kind=adamw'
        )
    resolved["torch_autocast"]["dtype"] = "bfloat16"
    resolved["zero_allow_untested_optimizer"] = True
    # It would wait for the device twice a step, for a line that nobody reads; metrics.jsonl has the speed.
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    return resolved


def _precision_blocks(config: DsConfig, precision: Precision) -> dict[str, bool]:
    """`enabled` of each block.

    bf16 is autocast over fp32 parameters, unless the file asks for bf16 parameters with fp32 masters.
    """
    has_bf16_parameters = precision == "bf16" and config.enabled_blocks() == ["bf16"]
    return {
        "bf16": has_bf16_parameters,
        "torch_autocast": precision == "bf16" and not has_bf16_parameters,
        "fp16": precision == "fp16",
    }


def _contradiction(config: DsConfig, key: str, recipe_key: str, value: Any) -> SettingsError:
    found: Any = config.values
    for part in key.split("."):
        found = found[part]
    return SettingsError(
        f"{config.place(key)}: {key} is {json.dumps(found)}, but the recipe has {recipe_key} {value}; "
        'write "auto" in the file or change one'
    )
