#!/usr/bin/env bash
# Runs every fuzz target for a short while (default 3 s each); a longer time is the first argument.
set -euo pipefail
time=${1:-3s}
count=0
for file in $(git ls-files '*_test.go' | xargs grep -lE '^func Fuzz'); do
  package=./$(dirname "$file")
  for target in $(grep -oE '^func Fuzz[A-Za-z0-9_]+' "$file" | sed 's/^func //'); do
    echo "fuzz $package $target"
    if ! out=$(go test -run '^$' -fuzz "^${target}\$" -fuzztime "$time" -fuzzminimizetime 10x "$package" 2>&1); then
      echo "$out" >&2
      exit 1
    fi
    count=$((count + 1))
  done
done
[ "$count" -gt 0 ] || { echo "fuzz: no target found" >&2; exit 1; }
echo "fuzzed $count targets for $time each"
