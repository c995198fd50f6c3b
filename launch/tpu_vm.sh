#!/usr/bin/env bash
# Train on a Cloud TPU slice: every worker runs the same command, and JAX finds the others by itself.
#
#     launch/tpu_vm.sh create | install | start | stop | delete
#     launch/tpu_vm.sh keep        all of it, and again after each preemption, until the training is complete or `stop`
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
TRIES=${TRIES:-5}    # failures in a row, other than preemptions, after which `keep` gives up: also hosts that do not meet

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

# Runs on each worker. What is there stays: a second install only brings the new code.
install_here() {
  set -e
  local python=python3.11 needed=
  mkdir -p diffusion
  tar -xzf diffusion.tar.gz -C diffusion
  cd diffusion
  if python3 -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then python=python3; fi
  # Debian and Ubuntu split off what venv needs.
  if ! $python -c 'import ensurepip' 2>/dev/null; then needed="$python $python-venv"; fi
  if test -n "$SHARE" && ! command -v mount.nfs >/dev/null; then needed="$needed nfs-common"; fi
  if test -n "$needed"; then
    sudo apt-get -q update
    # shellcheck disable=SC2086 # several words
    sudo apt-get -q install -y $needed
  fi
  test -x .venv/bin/python || $python -m venv .venv
  .venv/bin/python -m pip install --quiet -e . 'jax[tpu]'
  if test -n "$SHARE" && ! mountpoint -q /mnt/runs; then
    sudo mkdir -p /mnt/runs
    sudo mount -t nfs "$SHARE" /mnt/runs
    sudo chmod a+rwx /mnt/runs
  fi
}

# Every step is asked for its success: `keep` calls this as a condition, within which bash forgets `set -e`.
install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz) || return
  if ! git -C "$here" archive --format=tar.gz --output="$archive" HEAD ||
    ! tpu scp "$archive" "$NAME:diffusion.tar.gz" --worker=all; then
    rm -f "$archive"
    return 1
  fi
  rm -f "$archive"
  on all "$(declare -f install_here)
    SHARE=$(printf %q "$SHARE")
    install_here"
}

start() {
  on all "cd diffusion && rm -f exit-status stopped && .venv/bin/python main.py $(printf '%q ' "$@"); \
    status=\$?; if test \$status = 75 && test -e stopped; then echo stopped; else echo \$status; fi > exit-status; \
    exit \$status"
}

stop() {
  # To the Python process alone (^): the first SIGTERM saves and ends with exit status 75, on all workers. `stopped`
  # tells a `keep` that this was no preemption.
  on 0 "cd diffusion && touch stopped && pkill --signal TERM --full '^[.]venv/bin/python main[.]py' || \
    { rm -f stopped; echo 'nothing is running' >&2; exit 1; }"
}

keep() {
  local failures=0 status started
  while true; do
    case $(state) in
      READY) ;;
      NONE) say 'creating' && { create || sleep 60; } && continue ;;
      CREATING | STARTING | RESTARTING | REPAIRING) sleep 30 && continue ;;
      *) say "it is $(state): deleting it" && { delete || sleep 60; } && continue ;; # preempted
    esac
    started=$SECONDS
    if ! install; then
      status='a failed install'
    elif start "$@"; then
      say 'complete' && return
    else
      status=$(on 0 'cat diffusion/exit-status' 2>/dev/null || echo gone)
    fi
    case $status in
      1 | 2) say "the training refuses to run, as said above (exit status $status)" && return "$status" ;;
      stopped) say 'stopped and saved, as asked: the same command goes on' && return 75 ;;
    esac
    failures=$((failures + 1))
    say "ended with $status while the machines are $(state)"
    # Machines that were taken away are no failure, nor is what happens once in an hour.
    if [ "$(state)" != READY ] || [ $((SECONDS - started)) -gt 3600 ]; then failures=0; fi
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
