#!/usr/bin/env bash
# Installs what pip alone does not: extras that need a GPU or a compiler. Every item is checked, installed,
# verified, or skipped with the reason; nothing that fails is hidden. See --help.
set -u

ITEMS=(ninja cuda-torch triton liger-kernel flash-attn deepspeed-ops async-io)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'TEXT'
Usage: bash install_extreme_optimizations.sh [--dry-run] [--only ITEM]...

  --dry-run     print what would be done, change nothing
  --only ITEM   this item alone; may be given several times
  --help        this text

Items, in order:
  ninja          build tool that DeepSpeed compiles with
  cuda-torch     a CUDA build of torch, where a GPU meets a CPU build
  triton         compiler of GPU kernels (GPU, compute capability 7.5 or newer)
  liger-kernel   fused training kernels (GPU, needs triton)
  flash-attn     FlashAttention-2 (GPU, compute capability 8.0 or newer, nvcc)
  deepspeed-ops  DeepSpeed's CPU Adam and shared-memory communication, compiled
                 ahead of the first run (a C++ compiler; 1-3 minutes)
  async-io       DeepSpeed's asynchronous disk access (a C++ compiler, libaio)

Uses .venv/bin/python when it exists, else python3. Exit code: 0 when nothing
that was attempted failed, 1 when something did, 2 for bad usage, 130 when
stopped.
TEXT
}

DRY=0
WANTED=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY=1 ;;
    --only)
      if [ $# -lt 2 ]; then echo "--only needs an item: ${ITEMS[*]}." >&2; exit 2; fi
      case " ${ITEMS[*]} " in
        *" $2 "*) WANTED+=("$2") ;;
        *) echo "Unknown item $2. Known: ${ITEMS[*]}." >&2; exit 2 ;;
      esac
      shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "Unknown argument $1. See --help." >&2; exit 2 ;;
  esac
  shift
done
[ ${#WANTED[@]} -gt 0 ] || WANTED=("${ITEMS[@]}")

cd "$ROOT" || exit 1
PY=$ROOT/.venv/bin/python
[ -x "$PY" ] || PY=$(command -v python3) || {
  echo "No python3 was found; install Python 3.10 or newer." >&2
  exit 1
}
PATH=$(dirname "$PY"):$PATH
export PATH OMP_WAIT_POLICY=passive
QUOTED=$(printf '%q' "$PY")

RED='' GREEN='' PLAIN=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then RED=$'\e[31m' GREEN=$'\e[32m' PLAIN=$'\e[0m'; fi

if [ -w "$ROOT/.venv" ]; then LOGS=$ROOT/.venv/install-logs; else LOGS=$(mktemp -d); fi
mkdir -p "$LOGS" || exit 1

# read_facts: sets GPU, CAPABILITY, TORCH, TORCH_CUDA, ... ; called again after each installation.
read_facts() {
  local text
  text=$("$PY" -m training.hardware.shell 2>"$LOGS/facts.log") || {
    echo "$PY cannot examine this machine:" >&2
    tail -n 3 "$LOGS/facts.log" >&2
    echo "Python 3.10 or newer is needed; \`python3 elite_train.py\` makes or mends .venv." >&2
    exit 1
  }
  eval "$text"
}

try() { "$PY" -c "import sys, torch
from training.hardware import trials
answer = trials.attempt(trials.$1, torch, '$2')
sys.exit(answer or 0)"; }

version() { "$PY" -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null; }

# Each item has three functions. reason_X prints why it makes no sense here, or nothing. check_X prints the
# state and returns 0 when it is in place. plan_X prints the commands, one a line, that put it in place.
no_gpu() { [ -n "$GPU" ] || echo "no GPU${GPU_PROBLEM:+ ($GPU_PROBLEM)}"; }
no_compiler() { echo "$NO_COMPILER"; }
no_cuda_torch() { [ -n "$TORCH_CUDA" ] || echo "torch is a CPU build; install cuda-torch first"; }
first() { local text; for f in "$@"; do text=$($f); if [ -n "$text" ]; then echo "$text"; return; fi; done; }

reason_ninja() { :; }
check_ninja() {
  local text
  if [ -n "$NINJA" ] && text=$(ninja --version); then echo "${text%%.git*}"; return 0; fi
  echo "absent"; return 1
}
plan_ninja() { echo "$QUOTED -m pip install $NINJA_PIN"; }

reason_cuda_torch() { no_gpu; }
check_cuda_torch() {
  if [ -n "$TORCH_CUDA" ]; then "$PY" -c "import sys, torch
ok = torch.cuda.is_available()
print(torch.__version__ if ok else 'CUDA cannot be opened')
sys.exit(not ok)"; else echo "${TORCH:-absent}"; return 1; fi
}
plan_cuda_torch() { echo "$QUOTED -m pip install --force-reinstall $TORCH_PIN --index-url $TORCH_INDEX"; }

reason_triton() {
  first no_gpu no_cuda_torch
  if [ -n "$GPU" ] && [ "$CAPABILITY" -lt 75 ]; then echo "compute capability is below 7.5"; fi
}
check_triton() { if version triton && try triton cuda; then return 0; fi; echo "not working"; return 1; }
plan_triton() { echo "$QUOTED -m pip install $TRITON_PIN"; }

reason_liger_kernel() { reason_triton; }
check_liger_kernel() {
  if version liger-kernel && try liger cuda; then return 0; fi
  echo "not working"; return 1
}
plan_liger_kernel() { echo "$QUOTED -m pip install --no-deps liger-kernel"; }

reason_flash_attn() {
  first no_gpu no_cuda_torch no_compiler
  if [ -n "$GPU" ] && [ "$CAPABILITY" -lt 80 ]; then echo "compute capability is below 8.0 (Ampere)"; fi
  if [ -n "$GPU" ] && [ -z "$NVCC" ]; then echo "no nvcc; install the CUDA toolkit"; fi
}
check_flash_attn() {
  if version flash-attn && try flash_attention_2 cuda; then return 0; fi
  echo "not working"; return 1
}
plan_flash_attn() { echo "env MAX_JOBS=$JOBS $QUOTED -m pip install --no-build-isolation flash-attn"; }

no_deepspeed() { [ -n "$DEEPSPEED" ] || echo "deepspeed is not installed"; }
reason_deepspeed_ops() { first no_deepspeed no_compiler; }
check_deepspeed_ops() {
  case " $BUILT_OPS " in *" cpu_adam "*) ;; *) echo "not compiled"; return 1 ;; esac
  "$PY" -m training.hardware.ops --verify
}
plan_deepspeed_ops() { echo "$QUOTED -m training.hardware.ops --build"; }

no_libaio() {
  [ -e /usr/include/libaio.h ] || echo "no libaio headers; sudo apt install libaio-dev (or libaio-devel)"
}
reason_async_io() { first no_deepspeed no_compiler no_libaio; }
check_async_io() {
  case " $BUILT_OPS " in *" async_io "*) echo "compiled" ;; *) echo "not compiled"; return 1 ;; esac
}
plan_async_io() { echo "$QUOTED -m training.hardware.ops --build async_io"; }

