# Runs containers in lightweight virtual machines. `make help` lists the targets; what takes more than a line is in hack/.

PREFIX ?= /usr/local
DESTDIR ?=

# The version that the programs report. The -c lets root describe a tree that somebody else owns.
VERSION := $(shell git -c safe.directory='*' describe --tags --always --dirty 2>/dev/null || echo unknown)

export CGO_ENABLED = 0
GO_LDFLAGS = -s -w -X main.version=$(VERSION)
GO_BUILD = go build -trimpath -buildvcs=false -ldflags

# What runs VMs, what the demo and the tests put into them, and what the tests compare with.
RUN_PACKAGES = qemu-system-x86 qemu-system-common qemu-system-data
DEMO_PACKAGES = $(RUN_PACKAGES) busybox-static
ENGINE_PACKAGES = docker.io docker-compose podman netavark aardvark-dns catatonit iptables
RUNC_PACKAGES = runc gcc libc6-dev pkg-config libseccomp-dev
TEST_PACKAGES = $(DEMO_PACKAGES) $(ENGINE_PACKAGES) $(RUNC_PACKAGES) protobuf-compiler python3-seccomp iproute2 procps passt debootstrap util-linux \
	acl sqlite3 inotify-tools e2fsprogs
BENCH_PACKAGES = iperf3

# Tools of the developers, each in a directory that names its version.
TOOLS = $(CURDIR)/build/tools
GOLANGCI_LINT = $(TOOLS)/golangci-lint@v2.15.0/golangci-lint
PROTOC_GEN_GO = $(TOOLS)/protoc-gen-go@v1.36.12/protoc-gen-go
PROTOC_GEN_GRPC = $(TOOLS)/protoc-gen-go-grpc@v1.6.2/protoc-gen-go-grpc
PROTOC_GEN_TTRPC = $(TOOLS)/protoc-gen-go-ttrpc@v1.2.10/protoc-gen-go-ttrpc
RUNC = $(TOOLS)/runc@v1.5.2/runc
GENERATORS = $(PROTOC_GEN_GO) $(PROTOC_GEN_GRPC) $(PROTOC_GEN_TTRPC)

.PHONY: all
all: runv guest ## build bin/runv and the guest's files in build/guest

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 20

# The Go command knows best what has changed, so these targets always ask it; they are quick when nothing has.
.PHONY: runv
runv:
	@$(GO_BUILD) '$(GO_LDFLAGS)' -o bin/runv ./cmd/runv

.PHONY: guest
guest:
	@$(GO_BUILD) '$(GO_LDFLAGS)' -o build/ ./cmd/runv-agent
	@$(GO_BUILD) '$(GO_LDFLAGS) -E runv/internal/guest/stage.entry' -o build/ ./cmd/runv-init
	@go run -trimpath -buildvcs=false ./image/mkguest -agent build/runv-agent -init build/runv-init -agent-version '$(VERSION)' -out build/guest -cache build/kernel

.PHONY: demo
demo: demo-deps all ## run a container in a VM and show where the time goes
	@hack/demo

.PHONY: test
test: deps all $(GENERATORS) ## all checks and tests, those with VMs included
	@hack/test $(GENERATORS)

.PHONY: conformance
conformance: deps all ## compare with runc all that can be compared; writes docs/conformance.md
	@go test -count=1 -timeout 60m ./test/conformance -all -write '$(CURDIR)/docs/conformance.md'

.PHONY: soak
soak: deps all ## create and delete 200 containers with networks, and count what is left
	@go test -count=1 -timeout 60m -run TestCycles ./test/faults -cycles 200

.PHONY: engines
engines: deps all ## drive Docker and Podman with runc and with runv; writes docs/docker.md and docs/podman.md
	@go test -count=1 -timeout 60m ./test/engines -all -write '$(CURDIR)/docs'

.PHONY: bench
bench: deps all ## measure starts, exec, stdio, network and memory, beside runc
	@hack/deps $(BENCH_PACKAGES)
	@go run ./test/bench

.PHONY: lint
lint: $(GOLANGCI_LINT) ## static checks; the first run builds the linter, which takes minutes
	@$(GOLANGCI_LINT) run ./...

.PHONY: generate
generate: generate-deps $(GENERATORS) ## generate the code of the API from its .proto files
	@hack/generate . $(GENERATORS)

.PHONY: check-generated
check-generated: generate-deps $(GENERATORS) ## tell whether the generated code is current
	@hack/check-generated $(GENERATORS)

.PHONY: install
install: all ## install to DESTDIR and PREFIX (/usr/local)
	install -D -m 0755 bin/runv '$(DESTDIR)$(PREFIX)/bin/runv'
	install -D -m 0644 -t '$(DESTDIR)$(PREFIX)/share/runv' build/guest/vmlinux build/guest/initrd.cpio build/guest/guest.json

.PHONY: deps
deps: test-packages $(RUNC) ## install what the demo, the tests and the benchmarks need, and build the newer runc that they compare with

.PHONY: test-packages
test-packages:
	@hack/deps $(TEST_PACKAGES)

.PHONY: demo-deps
demo-deps:
	@hack/deps $(DEMO_PACKAGES)

.PHONY: generate-deps
generate-deps:
	@hack/deps protobuf-compiler

.PHONY: clean
clean: ## remove all that was built, downloads included
	rm -rf bin build

$(GOLANGCI_LINT): TOOL = github.com/golangci/golangci-lint/v2/cmd/golangci-lint
$(PROTOC_GEN_GO): TOOL = google.golang.org/protobuf/cmd/protoc-gen-go
$(PROTOC_GEN_GRPC): TOOL = google.golang.org/grpc/cmd/protoc-gen-go-grpc
$(PROTOC_GEN_TTRPC): TOOL = github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc
$(GOLANGCI_LINT) $(GENERATORS):
	@GOBIN='$(@D)' go install $(TOOL)@$(lastword $(subst @, ,$(@D)))

# The newer of the two oracles; test/harness knows this path. It is static, so that it runs whatever the machine has.
$(RUNC): | test-packages
	@GOBIN='$(@D)' CGO_ENABLED=1 go install -trimpath -tags 'seccomp netgo osusergo' -ldflags '-s -w -extldflags -static' \
		github.com/opencontainers/runc@$(lastword $(subst @, ,$(@D)))
