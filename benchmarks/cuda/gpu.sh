#!/usr/bin/env bash
# Everything that needs the GPU, in calls of ten minutes; run in the repository's root with .gpu beside it and $OUT set.
# usage: gpu.sh STAGE   (first: the ahead-of-time libraries, while FlashInfer's modules are built; second: the rest)
set -u
stage=$1; begun=$SECONDS; R=${R:-/tmp/attn-results}; S=${S:-/tmp/attn-gpu-site}; mkdir -p "$R" "$S"
. .gpu/install.sh
export PYTHONPATH="$(python3 benchmarks/cuda_libraries.py site "$S/ours"):$S/ours:$PYTHONPATH"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$R/device.txt"
left() { echo $(( ${LIMIT:-585} - (SECONDS - begun) )); }
lib() { local limit=$1; shift; timeout "$limit" python3 benchmarks/cuda_libraries.py "$@" --out "$R" 2>&1 | tee -a "$R/log.txt"; }
modules() { MAX_JOBS=${JOBS:-5} python3 plugins/attn-flashinfer/gpu/build_modules.py "$@" >> "$R/modules.txt" 2>&1; }
bring() { tar -C "$R" -czf "$OUT/results.tgz" . ; ls -la "$OUT"; }
ls .gpu/modules/*.tar.xz >/dev/null 2>&1 && modules --install .gpu/modules/*.tar.xz
case $stage in
  first)
    modules --out "$OUT/modules" --seconds 490 & builder=$!
    lib 100 verify flashmla --workers 2
    lib 200 verify fa3 --workers 3
    bring
    lib 90 speed --backends fa3,flashmla
    lib 60 traps
    lib 60 mixed
    bring
    [ "$(left)" -gt 70 ] && lib 60 verify flashinfer_mla --workers 2
    wait $builder; tail -3 "$R/modules.txt"; bring ;;
  second)
    lib 100 host
    lib 150 speed
    bring
    lib 150 verify flashinfer --workers 6
    lib 100 verify flashinfer_mla --workers 6
    bring
    lib "$(( $(left) - 5 ))" verify fa3 --workers 6
    bring ;;
  *) echo "unknown stage $stage" >&2; exit 2 ;;
esac
