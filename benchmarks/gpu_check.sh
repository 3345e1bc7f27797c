#!/usr/bin/env bash
# Builds, tests and measures fastcl on a machine with a GPU, in ten minutes at most; docs/performance.md describes it.
#
#   benchmarks/gpu_check.sh [--dry-run] OUT
#
# Stages: build, smoke, speed, tests, sanitizer. Each has a box of seconds and a log in the folder OUT; one that fails or
# is stopped does not stop the next. A table of the stages comes last, and the exit status is 1 unless all are ok.
# --dry-run: the same with a stand-in on the CPU for every stage.
#
# Needs no network, and fastcl need not be installed. Environment:
#   PYTHON               default python3: with torch, Triton, pytest, pytest-xdist, hypothesis and tqdm; to build also
#                        setuptools, pybind11, cmake and ninja
#   FASTCL_CHECK_SECONDS default 600: for all stages together
#   FASTCL_CHECK_WORKERS default: two fewer than the cores, 14 at most; each has one OpenMP thread
#   FASTCL_CHECK_BOXES   default "150 75 215 200 120": the seconds of each stage
#   FASTCL_CHECK_<STAGE> another command for a stage, for tests of this script
set -u
STAGES=(build smoke speed tests sanitizer)
SANITIZED=tests/backends/test_cuda_gpu.py

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
dry=0

pytest_on_gpu() { # warnings are listed, not errors: a new version's deprecation must not hide what works
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -v -W default -p no:cacheprovider -o faulthandler_timeout=90 \
        -n "$FASTCL_CHECK_WORKERS" --dist worksteal "$@"
}

stage_build() {
    "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch finds no CUDA device"' || return 1
    command -v nvidia-smi >/dev/null && nvidia-smi
    if ! "$PYTHON" -c 'from fastcl.ops.backends import cuda_runtime as c; raise SystemExit(c.kernels() is None)'; then
        local architecture
        architecture=$("$PYTHON" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
        # For this device alone and without optimisation across files, which takes most of the time.
        CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$architecture -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF ${CMAKE_ARGS:-}" \
            FASTCL_CUDA=1 "$PYTHON" setup.py build_ext --inplace || return 1
    fi
    "$PYTHON" -m fastcl.info
}

stage_smoke() { pytest_on_gpu -m "gpu and smoke" "${gpu_tests[@]}"; }

stage_speed() { # a fresh cache: the rows have the time of a first call
    TRITON_CACHE_DIR=$(mktemp -d) "$PYTHON" -m benchmarks --device cuda --budget $((FASTCL_CHECK_BOX - 20)) --out "$OUT"
}

stage_tests() { pytest_on_gpu -m "gpu and not smoke" "${gpu_tests[@]}"; }

stage_sanitizer() {
    PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || { echo "compute-sanitizer was not found"; return 1; }
    pytest_on_gpu -m gpu "$SANITIZED"
}

stand_in_for() {
    case $1 in
        build) "$PYTHON" -m fastcl.info ;;
        smoke) "$PYTHON" -m pytest -q --collect-only -p no:cacheprovider -m "gpu and smoke" "${gpu_tests[@]}" ;;
        speed) "$PYTHON" -m benchmarks --device cuda --rehearse --budget $((FASTCL_CHECK_BOX - 20)) --out "$OUT" ;;
        tests) "$PYTHON" -m pytest -v -p no:cacheprovider tests/backends/test_gpu_rehearsed.py ;;
        sanitizer) "$PYTHON" -m pytest -q --collect-only -p no:cacheprovider -m gpu "$SANITIZED" ;;
    esac
}

run_stage() { # in a process of its own, which `timeout` can end
    local name=$1 override="FASTCL_CHECK_${1^^}"
    cd "$here/.." || return 1
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v "$SANITIZED" | sort)
    if [ -n "${!override:-}" ]; then
        eval "${!override}"
    elif [ "$dry" = 1 ]; then
        stand_in_for "$name"
    else
        "stage_$name"
    fi
}

if [ "${1:-}" = --stage ]; then # how this script calls itself
    dry=$3
    run_stage "$2"
    exit
fi
main() { # a function, so that bash has read it all before a change of this file
    if [ "${1:-}" = --dry-run ]; then
        dry=1
        shift
    fi
    if [ $# != 1 ] || [ "${1#-}" != "$1" ]; then
        echo "usage: benchmarks/gpu_check.sh [--dry-run] OUT" >&2
        exit 2
    fi
    mkdir -p "$1" || exit 2
    OUT=$(cd "$1" && pwd)
    cores=$(nproc)
    workers=$((cores > 16 ? 14 : cores > 3 ? cores - 2 : 1))
    export OUT PYTHON FASTCL_CHECK_WORKERS=${FASTCL_CHECK_WORKERS:-$workers}
    read -r -a boxes <<<"${FASTCL_CHECK_BOXES:-150 75 215 200 120}"
    total=${FASTCL_CHECK_SECONDS:-600}
    tests_cache=$(mktemp -d) # of compiled kernels, shared by the tests' processes
    trap 'rm -rf "$tests_cache"' EXIT

    failed=0
    SECONDS=0
    table=$(printf '%-10s %-14s %8s %6s  %s' stage status seconds box 'last line of the log')
    for k in "${!STAGES[@]}"; do
        name=${STAGES[$k]} left=$((total - SECONDS - 5)) began=$SECONDS
        box=$((boxes[k] < left ? boxes[k] : left))
        log=$OUT/$name.log
        if [ "$box" -lt 1 ]; then
            status="no time left" last=""
        else
            echo "$name: at most $box s, log in $log"
            FASTCL_CHECK_BOX=$box TRITON_CACHE_DIR=$tests_cache \
                timeout --kill-after=5 "$box" bash "${BASH_SOURCE[0]}" --stage "$name" "$dry" >"$log" 2>&1 </dev/null
            code=$?
            case $code in
                0) status=ok ;;
                124 | 137) status="out of time" ;;
                *) status="failed ($code)" ;;
            esac
            last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-100)
        fi
        [ "$status" = ok ] || failed=1
        table+=$'\n'$(printf '%-10s %-14s %8d %6d  %s' "$name" "$status" $((SECONDS - began)) "$box" "$last")
    done
    rm -f "$OUT/gpu.now"
    printf '\n%s\n%-10s %-14s %8d\n' "$table" total "$([ $failed = 0 ] && echo ok || echo 'not all ok')" "$SECONDS" | tee "$OUT/table.txt"
    exit $failed
}

main "$@"
