"""Broken recipes, overrides, ds_configs and command lines as data: what is given, and words that the message has.

Every one of them is refused in one line by `UserError` (exit code 2 on the command line). The tables are read by
tests/test_broken_recipes.py and are meant to be mutated further.
"""

from __future__ import annotations

import json
from typing import Any

# Bytes of a recipe file.
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "key twice": (b"epochs: 1\noptim: {lr: 1e-3}\nepochs: 2\n", ("the key epochs", "lines 1 and 3")),
    "nested key twice": (b"epochs: 1\noptim:\n  lr: 1e-3\n  lr: 5e-4\n", ("the key optim.lr", "lines 3 and 4")),
    "key twice in a list": (
        b"epochs: 9\nfreezing:\n  lock: [text]\n  unfreeze:\n  - {epoch: 1, tower: text, all: true, epoch: 2}\n",
        ("the key freezing.unfreeze.0.epoch", "lines 5 and 5"),
    ),
    "quoted key twice": (b'epochs: 1\n"epochs": 2\n', ("the key epochs", "twice")),
    "key twice behind a merge": (b"a: &a {lr: 1}\noptim: {<<: *a, lr: 2, lr: 3}\nepochs: 1\n", ("optim.lr", "twice")),
    "truth as number": (b"epochs: yes\n", ("epochs", "valid integer", "true")),
    "number as text": (b"epochs: '3'\n", ("epochs", "valid integer", "'3'")),
    "float as text": (b"epochs: 1\noptim: {lr: '0.001'}\n", ("optim.lr", "valid number")),
    "half an epoch": (b"epochs: 1.5\n", ("epochs", "valid integer", "1.5")),
    "octal": (b"epochs: 010\n", ("epochs", "valid integer", "'010'")),
    "sexagesimal": (b"epochs: 1:30\n", ("epochs", "valid integer", "'1:30'")),
    "number as name": (b"epochs: 1\nname: 1e5\n", ("name", "valid string", "in quotes")),
    "empty name": (b"epochs: 1\nname: ''\n", ("name", "at least 1")),
    "deep nesting": (b"epochs: " + b"[" * 5000 + b"]" * 5000, ("levels deep",)),
    "deep mappings": (b"epochs: " + b"{a: " * 60 + b"1" + b"}" * 60, ("levels deep",)),
    "alias bomb": (
        b"a: &a [1,1,1,1,1,1,1,1,1]\n"
        + b"".join(
            b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % ((98 + i, 98 + i) + (97 + i,) * 9) for i in range(9)
        ),
        ("more than 10,000 values",),
    ),
    "holds itself": (b"epochs: &a [*a]\n", ("holds itself",)),
    "holds itself by key": (b"&a {epochs: *a}\n", ("holds itself",)),
    "too large": (b"# " + b"x" * 2**19 + b"\nepochs: 1\n", ("more than 256 KiB",)),
    "not UTF-8": ("epochs: 1\ndescription: müde\n".encode("latin-1"), ("cannot be read", "UTF-8")),
    "UTF-16": ("epochs: 1\n".encode("utf-16"), ("cannot be read", "UTF-8")),
    "zero bytes": (b"epochs: 1\x00\n", ("not valid YAML",)),
    "python tag": (b"epochs: !!python/object/apply:os.getcwd []\n", ("not valid YAML", "line 1", "tag")),
    "timestamp tag": (b"epochs: !!timestamp x\n", ("not valid YAML", "tag")),
    "tag that lies": (b"epochs: !!int x\n", ("not valid YAML",)),
    "tag of nothing": (b'epochs: !!int ""\n', ("not valid YAML",)),
    "tag of no truth": (b"epochs: !!bool maybe\n", ("not valid YAML",)),
    "huge integer": (b"epochs: " + b"9" * 5000 + b"\n", ("not valid YAML",)),
    "large integer": (b"epochs: " + b"9" * 400 + b"\n", ("epochs", "less than or equal")),
    "two documents": (b"epochs: 1\n---\nepochs: 2\n", ("not valid YAML", "document")),
    "tab": (b"optim:\n\tlr: 1\n", ("not valid YAML", "line 2")),
    "unknown alias": (b"epochs: *nothing\n", ("not valid YAML", "nothing")),
    "list as key": (b"? [1, 2]\n: 3\nepochs: 1\n", ("not valid YAML",)),
    "section as number": (b"epochs: 1\noptim: 5\n", ("optim", "section", "not 5")),
    "section as list": (b"epochs: 1\noptim: [1]\n", ("optim", "section")),
    "empty section": (b"epochs: 1\noptim:\n", ("optim", "section", "null")),
    "newline in a key": (b'epochs: 1\n"op\\ntim": 2\n', ("unknown key op tim",)),
}

