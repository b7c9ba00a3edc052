#!/usr/bin/env bash
# Installs what the tests talk to (Debian's packages) when run as root; otherwise says what is missing and goes on: the
# tests that need a missing program say so when they skip.
set -euo pipefail

declare -A packages=(
  [openssl]=openssl [curl]=curl [podman]=podman [runc]=runc [protoc]=protobuf-compiler [ip]=iproute2 [promtool]=prometheus
)
missing=()
for program in "${!packages[@]}"; do
  command -v "$program" >/dev/null 2>&1 || missing+=("${packages[$program]}")
done
[ "${#missing[@]}" -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "prerequisites: not installed: ${missing[*]}; run as root on Debian to have them installed" >&2
  exit 0
fi
echo "prerequisites: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
