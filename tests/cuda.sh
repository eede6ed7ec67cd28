#!/usr/bin/env bash
# The device tests, the examples and the benches on a GPU.
#
#   tests/cuda.sh                       builds and runs them; needs Rust, a CUDA toolkit and a GPU
#   tests/cuda.sh build FOLDER          only builds, the programs into FOLDER; needs no GPU
#   tests/cuda.sh run FOLDER [PART..]   only runs them; needs no Rust and no toolkit, but the driver, CUDA's
#                                       libraries (PyTorch's will do) and this repository's tests/fixtures
#
# The parts, each sized for less than eight minutes (a row of a table ends after 20 seconds):
#   tests      the device tests, and what is copied to the host
#   models     steps of Llama with 0.5, 1.5 and 7 billion values, beside plain candle and, if it is there, PEFT
#   layers     steps of linear layers, and the loss of a large head
#   examples   the examples in their quick form
#   ratios     the benches of single layers
#
# FEATURES are the crate's features, `cuda` by default, `cudnn`, or none for the CPU. With SMALL=1 the parts run with small
# sizes, on the CPU if there is no GPU: it shows that they run.
set -euo pipefail
cd "$(dirname "$0")/.."

EXAMPLES="finetune classify"
BENCHES="ratios model steps"
PARTS="tests models layers examples ratios"

step() { printf '\n== %s\n' "$*"; }

build() {
  local folder=$1 program name
  mkdir -p "$folder"
  step "build with ${FEATURES-cuda}"
  CARGO_PROFILE_RELEASE_STRIP=true cargo build --release --features "${FEATURES-cuda}" \
    -p loralib -p classify --test device --test nn --bins --examples --benches --message-format=json-render-diagnostics |
    grep -v '"kind":\["bin"\].*"profile":{[^}]*"test":true' | # the unit tests of a program, which have its name
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' |
    while read -r program; do
      name=$(basename "$program" | sed 's/-[0-9a-f]\{16\}$//')
      case " device nn $EXAMPLES $BENCHES " in *" $name "*) cp "$program" "$folder/$name" ;; esac
    done
  cc -shared -fPIC -O1 -o "$folder/to_host.so" tests/device/to_host.c -ldl
  ls -l "$folder"
}

# CUDA's libraries from PyTorch, if the loader finds no others.
libraries() {
  ldd "$1" | grep -q 'not found' || return 0
  local found
  found=$(python3 -c 'import glob, nvidia
print(":".join(d for p in nvidia.__path__ for d in sorted(glob.glob(p + "/*/lib"))))')
  export LD_LIBRARY_PATH="$found${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}:/usr/local/nvidia/lib64:/usr/local/nvidia/lib"
  ! ldd -r "$1" 2>&1 | grep -E 'not found|undefined'
}

run() {
  local folder part
  folder=$(cd "$1" && pwd)
  shift
  # F32 must not become TF32.
  unset NVIDIA_TF32_OVERRIDE
  device=cuda
  if [ -n "${SMALL-}" ] && ! nvidia-smi >/dev/null 2>&1; then
    device=cpu
  else
    # Everything below must run on the GPU.
    export LORALIB_DEVICE=cuda
    step "device and driver"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    libraries "$folder/device"
  fi
  for part in ${@:-$PARTS}; do
    "part_$part" "$folder"
  done
}

part_tests() {
  step "tests in F32, F64, BF16 and F16"
  "$1/device" --test-threads=1
  "$1/nn" --test-threads=1
  if [ "$device" = cpu ]; then
    return
  fi
  step "nothing of the base's size is copied to the host"
  local watched=(env LD_PRELOAD="$1/to_host.so" MAX_TO_HOST=4096 "$1/device" --exact)
  local ended=0
  "${watched[@]}" --ignored transfers::a_copy_of_the_base_s_size || ended=$?
  if [ "$ended" != 99 ]; then
    echo "to_host.c does not see the program's copies" >&2
    return 1
  fi
  "${watched[@]}" transfers::steps_and_merges_leave_the_base_on_the_device
}

part_models() {
  program "$1/steps" models ${SMALL:+--small}
  peft models
}

part_layers() {
  program "$1/steps" layers head ${SMALL:+--small}
  peft layers
}

part_examples() {
  local name
  for name in $EXAMPLES; do
    program "$1/$name" --device "$device" --quick --out "$(mktemp -d)"
  done
}

part_ratios() {
  program "$1/ratios" ${SMALL:+"Linear 512x768"}
  if [ -z "${SMALL-}" ]; then
    program "$1/model"
  fi
}

peft() {
  step "PEFT on torch"
  if python3 -c 'import peft, torch, transformers' 2>/dev/null; then
    python3 benches/compare/steps.py "$1" --device "$device" ${SMALL:+--small}
  else
    echo "skipped: python3 has no PEFT"
  fi
}

program() {
  step "$(basename "$1")"
  if [ -x "$1" ]; then
    "$@"
  else
    echo "skipped: not in the folder"
  fi
}

case "${1-}" in
  "") build target/cuda; run target/cuda ;;
  build) build "${2:?the folder for the programs}" ;;
  run) shift; run "${@:?the folder of the programs}" ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