# Overrides of the recipe demo.
OVERRIDES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "truth as lr": (("optim.lr=true",), ("optim.lr", "valid number", "true")),
    "truth as epochs": (("epochs=yes",), ("epochs", "valid integer")),
    "truth in a list": (("optim.betas=[true, 0.9]",), ("optim.betas.0", "valid number")),
    "truth in a mapping": (("optim.part_lr_scale.image=true",), ("optim.part_lr_scale.image", "valid number")),
    "number as truth": (("activation_checkpointing=1",), ("activation_checkpointing", "valid boolean")),
    "text as truth": (("activation_checkpointing='false'",), ("activation_checkpointing", "valid boolean")),
    "number as text": (("data.train=5",), ("data.train", "valid string", "quotes")),
    "quoted number": (("batch.global='8'",), ("batch.global", "valid integer")),
    "negative clamp": (("optim.max_logit_scale=-5",), ("optim.max_logit_scale", "greater than 0", "-5")),
    "endless clamp": (("optim.max_logit_scale=1e3",), ("optim.max_logit_scale", "less than or equal")),
    "batch of one": (("batch.global=1",), ("batch.global 1 /", "1 row", "2 or more")),
    "accumulation is the batch": (
        ("batch={global: 8, accumulation: 8}",),
        ("batch.global 8 / batch.accumulation 8 = 1 row", "0 in every step"),
    ),
    "accumulation above the batch": (("batch={global: 8, accumulation: 9}",), ("= 0 row",)),
    "absurd batch": (("batch.global=100000000",), ("100,000,000 x 100,000,000 logits", "at most 16,777,216")),
    "absurd batch, in short": (("batch.global=1e8",), ("100,000,000 x 100,000,000 logits",)),
    "seed of 65 bits": (("seed=18446744073709551616",), ("seed", "less than 9223372036854775808")),
    "negative seed": (("seed=-1",), ("seed",)),
    "image of one pixel": (("model.image.image_size=1",), ("model.image.image_size", "32", "not 1")),
    "image of a city": (("model.image.image_size=1e6",), ("model.image.image_size", "4096")),
    "absurd width": (("model.embed_dim=1e12",), ("model.embed_dim", "65536")),
    "empty data": (("data.train=''",), ("data.train", "at least 1")),
    "scalar, then its part": (("model.image=x", "model.image.head=y"), ("image is a single value",)),
    "part, then scalar": (("model.image.head=y", "model.image=x"), ("image is a single value",)),
    "deep value": (("epochs=" + "[" * 3000,), ("levels deep",)),
    "key twice in a value": (("batch={global: 8, global: 9}",), ("--set batch=", "the key global", "twice")),
    "alias in a value": (("epochs=*x",), ("not valid YAML",)),
    "tag in a value": (("epochs=!!python/name:os.system",), ("not valid YAML", "tag")),
    "newline in a key": (("op\ntim=1",), ("unknown key op tim",)),
    "no index": (("freezing.unfreeze." + "9" * 5000 + ".epoch=1",), ("not an index",)),
    "index in other digits": (("freezing.unfreeze.\u0660.epoch=1",), ("not an index",)),
    "value that is a comment": (("data.train=#1.tar",), ("--set data.train=#1.tar", "comment", "quotes")),
    "separator that is a block": (("data.csv_separator=|",), ("data.csv_separator", "at least 1")),
    "word for a list": (("freezing.lock=text",), ("freezing.lock", "list", "[a, b]")),
    "key without a name": ((".optim.lr=1",), ("unknown key ''",)),
    "logit scale beyond numbers": (("model.init_logit_scale=1e3",), ("model.init_logit_scale", "20")),
    "lr beyond numbers": (("optim.lr=1e400",), ("optim.lr", "finite")),
    "lone surrogate": (("data.train=\udcff",), ("not valid YAML",)),
    "zero byte": (("data.train='a\0b'",), ("not valid YAML",)),
    "very long value": (("optim.lr=" + "x" * 10**5,), ("optim.lr", "…")),
    "word as layer decay": (("optim.layer_decay=high",), ("optim.layer_decay", "a number above 0 and up to 1")),
    "layer decay that grows": (("optim.layer_decay=1.1",), ("optim.layer_decay.image", "less than or equal to 1")),
    "layer decay of nothing": (("optim.layer_decay={image: 0}",), ("optim.layer_decay.image", "greater than 0")),
    "layer decay of the temporal part": (("optim.layer_decay={temporal: 0.5}",), ("'image' or 'text'", "temporal")),
    "part of another task": (("optim.part_lr_scale.temporal=2",), ("part_lr_scale.temporal", "image-text training")),
    "mode without its file": (("features.mode=store",), ("features", "needs store")),
}

