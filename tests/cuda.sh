#!/usr/bin/env bash
# The device tests, the examples and the benches on a GPU.
#
#   tests/cuda.sh                builds and runs them; needs Rust, a CUDA toolkit and a GPU
#   tests/cuda.sh build FOLDER   only builds, the programs into FOLDER; needs no GPU
#   tests/cuda.sh run FOLDER     only runs them; needs no Rust and no toolkit, but the driver, CUDA's
#                                libraries (PyTorch's will do) and this repository's tests/fixtures
#
# FEATURES are the crate's features, `cuda` by default or `cudnn`. Measurements are printed.
set -euo pipefail
cd "$(dirname "$0")/.."

EXAMPLES="finetune classify"
BENCHES="ratios model"

step() { printf '\n== %s\n' "$*"; }

build() {
  local folder=$1 program name
  mkdir -p "$folder"
  step "build with ${FEATURES:-cuda}"
  CARGO_PROFILE_RELEASE_STRIP=true cargo build --release --features "${FEATURES:-cuda}" \
    -p loralib -p classify --test device --test nn --bins --examples --benches --message-format=json-render-diagnostics |
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
  local folder=$1 name
  folder=$(cd "$folder" && pwd)
  # Everything below must run on the GPU, and F32 must not become TF32.
  export LORALIB_DEVICE=cuda
  unset NVIDIA_TF32_OVERRIDE
  step "device and driver"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  libraries "$folder/device"

  step "tests in F32, F64, BF16 and F16"
  "$folder/device" --test-threads=1
  "$folder/nn" --test-threads=1

  step "nothing of the base's size is copied to the host"
  local watched=(env LD_PRELOAD="$folder/to_host.so" MAX_TO_HOST=4096 "$folder/device" --exact)
  local ended=0
  "${watched[@]}" --ignored transfers::a_copy_of_the_base_s_size || ended=$?
  if [ "$ended" != 99 ]; then
    echo "to_host.c does not see the program's copies" >&2
    return 1
  fi
  "${watched[@]}" transfers::steps_and_merges_leave_the_base_on_the_device

  for name in $EXAMPLES; do
    program "$folder/$name" --device cuda --quick --out "$(mktemp -d)"
  done
  for name in $BENCHES; do
    program "$folder/$name"
  done
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
  run) run "${2:?the folder of the programs}" ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
