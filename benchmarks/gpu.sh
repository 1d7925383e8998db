#!/usr/bin/env bash
# All that a GPU is needed for, in one call of under 9 minutes on an H200, most important first.
#
#   benchmarks/gpu.sh              results into $OUT, by default benchmarks/results
#   benchmarks/gpu.sh --dry-run    the same steps with tiny sizes on the CPU, by default into a
#                                  temporary folder
#
# Needs PyTorch with Triton and the few packages that longnet_zoo imports; no network. JSON is
# written after every cell: whoever interrupts it keeps what is finished, and the same call goes on
# from there. Afterwards `python -m benchmarks.performance` draws and writes docs/performance.md.
set -u

PYTHON=${PYTHON:-python3}
LIMIT_S=${LIMIT_S:-520} # of all steps together

case "${1:-}" in
  "") kind=gpu OUT=${OUT:-benchmarks/results} ;;
  --dry-run) kind=dry OUT=${OUT:-$(mktemp -d)} ;;
  *) echo "error: the only option is --dry-run, got $1" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$OUT" 2>/dev/null || { echo "error: cannot make the folder $OUT. Set OUT to another." >&2; exit 2; }

missing=$("$PYTHON" - <<'PYTHON_CODE'
from importlib.util import find_spec

needed = ("torch", "einops", "timm", "safetensors", "huggingface_hub", "rich", "numpy")
print(*(name for name in needed if find_spec(name) is None))
PYTHON_CODE
) || { echo "error: $PYTHON does not run. Set PYTHON." >&2; exit 2; }
if [ -n "$missing" ]; then
  echo "error: $PYTHON lacks $missing: pip install $missing" >&2
  exit 2
