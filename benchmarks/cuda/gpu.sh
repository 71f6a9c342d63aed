#!/usr/bin/env bash
# Everything that needs the GPU; run in the repository's root with $OUT set. One file of results comes back: $OUT/cuda.tgz.
#   gpu.sh verify     needs .gpu (pack.sh's packages) and .gpumod (FlashInfer's modules, see build_modules.py): verifies
#                     all four backends side by side for VERIFY seconds, tries the traps, then times on the quiet machine
#   gpu.sh more       on the same machine, still warm: verifies the four again for VERIFY seconds, in the tier TIER
#   gpu.sh fa4        needs .gpu4 (pack.sh OUT fa4): verifies fa4 for VERIFY seconds and times it
set -u
stage=$1; begun=$SECONDS; R=${R:-/tmp/attn-results-$stage}; S=${S:-/tmp/attn-gpu-site}; mkdir -p "$R" "$S"
unpack() { # archives into a folder, all at once
  local to=$1; shift; mkdir -p "$to"
  for f in "$@"; do [ -f "$f" ] && python3 -c "import sys,tarfile;tarfile.open(sys.argv[1]).extractall(sys.argv[2])" "$f" "$to" & done; wait
}
case $stage in
  verify) unpack "$S" .gpu/*/site.tar.xz; unpack "$S/flashinfer/data/aot" .gpumod/*.tar.xz ;;
  fa4) unpack "$S" .gpu4/*/site.tar.xz; export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 ;;
esac
export PYTHONPATH=$S:$S/nvidia_cutlass_dsl/dsl_packages PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} FLASHINFER_WORKSPACE_BASE=$S/jit FLASHINFER_CUDA_ARCH_LIST=9.0a
export FLASHINFER_DISABLE_JIT=${FLASHINFER_DISABLE_JIT-1}  # what was not carried is refused, and the evidence says so
export PYTHONPATH="$(python3 benchmarks/cuda_libraries.py site "$S/ours"):$S/ours:$PYTHONPATH"
lib() { local limit=$1 log=$2; shift 2; timeout "$limit" python3 benchmarks/cuda_libraries.py "$@" --out "$R" > "$R/$log.txt" 2>&1; }
check() { # backend, workers: all that VERIFY seconds allow
  lib $((VERIFY + 40)) "log-$1-$TIER" verify "$1" --tier "$TIER" --workers "$2" --max-seconds "$VERIFY"
}
bring() { tar -C "$R" -czf "$OUT/cuda.tgz" . ; echo "$1 at $((SECONDS - begun)) s"; }
TIER=${TIER:-contract}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$R/device.txt"; echo "unpacked at $((SECONDS - begun)) s"
case $stage in
  verify)
    VERIFY=${VERIFY:-75}
    check flashmla 2 & check fa3 5 & check flashinfer_mla 3 & check flashinfer 6 & wait; bring verified
    lib "${SPEED:-60}" log-speed speed --backends fa3,flashmla,flashinfer,flashinfer_mla --seconds 0.08; bring timed
    lib 35 log-host host; bring "host costs"
    lib 25 log-traps traps; bring traps ;;
  more) VERIFY=${VERIFY:-60}; check flashmla 2 & check fa3 5 & check flashinfer_mla 3 & check flashinfer 6 & wait; bring verified ;;
  fa4)
    VERIFY=${VERIFY:-90}; check fa4 14; bring verified
    lib 60 log-fa4-speed speed --backends fa4 --seconds 0.08; bring timed ;;
  *) echo "unknown stage $stage" >&2; exit 2 ;;
esac
tail -qn 3 "$R"/log-*.txt | cut -c1-300; grep -h "of the library" "$R"/log-*speed.txt | cut -c1-200; cut -c1-200 "$R/log-host.txt" "$R/log-traps.txt" 2>/dev/null