TABLE=()
FAILED=0
add_row() { TABLE+=("$(printf '%-13.13s  %-19.19s  %-13.13s  %-19.19s  %7s' "$1" "$2" "$3" "$4" "$5")"); }

# state ID LOG: prints the last line that check_ID says and returns its exit code; all it says goes to LOG.
state() {
  local text code
  text=$("check_$1" 2>>"$2")
  code=$?
  printf '%s\n' "$text" >>"$2"
  printf '%s\n' "$text" | tail -n 1 | cut -c1-200
  return $code
}

show_table() {
  echo
  printf '%-13s  %-19s  %-13s  %-19s  %7s\n' item before action after seconds
  printf '%s\n' "-------------  -------------------  -------------  -------------------  -------"
  [ ${#TABLE[@]} -eq 0 ] || printf '%s\n' "${TABLE[@]}"
}

stopped() { echo; echo "Stopped; items not listed were not looked at."; show_table; exit 130; }
trap stopped INT TERM

# run_item NAME: check -> install -> verify.
run_item() {
  local name=$1 id=${1//-/_} log=$LOGS/$1.log began=$SECONDS before after reason command
  : >"$log"
  reason=$("reason_$id" | head -n 1)
  if [ -n "$reason" ]; then
    printf '%s\n' "$name: skipped: $reason." | fold -s -w 78
    add_row "$name" "-" "skipped" "see above" $((SECONDS - began))
    return
  fi
  if before=$(state "$id" "$log"); then
    echo "$name: in place ($before)."
    add_row "$name" "$before" "none" "$before" $((SECONDS - began))
    return
  fi
  before=${before:-broken}
  if [ $DRY = 1 ]; then
    echo "$name: $before; would run:"
    "plan_$id" | sed 's/^/  /'
    add_row "$name" "$before" "would install" "-" $((SECONDS - began))
    return
  fi
  echo "$name: $before; installing (log: $log)"
  while IFS= read -r command; do
    echo "  $command"
    if ! bash -c "$command" >>"$log" 2>&1 </dev/null; then
      fail "$name" "$before" "$log" "$began" "install failed"
      return
    fi
  done < <("plan_$id")
  read_facts
  if after=$(state "$id" "$log"); then
    echo "  ${GREEN}works${PLAIN} ($after), $((SECONDS - began)) s"
    add_row "$name" "$before" "installed" "$after" $((SECONDS - began))
  else
    fail "$name" "$before" "$log" "$began" "does not work"
  fi
}

# fail NAME BEFORE LOG BEGAN STATE: shows the log's end and goes on with the next item.
fail() {
  FAILED=$((FAILED + 1))
  echo "  ${RED}$5${PLAIN}; the last lines of $3:"
  tail -n 15 "$3" | cut -c1-240 | sed 's/^/  | /'
  add_row "$1" "$2" "FAILED" "$5" $((SECONDS - $4))
}

read_facts
echo "Python: $PY"
for item in "${ITEMS[@]}"; do
  case " ${WANTED[*]} " in *" $item "*) run_item "$item" ;; esac
done
show_table
if [ $FAILED -gt 0 ]; then echo; echo "$FAILED item(s) failed; full logs in $LOGS"; exit 1; fi