# Overrides of a video recipe that no part of video training reads.
NOT_FOR_VIDEO: dict[str, str] = {
    "teacher": "teacher={}",
    "head_alignment": "head_alignment={}",
    "batch.micro": "batch.micro=2",
    "batch.keep_frozen_gib": "batch.keep_frozen_gib=1",
    "loss.tile": "loss.tile=64",
    "loss.mask_same_image": "loss.mask_same_image=true",
    "features.views": "features={mode: live, views: 1}",
    "data.format": "data.format=csv",
    "data.csv_image_key": "data.csv_image_key=path",
    "data.csv_caption_key": "data.csv_caption_key=text",
    "data.csv_separator": "data.csv_separator=;",
    "data.crop_scale": "data.crop_scale=[0.5, 1]",
    "data.random_erasing": "data.random_erasing=0.35",
    "data.color_jitter": "data.color_jitter=[0.1, 0.1, 0.1, 0]",
    "data.shuffle_shards": "data.shuffle_shards=2",
    "data.max_image_pixels": "data.max_image_pixels=5",
    "data.allow_pipe": "data.allow_pipe=true",
    "data.cache_folder": "data.cache_folder=x",
    "optim.part_lr_scale.logit_bias": "optim.part_lr_scale.logit_bias=2",
}


def _with(place: str, value: Any) -> str:
    """A usual ds_config with one value set; `a.b` is a key of a section."""
    config: dict[str, Any] = {"train_batch_size": "auto", "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    node, (*parents, last) = config, place.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return json.dumps(config)


# Text of a ds_config.
DS_CONFIGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("", ("JSON",)),
    "empty object": ("{}", ("empty ds_config",)),
    "list": ("[]", ("JSON object",)),
    "word": ("null", ("JSON object",)),
    "cut": ('{"zero_optimization": {"stage": 2', ("JSON", "line 1")),
    "comment": ('{"zero_optimization": {"stage": 2}} // two', ("JSON",)),
    "key twice": ('{"bf16": {"enabled": true},\n"bf16": {"enabled": false}}', ("the key bf16", "lines 1 and 2")),
    "nested key twice": ('{"zero_optimization": {"stage": 1, "stage": 2}}', ("the key stage", "2 times")),
    "NaN": ('{"gradient_clipping": NaN}', ("NaN", "finite")),
    "Infinity": ('{"gradient_clipping": -Infinity}', ("-Infinity", "finite")),
    "overflow": ('{"gradient_clipping": 1e999}', ("1e999", "finite")),
    "deep": ('{"a": ' * 100 + "1" + "}" * 100, ("levels deep",)),
    "deeper": ("[" * 10**5, ("levels deep",)),
    "huge integer": ('{"train_batch_size": ' + "9" * 5000 + "}", ("JSON",)),
    "unknown key": (_with("zero_optimisation", {}), ("unknown key zero_optimisation", "'zero_optimization'")),
    "unknown nested key": (_with("zero_optimization.stag", 2), ("zero_optimization.stag", "'stage'")),
    "unknown key two down": (
        _with("zero_optimization.offload_optimizer", {"devise": "cpu"}),
        ("zero_optimization.offload_optimizer.devise", "'device'"),
    ),
    "unknown key of bf16": (_with("bf16.enable", True), ("bf16.enable", "'enabled'")),
    "text as truth": (_with("bf16.enabled", "false"), ("bf16.enabled", "valid boolean", "'false'")),
    "number as truth": (_with("bf16.enabled", 1), ("bf16.enabled", "valid boolean")),
    "auto precision": (_with("bf16.enabled", "auto"), ("bf16.enabled", "'auto'", "only train_batch_size")),
    "auto stage": (_with("zero_optimization.stage", "auto"), ("zero_optimization.stage", "'auto'")),
    "truth for a section": (_with("bf16", True), ("bf16", "section", '{"enabled": true}')),
    "null for a section": (_with("zero_optimization", None), ("zero_optimization", "section")),
    "truth for zero": (_with("zero_optimization", True), ("zero_optimization", "section")),
    "list for a section": (_with("fp16", [1]), ("fp16", "section")),
    "stage 4": (_with("zero_optimization.stage", 4), ("zero_optimization.stage", "less than or equal to 3")),
    "stage -1": (_with("zero_optimization.stage", -1), ("zero_optimization.stage", "greater than or equal to 0")),
    "stage as text": (_with("zero_optimization.stage", "2"), ("zero_optimization.stage", "'2'")),
    "stage as truth": (_with("zero_optimization.stage", True), ("zero_optimization.stage", "true")),
    "stage and a half": (_with("zero_optimization.stage", 1.5), ("zero_optimization.stage", "1.5")),
    "bucket of nothing": (_with("zero_optimization.reduce_bucket_size", 0), ("reduce_bucket_size", "greater than 0")),
    "bucket as text": (_with("zero_optimization.reduce_bucket_size", "5e8"), ("reduce_bucket_size", "'5e8'")),
    "both precisions": (_with("fp16", {"enabled": True}), ("fp16 and bf16", "enable one")),
    "fp16 without ZeRO": ('{"fp16": {"enabled": true}}', ("fp16 with ZeRO stage 0", "use stage 1")),
    "bfloat16": (_with("bfloat16", {"enabled": True}), ("'bfloat16'", "its name is bf16")),
    "negative loss scale": (_with("fp16.loss_scale", -1), ("fp16.loss_scale", "greater than or equal to 0")),
    "endless scale power": (_with("fp16.initial_scale_power", 10**9), ("fp16.initial_scale_power", "64")),
    "no window": (_with("fp16.loss_scale_window", 0), ("fp16.loss_scale_window", "greater than 0")),
    "batch of zero": (_with("train_batch_size", 0), ("train_batch_size", "greater than 0")),
    "batch as text": (_with("train_batch_size", "8"), ("train_batch_size", "'8'")),
    "clipping as truth": (_with("gradient_clipping", True), ("gradient_clipping", "true")),
    "clipping below 0": (_with("gradient_clipping", -1), ("gradient_clipping",)),
    "sum of gradients": (_with("gradient_allreduce_op", "sum"), ("gradient_allreduce_op", "'mean'")),
    "no predivide factor": (_with("gradient_predivide_factor", 0), ("gradient_predivide_factor",)),
    "offload to a disk": (
        _with("zero_optimization.offload_optimizer", {"device": "nvme"}),
        ("offload_optimizer.device is nvme", "use cpu"),
    ),
    "offload to the moon": (_with("zero_optimization.offload_optimizer", {"device": "moon"}), ("'cpu'", "'moon'")),
    "offload in stage 0": (
        '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
        ("offload_optimizer needs stage 1", "stage is 0"),
    ),
    "offload of parameters in stage 2": (
        _with("zero_optimization.offload_param", {"device": "cpu"}),
        ("offload_param needs stage 3", "stage is 2"),
    ),
    "old name of offload": (_with("zero_optimization.cpu_offload", True), ("cpu_offload", "offload_optimizer")),
    "no gradient norm": ('{"zero_optimization": {"stage": 3, "compute_grad_norm": false}}', ("compute_grad_norm",)),
    "optimizer": (_with("optimizer", {"type": "Lamb", "params": {"lr": "auto"}}), ("'optimizer'", "optim owns it")),
    "optimizer's lr": (_with("optimizer", {"type": "AdamW", "params": {"lr": 1e-3}}), ("'optimizer'", "optim owns")),
    "scheduler": (_with("scheduler", {"type": "WarmupLR", "params": {}}), ("'scheduler'", "optim owns it")),
    "zenflow": (_with("zero_optimization.zenflow", {"topk_ratio": 0.1}), ("zenflow", "steps past")),
    "masters in bf16": (_with("bf16.bf16_master_weights_and_grads", True), ("fp32 masters",)),
    "DeepSpeed's CPU Adam": (_with("zero_force_ds_cpu_optimizer", True), ("zero_force_ds_cpu_optimizer", "AdamW")),
    **{
        f"section {name}": (_with(name, value), (f"'{name}'", "remove the section"))
        for name, value in {
            "activation_checkpointing": {"partition_activations": True},
            "amp": {"enabled": True},
            "autotuning": {"enabled": True},
            "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
            "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"},
            "data_efficiency": {"enabled": True},
            "elasticity": {"enabled": True},
            "flops_profiler": {"enabled": True},
            "hybrid_engine": {"enabled": True},
            "pipeline": {"stages": 2},
            "sparse_attention": {"mode": "fixed"},
            "tensor_parallel": {"autotp_size": 2},
            "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        }.items()
    },
}

