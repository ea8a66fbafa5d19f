#!/usr/bin/env bash
# Everything to be measured on a GPU, in parts of less than 8 minutes.
#
#   bench/gpu.sh [--out DIR] [--within SECONDS] [part ...]
#
# parts: ceilings   matrix product and device copy, which percentages refer to
#        cuda       does the step run at all, and right: captured, resumed, read back
#        cuda_more  what else is tested on a GPU alone: fastat profile, landscape, memory
#        targets    training end to end, seven steps that have a target, beside plain loops and the
#                   libraries' models: targets_conv targets_attention targets_ast
#        tests      the kernels' tests on the device, at the models' shapes too, and the front end's
#        kernels    all five kernels beside their peers, or one by its name:
#                   attention bn_relu_pool depthwise_conv log_mel patch_embed
#        a4 a2      training steps of the six models in memory, compiled, kernels on and off
#        eager      the same steps, not compiled
#        tune       times the other configurations of every kernel; tune=attention those of one
# Without parts: ceilings cuda targets tests kernels a4 cuda_more.
#
# A first session of 30 minutes runs, in this order, which is that of what would be missed most:
#   1. ceilings (seconds), cuda (a few minutes);
#   2. targets (three parts): the figures that the engine is for, with the library's operators;
#   3. tests, then attention and log_mel: whether the kernels are right, and the two that most of a
#      step could gain from; a4 tells what they do to whole steps. The rest in a second session.
# Every part stands alone, and what it found is kept: a session may end at any time. A part that is
# out of time says what it has so far. With --within all parts together, the table included, take no
# longer than that: one that has less than a minute left is not started.
#
# With pytest-xdist, what a part compiles is compiled by several processes first, which fill the
# caches of Triton and of torch.compile; what is timed then runs alone.
#
# Needs torch, triton, timm, h5py, pytest and pytest-benchmark, for targets and a4 zlib-ng and soundfile
# (which needs cffi), for cuda soxr too, and the source tree: fastat need not be installed, nor
# DALI. What is missing is said first. Peers that are not installed (flash-attn) are skipped.
# Results go to DIR (bench/results) as they come; the last thing printed is bench.compare's tables,
# and <device>.json is what it keeps. Every part runs to its end; the exit code says whether all
# passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
KERNELS="attention bn_relu_pool depthwise_conv log_mel patch_embed"
LIMIT_S=470
WARM_LIMIT_S=200
SUMMARY_S=25 # kept of a part's time, to say what came of it
LEAST_S=60
out=bench/results
within=

if [ "${1:-}" = --help ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit
fi
while true; do
    case ${1:-} in
        --out) out=${2:?--out needs a folder} ;;
        --within) within=${2:?--within needs seconds} ;;
        *) break ;;
    esac
    shift 2
done
[[ $within =~ ^[0-9]*$ ]] || { echo "gpu.sh: --within takes seconds, got $within" >&2; exit 2; }
mkdir -p "$out"
FASTAT_BENCH_OUT=$(cd "$out" && pwd)
PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
FASTAT_BENCH_RUN=${FASTAT_BENCH_RUN:-$(date "+%Y-%m-%d %H:%M:%S")}
export FASTAT_BENCH_OUT FASTAT_BENCH_RUN PYTHONPATH PYTHONUNBUFFERED=1

# Seconds until this part's summary is due, at least some.
left() {
    local seconds=$((PART_ENDS - $(date +%s) - SUMMARY_S))
    echo $((seconds > 5 ? seconds : 5))
}

# Out of time it is interrupted, as by Ctrl-C: it then says what passed and failed so far.
pytest_() {
    timeout --foreground -s INT -k 15 "$(left)" env --default-signal=INT \
        "$PYTHON" -m pytest -q -p no:cacheprovider -o console_output_style=classic "$@"
}

gpu_and_xdist() {
    "$PYTHON" -c 'import torch, xdist; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null
}

# summary CODE LOG LINES: pytest's last line, and where it did not pass what it says of that; of what
# came after so many lines.
summary() {
    if [ "$1" != 0 ]; then
        tail -n "+$(($3 + 1))" "$2" | grep -aE '^(FAILED|ERROR|E  )|KeyboardInterrupt' | cut -c -300 | tail -n 20
    fi
    tail -n 1 "$2"
    return "$1"
}

# logged_ NAME PYTEST_ARGUMENT...: into NAME.log, behind what is there.
logged_() {
    local log=$FASTAT_BENCH_OUT/$1.log lines
    shift
    lines=$(cat "$log" 2>/dev/null | wc -l)
    pytest_ "$@" >>"$log" 2>&1
    summary $? "$log" "$lines"
}

