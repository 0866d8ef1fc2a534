#!/usr/bin/env bash
# Fifteen minutes of a GPU that is lent by the minute: three calls, and nothing to think about between them.
#
#   bench/gpu15.sh pack      where there is a network: puts what the other machine lacks into .gpu15/
#   bench/gpu15.sh 1         on the GPU machine: gate, step, proof (four minutes and a half at most)
#   bench/gpu15.sh 2         step at 32 pairs, picture of a step (two minutes)
#   bench/gpu15.sh 3         decoding, data tests, resuming, training, loader, kernels (six and a half minutes)
#
# A number after that is the minutes that the parts may take in all (4, 1.75 and 6 where there is none): where less
# is left of the time that the machine is lent for, the parts that are worth most still fit.
#
# The GPU machine needs Python, torch, triton and pytest, and no network. Files may have to travel in pieces: call 1
# needs .gpu15/wheels and .gpu15/commit, and may bring part.00; call 2 brings part.01, call 3 part.02 (each below 56
# MiB). What was brought stays. Without the parts, call 3 runs what needs no DALI.
#
# Stop rule: the last line of each call, VERDICTS, tells what passed from what is not installed, had no time left or
# failed. Unless the gate and the proof passed in call 1, stop: no figure after that means anything. Mend it, and begin
# again with what is left of the time. Another part that failed or took too long stops nothing.
#
# Results go to $OUT, or else to bench/records: one archive for each call, gpu15-1.tar.gz and so on, made anew after
# each part. What is in them also stands in $RECORDS, or else in bench/records.
# REHEARSE=1 runs the same parts at toy sizes on a CPU.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=.gpu15
python=${PYTHON:-python3}

pack() {
    local tag=${1:-312} platforms=() work
    work=$(mktemp -d)
    trap 'rm -rf "$work"' RETURN
    for platform in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 \
        manylinux_2_5_x86_64 manylinux1_x86_64 any; do platforms+=(--platform "$platform"); done
    fetch() { # FOLDER PACKAGE...
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --python-version "${tag:0:1}.${tag:1}" --implementation cp --abi "cp$tag" --abi abi3 --abi none \
            "${platforms[@]}" -c constraints.txt --dest "$@"
    }
    rm -rf "$here"
    mkdir -p "$here/wheels" "$work/site"
    git rev-parse --short=12 HEAD > "$here/commit"
    fetch "$here/wheels" tyro docstring-parser typeguard nvidia-ml-py
    fetch "$work/wheels" nvidia-dali-cuda130 'nvidia-nvimgcodec-cu13>=0.9,<0.10' nvidia-nvjpeg \
        astunparse gast makefun nvtx optree 'libcst~=1.8' six packaging wheel
    for wheel in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site"; done
    # Bindings for other interpreters, and headers, are dead weight on the way.
    find "$work/site/nvidia/dali" -name '*.cpython-*.so' ! -name "*.cpython-$tag-*" -delete
    rm -rf "$work/site/nvidia/dali/include"
    tar -C "$work/site" -c . | xz -T0 -6 -c | split -b 56m -d - "$here/part."
    ls -l "$here" "$here/wheels"
}

prepare() {
    if [ -d "$here/wheels" ] && [ ! -d "$here/site" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$here/site" "$here"/wheels/*.whl
    fi
    # DALI's packages once their last part has come; until then its parts of the check are "not installed".
    if [ "$1" = 3 ] && [ -f "$here/part.00" ] && [ ! -d "$here/dali" ]; then
        # By Python, because tar may find no xz there.
        cat "$here"/part.* > "$here/dali.tar.xz"
        "$python" -m tarfile --filter tar -e "$here/dali.tar.xz" "$here/dali" || {
            echo "$here/part.*: DALI cannot be unpacked; is a part missing?" >&2
            rm -rf "$here/dali"
        }
    fi
    export PYTHONPATH="$PWD:$PWD/$here/site:$PWD/$here/dali${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    if [ -f "$here/commit" ]; then export FASTMOCO_COMMIT=${FASTMOCO_COMMIT:-$(cat "$here/commit")}; fi
}

check() { # CALL MINUTES PARTS
    local results=${OUT:-bench/records} minutes=$2
    [ -z "${REHEARSE:-}" ] || minutes=60
    "$python" -m fastmoco env || true
    "$python" -m fastmoco.bench gpu-check --minutes "$minutes" --parts "$3" --records "${RECORDS:-bench/records}" \
        --archive "$results/gpu15-$1.tar.gz" ${REHEARSE:+--rehearse}
}

case ${1:-} in
    pack) pack "${2:-312}" ;;
    1) prepare 1; check 1 "${2:-4}" gate,step,proof ;;
    2) prepare 2; check 2 "${2:-1.75}" step-32,picture ;;
    3) prepare 3; check 3 "${2:-6}" decode,data,resume,train,loader,kernel-tests,kernels ;;
    *) sed -n '2,/^set /p' bench/gpu15.sh | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
