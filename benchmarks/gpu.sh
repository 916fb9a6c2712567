#!/usr/bin/env bash
# One command for a machine with a CUDA GPU: build, test, measure, check memory. Uses no network.
#
#   benchmarks/gpu.sh [PART...]     all parts, or these
#   SKIP="triton racecheck"         leave parts out
#   OUT=DIR                         where gpu-summary.txt, gpu-log.txt and gpu-*.json go; default
#                                   benchmarks/results
#   LIMIT=520                       seconds for everything; every part has its own limit besides
#   PYTHON=python3                  the interpreter that has torch
#   BUILD=DIR                       where to build, in its folder ato_fast-gpu; default build
#   ATO_FAST_COMMIT=SHA             commit to record where there is no .git
#
# A part that fails does not keep later ones from running. Exit status: 0 all passed, 1 a part
# failed, 2 nothing was run (no CUDA device, wrong usage, a package that all needs is missing).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
parts=(build test step overhead memcheck triton racecheck bf16 masked shrink end2end)
python=${PYTHON:-python3}
LIMIT=${LIMIT:-520}
skip=" ${SKIP:-} "

die() {
  echo "gpu.sh: $*" >&2
  exit 2
}
known() { [[ " ${parts[*]} " == *" $1 "* ]] || die "unknown part '$1'; parts: ${parts[*]}"; }
for name in "$@" ${SKIP:-}; do known "$name"; done
wanted=" ${*:-${parts[*]}} "

"$python" -c 'import sys
try:
    import torch
except ImportError:
    sys.exit(3)
sys.exit(0 if torch.cuda.is_available() else 4)'
case $? in
  0) ;;
  4) die "no CUDA device: torch.cuda.is_available() is False; nothing was built or run" ;;
  *) die "$python cannot import torch; set PYTHON" ;;
esac

out=${OUT:-benchmarks/results}
mkdir -p "$out" || die "cannot write to $out"
out=$(cd "$out" && pwd)
log=$out/gpu-log.txt summary=$out/gpu-summary.txt
: >"$log"
: >"$summary"
say() { echo "$*" | tee -a "$summary"; }

# A copy, because the package's kernels/ lies beside ato_fast/ and nothing is installed here. It is
# kept, so that a second run builds only what changed.
copy=${BUILD:-build}/ato_fast-gpu
mkdir -p "$copy" || die "cannot write to $copy"
copy=$(cd "$copy" && pwd)
find "$copy" -path "$copy/build" -prune -o -name '*.py' -exec rm -f {} +
tar -cf - --exclude='./.git' --exclude='./.venv*' --exclude='./build' --exclude='./dist' \
  --exclude='./runs' --exclude='*.so' --exclude='__pycache__' --exclude='./.*_cache' . |
  tar -xf - -C "$copy"
ln -sfn ../kernels "$copy/ato_fast/kernels"
commit=$(git rev-parse HEAD 2>/dev/null)
[[ -n $commit && -n $(git status --porcelain 2>/dev/null) ]] && commit+=+dirty
export ATO_FAST_COMMIT=${ATO_FAST_COMMIT:-$commit} PYTHONUNBUFFERED=1
cd "$copy" || exit 2

say "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)"
say "commit ${ATO_FAST_COMMIT:-unknown}"
"$python" - <<'PYTHON' | tee -a "$summary" || die "see the line above"
import importlib, sys

NEED = {"torch": None, "numpy": None, "safetensors": None, "setuptools": None}
MISS = {
    "triton": "part triton fails, compile is left out", "pytest": "part test fails",
    "torchvision": "parts shrink, end2end and tests that trace its models fail, masked is short",
    "timm": "tests of its models fail", "sklearn": "tests on digits fail",
    "ninja": "the build is slow",
}
found, lost = [f"python {sys.version.split()[0]}"], []
for name in (*NEED, *MISS):
    try:
        found.append(f"{name} {getattr(importlib.import_module(name), '__version__', 'present')}")
    except Exception as error:
        lost.append((name, MISS.get(name, "NOTHING WORKS WITHOUT IT"), error))
print(", ".join(found))
for name, effect, error in lost:
    print(f"MISSING {name}: {effect} ({type(error).__name__}: {error})")
sys.exit(any(name in NEED for name, *_ in lost))
PYTHON

arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
sanitizer=$(command -v compute-sanitizer ||
  ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
failed=0

# part NAME SECONDS COMMAND...: runs it unless it is to be left out; notes the outcome.
part() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS)) begin=$SECONDS status=0
  shift 2
  if [[ $wanted != *" $name "* || $skip == *" $name "* ]]; then
    say "$(printf '%-10s left out' "$name")"
    return
  fi
  if ((left < 2)); then
    say "$(printf '%-10s FAIL: no time left of %s s' "$name" "$LIMIT")"
    failed=1
    return
  fi
  ((limit = limit < left ? limit : left))
  rm -f "$out/gpu-$name.json"
  echo "== $name: $*" >>"$log"
  timeout -k 5 "$limit" "$@" >"$copy/part.log" 2>&1 || status=$?
  cat "$copy/part.log" >>"$log"
  local verdict=ok
  if ((status)); then
    failed=1
    verdict="FAIL, exit status $status"
    ((status == 124 || status == 137)) && verdict="FAIL, stopped after $limit s"
  fi
  say "$(printf '%-10s %s (%d s)' "$name" "$verdict" $((SECONDS - begin)))"
  if ((status)) || [[ $name == test || $name == *check ]]; then
    grep -v '^$' "$copy/part.log" | tail -n $((status ? 6 : 1)) | cut -c1-160 | sed 's/^/    /' |
      tee -a "$summary"
  fi
}

cuda=(env ATO_FAST_BACKEND=cuda)
# Stored layouts: tracing them here would take device time, and the CPU tests compare the two.
run=("$python" -m benchmarks.run --device cuda --layouts stored)
# Without torch's cache every tensor is an allocation of its own, with nothing behind it.
sanitize=("${cuda[@]}" PYTHONPATH=tests PYTORCH_NO_CUDA_MEMORY_CACHING=1
  "${sanitizer:-compute-sanitizer}" --error-exitcode 9)

# Nothing may be measured with the libraries of an earlier build.
[[ $wanted == *" build "* && $skip != *" build "* ]] && rm -f "$copy"/ato_fast/*.so
part build 150 env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" \
  "$python" setup.py -q build_ext --inplace
part test 100 "$python" -m pytest -q -m gpu -p no:cacheprovider \
  --continue-on-collection-errors tests
part step 160 "${cuda[@]}" "${run[@]}" --dtypes fp32 --rounds 20 --seconds 120 \
  --compile-cases resnet50 --compile-seconds 40 --json "$out/gpu-step.json"
part overhead 40 "${cuda[@]}" "${run[@]}" --suite overhead --rounds 20 \
  --json "$out/gpu-overhead.json"
part memcheck 70 "${sanitize[@]}" --tool memcheck "$python" -m benchmarks.sanitize \
  --dtypes float32 bfloat16
part triton 60 "${run[@]}" --backends cuda triton --cases resnet50 mobilenet_v2 --dtypes fp32 \
  --contenders fused copy --masked 0 0.5 --rounds 20 --seconds 45 --json "$out/gpu-triton.json"
part racecheck 70 "${sanitize[@]}" --tool racecheck "$python" -m benchmarks.sanitize
part bf16 60 "${cuda[@]}" "${run[@]}" --dtypes bf16 --cases resnet50 vit_b_16 --masked 0 0.5 \
  --contenders fused foreach copy --rounds 20 --seconds 45 --json "$out/gpu-bf16.json"
# Triton serves the controller's kernels, so none is forced.
part masked 75 "${run[@]}" --suite masked --rounds 15 --seconds 60 --json "$out/gpu-masked.json"
# Compiling the networks takes minutes; both suites do it by themselves, without --no-compile.
part shrink 70 "${cuda[@]}" "${run[@]}" --suite shrink --no-compile --round-to 8 --rounds 15 \
  --seconds 40 --json "$out/gpu-shrink.json"
part end2end 80 "${run[@]}" --suite end2end --no-compile --stages 1 --rounds 10 \
  --real-steps 0 --seconds 45 --json "$out/gpu-end2end.json"

say ""
for name in step overhead triton bf16 masked shrink end2end; do
  [[ $wanted == *" $name "* && $skip != *" $name "* && -f $out/gpu-$name.json ]] || continue
  "$python" -m benchmarks.run --show "$out/gpu-$name.json" --show-masked 0.5 2>&1 |
    tail -n +2 | tee -a "$summary"
done
say "$( ((failed)) && echo FAILED || echo 'all parts passed'), ${SECONDS} s; full output: $log"
exit "$failed"
