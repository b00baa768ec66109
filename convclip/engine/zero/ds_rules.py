"""Which ds_configs are refused, and why: what convclip cannot honour, and values that contradict one another.

Neither torch nor deepspeed is imported, so that a mistake is named at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from convclip.config import first_problem, one_line
from convclip.engine.zero.ds_sections import DsConfig
from convclip.schema import UserError

# "auto" is for what somebody else knows: the recipe the first four, DeepSpeed's own default the others.
FROM_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
FROM_DEEPSPEED = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.overlap_comm",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
)
OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
ANOTHER_MODEL = "it changes the model or how it is divided, and convclip divides by data alone"
ANOTHER_DATA = "the recipe's data and schedule say what is read and when"
OTHER_MASTERS = "convclip keeps fp32 masters in memory, for unfreezing and checkpoints"
OWN_LOGS = "convclip writes train.log, metrics.jsonl and tensorboard/ itself"
OWN_CHECKPOINTS = "convclip writes checkpoints of its own"
REMOVED = "DeepSpeed no longer has it"
# Keys of DeepSpeed that would train something else than the recipe says, or do nothing here. One that is switched off
# ({"enabled": false}, false, null, all of its values so) is left out; any other is refused with the reason.
REFUSED = {
    "optimizer": "the recipe's optim owns it",
    "scheduler": "the recipe's optim owns it",
    "activation_checkpointing": "the recipe's field activation_checkpointing owns it",
    "dataloader_drop_last": ANOTHER_DATA,
    "data_efficiency": ANOTHER_DATA,
    "curriculum_learning": ANOTHER_DATA,
    "managed_gradient_accumulation": "the recipe's batch.accumulation owns it",
    "bfloat16": "its name is bf16",
    "torch_autocast": "precision is set by bf16 or fp16, which evaluation, stores and chunked steps follow too",
    "amp": "precision is set by bf16 or fp16",
    "data_types": "precision is set by bf16 or fp16",
    "quantize_training": REMOVED,
    "weight_quantization": ANOTHER_MODEL,
    "compression_training": ANOTHER_MODEL,
    "eigenvalue": REMOVED,
    "progressive_layer_drop": ANOTHER_MODEL,
    "sparse_attention": ANOTHER_MODEL,
    "sparse_gradients": REMOVED,
    "graph_harvesting": REMOVED,
    "compile": ANOTHER_MODEL,
    "pipeline": ANOTHER_MODEL,
    "tensor_parallel": ANOTHER_MODEL,
    "expert_parallel": ANOTHER_MODEL,
    "sequence_parallel_size": ANOTHER_MODEL,
    "seq_parallel_communication_data_type": ANOTHER_MODEL,
    "use_data_before_expert_parallelism": ANOTHER_MODEL,
    "hybrid_engine": "it is for training with generated text",
    "autotuning": "the recipe and --plan say what fits",
    "elasticity": "the recipe's batch.global owns the batch, and --resume takes any number of ranks",
    "checkpoint": OWN_CHECKPOINTS,
    "nebula": OWN_CHECKPOINTS,
    "datastates_ckpt": OWN_CHECKPOINTS,
    "load_universal_checkpoint": OWN_CHECKPOINTS,
    "aio": "only offload to nvme uses it, which convclip has not",
    "disable_allgather": REMOVED,
    "vocabulary_size": "the recipe's model.text.vocab_size owns it",
    "tensorboard": OWN_LOGS,
    "wandb": OWN_LOGS,
    "comet": OWN_LOGS,
    "csv_monitor": OWN_LOGS,
    "comms_logger": OWN_LOGS,
    "flops_profiler": OWN_LOGS,
    "timers": OWN_LOGS,
    "log_level": OWN_LOGS,
    "bf16.bf16_master_weights_and_grads": OTHER_MASTERS,
    "bf16.bf16_optimizer_states": OTHER_MASTERS,
    "fp16.fp16_master_weights_and_grads": OTHER_MASTERS,
    "zero_optimization.zenflow": "it updates weights with gradients of steps past",
    "zero_optimization.cpu_offload": 'its name is "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'its name is "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "its name is pin_memory, in offload_optimizer",
    "zero_optimization.zero_quantized_weights": OTHER_MASTERS,
    "zero_optimization.zero_quantized_nontrainable_weights": OTHER_MASTERS,
    "zero_optimization.zero_quantized_gradients": OTHER_MASTERS,
    "zero_optimization.mics_shard_size": REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": REMOVED,
    "zero_optimization.zeropp_loco_param": REMOVED,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zero_optimization.leaf_module": ANOTHER_MODEL,
    "zero_optimization.zero_hpz_partition_size": OTHER_MASTERS,
    "zero_optimization.offload_optimizer.nvme_path": OTHER_MASTERS,
    "zero_optimization.offload_optimizer.super_offload": OTHER_MASTERS,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": OTHER_MASTERS,
    "zero_optimization.offload_param.nvme_path": OTHER_MASTERS,
}
# Values beside false that switch a key off.
ALSO_OFF: dict[str, Any] = {"zero_optimization.zero_hpz_partition_size": 1, "sequence_parallel_size": 1}
# As DeepSpeed's and Hugging Face's users write what the recipe does anyway.
OWNED_TYPES = {"optimizer": ("AdamW",), "scheduler": ("WarmupCosineLR",)}


def check_structure(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The ds_config without what is switched off or DeepSpeed's own default.

    Errors: UserError, one line that begins with `source`, for an unknown key, a wrong type or range, two values that
    contradict one another, and what convclip does not pass on.
    """
    if not values:
        raise UserError(f'{source}: an empty ds_config: write at least {{"zero_optimization": {{"stage": 0}}}}')
    kept = _without_refused(values, source)
    settled = _without(kept, (*FROM_RECIPE, *FROM_DEEPSPEED), "auto")
    try:
        config = DsConfig.model_validate(settled)
    except ValidationError as error:
        hint = _hint(error.errors()[0])
        raise UserError(one_line(f"{source}: {first_problem(error, DsConfig)}{hint}")) from None
    for rule in _contradictions(config):
        raise UserError(f"{source}: {rule}")
    return _without(_without(kept, FROM_DEEPSPEED, "auto"), OFFLOADS, None)


