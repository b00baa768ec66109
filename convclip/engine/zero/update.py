"""The optimizer's update, skipped in every ZeRO stage alike where a gradient is not finite."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from convclip.schema import UserError


def take_update(engine: DeepSpeedEngine) -> bool:
    """`engine.step()`, after a backward pass: at an accumulation boundary the optimizer's update.

    False where that was skipped because the gradient of some rank is infinite or not a number: weights and optimizer
    state are as before then, on all ranks. Errors: UserError where fp16's loss scale cannot shrink any more.
    """
    at_boundary = engine.is_gradient_accumulation_boundary()
    # Stage 0 in fp32 is plain torch, which looks at no gradient; ranks have the same one by now.
    if at_boundary and isinstance(engine.optimizer, torch.optim.Optimizer) and not _is_finite(engine):
        _skip(engine)
        return False
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise UserError(
            "fp16: gradients overflow at the smallest loss scale: lower optim.lr, set optim.clip_grad_norm, or use a "
            "bf16 or fp32 ds_config"
        ) from None
    if not at_boundary:
        return True
    skipped = bool(getattr(engine.optimizer, "overflow", False))
    if skipped and isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        # A skipped step of stage 3 returns before it gathers the small parameters that are always held whole.
        small = engine.optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)
    return not skipped


def _is_finite(engine: DeepSpeedEngine) -> bool:
    gradients = [p.grad for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def _skip(engine: DeepSpeedEngine) -> None:
    """Drop the gradients and count the step as `engine.step` counts a skipped one."""
    engine.zero_grad()
    engine.skipped_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine.micro_steps += 1
