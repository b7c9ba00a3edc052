# What a person runs. `make demo` and `make test` are the README's two commands; .ci/run calls `make test` and the checks.
GO ?= go
BIN := bin/redoubt
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unversioned)
LDFLAGS := -s -w -X main.version=$(VERSION)

.PHONY: build demo test lint generate generate-check fuzz bench soak cross prerequisites clean

build: ## the one binary, static
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/redoubt

demo: build ## as much of the story as this machine can tell
	./$(BIN) demo --once

prerequisites: ## what the tests start: installed when root, else only looked for
	./test/prerequisites.sh

test: prerequisites build ## every test, with the real programs that they talk to
	$(GO) test -timeout 300s ./...

lint: ## format, vet, golangci-lint (built once, from tools/go.mod)
	./test/lint.sh

generate: ## protobuf code, CLI reference
	$(GO) generate ./...

generate-check: generate ## generated code matches its sources
	git diff --exit-code -- '*.pb.go' docs/cli

fuzz: ## every fuzz target, briefly
	./test/fuzz.sh $(or $(FUZZTIME),3s)

bench: build ## ratios against the named peers, in one run (docs/benchmarks.md)
	./test/bench.sh

soak: build ## long runs; not part of CI
	REDOUBT_SOAK=1 $(GO) test -timeout 60m -run Soak ./test/...

cross: ## the CLI, the server and the gateway also build for these
	CGO_ENABLED=0 GOOS=darwin GOARCH=arm64 $(GO) build -o /dev/null ./cmd/redoubt
	CGO_ENABLED=0 GOOS=linux GOARCH=arm64 $(GO) build -o /dev/null ./cmd/redoubt

clean:
	rm -rf bin .cache
