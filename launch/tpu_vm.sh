#!/usr/bin/env bash
# Train on a Cloud TPU slice: every worker runs the same command, and JAX finds the others by itself.
#
#     launch/tpu_vm.sh create | install | start | stop | delete
#     launch/tpu_vm.sh keep        all of it, and again after each preemption, until the training is complete
#
# Settings are environment variables; the arguments of main.py follow a --:
#
#     NAME=ddpm ZONE=us-central2-b TYPE=v4-32 SHARE=10.0.0.2:/runs launch/tpu_vm.sh keep -- \
#         --config=configs/lsun_bedroom.py --workdir=/mnt/runs/bedroom --config.model.dtype=bfloat16
#
# SHARE is an NFS export (Filestore) that all workers mount as /mnt/runs: the workdir has to lie there.
set -euo pipefail

NAME=${NAME:-diffusion}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-32}
VERSION=${VERSION:-tpu-ubuntu2204-base} # of the machines' software: each kind of TPU has its own
SHARE=${SHARE:-}
SPOT=${SPOT:---spot} # empty: machines that are not taken away, at a higher price
TRIES=${TRIES:-5}    # failures in a row, other than preemptions, after which `keep` gives up

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=(--zone "$ZONE")

say() { echo "$(date -u +%H:%M:%S) $*" >&2; }

tpu() { gcloud compute tpus tpu-vm "$@" "${where[@]}"; }

on() { tpu ssh "$NAME" --worker="$1" --command="$2"; }

state() { tpu describe "$NAME" --format='value(state)' 2>/dev/null || echo NONE; }

create() {
  # shellcheck disable=SC2086 # SPOT is one word or none
  tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" $SPOT
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$here" archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$NAME:diffusion.tar.gz" --worker=all
  rm -f "$archive"
  # What is there stays: a second install only brings the new code.
  on all "set -e
    mkdir -p diffusion && tar -xzf diffusion.tar.gz -C diffusion && cd diffusion
    python3 -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null && python=python3 || {
      sudo apt-get -q update && sudo apt-get -q install -y python3.11 python3.11-venv nfs-common; python=python3.11; }
    test -x .venv/bin/python || \$python -m venv .venv
    .venv/bin/python -m pip install --quiet -e . 'jax[tpu]'
    if test -n '$SHARE' && ! mountpoint -q /mnt/runs; then
      sudo mkdir -p /mnt/runs && sudo mount -t nfs '$SHARE' /mnt/runs && sudo chmod a+rwx /mnt/runs
    fi"
}

start() {
  on all "cd diffusion && rm -f exit-status && .venv/bin/python main.py $(printf '%q ' "$@"); \
    status=\$?; echo \$status > exit-status; exit \$status"
}

stop() {
  # To the Python process alone: the first SIGTERM saves and ends with exit status 75, on all workers.
  on 0 "pkill --signal TERM --full '[.]venv/bin/python main[.]py'"
}

keep() {
  local failures=0 status
  while true; do
    case $(state) in
      READY) ;;
      NONE) say 'creating' && { create || sleep 60; } && continue ;;
      CREATING | STARTING | RESTARTING | REPAIRING) sleep 30 && continue ;;
      *) say "it is $(state): deleting it" && { delete || sleep 60; } && continue ;; # preempted
    esac
    if install && start "$@"; then
      say 'complete' && return
    fi
    status=$(on 0 'cat diffusion/exit-status' 2>/dev/null || echo gone)
    case $status in
      1 | 2) say "the training refuses to run, as said above (exit status $status)" && return "$status" ;;
      75) failures=0 ;;
      *) failures=$((failures + 1)) ;;
    esac
    say "ended with $status while the machines are $(state)"
    if [ "$(state)" != READY ]; then failures=0; fi
    if [ "$failures" -ge "$TRIES" ]; then say "$failures failures in a row" && return 1; fi
    sleep 30
  done
}

delete() { tpu delete "$NAME" --quiet; }

action=${1:-}
shift || true
if [ "${1:-}" = -- ]; then shift; fi
case $action in
  create | install | stop | delete) "$action" ;;
  start | keep) "$action" "$@" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
esac
