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
  python3 bench/gather.py "$STATE" "$OUT/results.json" || true
  (cd "$STATE" && for log in *.log; do [ -e "$log" ] && echo "===== $log" && cat "$log"; done) >"$OUT/session.log"
  tar -czf "$OUT/state.tgz" -C "$STATE" .
  echo "== $open steps open; $OUT: results.json, session.log, state.tgz"
}
trap finish EXIT
trap 'exit 99' INT TERM

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) status
  shift 2
  [ "$DEVICE" = cuda ] || limit=$((limit * 10)) # kernels are interpreted there
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
  step "race_$name" "$limit" python3 bench/run.py "$@" --device "$DEVICE" --json "$STATE/race_$name.json"
}

export FINEALIGN_NATIVE=require FINEALIGN_REQUIRE_NATIVE=1 PYTHONUNBUFFERED=1
if [ "$DEVICE" = cuda ]; then
  arch=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 100
  case $arch in 90) arch=90a ;; 10?) arch=100f ;; esac
  export FINEALIGN_ARCHS=$arch FINEALIGN_CUDA=require
  models=models sweep=models-sweep tile=() first=(--shape "Llama-3-8B")
else
  export FINEALIGN_CUDA=off TRITON_INTERPRET=1
  models=small sweep=small tile=(--rows 2 --columns 3001 --shape small) first=()
fi

BUILD=${BUILD:-python3 -m pip install --quiet --no-build-isolation --no-deps -e .}
rm -f "$STATE/build.done" # another machine may have nothing; where nothing changed it takes a moment
step build 150 $BUILD || exit 100
step doctor 60 python3 -m finealign_kernels doctor

tests() { # tests NAME SECONDS ARGUMENTS...: many at a time where pytest-xdist is there, as most of it is compiling
  local name=$1 limit=$2 many=()
  shift 2
  [ "$DEVICE" = cuda ] && python3 -c 'import xdist' 2>/dev/null && many=(-n 8)
  step "tests_$name" "$limit" python3 -m pytest -q "${many[@]}" "$@"
}

tests gpu 120 tests/test_gpu.py tests/test_segments.py -k "not past_two and not one_graph and not queued_times"
tests head 150 tests/test_linear_logprobs_triton.py
tests rows 120 tests/test_row_logprobs_triton.py

race token_logprobs 60 token_logprobs --size "$models" --dtype bfloat16
bf16=(--dtype bfloat16 --size "$models")
race head_dense 120 head "${bf16[@]}" "${first[@]}" --case dense --case frozen
sweep_of() { # sweep_of NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "sweep_$name" "$limit" python3 bench/sweep.py --dtype bfloat16 "${tile[@]}" "$@" --json "$STATE/sweep_$name.json"
}
sweep_of rows 90 --kernel row_fwd --kernel row_bwd
sweep_of forward 150 --kernel head_fwd --kernel head_fwd_tma "${first[@]}"
sweep_of backward 180 --kernel head_bwd --kernel head_dx --kernel head_dw --kernel head_capped "${first[@]}"

race rest 90 $(python3 bench/run.py --list | grep -vxE 'head|loss|token_logprobs') --size "$models" --rounds 9
race head_kinds 120 head "${bf16[@]}" "${first[@]}" --case prompt50 --case grpo30 --case pivots20
race head_kinds_compact 120 head "${bf16[@]}" "${first[@]}" --case prompt50-compact --case grpo30-compact --case pivots20-compact
step tests_large 120 python3 -m pytest -q tests/test_gpu.py -k "past_two or queued_times" # one at a time: 60 GiB, times
tests compiled 180 tests/test_gpu.py -k one_graph
tests ops 120 tests/test_logprobs.py tests/test_returns.py tests/test_sequence_loss.py tests/test_policy_loss.py
if [ "$DEVICE" = cuda ]; then
  race head_models 120 head "${bf16[@]}" --case dense --shape "SmolLM2-135M" --shape "Qwen2.5-7B" --shape "Gemma-2-2B"
  sweep_of models 180 --kernel head_fwd --kernel head_fwd_tma --kernel head_bwd --kernel head_dx --kernel head_dw \
    --kernel head_capped --shape "Gemma-2-2B" --shape "SmolLM2-135M"
fi
race loss 90 loss "${bf16[@]}"
race head_sweep 180 head --dtype bfloat16 --size "$sweep" --case dense
if [ "$DEVICE" = cuda ]; then
  race head_long 150 head "${bf16[@]}" --shape "Llama-3-8B, long" --case dense --case grpo30 --case pivots20
  race head_float32 120 head --dtype float32 --size "$models" "${first[@]}" --case dense
fi
if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then
  # an allocation each: inside of a cached block nothing is out of bounds
  checked=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1)
  step sanitizer 150 "${checked[@]}" python3 -m pytest -q tests/test_gpu.py -k "sanitizer and cuda"
  step sanitizer_races 150 "${checked[@]}" --tool racecheck python3 -m pytest -q tests/test_gpu.py \
    -k "sanitizer and cuda and (segment or scan or gae or advantages or dpo)"
fi
step plots 60 bash -c "python3 bench/plots.py '$STATE'/race_*.json --out '$STATE/plots'"
rm -f "$STATE"/best.* # of all sweeps until now
step best 30 bash -c "python3 bench/sweep.py --best '$STATE'/sweep_*.json"
exit "$open"
