#!/usr/bin/env bash
# One call on a machine with a GPU: build, test, race; JSON and logs under $OUT (default bench/results/new).
# Smallest questions first, each step bounded in time and skipped where its result is already there, so that a call cut
# short can be repeated. Exit status: the number of steps that failed.
#
#   OUT=results bash bench/gpu_session.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/new}
mkdir -p "$OUT"
failed=0

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  if [ -e "$OUT/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name"
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    touch "$OUT/$name.done"
  else
    failed=$((failed + 1))
    echo "   FAILED ($?); the end of $OUT/$name.log:"
  fi
  tail -n 12 "$OUT/$name.log"
}

python - >"$OUT/machine.txt" <<'E2'
import platform, torch
print(platform.python_version(), torch.__version__, torch.version.cuda)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", torch.cuda.get_device_capability() if torch.cuda.is_available() else "")
E2
cat "$OUT/machine.txt"

arch=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null || echo 90)
[ "$arch" = 90 ] && arch=90a
export FINEALIGN_ARCHS=$arch FINEALIGN_CUDA=require FINEALIGN_NATIVE=require

step build 120 python -m pip install --quiet --no-build-isolation --no-deps -e .
export FINEALIGN_REQUIRE_NATIVE=1
step doctor 60 python -m finealign_kernels doctor
step tests 200 python -m pytest -q -x tests/test_segments.py tests/test_row_logprobs_triton.py tests/test_logprobs.py tests/test_losses.py
for suite in token_logprobs segments head; do
  step "bench_$suite" 120 python bench/run.py "$suite" --device cuda --json "$OUT/$suite.json"
done
exit "$failed"
