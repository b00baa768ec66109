#!/usr/bin/env bash
# Trains under Slurm, on any number of nodes, and goes on by itself after a time limit, a preemption or a node that died:
#
#     sbatch --nodes=2 --output=runs/%x-%j.log launch/slurm.sh --recipe tiny_gpt2_unfreeze \
#         --ds_config ds_configs/zero2_bf16.json --train_data 'shards/train-{000000..000118}.tar' \
#         --val_data 'shards/val-{000000..000004}.tar' --output_dir runs/tiny_gpt2_unfreeze
#
# What the site wants (partition, account) goes before the script's name, as --nodes here; the rest is train.py's. Submit
# it from the repository's root, with the environment entered or its folder in VENV.
#SBATCH --job-name=convclip
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# Five minutes before the end, to the tasks of srun: time for the present step and a checkpoint.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Any number that a failure does not give.
AGAIN=75
if [ -d "${VENV:-.venv}" ]; then
    export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
fi
code=0
# Ranks, their number and the address of the first one are read from Slurm's variables. A rank that fails takes its job
# step with it, so that the others do not wait for the watchdog.
srun --kill-on-bad-exit=1 python launch/train.py --resume auto --set "stop.exit_code=$AGAIN" "$@" || code=$?
if [ "$code" -eq "$AGAIN" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
