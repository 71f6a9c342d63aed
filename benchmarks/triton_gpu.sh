#!/usr/bin/env bash
# attn-triton on a GPU machine: run in the repository's root with .gpu beside it (libraries to compare with) and $OUT set.
# usage: triton_gpu.sh STAGE...   stages in the order given; what a stage found is packed into $OUT/triton.tgz as it ends
#   fixed    the cases that once broke the device, each in a process of its own
#   verify   the kit for VERIFY seconds (50), TIER contract; evidence of what ran; kernels compiled ahead lie in .gputri
#   checks   fixed and memory side by side, then verify, on WORKERS (16) processes
#   speed    every named shape beside its peers, at most SPEED seconds (60); plots
#   engines  every named shape beside the Triton kernels of vLLM and SGLang, at most ENGINES seconds (80)
#   host     microseconds of the host, bytes of the graphs' state
#   memory   compute-sanitizer, memcheck and racecheck side by side, over a small step for every kernel, SANITIZE seconds (110)
#   random   random steps against the oracle, RANDOM seconds (40)
#   tune     the committed launch parameters beside the candidates round them, TUNE seconds (120), CLASSES of them
#   generate `attn generate` and its session with MODEL (a .gguf file): RUNS of backend:dtype beside eager attention
#   ceiling  what the card can do
set -u
begun=$SECONDS; R=${R:-/tmp/attn-triton-results}; S=${S:-/tmp/attn-gpu-site}; mkdir -p "$R" "$S/ours"
for f in .gpu/{fa3,flashmla,flashinfer}/site.tar.xz; do
  mark=$S/.$(echo "$f" | tr / -); [ -f "$f" ] && [ ! -e "$mark" ] && { python3 -c "import sys,tarfile;tarfile.open(sys.argv[1]).extractall(sys.argv[2])" "$f" "$S" && touch "$mark"; } &
