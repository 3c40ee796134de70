#!/bin/bash
# Starts a run on every worker of a TPU pod, from your own machine:
#     ZONE=us-east5-a scripts/tpu_pod.sh NAME tool-n1-7b --data.path DATA --run.dir /mnt/shared/RUN
# NAME is a TPU VM whose workers have the checkout in ~/grpo_jax with `pip install -e '.[tpu]'` done, and see one shared file
# system (Filestore, say) under the run's folder. Called again, it resumes. See docs/scale.md.
set -eu
name=$1
shift
gcloud compute tpus tpu-vm ssh "$name" --zone "$ZONE" --worker=all \
    --command "cd ~/grpo_jax && exec python -m grpo_jax.train $(printf '%q ' "$@") --hosts.launcher tpu"
