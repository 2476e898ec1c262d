#!/usr/bin/env bash
# One run on several nodes, one process a GPU:
#   sbatch slurm.sh small --variant ddl-cc
# What follows slurm.sh is what ddl train takes: RECIPE [FIELDS ...] [--field value ...]
# All nodes must see the recipe's `out` and `data`. A job that is preempted, out of time or on a node
# that fails is queued again by itself and goes on from its newest checkpoint; one that lost a process
# or was cancelled goes on by the same sbatch.
#SBATCH --job-name=ddl
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# srun and not torchrun: Slurm's SIGTERM then reaches the processes themselves, which have the time
# that --signal gives them to save (torchrun would kill them after 30 seconds), and one that ends ends all.
# The CPUs of a task are said again, since srun does not take them from sbatch from Slurm 22.05 on.
# shellcheck disable=SC2016 # the inner shell is each process's own
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec ddl train "$@"' ddl-train "$@" || status=$?

# 143: SIGTERM, and saved. Slurm takes a job that ends by itself for failed, preempted or not.
if [[ ${status:=0} == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
