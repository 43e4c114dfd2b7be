#!/usr/bin/env bash
# Makes what gpu_session.sh takes along to a machine that can download nothing: the wheel of this checkout for sm_90a and
# the rivals' wheels. Needs nvcc, torch >= 2.10 and ninja, no GPU.
#
#   bash bench/gpu_pack.sh [FOLDER]      FOLDER (.whl) is made anew; more than 64 MiB in it is an error
#
# ARCHS, PYTHON_VERSION   for another GPU (90a) or another Python there (3.12)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
mkdir -p "$folder"
rm -f "$folder"/*.whl
FINEALIGN_NATIVE=require FINEALIGN_CUDA=require FINEALIGN_ARCHS=${ARCHS:-90a} \
  python3 -m pip wheel --quiet --no-deps --no-build-isolation -w "$folder" .
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" -d "$folder" \
  trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
size=$(du -sm "$folder" | cut -f1)
ls -l "$folder"
[ "$size" -le 64 ] || { echo "$folder holds $size MiB, at most 64 may travel" >&2; exit 1; }