# Arguments of launch/train.py; {folder} is an empty folder.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "empty recipe": (("--recipe", ""), ("--recipe is empty",)),
    "empty output": (("--recipe", "demo", "--output_dir", ""), ("--output_dir is empty",)),
    "empty training data": (("--recipe", "demo", "--train_data", ""), ("--train_data is empty",)),
    "empty evaluation data": (("--recipe", "demo", "--val_data", ""), ("--val_data is empty",)),
    "empty resume": (("--recipe", "demo", "--resume", ""), ("--resume is empty",)),
    "empty ds_config": (("--recipe", "demo", "--plan", "--ds_config", ""), ("--ds_config is empty",)),
    "empty plot": (("--recipe", "demo", "--plan", "--plot", ""), ("--plot is empty",)),
    "folder as recipe": (("--recipe", "{folder}", "--plan"), ("unknown recipe", ".yaml")),
    "folder as ds_config": (("--recipe", "demo", "--plan", "--ds_config", "{folder}"), ("it is a folder",)),
    "no such ds_config": (("--recipe", "demo", "--plan", "--ds_config", "{folder}/x.json"), ("x.json", "No such")),
    "device as ds_config": (("--recipe", "demo", "--plan", "--ds_config", "/dev/zero"), ("no plain file",)),
    "plot into no folder": (("--recipe", "demo", "--plan", "--plot", "{folder}/no/lr.png"), ("there is no folder",)),
    "plot as a table": (("--recipe", "demo", "--plan", "--plot", "{folder}/lr.csv"), ("lr.csv", ".png, .pdf, .svg")),
    "plot without a plan": (("--recipe", "demo", "--plot", "{folder}/lr.png"), ("--plot goes with --plan",)),
    "json without a plan": (("--recipe", "demo", "--json"), ("--json goes with --plan",)),
    "other data without a resume": (
        ("--recipe", "demo", "--resume_other_data"),
        ("goes with --resume", "--resume auto"),
    ),
    "data twice": (
        ("--recipe", "demo", "--train_data", "a", "--set", "data.train=b"),
        ("--train_data a", "--set data.train=b", "give one"),
    ),
    "data twice, in its section": (
        ("--recipe", "demo", "--val_data", "a", "--set", "data={val: b}"),
        ("--val_data a", "--set data={val: b}", "data.val"),
    ),
    "batch above the rows": (
        ("--recipe", "demo", "--plan", "--set", "batch.global=20000"),
        ("rows_per_epoch 10,000 / batch.global 20,000 = 0 steps",),
    ),
}
