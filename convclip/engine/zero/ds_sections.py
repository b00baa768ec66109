"""What a ds_config may say: every key that convclip passes on to DeepSpeed, with its type. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from convclip.schema import Section


def _whole(value: Any) -> Any:
    """DeepSpeed's users write sizes as 5e8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**9)]


class Offload(Section):
    """Where optimizer state or parameters lie between steps."""

    device: Literal["none", "cpu", "nvme"] = "none"
    pin_memory: bool = True
    buffer_count: Size = 4
    buffer_size: Size = 10**8
    max_in_cpu: Size = 10**9
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = Field(1.0, ge=0, le=1)


class Zero(Section):
    """ZeRO and its communication."""

    stage: int = Field(0, ge=0, le=3)
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Positive = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Size = 500_000_000
    overlap_comm: bool | None = None
    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: Offload | None = None
    offload_optimizer: Offload | None = None
    sub_group_size: Size = 10**9
    stage3_prefetch_bucket_size: Size = 50_000_000
    stage3_param_persistence_threshold: Size = 100_000
    stage3_model_persistence_threshold: Size = 2**63 - 1
    stage3_max_live_parameters: Size = 10**9
    stage3_max_reuse_distance: Size = 10**9
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_gather_fp16_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: Size = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


class Fp16(Section):
    """Half precision with a loss scale; loss_scale 0 adapts it."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(0, ge=0)
    initial_scale_power: int = Field(16, ge=0, le=64)
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Positive = 1


class Bf16(Section):
    """bfloat16 weights and activations beside fp32 masters."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True


class DsConfig(Section):
    """A ds_config, whole."""

    train_batch_size: Positive | None = None
    train_micro_batch_size_per_gpu: Positive | None = None
    gradient_accumulation_steps: Positive | None = None
    gradient_clipping: float | None = Field(None, ge=0)
    zero_optimization: Zero = Zero()
    fp16: Fp16 = Fp16()
    bf16: Bf16 = Bf16()
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1.0, gt=0)
    gradient_allreduce_op: Literal["mean"] = "mean"
    steps_per_print: Positive = 10
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = False
