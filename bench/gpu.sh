#!/usr/bin/env bash
# Everything to be measured on a GPU, in parts of less than 8 minutes.
#
#   bench/gpu.sh [--out DIR] [part ...]
#
# parts: ceilings   bf16 matrix product and device copy, which percentages refer to
#        tests      the kernels' tests on the device, at the models' shapes too
#        kernels    all six kernels beside their peers, or one by its name:
#                   attention attention_pool bn_relu_pool depthwise_conv log_mel patch_embed
#        a4 a2      whole training steps of the six models, compiled, kernels on and off
#        eager      the same steps, not compiled
#        tune       times the other configurations of every kernel
# Without parts: ceilings tests kernels a4.
#
# Needs torch, triton, timm, h5py, pytest and pytest-benchmark, and the source tree: fastat need not
# be installed, nor DALI. Results go to DIR (bench/results) as they come; the last thing printed is
# a table. Every part runs to its end; the exit code says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
KERNELS="attention attention_pool bn_relu_pool depthwise_conv log_mel patch_embed"
LIMIT_S=480
out=bench/results

if [ "${1:-}" = --help ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit
fi
if [ "${1:-}" = --out ]; then
    out=${2:?--out needs a folder}
    shift 2
fi
mkdir -p "$out"
FASTAT_BENCH_OUT=$(cd "$out" && pwd)
PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export FASTAT_BENCH_OUT PYTHONPATH PYTHONUNBUFFERED=1

pytest_() {
    "$PYTHON" -m pytest -q -p no:cacheprovider -o console_output_style=classic "$@"
}

bench_() {
    pytest_ --benchmark-columns=median,min,rounds --benchmark-sort=name "$@" >>"$FASTAT_BENCH_OUT/bench.log" 2>&1
    local code=$?
    tail -n 1 "$FASTAT_BENCH_OUT/bench.log"
    return $code
}

tests_() {
    set -o pipefail
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
    pytest_ tests/kernels --ignore tests/kernels/test_aot.py --ignore tests/kernels/test_mutants.py \
        "${workers[@]}" 2>&1 | tail -n 25
}

part() {
    case $1 in
        ceilings) "$PYTHON" -m bench.ceilings "$FASTAT_BENCH_OUT" ;;
        tests) tests_ ;;
        a4) bench_ bench/bench_models.py -k "A4 and not eager" ;;
        a2) bench_ bench/bench_models.py -k "A2 and not eager" ;;
        eager) bench_ bench/bench_models.py -k eager ;;
        tune) "$PYTHON" -m bench.tune ;;
        *) bench_ "bench/bench_$1.py" ;;
    esac
}
export -f part pytest_ bench_ tests_
export PYTHON

parts=()
for name in "${@:-ceilings tests kernels a4}"; do
    for name in $name; do
        case $name in
            kernels) parts+=($KERNELS) ;;
            ceilings | tests | a4 | a2 | eager | tune) parts+=("$name") ;;
            *)
                [[ " $KERNELS " == *" $name "* ]] || { echo "gpu.sh: no part named $name" >&2; exit 2; }
                parts+=("$name")
                ;;
        esac
    done
done

failed=()
for name in "${parts[@]}"; do
    echo "== $name"
    start=$SECONDS
    timeout "$LIMIT_S" bash -c "part $name" || failed+=("$name (exit code $?)")
    echo "   $((SECONDS - start)) s"
done
[ -f "$FASTAT_BENCH_OUT/results.jsonl" ] && "$PYTHON" -m bench.table "$FASTAT_BENCH_OUT"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see $out/bench.log" >&2
    exit 1
fi
