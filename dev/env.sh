# shellcheck shell=bash disable=SC2034
# Sourced by every script in dev/: where things live and which addresses the development cluster uses.
# Nothing here touches the machine.

NIB_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Costly results (Kubernetes, base root file system, packages), keyed by version; safe to delete at any time.
NIB_CACHE=${NIB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/node-image-builder}
# State of the running development cluster: kubeconfig, logs, process ids.
NIB_STATE=${NIB_STATE:-$NIB_CACHE/state}

KUBERNETES_VERSION=1.34.4
# The CoreDNS that this Kubernetes release ships its manifest for.
COREDNS_VERSION=1.12.1
HELM_VERSION=3.19.5
KUBECONFORM_VERSION=0.7.0
# etcd and kube-apiserver for tests that need an API server and no node.
NIB_ASSETS=$NIB_CACHE/kubernetes-$KUBERNETES_VERSION/bin

# The cluster lives in namespaces of its own (network, mount, process); these are its addresses.
NIB_HOST_IP=10.250.0.1
NIB_NODE_IP=10.250.0.2
NIB_POD_CIDR=10.244.0.0/24
NIB_SERVICE_CIDR=10.96.0.0/16
NIB_DNS_IP=10.96.0.10
NIB_API=https://$NIB_NODE_IP:6443

# The release mirror: EKS-A / EKS-D documents, artifacts and base root file system, served from inside the cluster's network.
NIB_MIRROR_PORT=8480
NIB_MIRROR_URL=http://$NIB_NODE_IP:$NIB_MIRROR_PORT
NIB_MIRROR_DIR=$NIB_CACHE/mirror
# Where a machine outside the cluster downloads finished images: the artifact server's NodePort.
NIB_ARTIFACTS_URL=http://$NIB_NODE_IP:30080

# What the cluster keeps on disk: containerd's images (kept by dev/down), kubelet's pods and the volumes (wiped).
NIB_CLUSTER=$NIB_CACHE/cluster
NIB_NODE=nib-dev
# The host's end of the cable to the cluster.
NIB_LINK=nib0
NIB_CGROUP=node-image-builder
NIB_PAUSE_IMAGE=localhost/node-image-builder/pause:$KUBERNETES_VERSION
NIB_COREDNS_IMAGE=localhost/node-image-builder/coredns:$COREDNS_VERSION

NIB_OPERATOR_IMAGE=localhost/node-image-builder/operator:dev
NIB_BUILDER_IMAGE=localhost/node-image-builder/builder:dev
# Stands in for the image of kubernetes-sigs/image-builder, see dev/images/upstream.
NIB_UPSTREAM_IMAGE=localhost/node-image-builder/upstream:dev

export KUBECONFIG=${NIB_KUBECONFIG:-$NIB_STATE/kubeconfig}
export PATH=$NIB_ASSETS:$NIB_CACHE/bin:$PATH