# bench_ WORKERS PYTEST_ARGUMENT...: so many processes share the GPU while they compile; 0: none does.
bench_() {
    local workers=$1 log=$FASTAT_BENCH_OUT/bench.log seconds
    shift
    if [ "$workers" != 0 ] && gpu_and_xdist; then
        seconds=$(($(left) / 2))
        TORCHINDUCTOR_COMPILE_THREADS=4 \
            timeout -k 10 $((seconds < WARM_LIMIT_S ? seconds : WARM_LIMIT_S)) \
            "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-disable -n "$workers" "$@" >>"$log" 2>&1
        echo "   compiled: $(tail -n 1 "$log")"
    fi
    logged_ bench --benchmark-columns=median,min,rounds --benchmark-sort=name "$@"
}

# A file whose imports are not installed here is an error, and the others still run.
tests_() {
    local workers=()
    gpu_and_xdist && workers=(-n 8)
    logged_ tests --continue-on-collection-errors tests/kernels tests/test_frontend.py \
        --ignore tests/kernels/test_aot.py --ignore tests/kernels/test_mutants.py "${workers[@]}"
}

cuda_() {
    logged_ cuda --continue-on-collection-errors --durations 10 -m cuda "$@"
}

part() {
    case $1 in
        ceilings) "$PYTHON" -m bench.ceilings "$FASTAT_BENCH_OUT" ;;
        tests) tests_ ;;
        cuda) cuda_ tests/test_step.py tests/models/test_crnn.py ;;
        cuda_more)
            cuda_ tests/test_landscape.py tests/test_profile_measure.py tests/test_memory_trial.py
            ;;
        targets_conv) bench_ 3 bench/bench_targets.py -k "cnn_trans or crnn or resnet50" ;;
        targets_attention) bench_ 2 bench/bench_targets.py -k "conformer or transformer" ;;
        targets_ast) bench_ 2 bench/bench_targets.py -k "ast-" ;;
        a4) bench_ 4 bench/bench_models.py -k "A4 and not eager" ;;
        a2) bench_ 4 bench/bench_models.py -k "A2 and not eager" ;;
        eager) bench_ 0 bench/bench_models.py -k eager ;;
        tune=*) "$PYTHON" -m bench.tune "${1#tune=}" ;;
        *) bench_ 6 "bench/bench_$1.py" ;;
    esac
}
export -f part left pytest_ gpu_and_xdist summary logged_ bench_ tests_ cuda_
export PYTHON WARM_LIMIT_S SUMMARY_S

parts=()
for name in "${@:-ceilings cuda targets tests kernels a4 cuda_more}"; do
    for name in $name; do
        case $name in
            kernels) parts+=($KERNELS) ;;
            tune) for op in $KERNELS; do parts+=("tune=$op"); done ;;
            targets) parts+=(targets_conv targets_attention targets_ast) ;;
            ceilings | cuda | cuda_more | targets_conv | targets_attention | targets_ast | tests | a4 | a2 | eager)
                parts+=("$name")
                ;;
            *)
                [[ " $KERNELS " == *" ${name#tune=} "* ]] || { echo "gpu.sh: no part named $name" >&2; exit 2; }
                parts+=("$name")
                ;;
        esac
    done
done

"$PYTHON" - <<'EOF'
from importlib.util import find_spec
names = "torch triton timm h5py pytest pytest_benchmark xdist torchvision zlib_ng soundfile cffi soxr"
if missing := [name for name in names.split() if find_spec(name) is None]:
    print("not installed here:", *missing)
EOF
failed=()
for name in "${parts[@]}"; do
    start=$SECONDS
    seconds=$LIMIT_S
    if [ -n "$within" ]; then
        rest=$((within - SECONDS - SUMMARY_S)) # the table comes last
        seconds=$((rest < LIMIT_S ? rest : LIMIT_S))
        if [ "$seconds" -lt "$LEAST_S" ]; then
            failed+=("$name (no time left)")
            continue
        fi
    fi
    echo "== $name"
    PART_ENDS=$(($(date +%s) + seconds)) timeout -k 10 "$seconds" bash -c "part $name" || failed+=("$name (exit code $?)")
    echo "   $((SECONDS - start)) s"
done
[ -f "$FASTAT_BENCH_OUT/results.jsonl" ] && "$PYTHON" -m bench.compare "$FASTAT_BENCH_OUT" --save
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see the logs in $out" >&2
    exit 1
fi
