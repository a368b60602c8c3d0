# The README's two commands are `make demo` and `make test`. Everything they need is installed and built by dev/.

SHELL := bash
.DEFAULT_GOAL := help

include $(wildcard dev/*.mk)

.PHONY: help demo demo-vsphere demo-nutanix test test-all lint unit e2e binary crds

help: ## Lists the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | sort | column -t -s $$'\t'

demo: ## Builds everything, starts a cluster, builds a node image in it and boots the result.
	dev/demo

demo-vsphere: ## Builds a template into a simulated vCenter, lists it, and boots the disk that vCenter has.
	NIB_KEEP=1 dev/e2e vsphere::

demo-nutanix: ## Builds an image into a simulated Prism Central, shows it, and boots the disk that Prism Central has.
	NIB_KEEP=1 dev/e2e nutanix::

test: ## Checks, unit and integration tests, and the demo's build in a real cluster.
	dev/test

test-all: ## The same with every other end-to-end test: faults, nodes that join, vSphere, Nutanix. What CI runs.
	dev/test all

lint: ## Format, clippy, licences, documentation, chart.
	dev/lint

unit: ## Unit and integration tests; needs no cluster, but the Kubernetes binaries for its API server.
	dev/unit

e2e: ## The end-to-end build and its faults, in the development cluster.
	dev/e2e

binary: ## The static release binary.
	dev/binary

crds: ## Writes crds/ and the chart's copy anew from the Rust types.
	cargo run --quiet -- crd > crds/nodeimagebuilds.nodeimagebuild.dev.yaml
	cp crds/nodeimagebuilds.nodeimagebuild.dev.yaml charts/node-image-builder/files/
