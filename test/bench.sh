#!/usr/bin/env bash
# The figures of docs/benchmarks.md, each with its peer in the same run. Machines are noisy: read ratios, not times.
# usage: test/bench.sh [BENCHTIME]   (default 1s)
set -euo pipefail
time=${1:-1s}
bin=$PWD/bin/redoubt
bench() { go test -run '^$' -bench "$1" -benchtime "$time" -benchmem "./$2" | grep -E '^Benchmark'; }

echo "== SVID from CSR to bytes against bare x509.CreateCertificate"
bench '.' identity/ca
echo "== a decision against cedar-go as shipped"
bench 'Decide|Cedar|Linear' policy/eval
bench '.' policy/set
echo "== who is calling the Workload API, and its first answer"
bench '.' identity/workload
echo "== a management write, from transaction to index"
bench '.' store/sqlite
bench '.' audit
echo "== starting a workload confined, against bare os.StartProcess; attesting a process"
bench '.' sandbox
bench '.' identity/attest
echo "== the rest"
bench '.' fleet
bench '.' api
bench '.' event/spool

[ "$(id -u)" -eq 0 ] || { echo "not root: start to ready and idle memory are left out"; exit 0; }
echo "== start to ready, and idle memory, of redoubt dev (10 fresh data directories)"
for i in $(seq 10); do
  dir=$(mktemp -d)
  fifo=$dir/ready
  mkfifo "$fifo"
  start=$(date +%s%N)
  "$bin" dev --json --data "$dir/data" >"$fifo" 2>/dev/null &
  pid=$!
  read -r _ <"$fifo"
  ready=$((($(date +%s%N) - start) / 1000000))
  sleep 2
  rss=$(awk '/^VmRSS/ {print $2}' "/proc/$pid/status")
  threads=$(awk '/^Threads/ {print $2}' "/proc/$pid/status")
  echo "ready ${ready} ms  idle ${rss} kB resident, ${threads} threads"
  kill -TERM "$pid"
  wait "$pid" || true
  rm -rf "$dir"
done