fi
if [ $kind = gpu ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
then
  echo "error: PyTorch sees no CUDA GPU. --dry-run runs tiny sizes on the CPU." >&2
  exit 2
fi

stop() {
  trap '' INT TERM
  [ -n "${child:-}" ] && kill -TERM "$child" 2>/dev/null && wait "$child"
  echo "stopped after $SECONDS s; finished cells are kept in $OUT" >&2
  exit 130
}
trap stop INT TERM

failed=0
# step SECONDS NAME COMMAND...: runs it within its time and that of all; again after a crash (75).
step() {
  local limit=$1 name=$2 tries=0 code=75 left
  shift 2
  while [ $code -eq 75 ] && [ $tries -lt 3 ]; do
    left=$((LIMIT_S - SECONDS))
    [ "$left" -gt "$limit" ] && left=$limit
    if [ "$left" -lt 3 ]; then
      echo "== $name: left out, $LIMIT_S s are over" | tee -a "$OUT/gpu.log"
      failed=1
      return
    fi
    echo "== $name (at $SECONDS s, limit $left s)" | tee -a "$OUT/gpu.log"
    # Ten seconds after SIGTERM, which a programme uses to stop in order, comes SIGKILL.
    timeout -k 10 "$left" "$@" >>"$OUT/gpu.log" 2>&1 &
    child=$!
    wait "$child"
    code=$?
    child=
    tries=$((tries + 1))
    echo "== $name ended with $code at $SECONDS s" | tee -a "$OUT/gpu.log"
  done
  [ $code -eq 0 ] || failed=1
}

export PYTHONUNBUFFERED=1
pattern="--segment-lengths 2048 4096 8192 16384 32768 --dilation-rates 1 2 4 8 16"
sizes() { # the sizes of a step: on a GPU, or in a dry run
  if [ $kind = gpu ]; then echo "$1"; else echo "$2"; fi
}
small="--device cpu --segment-lengths 64 128 --dilation-rates 1 2 --rounds 1"

# 1. Right? Every kernel against the oracle.
if "$PYTHON" -c 'import pytest, pytest_timeout, hypothesis' 2>/dev/null; then
  # Named one by one: other test files need packages that a bare machine lacks.
  tests=$(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
  # Most of the time goes into compiling, one kernel a process.
  workers=$("$PYTHON" -c 'import xdist; print("-n 8")' 2>/dev/null)
  # shellcheck disable=SC2086 # words are wanted here and below
  step 110 "tests" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider \
    $(sizes "$workers" "--collect-only") $tests
else
  echo "== tests: left out, they need pytest, pytest-timeout and hypothesis" | tee -a "$OUT/gpu.log"
  failed=1
fi

# 2. Each kernel against dense attention at equal pairs, and against the usual pipeline.
# shellcheck disable=SC2046,SC2086
step 180 "kernels" "$PYTHON" -m benchmarks.kernels --resume --no-picture --output "$OUT/kernels-$kind.json" \
  $(sizes "--device cuda --dtype bfloat16 $pattern --seq-lens 65536 1048576 --shapes 12x64 16x128 \
    --limit-s 3" "$small --seq-lens 256 --shapes 2x16")

# 3. How long a sequence one attention layer takes: whole, then in pieces.
# shellcheck disable=SC2046,SC2086
step 60 "length" "$PYTHON" -m benchmarks.length --resume --no-picture --output "$OUT/length-$kind.json" \
  $(sizes "--device cuda --dtype bfloat16 $pattern --num-heads 12 --rounds 3 --min-seq-len 65536 \
    --max-seq-len 16777216 --max-backward-seq-len 4194304" \
    "$small --num-heads 2 --head-dim 16 --min-seq-len 128 --max-seq-len 256 \
    --max-backward-seq-len 128")
# shellcheck disable=SC2046,SC2086
step 60 "length in pieces" "$PYTHON" -m benchmarks.length --resume --no-picture \
  --output "$OUT/length-pieces-$kind.json" \
  $(sizes "--device cuda --dtype bfloat16 $pattern --num-heads 12 --rounds 3 --piece-len 524288 \
    --min-seq-len 1048576 --max-seq-len 16777216 --max-backward-seq-len 4194304" \
    "$small --num-heads 2 --head-dim 16 --min-seq-len 128 --max-seq-len 256 \
    --max-backward-seq-len 256 --piece-len 128")

# 4. Training steps of whole models; a million tokens with memory saving first.
# shellcheck disable=SC2046,SC2086
step 90 "models, a million tokens" "$PYTHON" -m benchmarks.models --resume --no-picture \
  --output "$OUT/models-million-$kind.json" --modes "memory saving" \
  $(sizes "--device cuda --dtype bfloat16 --rounds 2 --cases longnet_lm_base:1048576" \
    "--device cpu --rounds 1 --cases longnet_lm_tiny:256 --num-layers 1")
# shellcheck disable=SC2046,SC2086
step 90 "models" "$PYTHON" -m benchmarks.models --resume --no-picture --output "$OUT/models-$kind.json" \
  $(sizes "--device cuda --dtype bfloat16 --rounds 3 --cases longnet_lm_base:65536 \
    gigapath_slide_enc12l768d:65536 longvit_small_patch32_8192" \
    "--device cpu --rounds 1 --cases gigapath_slide_enc12l768d:64 --num-layers 1")

# 5. Dilated against vanilla attention.
# shellcheck disable=SC2046
step 45 "bench" "$PYTHON" -m longnet_zoo.cli bench --resume --no-picture --output "$OUT/bench-$kind" \
  $(sizes "--device cuda --dtype bfloat16 --max-seq-len 131072 --num-seq-lens 7" \
    "--device cpu --max-seq-len 256 --num-seq-lens 2 --num-iter 2 --num-heads 2 --emb-dim 16")

# What a causal model costs that reads and writes piece by piece.
# shellcheck disable=SC2046,SC2086
step 60 "streaming" "$PYTHON" -m benchmarks.streaming --resume --no-picture \
  --output "$OUT/streaming-$kind.json" \
  $(sizes "--device cuda --dtype bfloat16 --model longnet_lm_base --chunk-sizes 24000 32768" \
    "$small --num-bytes 400 --chunk-sizes 100 128 --positions 10 100 --uncached-positions 10 \
    --score-bytes 300")

# The tables once more, without the lines of JSON.
grep -v '^{' "$OUT/gpu.log" | cut -c1-160 | tail -n 150
echo "== done in $SECONDS s, results in $OUT"
exit $failed
