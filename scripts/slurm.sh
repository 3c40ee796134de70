#!/bin/bash
# Qwen2.5-14B on 4 nodes of 8 H100s, one process a node. From the checkout, on a file system that all nodes share:
#     sbatch scripts/slurm.sh tool-n1-14b --data.path DATA --run.dir RUN
# Any options of grpo_jax.train may follow, any of sbatch come before: sbatch --nodes 2 scripts/slurm.sh ... See docs/scale.md.
#SBATCH --job-name=grpo --output=%x-%j.log --open-mode=append
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --time=24:00:00 --signal=TERM@300 --requeue

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95  # what grpo_jax.plan counts on; jax takes 0.75 by itself
# A node that is lost ends the others within a minute; --wait ends what even that leaves.
srun --wait=90 "${PYTHON:-python}" -m grpo_jax.train "$@"
code=$?
# 75: it was told that its time is up, or is preempted; it has saved, and goes on from there when it runs again. Not if cancelled.
[ $code -eq 75 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
