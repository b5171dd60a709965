#!/usr/bin/env bash
# A Cloud TPU slice without Kubernetes: install on all its hosts, and run one process on each.
#
#   export TPU_NAME=my-slice ZONE=us-east5-a PROJECT=my-project
#   experiments/launch/tpu_vm.sh install
#   experiments/launch/tpu_vm.sh run --model mini --mesh fsdp=-1 --batch-size 256 --seq-len 4096 \
#     --source /mnt/shared/corpus --out /mnt/shared/mini
#   experiments/launch/tpu_vm.sh stop      # SIGTERM: the run saves and ends; continue with --resume
#
# The slice exists already (gcloud compute tpus tpu-vm create), and `--out` is on a file system
# that all hosts have mounted (Filestore, or a bucket through gcsfuse). STAGE=sft, grpo or
# reward-model runs another command than pretrain. The mesh's devices, 64 chips of a v5p:4x4x4,
# say, must divide the batch.
set -euo pipefail

: "${TPU_NAME:?the name of the slice}" "${ZONE:?its zone}" "${PROJECT:?its project}"
SOURCE=${SOURCE:-$PWD}
STAGE=${STAGE:-pretrain}
REMOTE=deepseek_jax

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" \
    --worker=all --command="$1"
}

case ${1:-} in
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$SOURCE" archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:$REMOTE.tar.gz" \
      --zone="$ZONE" --project="$PROJECT" --worker=all
    everywhere "set -e; mkdir -p $REMOTE; tar xzf $REMOTE.tar.gz -C $REMOTE; cd $REMOTE; \
      python3 -m venv .venv; .venv/bin/pip install --quiet --constraint constraints.txt -e '.[tpu]'"
    ;;
  run)
    shift
    # Quoted once for the shell over there; no options are needed to find the other hosts.
    printf -v words '%q ' "$@"
    everywhere "cd $REMOTE && exec .venv/bin/deepseek-jax $STAGE $words"
    ;;
  stop)
    # One host is enough: all agree on the step after which they stop. The brackets keep the
    # pattern from matching the shell that runs it.
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" \
      --worker=0 --command="pkill -TERM -u \"\$USER\" -f '[d]eepseek-jax (pretrain|sft|grpo|reward-model) '"
    ;;
  *)
    echo "usage: $0 install | run OPTIONS... | stop" >&2
    exit 2
    ;;
esac
