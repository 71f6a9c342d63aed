#!/usr/bin/env bash
# Everything that needs the GPU; run in the repository's root with $OUT set. One file of results comes back,
# $OUT/cuda-STAGE.tgz, packed again every 12 seconds: a run that is cut off brings what was done.
#   gpu.sh unpack    unpacks what was carried, for packages that do not travel in one call
#   gpu.sh modules   builds FlashInfer's missing modules for BUILD seconds on all cores; they come back in packs as well
#   gpu.sh tiers     needs .gpu (pack.sh's packages) and .gpumod (FlashInfer's modules, see build_modules.py): verifies
#                    the backends of SHARES (name:processes) side by side for VERIFY seconds, in the tier TIER; beside
#                    them what ALSO names of models, mixed and traps, and the single CASES (a name, then ids);
#                    SAVE=1: Triton's cache comes back, as triton-cache.tar.xz, to be carried as .gpu/cache/site.tar.xz;
#                    MPS=1: through NVIDIA's multi-process service if that starts, which ends with the stage
#   gpu.sh measure   times them on the quiet machine, beside their libraries; models, mixed plans and traps
#   gpu.sh layers    what a layer costs the host above its library's own call, on the quiet machine
#   gpu.sh fa4       needs .gpu4 (pack.sh OUT fa4): verifies fa4 for VERIFY seconds and times it (not with VERIFY, SPEED, LAYERS=0);
#                    .gpu4cache, if it was carried: kernels.json (fa4_kernels.py list), compiled first for COMPILE seconds
#                    on all cores, *.tar.xz with kernels that were compiled before, and hyp/, the hypothesis whose draws
#                    they are; SAVE=1: the library's cache of kernels comes back, to be carried there; then the single CASES (ids)
# A machine that is still warm has what was unpacked before, and needs nothing carried again.
set -u
stage=$1; begun=$SECONDS; R=${R:-/tmp/attn-results-$stage}; rm -rf "$R"; mkdir -p "$R"
S=${S:-/tmp/attn-gpu-site}; [ "$stage" = fa4 ] && S=${S4:-/tmp/attn-gpu4-site}; mkdir -p "$S/ours"
unpack() { # archives into a folder, all at once, each only once
  local to=$1 f mark; shift; mkdir -p "$to"
  for f in "$@"; do
    mark=$S/.$(echo "$f" | tr / -)
    [ -f "$f" ] && ! [ "$mark" -nt "$f" ] && {
      python3 -c "import sys,tarfile;tarfile.open(sys.argv[1]).extractall(sys.argv[2])" "$f" "$to" && touch "$mark" & }
  done; wait
}
case $stage in
  unpack | modules | tiers | measure | layers) unpack "$S" .gpu/*/site.tar.xz; unpack "$S/flashinfer/data/aot" .gpumod/*.tar.xz ;;
  fa4)
    unpack "$S" .gpu4/*/site.tar.xz .gpu4cache/hyp/site.tar.xz
    export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=${KERNELS:-$S/fa4-kernels}
    here=$(grep -m 1 ^flags /proc/cpuinfo)  # the host's part of a kernel is for the processor that compiled it
    for flag in avx512f avx512bw avx512dq avx512vl bmi2; do [[ " $here " == *" $flag "* ]] || other=$flag; done
    [ -n "${other:-}" ] && echo "kernels that were carried are left out: no $other here" ||
      unpack "$FLASH_ATTENTION_CUTE_DSL_CACHE_DIR" .gpu4cache/*.tar.xz ;;
  *) echo "unknown stage $stage" >&2; exit 2 ;;
esac
[ "$stage" = unpack ] && { echo "unpacked at $((SECONDS - begun)) s: $(ls "$S/flashinfer/data/aot" 2>/dev/null | wc -l) modules"; exit; }
export PYTHONPATH=$S:$S/nvidia_cutlass_dsl/dsl_packages PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export OMP_NUM_THREADS=1 ATTN_NUM_THREADS=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$S/triton-cache}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} FLASHINFER_WORKSPACE_BASE=$S/jit FLASHINFER_CUDA_ARCH_LIST=9.0a
export FLASHINFER_DISABLE_JIT=${FLASHINFER_DISABLE_JIT-1}  # what was not carried is refused, and the evidence says so
export PYTHONPATH="$(python3 benchmarks/cuda_libraries.py site "$S/ours"):$S/ours:$PYTHONPATH"
[ "$stage" = fa4 ] && PYTHONPATH=$S/hyp:$PYTHONPATH
lib() { local limit=$1 log=$2; shift 2; timeout "$limit" python3 benchmarks/cuda_libraries.py "$@" --out "$R" > "$R/log-$log.txt" 2>&1; }
pack() { tar -C "$R" -czf "$OUT/cuda-$stage.$1" . && mv "$OUT/cuda-$stage.$1" "$OUT/cuda-$stage.tgz"; }
bring() { pack tmp; echo "$1 at $((SECONDS - begun)) s"; }
( while sleep 12; do pack part; done ) > /dev/null 2>&1 & packer=$!  # a run that is killed outright brings what was there
. benchmarks/side_by_side.sh
trap 'kill $packer 2>/dev/null; alone' EXIT
check() { # backend, workers: all of the tier that VERIFY seconds allow, or a spread of SPREAD of its cases, without evidence
  lib $((VERIFY + 45)) "$1-$TIER" verify "$1" --tier "$TIER" --workers "$2" --max-seconds "$VERIFY" \
    ${SPREAD:+--max-cases "$SPREAD"}; echo "$1 at $((SECONDS - begun)) s"
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$R/device.txt"; echo "unpacked at $((SECONDS - begun)) s"
case $stage in
  modules)
    ls "$S/flashinfer/data/aot" > "$R/there.txt"; cores=$(nproc --all)  # nproc alone says OMP_NUM_THREADS
    env -u FLASHINFER_DISABLE_JIT MAX_JOBS=4 timeout $((BUILD + 40)) python3 plugins/attn-flashinfer/gpu/build_modules.py \
      --out "$OUT" --seconds "$BUILD" --at-once $((cores / 3)) --skip "$R/there.txt" 2>&1 | tee "$R/log-modules.txt" | grep modules ;;
  tiers)
    TIER=${TIER:-stress}; VERIFY=${VERIFY:-200}; [ "${MPS:-0}" = 1 ] && share "$R/mps.txt"
    for part in ${SHARES:-fa3:5 flashinfer:5 flashinfer_mla:4 flashmla:3}; do check "${part%:*}" "${part#*:}" & done
    [ -n "${ALSO:-}" ] && lib "${MODELS:-90}" models $ALSO &
    [ -n "${CASES:-}" ] && lib 100 cases cases $CASES &
    for job in $(jobs -p); do [ "$job" = $packer ] || wait "$job"; done; times > "$R/times.txt"
    tail -n 1 "$R/times.txt"; alone; bring verified
    [ "${SAVE:-0}" = 1 ] && tar -C "$S" -c triton-cache | xz -1 -T 0 > "$OUT/triton-cache.tar.xz" && echo "saved at $((SECONDS - begun)) s" ;;
  measure)
    [ "${HOST:-45}" = 0 ] || { lib "${HOST:-45}" host host; bring "host costs"; }
    [ "${MODELS:-80}" = 0 ] || { lib "${MODELS:-80}" models models mixed traps; bring "models, mixed plans and traps"; }
    lib "${SPEED:-80}" speed speed --backends "${TIMED:-flashinfer,fa3,flashmla,flashinfer_mla}" --seconds 0.06; bring "speed" ;;
  layers)
    lib "${LAYERS:-40}" layers layers --backends "${TIMED:-flashinfer_mla,flashmla,fa3,flashinfer}" --rounds "${ROUNDS:-60}"; bring layers ;;
  fa4)
    TIER=${TIER:-contract}; VERIFY=${VERIFY:-110}
    [ -f .gpu4cache/kernels.json ] && [ "${COMPILE:-0}" != 0 ] && {
      timeout $((COMPILE + 40)) python3 plugins/attn-fa3/gpu/fa4_kernels.py compile .gpu4cache/kernels.json \
        --processes "$(nproc --all)" --seconds "$COMPILE" > "$R/log-kernels.txt" 2>&1; tail -n 1 "$R/log-kernels.txt"; bring compiled; }
    [ "${SAVE:-0}" = 1 ] && { # in four parts, by the first digit of their names
      for part in 0-3 4-7 8-b c-f; do
        (cd "$FLASH_ATTENTION_CUTE_DSL_CACHE_DIR" && find . -name "[$part]*.o" -print0 |
          tar --null -T - -c | xz -1 > "$OUT/kernels-$part.tar.xz") & saving="${saving:-} $!"
      done; wait $saving; echo "saved at $((SECONDS - begun)) s"; }
    [ -n "${CASES:-}" ] && { lib 100 cases cases fa4 $CASES; bring "single cases"; }
    [ "$VERIFY" = 0 ] || {
      [ "${MPS:-0}" = 1 ] && share "$R/mps.txt"; check fa4 "${WORKERS:-15}"; alone; bring verified; }
    [ "${SPEED:-60}" = 0 ] || { lib "${SPEED:-60}" speed speed --backends fa4 --seconds 0.08; bring timed; }
    [ "${LAYERS:-30}" = 0 ] || { lib "${LAYERS:-30}" layers layers --backends fa4 --rounds "${ROUNDS:-60}"; bring layers; } ;;
esac
for f in "$R"/log-*.txt; do echo "== $f"; tail -n 4 "$f" | cut -c1-300; done
grep -h "of the library" "$R"/log-speed.txt 2>/dev/null | cut -c1-200; grep -h "^\[\(host\|layers\|traps\|models\|mixed\|cases\)\]" "$R"/log-*.txt | cut -c1-240
