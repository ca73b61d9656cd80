# Each recipe is one line and calls what plain commands do; nothing needs just.

# both binaries, static
build:
    CGO_ENABLED=0 go build -o bin/ ./coordinator/cmd/godwit ./agent/cmd/godwit-agent

# the demo: moves a tree between two hosts made of namespaces (root)
demo:
    go run ./testenv demo

# all tests, installing what they need (root)
test *ARGS:
    go run ./testenv test {{ARGS}}

# moves of trees of many kinds, measured (root)
bench *ARGS:
    go run ./testenv bench {{ARGS}}

# format, vet, staticcheck
lint:
    gofmt -l . && go vet ./... && go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

# what is run before a change is taken
ci:
    .ci/run

# protobuf code, with protoc and protoc-gen-go in PATH
proto:
    protoc --go_out=. --go_opt=module=godwit wire/godwit.proto
