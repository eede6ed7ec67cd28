#!/usr/bin/env bash
# Three hosts on one machine: network namespaces, connected by a bridge. As root, on Linux, with iproute2 and Open MPI.
# Without arguments, runs the tests of several ranks with a rank on each host before a second one on any, and then runs
# in which a host fails. With arguments, runs that command on the first host, from which mpirun starts ranks on all.
# RATE (tc's, such as 1gbit) limits what each host sends.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $# -eq 0 ]]; then
  # The hosts have no way to a registry.
  cargo test --release --no-run
fi
dir=$(mktemp -d)
host() { echo "data-parallel-$$-$1"; }
created=()
cleanup() {
  for name in "${created[@]}"; do
    ip netns pids "$name" | xargs -r kill -9
    ip netns del "$name"
  done
  rm -rf "$dir"
}
trap cleanup EXIT
create() {
  ip netns add "$1"
  created+=("$1")
}

create "$(host bridge)"
ip -n "$(host bridge)" link add bridge up type bridge
for i in 1 2 3; do
  create "$(host $i)"
  ip -n "$(host $i)" link set lo up
  ip -n "$(host $i)" link add eth0 type veth peer name "port$i" netns "$(host bridge)"
  ip -n "$(host bridge)" link set "port$i" up master bridge
  ip -n "$(host $i)" addr add "10.77.0.$i/24" dev eth0
  ip -n "$(host $i)" link set eth0 up
  if [[ -n ${RATE:-} ]]; then
    ip netns exec "$(host $i)" tc qdisc add dev eth0 root tbf rate "$RATE" burst 32kb latency 50ms
  fi
  echo "10.77.0.$i slots=2" >>"$dir/hostfile"
done

# What ssh is between machines: runs a command on the host of an address. Open MPI tells hosts apart by their names.
cat >"$dir/agent" <<AGENT
#!/usr/bin/env bash
host=$(host '')\${1##*.}
shift
exec ip netns exec "\$host" unshare --uts sh -c "hostname \$host; \$*"
AGENT
chmod +x "$dir/agent"
on_first() { ip netns exec "$(host 1)" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$(host 1)" "$@"; }
export OMPI_MCA_orte_default_hostfile=$dir/hostfile OMPI_MCA_plm_rsh_agent=$dir/agent
export OMPI_MCA_rmaps_base_mapping_policy=node:OVERSUBSCRIBE OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CANDLE_BARRIER_POOL_SPIN_LIMIT=50
# A host that is silent for 4 + 2 · 3 seconds is lost.
export OMPI_MCA_oob_tcp_keepalive_time=4 OMPI_MCA_oob_tcp_keepalive_intvl=2 OMPI_MCA_oob_tcp_keepalive_probes=3

if [[ $# -gt 0 ]]; then
  on_first "$@"
  exit
fi

# A killed rank is found among the processes of one host.
on_first cargo test --release --offline -- --nocapture --skip a_killed_rank

program=$(cargo metadata --offline --format-version 1 --no-deps |
  sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/data_parallel
sizes=(--width 64 --layers 2 --context 64 --batch 9 --out "$dir/out")
export RAYON_NUM_THREADS=1
# Ends a run some time after its first checkpoint by a failure of host 3, which the arguments make.
fails() {
  rm -rf "$dir/out"
  on_first timeout 120 mpirun -n 3 "$program" "${sizes[@]}" --steps 1000000 --every 1 >"$dir/log" 2>&1 &
  local run=$! start
  until [[ -f $dir/out/state.safetensors ]]; do
    kill -0 $run || { cat "$dir/log" >&2 && exit 1; }
    sleep 0.1
  done
  start=$(date +%s%3N)
  "$@"
  if wait $run; then
    echo 'the run succeeded' >&2
    exit 1
  fi
  local ms=$(($(date +%s%3N) - start))
  echo "$*: the run ended after $ms ms"
  if [[ $ms -gt 30000 ]]; then
    exit 1
  fi
}
processes_end() { ip netns pids "$(host 3)" | xargs kill -9; } # of the rank, and of Open MPI's daemon
link() { ip -n "$(host bridge)" link set port3 "$1"; }
for failure in processes_end 'link down'; do
  fails $failure
  # On the first host alone.
  (unset OMPI_MCA_orte_default_hostfile && on_first mpirun -n 2 "$program" "${sizes[@]}" --steps 1 --resume)
done
