#!/usr/bin/env bash
# One call on a machine with a GPU: ceilings, races, a table of kernel times, a short sweep, tests. The numbers that
# decide come first, each step is bounded and saves its JSON at once, and the whole call is bounded too (BUDGET seconds,
# 560 unless given), so that it ends before ten minutes do. Nothing is downloaded: bench/gpu_pack.sh makes the wheels
# beforehand, in the folder WHEELS (.whl). Without that folder the checkout is built (BUILD). Where nothing can be
# installed the checkout is copied, and where the extension cannot be imported the session goes on without it.
#
#   bash bench/gpu_session.sh                    again, to go on where a call was cut short: with what had no turn, then
#                                                with what ran out of time; RETRY=1 repeats failures too
#   LIMIT_doctor=90 bash bench/gpu_session.sh    another limit for one step, in seconds; GRACE=5 more until it is killed
#   OUT=results bash bench/gpu_session.sh        where results.json, session.log and state.tgz go (bench/results/new)
#   STATE=folder bash bench/gpu_session.sh       where steps leave their JSON, logs and .done files (build/gpu_session):
#                                                unpack state.tgz there to go on with another machine
#   DEVICE=cpu bash bench/gpu_session.sh         every step on the CPU, with small shapes: only the device differs. Ten
#                                                times the seconds; BUDGET=5000. Triton 3.6 interprets with numpy below 2.4
#   python bench/goals.py OUT/results.json       its rows into bench/results/ and docs/status.md
#
# Exit status: the number of steps that failed or that the budget left undone; 100 where torch finds no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} BUDGET=${BUDGET:-560} WHEELS=${WHEELS:-.whl} RETRY=${RETRY:-0}
STATE=${STATE:-build/gpu_session} OUT=${OUT:-bench/results/new}
mkdir -p "$STATE" "$OUT"
open=0 turn=first # steps that failed or were left
declare -A ended

gather() { # after every step: a call that is killed leaves what it had
  python3 bench/gather.py "$STATE" "$OUT/results.json" || true
  (cd "$STATE" && for log in *.log; do [ -e "$log" ] && echo "===== $log" && cat "$log"; done) >"$OUT/session.log"
  tar -czf "$OUT/state.tgz" -C "$STATE" --exclude=./site .
}
finish() {
  gather
  echo "== $open steps open; $OUT: results.json, session.log, state.tgz"
}
trap finish EXIT
trap 'exit 99' INT TERM

settled() { # a GPU still holds what a process had that was killed: at most ten seconds until it does not
  local used
  for _ in {1..10}; do
    used=$(timeout 5 nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2>/dev/null | head -n 1)
    [[ $used =~ ^[0-9]+$ ]] && [ "$used" -gt 4096 ] || return 0
    sleep 1
  done
  echo "== $used MiB of the GPU's memory are in use"
}

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) own=LIMIT_$1 status
  shift 2
  [ "$DEVICE" = cuda ] || limit=$((limit * 10)) # kernels are interpreted there
  limit=${!own:-$limit}
  if [ -n "${ended[$name]:-}" ] || { [ -e "$STATE/$name.late" ] && [ "$turn" = first ]; }; then
    return 0
  fi
  ended[$name]=1
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
  # what an earlier try has measured stays beside the new one, before it by name
  [ ! -e "$STATE/$name.json" ] || mv "$STATE/$name.json" "$STATE/$name.$(date +%s).json"
  rm -f "$STATE/$name.failed" "$STATE/$name.late"
  echo "== $name, after $SECONDS s"
  # interrupted, a program says where it was
  timeout --signal=INT --kill-after="${GRACE:-5}" "$((limit < left ? limit : left))" "$@" >"$STATE/$name.log" 2>&1
  status=$?
  case $status in
    0) touch "$STATE/$name.done" ;;
    124 | 137) touch "$STATE/$name.late" ;; # tried again by another call, after what had no turn
    *) touch "$STATE/$name.failed" ;;
  esac
  if [ "$status" != 0 ]; then
    open=$((open + 1))
    echo "   FAILED ($status)"
  fi
  tail -n 12 "$STATE/$name.log"
  [ "$status" = 0 ] || [ "$DEVICE" != cuda ] || settled
  gather
  return "$status"
}

race() { # race NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "race_$name" "$limit" python3 bench/apart.py "$hangs" --json "$STATE/race_$name.json" "$@" --device "$DEVICE"
}

export HF_HUB_OFFLINE=1 # nothing waits for a network
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=1 # every test process would start a pool of its own
if [ "$DEVICE" = cuda ]; then
  models=models first=(--shape "Llama-3-8B")
  marked=(-m gpu) swept=bfloat16 hangs=45 # seconds after which one call of a race is taken to hang
  (nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw --format=csv,noheader -lms 500 >"$STATE/clocks.csv" 2>/dev/null) &
  clocks=$!
  trap 'kill $clocks 2>/dev/null; finish' EXIT
  arch=$(timeout 150 python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 100
  case $arch in 90) arch=90a ;; 10?) arch=100f ;; esac
  export FINEALIGN_ARCHS=$arch
else
  export FINEALIGN_CUDA=off TRITON_INTERPRET=1
  models=small first=() marked=() swept=float32 hangs=450 # bfloat16 is not right in Triton's interpreter
fi

cores=$(nproc) many=()
[ "$cores" -ge 4 ] && python3 -c 'import xdist' 2>/dev/null && many=(-n $((cores < 8 ? cores : 8)))

