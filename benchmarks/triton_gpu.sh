#!/usr/bin/env bash
# attn-triton on the GPU machine: run in the repository's root with .gpu beside it and $OUT set.
# usage: triton_gpu.sh STAGE...   (check, random, speed, host, ...: in the order given; LIMIT seconds in all)
set -u
begun=$SECONDS; R=${R:-/tmp/attn-triton-results}; S=${S:-/tmp/attn-gpu-site}; mkdir -p "$R" "$S/ours"
. .gpu/install.sh
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
export PYTHONPATH="$PWD/core/src:$PWD/plugins/attn-triton/src:$S/ours:$PYTHONPATH" TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/attn-triton-cache}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$R/device.txt"
left() { echo $(( ${LIMIT:-580} - (SECONDS - begun) )); }
say() { echo "== $* ($(left) s left)"; }
py() { local limit=$1; shift; timeout "$limit" python3 "$@" 2>&1 | tee -a "$R/log.txt" | tail -${TAIL:-60}; }
bring() { tar -C "$R" -czf "$OUT/triton.tgz" . ; }
for stage in "$@"; do
  say "$stage"
  case $stage in
    ceiling) py 60 benchmarks/triton_attention.py ceiling --out "$R" ;;
    random)  py 100 benchmarks/triton_check.py random --seeds "${SEEDS:-0:300}" --budget 70 ;;
    check)   py "$(left)" benchmarks/triton_check.py verify --tier "${TIER:-contract}" --out "$R" --workers 14 --budget "$(( $(left) - 20 ))" ;;
    some)    py 130 benchmarks/triton_check.py verify --tier contract --max-cases "${CASES:-600}" --out "$R" --workers 14 --budget 120 ;;
    diag)    TAIL=250 py 150 benchmarks/triton_diag.py ;;
    speed)   py $(( ${BUDGET:-160} + 60 )) benchmarks/triton_attention.py speed --out "$R" --budget "${BUDGET:-160}" ${SPEED:-} ;;
    host)    py 60 benchmarks/triton_attention.py host --out "$R" ;;
    race)    timeout 150 compute-sanitizer --tool racecheck python3 benchmarks/triton_check.py random --seeds 0:5 --workers 0 2>&1 | tee "$R/racecheck.txt" | tail -15 ;;
    memory)  timeout 150 compute-sanitizer --tool memcheck python3 benchmarks/triton_check.py random --seeds 0:8 --workers 0 2>&1 | tee "$R/memcheck.txt" | tail -15 ;;
    *) echo "unknown stage $stage"; exit 2 ;;
  esac
  bring
done
