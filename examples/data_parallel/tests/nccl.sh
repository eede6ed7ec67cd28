#!/usr/bin/env bash
# Builds the example with NCCL, and checks that the program links. Needs no GPU.
#
#   tests/nccl.sh FOLDER   builds into FOLDER
#
# Needs Rust, MPI, a CUDA toolkit in CUDA_HOME, and libnccl.so where the linker or LIBRARY_PATH finds it: from NVIDIA's
# Debian package libnccl-dev, or as a link to the libnccl.so.2 of PyPI's nvidia-nccl-cu13.
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR=${1:?the folder to build into}
export LD_LIBRARY_PATH="${LIBRARY_PATH:+$LIBRARY_PATH:}${CUDA_HOME:+$CUDA_HOME/lib64:$CUDA_HOME/lib64/stubs:}${LD_LIBRARY_PATH-}"
CARGO_PROFILE_RELEASE_STRIP=true cargo build --release --features nccl --bin data_parallel
program=$CARGO_TARGET_DIR/release/data_parallel

if ldd -r "$program" 2>&1 | grep -E 'not found|undefined'; then
  echo "$program does not link" >&2
  exit 1
fi
for name in ncclGetUniqueId ncclCommInitRank ncclAllReduce; do
  nm -D --undefined-only "$program" | grep -w "$name"
done
