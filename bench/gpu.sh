#!/usr/bin/env bash
# Everything to be measured on a GPU, in parts of less than 8 minutes.
#
#   bench/gpu.sh [--out DIR] [part ...]
#
# parts: ceilings   bf16 matrix product and device copy, which percentages refer to
#        cuda       what else is tested on a GPU alone: the step, the loader, the front end
#        targets    training end to end, seven steps that have a target, beside plain loops and the
#                   libraries' models: targets_conv targets_attention targets_ast
#        tests      the kernels' tests on the device, at the models' shapes too
#        kernels    all six kernels beside their peers, or one by its name:
#                   attention attention_pool bn_relu_pool depthwise_conv log_mel patch_embed
#        a4 a2      training steps of the six models in memory, compiled, kernels on and off
#        eager      the same steps, not compiled
#        tune       times the other configurations of every kernel; tune=attention those of one
# Without parts: ceilings cuda targets tests kernels a4.
#
# A first session of 30 minutes runs, in this order, which is that of what would be missed most:
#   1. ceilings (seconds), cuda (a minute or two): does the step run at all, and right;
#   2. targets (three parts): the figures that the engine is for, with the library's operators;
#   3. tests, then attention and log_mel: whether the kernels are right, and the two that most of a
#      step could gain from; a4 tells what they do to whole steps. The rest in a second session.
# Every part stands alone, and what it found is kept: a session may end at any time.
#
# With pytest-xdist, what a part compiles is compiled by several processes first, which fill the
# caches of Triton and of torch.compile; what is timed then runs alone.
#
# Needs torch, triton, timm, h5py, pytest and pytest-benchmark, for targets torchvision, soundfile and
# zlib-ng, for cuda what fastat needs, and the source tree: fastat need not be installed, nor DALI.
# Peers that are not installed (flash-attn) are skipped. Results go to DIR (bench/results) as they
# come; the last thing printed is bench.compare's tables, and <device>.json is what it keeps. Every
# part runs to its end; the exit code says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
KERNELS="attention attention_pool bn_relu_pool depthwise_conv log_mel patch_embed"
LIMIT_S=470
WARM_LIMIT_S=200
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
FASTAT_BENCH_RUN=${FASTAT_BENCH_RUN:-$(date "+%Y-%m-%d %H:%M:%S")}
export FASTAT_BENCH_OUT FASTAT_BENCH_RUN PYTHONPATH PYTHONUNBUFFERED=1

pytest_() {
    "$PYTHON" -m pytest -q -p no:cacheprovider -o console_output_style=classic "$@"
}

gpu_and_xdist() {
    "$PYTHON" -c 'import torch, xdist; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null
}

# bench_ WORKERS PYTEST_ARGUMENT...: so many processes share the GPU while they compile; 0: none does.
bench_() {
    local workers=$1 code log=$FASTAT_BENCH_OUT/bench.log
    shift
    if [ "$workers" != 0 ] && gpu_and_xdist; then
        TORCHINDUCTOR_COMPILE_THREADS=4 timeout -k 10 "$WARM_LIMIT_S" "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-disable \
            -n "$workers" "$@" >"$FASTAT_BENCH_OUT/warm.log" 2>&1
        echo "   compiled: $(tail -n 1 "$FASTAT_BENCH_OUT/warm.log")"
    fi
    pytest_ --benchmark-columns=median,min,rounds --benchmark-sort=name "$@" >>"$log" 2>&1
    code=$?
    tail -n 1 "$log"
    return $code
}

tests_() {
    local workers=() code log=$FASTAT_BENCH_OUT/tests.log
    gpu_and_xdist && workers=(-n 8)
    pytest_ tests/kernels --ignore tests/kernels/test_aot.py --ignore tests/kernels/test_mutants.py \
        "${workers[@]}" >"$log" 2>&1
    code=$?
    tail -n 25 "$log"
    return $code
}

cuda_() {
    local code log=$FASTAT_BENCH_OUT/cuda.log
    # A file whose imports are not installed here is an error, and the others still run.
    pytest_ tests -m cuda --ignore tests/kernels --continue-on-collection-errors >"$log" 2>&1
    code=$?
    tail -n 25 "$log"
    return $code
}

part() {
    case $1 in
        ceilings) "$PYTHON" -m bench.ceilings "$FASTAT_BENCH_OUT" ;;
        tests) tests_ ;;
        cuda) cuda_ ;;
        targets_conv) bench_ 3 bench/bench_targets.py -k "cnn_trans or crnn or resnet50" ;;
        targets_attention) bench_ 2 bench/bench_targets.py -k "conformer or transformer" ;;
        targets_ast) bench_ 2 bench/bench_targets.py -k "ast-" ;;
        a4) bench_ 4 bench/bench_models.py -k "A4 and not eager" ;;
        a2) bench_ 4 bench/bench_models.py -k "A2 and not eager" ;;
        eager) bench_ 0 bench/bench_models.py -k eager ;;
        tune=*) "$PYTHON" -m bench.tune "${1#tune=}" ;;
        attention_pool) bench_ 0 bench/bench_attention_pool.py ;;
        *) bench_ 6 "bench/bench_$1.py" ;;
    esac
}
export -f part pytest_ gpu_and_xdist bench_ tests_ cuda_
export PYTHON WARM_LIMIT_S

parts=()
for name in "${@:-ceilings cuda targets tests kernels a4}"; do
    for name in $name; do
        case $name in
            kernels) parts+=($KERNELS) ;;
            tune) for op in $KERNELS; do parts+=("tune=$op"); done ;;
            targets) parts+=(targets_conv targets_attention targets_ast) ;;
            ceilings | cuda | targets_conv | targets_attention | targets_ast | tests | a4 | a2 | eager)
                parts+=("$name")
                ;;
            *)
                [[ " $KERNELS " == *" ${name#tune=} "* ]] || { echo "gpu.sh: no part named $name" >&2; exit 2; }
                parts+=("$name")
                ;;
        esac
    done
done

failed=()
for name in "${parts[@]}"; do
    echo "== $name"
    start=$SECONDS
    timeout -k 10 "$LIMIT_S" bash -c "part $name" || failed+=("$name (exit code $?)")
    echo "   $((SECONDS - start)) s"
done
[ -f "$FASTAT_BENCH_OUT/results.jsonl" ] && "$PYTHON" -m bench.compare "$FASTAT_BENCH_OUT" --save
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see bench.log, cuda.log and tests.log in $out" >&2
    exit 1
fi
