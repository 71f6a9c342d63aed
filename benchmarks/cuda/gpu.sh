#!/usr/bin/env bash
# Everything that needs the GPU; run in the repository's root with $OUT set, on one machine that stays warm between calls.
#   gpu.sh libraries    needs .gpu (pack.sh's packages): starts building FlashInfer's modules, verifies fa3 and flashmla
#   gpu.sh flashinfer   needs .gpumod (modules built before, or nothing): verifies FlashInfer, then times everything
#   gpu.sh fa4          needs .gpu4 (pack.sh OUT fa4), alone: verifies and times fa4
# Modules that are built come back in $OUT/modules; put them into .gpumod for the next machine.
set -u
stage=$1; begun=$SECONDS; R=${R:-/tmp/attn-results}; S=${S:-/tmp/attn-gpu-site}; NEW=/tmp/attn-modules; mkdir -p "$R" "$S"
if [ "$stage" = libraries ]; then . .gpu/install.sh; cp .gpu/have_modules.txt /tmp/have_modules.txt 2>/dev/null || : > /tmp/have_modules.txt
elif [ "$stage" = fa4 ]; then . .gpu4/install.sh; export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1
else  # unpacked by the call before
  export PYTHONPATH=$S:$S/nvidia_cutlass_dsl/dsl_packages PYTHONUNBUFFERED=1 CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
  export FLASHINFER_WORKSPACE_BASE=$S/jit FLASHINFER_CUDA_ARCH_LIST=9.0a
fi
export PYTHONPATH="$(python3 benchmarks/cuda_libraries.py site "$S/ours"):$S/ours:$PYTHONPATH" PYTHONWARNINGS=ignore
left() { echo $(( ${LIMIT:-585} - (SECONDS - begun) )); }
lib() { local limit=$1; shift; timeout "$limit" python3 benchmarks/cuda_libraries.py "$@" --out "$R" 2>&1 | grep -v "Assertion .-sizes" >> "$R/log-$stage.txt"; }
build_modules="python3 plugins/attn-flashinfer/gpu/build_modules.py"
bring() { tar -C "$R" -czf "$OUT/results.tgz" . ; echo "$(( SECONDS - begun )) s"; }
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$R/device.txt"
case $stage in
  libraries)
    MAX_JOBS=5 setsid nohup $build_modules --out $NEW --seconds "${BUILD:-330}" --skip /tmp/have_modules.txt > "$R/modules.txt" 2>&1 &
    lib 150 verify flashmla --tier numerics --workers 2 &
    a=$!; lib 160 verify fa3 --tier numerics --workers 6 & b=$!; lib 90 traps & c=$!
    wait $a $b $c; bring ;;
  flashinfer)
    ls .gpumod/*.tar.xz > /dev/null 2>&1 && $build_modules --install .gpumod/*.tar.xz
    lib 100 verify flashinfer_mla --tier numerics --workers 4 & a=$!
    lib 60 traps & b=$!; lib 80 mixed & c=$!; lib 90 models & d=$!
    wait $a $b $c $d; bring
    while ! grep -q "modules. done" "$R/modules.txt" && [ "$(left)" -gt 330 ]; do sleep 2; done; tail -2 "$R/modules.txt"
    lib 90 speed; bring
    lib 60 host; bring
    lib "${VERIFY:-170}" verify flashinfer --tier numerics --workers 10; bring
    [ "$(left)" -gt 60 ] && { lib 50 verify fa3 --tier stress --workers 8; }
    mkdir -p "$OUT/modules"; cp $NEW/*.tar.xz "$OUT/modules/" 2>/dev/null; bring ;;
  fa4)
    lib 60 speed --backends fa4; bring
    lib "${VERIFY:-240}" verify fa4 --workers 14; bring ;;
  *) echo "unknown stage $stage" >&2; exit 2 ;;
esac
tail -40 "$R/log-$stage.txt" | cut -c1-300