done
for f in .gpumod/*.tar.xz; do # FlashInfer's modules, compiled ahead
  mark=$S/.$(echo "$f" | tr / -); [ -f "$f" ] && [ ! -e "$mark" ] && { mkdir -p "$S/flashinfer/data/aot"; python3 -c "import sys,tarfile;tarfile.open(sys.argv[1]).extractall(sys.argv[2])" "$f" "$S/flashinfer/data/aot" && touch "$mark"; } &
done
python3 - "$S/ours" <<'P'
import pathlib, sys, tomllib
for folder in ("core", "plugins/attn-triton"):
    project = tomllib.loads(pathlib.Path(folder, "pyproject.toml").read_text())["project"]
    info = pathlib.Path(sys.argv[1], f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project.get("entry-points", {})
    (info / "entry_points.txt").write_text("\n".join(f"[{g}]\n" + "\n".join(f"{k} = {v}" for k, v in e.items()) for g, e in groups.items()))
P
wait
export PYTHONPATH="$PWD/core/src:$PWD/plugins/attn-triton/src:$S/ours:$S:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
[ -d .gputri/hyp ] && PYTHONPATH=$PWD/.gputri/hyp:$PYTHONPATH # the random cases that were compiled ahead are this release's draws
export PYTHONWARNINGS=ignore TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/attn-triton-cache}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} FLASHINFER_WORKSPACE_BASE=$S/jit FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_DISABLE_JIT=${FLASHINFER_DISABLE_JIT-1}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$R/device.txt"
say() { echo "== $* (at $((SECONDS - begun)) s)"; }
py() { local limit=$1; shift; timeout "$limit" python3 "$@" 2>&1 | tee -a "$R/log.txt" | tail -"${TAIL:-60}" | grep -v ^STAGE | cut -c1-400; }
bring() { tar -C "$R" -czf "$OUT/triton.tgz" . ; }
python3 - <<'P'
import os, pathlib, tarfile
from concurrent.futures import ThreadPoolExecutor

into = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
parts = [part for part in sorted([*pathlib.Path(".gputri").glob("*.tar.xz"), *pathlib.Path(".gputri/tune").glob("*.tar.xz")]) if not (into / f".{part.name}").exists()]
into.mkdir(parents=True, exist_ok=True)


def unpack(part):
    with tarfile.open(part) as packed:
        packed.extractall(into, filter="data")
    (into / f".{part.name}").touch()


with ThreadPoolExecutor(12) as pool:
    list(pool.map(unpack, parts))
print(f"{len(parts)} parts of kernels compiled ahead; {sum(1 for _ in into.iterdir())} kernels", flush=True)
P
. benchmarks/side_by_side.sh
FIXED=(
  extend/16x2x64-32+window=1048576+softcap=1.5/65@0/dtype=float16/kv_dtype=fp8_e5m2/page_size=64/memory=shuffled/seed=1/lse/joined/nosave/twice
  extend/16x2x256-80+sinks+cross/16@16e17/kv_dtype=fp8_e5m2/layout=HND/seed=1/hot/joined/nosave/nohost/loose/alone
  extend/2x2x80+softcap=1.5+sinks+cross/3@2e17,0@16e16,5@0e35/batch=3/dtype=float16/kv_dtype=fp8_e5m2/layout=HND/memory=descending/seed=1/lse/stacked/nohost/loose/twice/alone
  extend/32x2x256-32+window=8+softcap=1.5+sinks/3@2,0@64,5@0/batch=3/kv_dtype=fp8_e5m2/page_size=64/memory=shuffled/seed=1/lse/out/spans/fused/holes/nohost/twice
  extend/2x2x32-80+window=16/37@132/dtype=float16/kv_dtype=fp8_e5m2/memory=shuffled/seed=1/hot/joined/decoy/nohost/loose/alone
  decode/6x2x80+window=15+sinks/1@194/kv_dtype=fp8_e5m2/layout=HND/memory=interleaved/seed=1/lse/out/hot/fused/holes/nohost/loose/twice/alone
  extend/mla:16x1x128-80+window=1048576+scale=0.125/3@2,0@64,5@0/batch=3/kv_dtype=fp8_e4m3/page_size=64/layout=MLA/seed=1/out/spans/fused/holes/nohost/alone
)
fixed() { py 70 benchmarks/triton_check.py cases "${FIXED[@]}" --out "$R" --seconds 60; }
verify() {
  share "$R/mps.txt"
  py $(( ${VERIFY:-50} + 45 )) benchmarks/triton_check.py verify --tier "${TIER:-contract}" --workers "${WORKERS:-16}" \
    --seconds "${VERIFY:-50}" --out "$R"
  alone
}
sanitize() {
  TRITON_CACHE_DIR=${STEPS_CACHE:-$TRITON_CACHE_DIR} timeout "${SANITIZE:-110}" compute-sanitizer --tool "$1" python3 benchmarks/triton_check.py small 2>&1 |
    tee "$R/$1.txt" | tail -22 | cut -c1-200
}
generate() {
  local ask=("What is the capital of France?" --device cuda --attention-backend triton --model "$MODEL" --max-new-tokens 24)
  py 90 -m attn_core generate "${ask[@]}" --dtype float32
  py 60 -m attn_core generate "${ask[@]}" --dtype float32 --cuda-graph
  py 150 benchmarks/generate_smollm2.py --model "$MODEL" --runs "${RUNS:-triton:float32,triton:bfloat16,torch_native:float32}" --out "$R"
}
memory() { sanitize memcheck & sanitize racecheck & wait; }
for stage in "$@"; do
  say "$stage"
  case $stage in
    fixed)   fixed ;;
    verify)  verify ;;
    memory)  memory ;;
    checks)  fixed & memory & wait; verify ;;
    speed)   py $(( ${SPEED:-60} + 30 )) benchmarks/triton_attention.py speed plot --out "$R" --budget "${SPEED:-60}" --workers 15 ${WITH:-} ;;
    engines) py $(( ${ENGINES:-80} + 40 )) benchmarks/triton_attention.py speed --out "$R" --name triton_engines --budget "${ENGINES:-80}" --workers 15 \
               --bench decode,mixed,mla,extend --variants table --peers vllm-triton,sglang-triton --seconds 0.05 ;;
    host)    py 40 benchmarks/triton_host.py --out "$R" ;;
    tune)    py $(( ${TUNE:-120} + 30 )) benchmarks/triton_tune.py --out "$R" --budget "${TUNE:-120}" --workers 15 ${CLASSES:+--classes "$CLASSES"} ;;
    generate) generate ;;
    ceiling) py 30 benchmarks/triton_attention.py ceiling --out "$R" ;;
    random)  py $(( ${RANDOM_SECONDS:-40} + 30 )) benchmarks/triton_check.py random --seeds "${SEEDS:-0:400}" --workers 15 --seconds "${RANDOM_SECONDS:-40}" ;;
    *) echo "unknown stage $stage"; exit 2 ;;
  esac
  bring
done
say done
