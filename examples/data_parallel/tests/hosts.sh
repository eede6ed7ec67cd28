#!/usr/bin/env bash
# Three hosts on one machine: network namespaces, connected by a bridge. As root, on Linux, with iproute2 and Open MPI.
# Without arguments, runs the tests of several ranks with a rank on each host before a second one on any, and then a
# run in which a host fails. With arguments, runs that command on the first host, from which mpirun starts ranks on all.
# RATE (tc's, such as 1gbit) limits what each host sends.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
host() { echo "data-parallel-$1"; }
cleanup() {
  for i in 1 2 3; do
    ip netns pids "$(host $i)" 2>/dev/null | xargs -r kill -9
    ip netns del "$(host $i)" 2>/dev/null || true
  done
  ip netns del "$(host bridge)" 2>/dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT

ip netns add "$(host bridge)"
ip -n "$(host bridge)" link add bridge up type bridge
for i in 1 2 3; do
  ip netns add "$(host $i)"
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
cat >"$dir/agent" <<'AGENT'
#!/usr/bin/env bash
host=data-parallel-${1##*.}
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
AGENT
chmod +x "$dir/agent"
on_first() { ip netns exec "$(host 1)" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$(host 1)" "$@"; }
export OMPI_MCA_orte_default_hostfile=$dir/hostfile OMPI_MCA_plm_rsh_agent=$dir/agent
export OMPI_MCA_rmaps_base_mapping_policy=node:OVERSUBSCRIBE OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CANDLE_BARRIER_POOL_SPIN_LIMIT=50

if [[ $# -gt 0 ]]; then
  on_first "$@"
  exit
fi

# A killed rank is found among the processes of one host.
on_first cargo test --release -- --nocapture --skip a_killed_rank

echo 'a host fails'
program=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/data_parallel
sizes=(--width 64 --layers 2 --context 64 --batch 9 --out "$dir/out")
export RAYON_NUM_THREADS=1
on_first mpirun -n 3 "$program" "${sizes[@]}" --steps 1000000 --every 1 >"$dir/log" 2>&1 &
run=$!
until [[ -f $dir/out/state.safetensors ]]; do
  kill -0 $run || { cat "$dir/log" >&2 && exit 1; }
  sleep 0.1
done
start=$(date +%s%3N)
ip netns pids "$(host 3)" | xargs kill -9 # the rank, and Open MPI's daemon
if wait $run; then
  echo 'the run succeeded' >&2
  exit 1
fi
echo "the run ended $(($(date +%s%3N) - start)) ms after the host"
on_first mpirun -n 3 "$program" "${sizes[@]}" --steps 1 --resume