def _without_refused(values: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """A copy of `values` without the refused keys that are switched off; UserError for one that is not."""
    kept = {}
    for key, value in values.items():
        place = f"{prefix}{key}"
        if place in REFUSED:
            if not (_is_off(value) or value == ALSO_OFF.get(place, False) or _is_owned(place, value)):
                kind = "a section" if isinstance(value, dict) else "a key"
                raise UserError(f"{source}: has {kind} {place!r}: {REFUSED[place]}, remove the {kind.split()[1]}")
        elif isinstance(value, dict):
            kept[key] = _without_refused(value, source, f"{place}.")
        else:
            kept[key] = value
    return kept


def _is_off(value: Any) -> bool:
    """False, null, nothing; `enabled: false`; or all of its values so."""
    if isinstance(value, dict):
        return value.get("enabled") is False or all(_is_off(inner) for inner in value.values())
    return value is None or value is False or value in ("", [], "auto")


def _is_owned(place: str, value: Any) -> bool:
    """Whether a section leaves all to the recipe: the type that it has anyway, every parameter "auto"."""
    if not isinstance(value, dict) or value.get("type") not in OWNED_TYPES.get(place, ()):
        return False
    parameters = value.get("params", {})
    return isinstance(parameters, dict) and all(given == "auto" for given in parameters.values())


def _without(values: Mapping[str, Any], places: tuple[str, ...], what: Any, prefix: str = "") -> dict[str, Any]:
    """A copy of `values` without the keys at `places` that are `what`."""
    return {
        key: _without(value, places, what, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if isinstance(value, dict) or f"{prefix}{key}" not in places or value != what
    }


def _hint(problem: Any) -> str:
    """What to do about a problem whose own words do not say it."""
    given = problem["input"]
    if problem["type"] == "extra_forbidden":
        return ""
    if given == "auto":
        return f': only {", ".join(FROM_RECIPE)} and sizes of zero_optimization can be "auto"'
    if problem["type"] == "model_type" and isinstance(given, bool) and problem["loc"][-1] in ("fp16", "bf16"):
        return f': write {{"enabled": {str(given).lower()}}}'
    return ""


def _contradictions(config: DsConfig) -> Iterator[str]:
    """Values that are right alone and wrong together."""
    zero, stage = config.zero_optimization, config.zero_optimization.stage
    if config.fp16.enabled and config.bf16.enabled:
        yield "fp16 and bf16 are both enabled: enable one of them"
    if config.fp16.enabled and stage == 0:
        yield "has fp16 with ZeRO stage 0, which DeepSpeed computes wrongly: use stage 1"
    for name, offload, stages in (
        ("offload_optimizer", zero.offload_optimizer, (1, 2, 3)),
        ("offload_param", zero.offload_param, (3,)),
    ):
        device = "none" if offload is None else offload.device
        if device == "nvme":
            yield f"zero_optimization.{name}.device is nvme: {OTHER_MASTERS}; use cpu"
        if device != "none" and stage not in stages:
            yield f"zero_optimization.{name} needs stage {' or '.join(map(str, stages))}, and stage is {stage}"
        if offload is not None and offload.ratio < 1 and stage != 3:
            yield f"zero_optimization.{name}.ratio below 1 needs stage 3, and stage is {stage}"
    if not zero.compute_grad_norm and stage not in (1, 2):
        yield f"zero_optimization.compute_grad_norm false needs stage 1 or 2, and stage is {stage}"
    if config.zero_force_ds_cpu_optimizer:
        yield "zero_force_ds_cpu_optimizer is true: the optimizer is torch's AdamW, write false"
