#!/bin/sh
# Generates agentpb from agent.proto with protoc and the plugins that go.mod pins (`go tool`), so that the same sources
# give the same bytes everywhere. Run by `go generate ./api/agent`.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
for plugin in protoc-gen-go protoc-gen-go-grpc; do
	printf '#!/bin/sh\nexec go tool %s "$@"\n' "$plugin" >"$bin/$plugin"
	chmod +x "$bin/$plugin"
done
PATH="$bin:$PATH" protoc --proto_path=. \
	--go_out=agentpb --go_opt=paths=source_relative \
	--go-grpc_out=agentpb --go-grpc_opt=paths=source_relative \
	agent.proto
# The version of protoc is not pinned, and says nothing about what it read.
sed -i -E -e '\#^// (- +)?[[:space:]]*protoc[[:space:]]+v[0-9]#d' agentpb/*.pb.go
