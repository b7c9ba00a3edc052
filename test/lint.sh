#!/usr/bin/env bash
# gofumpt, go vet and golangci-lint; the linter is built once from tools/go.mod into .cache/bin.
set -euo pipefail
unformatted=$(git ls-files '*.go' | grep -v '\.pb\.go$' | xargs go tool gofumpt -l)
if [ -n "$unformatted" ]; then
  echo "not formatted (run: go tool gofumpt -w .):" >&2
  echo "$unformatted" >&2
  exit 1
fi
if [ ! -x .cache/bin/golangci-lint ] || [ tools/go.mod -nt .cache/bin/golangci-lint ]; then
  echo "lint: building golangci-lint, once" >&2
  (cd tools && go build -o ../.cache/bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint)
fi
.cache/bin/golangci-lint run ./...
GOOS=darwin GOARCH=arm64 go vet ./cmd/redoubt