rm -f "$STATE"/install.{done,late,failed} # another machine may have nothing; where nothing changed it takes a moment
site=$(realpath "$STATE")/site
pip=(python3 -m pip install --quiet) into=(--no-index --no-deps --no-compile --upgrade --target "$site")
wheels=() how=(${BUILD:-"${pip[@]}" --no-build-isolation --no-deps -e .})
if [ -z "${BUILD:-}" ] && ls "$WHEELS"/*.whl >/dev/null 2>&1; then
  wheels=("$WHEELS"/*.whl) how=("${pip[@]}" "${into[@]}" "$WHEELS"/*.whl)
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
step install 90 "${how[@]}" || {
  rm -rf "$site"
  mkdir -p "$site"
  for wheel in "${wheels[@]}"; do # one that does not fit keeps none of the others out
    timeout 60 "${pip[@]}" "${into[@]}" "$wheel" >>"$STATE/install.log" 2>&1 || echo "== on without $wheel"
  done
  if [ ! -e "$site/finealign_kernels" ]; then
    echo "== the package could not be installed, on with a copy of the checkout, without the extension"
    cp -r finealign_kernels "$site"
    cp -r kernels/triton "$site/finealign_kernels/kernels"
    rm -f "$site"/finealign_kernels/*.so
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  fi
}
# the checkout itself has no kernels: outside of it, so that what was installed is found
runs='import sys, torch; from finealign_kernels import _C; from finealign_kernels.ops import _native
sys.exit(_native.missing(torch.device(sys.argv[1])))'
if (cd / && timeout 60 python3 -c "$runs" "$DEVICE") >"$STATE/native.log" 2>&1; then
  export FINEALIGN_REQUIRE_NATIVE=1
else
  echo "== the extension does not load or has no code for this GPU, on without it: $(tail -n 1 "$STATE/native.log")"
  export FINEALIGN_DISABLE_NATIVE=1
fi

tests() { # tests NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  # each with its name as it ends; one that hangs (or compiles for so long) ends its process, and xdist starts another
  step "tests_$name" "$limit" python3 -m pytest -v --tb=short -o faulthandler_timeout=$((hangs + 15)) "$@"
}

bf16=(--dtype bfloat16 --size "$models" --no-memory)
ceilings=(python3 bench/ceilings.py --device "$DEVICE")
steps() {
  step ceilings 40 "${ceilings[@]}" --json "$STATE/ceilings.json"
  ours=(--rival trl --rival ours-default --rival ours-no-workspace --rival fused --rival fused-no-workspace)
  race head_dense 120 head "${bf16[@]}" "${first[@]}" --case dense --rival gemm3 --rival gemm4 "${ours[@]}"
  step profile 30 "${ceilings[@]}" --profile ours fused trl gemm3 --json "$STATE/profile.json"
  race head_kinds 90 head "${bf16[@]}" "${first[@]}" --case frozen --case pivots20 --case grpo30 \
    --rival trl --rival fused --rival gemm3
  race token_logprobs 40 token_entropy token_logprobs "${bf16[@]}" "${first[@]}" --rival trl --rival copy
  batches=()
  [ "$DEVICE" = cuda ] && batches=(--shape "1024 of 4096" --shape "64 of 512" --shape "32 of 32768" --shape "1 of a million")
  race rest 60 rl sequence policy segments --size "$models" "${batches[@]}" --rounds 5 --no-memory
  step doctor 60 bash -c "cd / && python3 -m finealign_kernels doctor" # compiles a dozen kernels of small shapes

  launches=(--launch 128,256,64,8,3,32,8 --launch 128,256,64,8,4,32,8 --launch 128,256,64,8,3,32,16
    --launch 128,256,64,8,3,64,8 --launch 128,128,64,8,4,32,8 --launch 256,128,64,8,3,32,8 --launch 128,128,64,4,3,16,8)
  size=(--rows 8192 "${first[@]}") # as the races
  [ "$DEVICE" = cuda ] || size=(--rows 2 --shape small) launches=(--launch 32,64,32,4,1,32,2 --launch 16,128,16,4,1,128,8)
  step sweep_forward 120 python3 bench/sweep.py --kernel head_fwd_tma --dtype "$swept" "${size[@]}" "${launches[@]}" \
    --json "$STATE/sweep_forward.json"

  tests gpu 120 "${many[@]}" tests/kernels/test_gpu.py "${marked[@]}" \
    -k "nothing_waits or graph_replays or queued_on or agrees or bits_repeat or any_length"
  # what FUSED_BY_DEFAULT and compact="auto" are decided by, at other depths
  [ "$DEVICE" = cuda ] && depths=(--shape SmolLM2-135M --shape Gemma-2-2B) || depths=()
  race head_depths 90 head "${bf16[@]}" "${depths[@]}" --case dense --case pivots20 \
    --rival gemm3 --rival fused --rival chunked-device --rival fused-device
  tests head 90 "${many[@]}" tests/kernels/test_linear_logprobs_triton.py -k "shipped_tiles or agrees_with_float64 or within_eagers"
  tests rows 60 "${many[@]}" tests/kernels/test_row_logprobs_triton.py
  tests large 90 tests/kernels/test_gpu.py "${marked[@]}" -k past_two # one at a time: 60 GiB
  if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then
    # an allocation each: inside of a cached block nothing is out of bounds
    step sanitizer 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python3 -m pytest -q \
      tests/kernels/test_gpu.py -k "sanitizer and cuda and (segment or gae or dpo or grpo or linear_logprobs)"
  fi
}
steps
turn=last
steps
exit "$open"
