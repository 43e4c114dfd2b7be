#!/usr/bin/env bash
# One call on a machine with a GPU: build, test, sweep, race, results. Smallest questions first, each step bounded, and
# the whole call too (BUDGET seconds, 530 unless given), so that it ends before a lease of ten minutes does.
#
#   bash bench/gpu_session.sh                    again, to go on where a call was cut short; RETRY=1 repeats failures too
#   OUT=results bash bench/gpu_session.sh        where results.json, session.log and state.tgz go (bench/results/new)
#   STATE=folder bash bench/gpu_session.sh       where steps leave their JSON, logs and .done files (build/gpu_session):
#                                                unpack state.tgz there to go on with another machine
#   DEVICE=cpu bash bench/gpu_session.sh         every step on the CPU, with small shapes: only the device differs
#
# Exit status: the number of steps that failed or that the budget left undone; 100 where nothing could be built.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} BUDGET=${BUDGET:-530} RETRY=${RETRY:-0}
STATE=${STATE:-build/gpu_session} OUT=${OUT:-bench/results/new}
mkdir -p "$STATE" "$OUT"
open=0 # steps that failed or were left

finish() {
  python bench/gather.py "$STATE" "$OUT/results.json" || true
  (cd "$STATE" && for log in *.log; do [ -e "$log" ] && echo "===== $log" && cat "$log"; done) >"$OUT/session.log"
  tar -czf "$OUT/state.tgz" -C "$STATE" .
  echo "== $open steps open; $OUT: results.json, session.log, state.tgz"
}
trap finish EXIT
trap 'exit 99' INT TERM

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) status
  shift 2
  if [ -e "$STATE/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  if [ -e "$STATE/$name.failed" ] && [ "$RETRY" = 0 ]; then
    echo "== $name: FAILED before (RETRY=1 repeats it)"
    open=$((open + 1))
    return 1
  fi
  if [ "$left" -lt 10 ]; then
    echo "== $name: left for another call"
    open=$((open + 1))
    return 1
  fi
  rm -f "$STATE/$name.failed"
  echo "== $name, after $SECONDS s"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$STATE/$name.log" 2>&1
  status=$?
  if [ "$status" = 0 ]; then
    touch "$STATE/$name.done"
  else
    open=$((open + 1))
    echo "   FAILED ($status)"
    case $status in 124 | 137) ;; *) touch "$STATE/$name.failed" ;; esac # what ran out of time is tried again
  fi
  tail -n 12 "$STATE/$name.log"
  return "$status"
}

race() { # race NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "race_$name" "$limit" python bench/run.py "$@" --device "$DEVICE" --json "$STATE/race_$name.json"
}

export FINEALIGN_NATIVE=require FINEALIGN_REQUIRE_NATIVE=1 PYTHONUNBUFFERED=1
if [ "$DEVICE" = cuda ]; then
  arch=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 100
  case $arch in 90) arch=90a ;; 10?) arch=100f ;; esac
  export FINEALIGN_ARCHS=$arch FINEALIGN_CUDA=require
  models=models sweep=models-sweep tile=()
else
  export FINEALIGN_CUDA=off TRITON_INTERPRET=1
  models=small sweep=small tile=(--rows 2 --columns 3001)
fi

BUILD=${BUILD:-python -m pip install --quiet --no-build-isolation --no-deps -e .}
rm -f "$STATE/build.done" # another machine may have nothing; where nothing changed it takes a moment
step build 150 $BUILD || exit 100
step doctor 60 python -m finealign_kernels doctor
step tests_gpu 150 python -m pytest -q tests/test_gpu.py tests/test_segments.py
step tests_rows 150 python -m pytest -q tests/test_row_logprobs_triton.py

race token_logprobs 60 token_logprobs --size "$models" --dtype bfloat16
race rest 90 $(python bench/run.py --list | grep -vxE 'head|loss|token_logprobs') --size "$models" --rounds 9
step sweep_rows 90 python bench/sweep.py --dtype bfloat16 "${tile[@]}" --json "$STATE/sweep_rows.json"

bf16=(--dtype bfloat16 --size "$models")
first=(); [ "$DEVICE" = cuda ] && first=(--shape "Llama-3-8B")
race head_dense 90 head "${bf16[@]}" "${first[@]}" --case dense --case frozen
race head_kinds 120 head "${bf16[@]}" "${first[@]}" --case prompt50 --case grpo30 --case pivots20
race head_kinds_compact 120 head "${bf16[@]}" "${first[@]}" --case prompt50-compact --case grpo30-compact --case pivots20-compact
if [ "$DEVICE" = cuda ]; then
  race head_models 120 head "${bf16[@]}" --case dense --shape "SmolLM2-135M" --shape "Qwen2.5-7B" --shape "Gemma-2-2B"
fi
race loss 90 loss "${bf16[@]}"
race head_sweep 180 head --dtype bfloat16 --size "$sweep" --case dense
if [ "$DEVICE" = cuda ]; then
  race head_long 150 head "${bf16[@]}" --shape "Llama-3-8B, long" --case dense --case grpo30 --case pivots20
  race head_float32 120 head --dtype float32 --size "$models" "${first[@]}" --case dense
fi
if command -v compute-sanitizer >/dev/null; then
  step sanitizer 150 compute-sanitizer --error-exitcode 1 python -m pytest -q tests/test_gpu.py -k sanitizer
fi
step plots 60 bash -c "python bench/plots.py '$STATE'/race_*.json --out '$STATE/plots'"
exit "$open"
