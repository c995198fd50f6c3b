#!/usr/bin/env bash
# Train on a Cloud TPU slice: every worker runs the same command, and JAX detects the others.
#
#     launch/tpu_vm.sh create | install | start | stop | delete
#     launch/tpu_vm.sh keep        create, install and start, again after each preemption, until complete or stopped
#
# Settings are environment variables; the arguments of main.py follow after --:
#
#     NAME=ddpm ZONE=us-central2-b TYPE=v4-32 SHARE=10.0.0.2:/runs launch/tpu_vm.sh keep -- \
#         --config=configs/lsun_bedroom.py --workdir=/mnt/runs/bedroom --config.model.dtype=bfloat16 \
#         --config.data.data_dir=/mnt/runs/tensorflow_datasets
#
# SHARE is an NFS export (Filestore) that all workers mount as /mnt/runs. The workdir and the data must be below it. To
# connect to several workers, gcloud needs its key in the SSH agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

NAME=${NAME:-diffusion}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-32}
VERSION=${VERSION:-tpu-ubuntu2204-base} # software of the machines; it depends on the kind of TPU
SHARE=${SHARE:-}
SPOT=${SPOT---spot} # SPOT= (empty) for machines that are not preempted, at a higher price
TRIES=${TRIES:-5}    # consecutive failures, preemptions not counted, after which `keep` gives up

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

# The next three run on a worker. The pattern matches the Python process only (^).
running_here() { pgrep --full '^[.]venv/bin/python main[.]py' >/dev/null; }

# A second installation only updates the code.
install_here() {
  set -e
  if running_here; then echo 'the training is running: nothing is installed' >&2 && return; fi
  local python=python3.11 needed=
  mkdir -p diffusion
  tar -xzf diffusion.tar.gz -C diffusion
  cd diffusion
  if python3 -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then python=python3; fi
  # Debian and Ubuntu package what venv needs separately.
  if ! $python -c 'import ensurepip' 2>/dev/null; then needed="$python $python-venv"; fi
  if test -n "$SHARE" && ! command -v mount.nfs >/dev/null; then needed="$needed nfs-common"; fi
  if test -n "$needed"; then
    # A new machine installs updates by itself; meanwhile it locks apt.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      if sudo apt-get -q update; then break; fi
      sleep 30
    done
    # shellcheck disable=SC2086 # several words
    sudo DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600 install -y $needed
  fi
  test -x .venv/bin/python || $python -m venv .venv
  .venv/bin/python -m pip install --quiet -e . 'jax[tpu]'
  if test -n "$SHARE" && ! mountpoint -q /mnt/runs; then
    sudo mkdir -p /mnt/runs
    sudo mount -t nfs "$SHARE" /mnt/runs
    sudo chmod a+rwx /mnt/runs
  fi
}

# gcloud runs a command again if its connection breaks. The training does not end with the connection, so the second run
# waits for the first one, whose exit status it takes over.
start_here() {
  local status
  cd diffusion || return
  if running_here; then
    echo 'the training is running: waiting for it to end' >&2
    while running_here; do sleep 10; done
    sleep 5 # until its shell has written the file
  else
    rm -f stopped exit-status
    status=0
    .venv/bin/python main.py "$@" || status=$?
    if test $status = 75 && test -e stopped; then echo stopped; else echo $status; fi >exit-status
  fi
  status=$(cat exit-status) || return
  if test "$status" = stopped; then status=75; fi
  return "$status"
}

# Each step is checked explicitly: `keep` calls this function in a condition, where bash ignores `set -e`.
install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz) || return
  if ! git -C "$here" archive --format=tar.gz --output="$archive" HEAD ||
    ! tpu scp "$archive" "$NAME:diffusion.tar.gz" --worker=all; then
    rm -f "$archive"
    return 1
  fi
  rm -f "$archive"
  on all "$(declare -f running_here install_here)
    SHARE=$(printf %q "$SHARE")
    install_here"
}

start() {
  on all "set -- $(printf '%q ' "$@"); $(declare -f running_here start_here)
    start_here \"\$@\""
}

stop() {
  # SIGTERM to one worker makes all save and exit with status 75. The file `stopped` tells `keep` that this was not a
  # preemption.
  on 0 "cd diffusion && touch stopped && pkill --signal TERM --full '^[.]venv/bin/python main[.]py' || \
    { rm -f stopped; echo 'nothing is running' >&2; exit 1; }"
}

keep() {
  local failures=0 status started messages
  while true; do
    case $(state) in
      READY) ;;
      NONE)
        say 'creating'
        if ! messages=$(create 2>&1 | tee >(cat >&2)); then
          case $messages in # what is lacking may come: capacity, for example
            *PERMISSION_DENIED* | *UNAUTHENTICATED* | *INVALID_ARGUMENT*) say 'refused, see above' && return 1 ;;
          esac
          sleep 60
        fi
        continue
        ;;
      CREATING | STARTING | RESTARTING | REPAIRING) sleep 30 && continue ;;
      *) say "the state is $(state): deleting" && { delete || sleep 60; } && continue ;; # preempted
    esac
    started=$SECONDS
    if ! install; then
      status='a failed installation'
    elif start "$@"; then
      say 'complete' && return
    else
      status=$(on 0 'cat diffusion/exit-status' 2>/dev/null || echo gone)
    fi
    case $status in
      1 | 2) say "the training refused to run, see above (exit status $status)" && return "$status" ;;
      stopped) say 'stopped and saved: the same command continues' && return 75 ;;
    esac
    failures=$((failures + 1))
    say "ended with $status, the state is $(state)"
    # A preemption does not count as a failure, nor does one failure per hour.
    if [ "$(state)" != READY ] || [ $((SECONDS - started)) -gt 3600 ]; then failures=0; fi
    if [ "$failures" -ge "$TRIES" ]; then say "$failures failures in a row: giving up" && return 1; fi
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
  *) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
esac
