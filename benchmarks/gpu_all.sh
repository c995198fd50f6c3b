#!/usr/bin/env bash
# Everything worth knowing from one GPU, in at most eleven minutes. The parts, in this order, with their limits:
#
#     table     300 s   times beside PyTorch's
#     kernels    40 s   kernels of a training step
#     train     100 s   CIFAR-10 from pictures
#     sample     50 s   1,000 images of that network
#     plan       50 s   --mode=plan of that training, beside what it took: plan-beside-run.json
#     check     120 s   outputs and losses beside the CPU's
#
#     bash benchmarks/gpu_all.sh FOLDER RESULTS [--rehearse]
#     PARTS='check table' bash benchmarks/gpu_all.sh FOLDER RESULTS
#
# FOLDER holds what benchmarks/gpu_wheels.sh put there: wheels that the machine lacks, and pictures. The machine needs
# Python with JAX for its GPU and, for a comparison, PyTorch. Each part has its own time limit; what it found lies in
# RESULTS when it ends. --rehearse does the same with a small network on any device.
set -u
cd "$(dirname "$0")/.."
folder=$(realpath "$1") results=$2 rehearse=${3:-}
mkdir -p "$results"
results=$(realpath "$results")
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

if compgen -G "$folder/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$folder"/*.whl || exit
  export PYTHONPATH=$site:${PYTHONPATH:-}
fi
scale=1
if [ -n "$rehearse" ]; then # perhaps on a slow machine
  scale=10
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=$site/programs # each part finds what an earlier one compiled and tuned
mkdir -m 700 "$JAX_COMPILATION_CACHE_DIR"
parts=${PARTS:-table kernels train sample plan check}
most=${TABLE_SECONDS:-100} # after which no other task is begun

# part SECONDS NAME COMMAND…: run a command, stop it after so many seconds, and keep what it prints.
part() {
  local seconds=$(($1 * scale)) name=$2
  shift 2
  [[ " $parts " == *" $name "* ]] || return
  echo "── $name (at most $seconds s)"
  local began=$SECONDS
  timeout --signal=TERM --kill-after=20 "$seconds" "$@" 2>&1 | tee "$results/$name.log"
  echo "── $name ended with ${PIPESTATUS[0]} after $((SECONDS - began)) s"
  cp benchmarks/results/*gpu*.json benchmarks/results/nvidia*.json "$results" 2>/dev/null
}

run=$site/run
train=(--config=cifar10 --config.compile_cache="$JAX_COMPILATION_CACHE_DIR" --config.data.source="folder:$folder/pictures.zip" --config.model.dtype=bfloat16
  --config.data.placement=host # the step is then the one that is planned
  --config.train.num_steps=1000000 --config.train.log_every=50 --config.train.sample_every=1000
  --config.train.warmup_steps=500 --config.train.ema_decay=0.999)
sample=(--config.sample.num_images=1000 --config.sample.num_steps=50 --config.sample.eta=0)
if [ -n "$rehearse" ]; then
  train=(--config=digits --config.compile_cache="$JAX_COMPILATION_CACHE_DIR" --config.data.placement=host --config.model.channels=8 --config.model.groups=4 --config.model.multipliers='(1,)'
    --config.model.attention_resolutions='()' --config.train.num_steps=4 --config.train.sample_every=2)
  sample=(--config.sample.num_images=4 --config.sample.num_steps=2)
fi

nvidia-smi 2>/dev/null | tee "$results/nvidia-smi.log"
# From nothing, XLA takes 100 s for a training step of CIFAR-10, and torch.compile 150 s.
part $((most + 200)) table "$python" -m benchmarks.gpu table --seconds="$most" --repetitions=3 $rehearse
part 40 kernels "$python" -m benchmarks.gpu kernels $rehearse
part 100 train "$python" main.py "${train[@]}" --workdir="$run" # SIGTERM saves the last step
part 50 sample "$python" main.py --workdir="$run" --mode=sample "${sample[@]}"
# shellcheck disable=SC2016
part 50 plan bash -c 'set -o pipefail; python=$1 run=$2 to=$3; shift 3
  "$python" main.py "$@" --workdir="$run" --mode=plan --config.plan.target=here --config.plan.programs="(\"train\",)" &&
    "$python" -m benchmarks.gpu beside --run="$run" | tee "$to"' \
  plan "$python" "$run" "$results/plan-beside-run.json" "${train[@]}"
part 120 check "$python" -m benchmarks.gpu check $rehearse

cp "$run"/logs/metrics.jsonl "$run"/samples/*/grid.png "$run"/samples/*/record.json "$run"/plan/*.md "$results" 2>/dev/null
cp "$(ls "$run"/samples/progress/*.png 2>/dev/null | tail -n 1)" "$results/last-sheet.png" 2>/dev/null
tail -n 1 "$results/metrics.jsonl"
ls "$results"
