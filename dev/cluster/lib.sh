# shellcheck shell=bash disable=SC2034
# Sourced after env.sh and lib.sh by the scripts that handle the cluster's namespaces.

# The node runs the containerd and the runc that the images of the mirror's releases have (dev/mirror/programs). Its content is
# its version's own: an older one does not read what a newer one wrote.
source "$NIB_ROOT/dev/mirror/release.env"
NIB_RUNTIME_PATH=$NIB_PROGRAMS/containerd:$NIB_PROGRAMS/runc
NIB_CONTAINERD_ROOT=containerd-$CONTAINERD_VERSION

# The kernel settings that the cluster changes for the whole machine.
host_settings=(
	kernel.keys.root_maxbytes kernel.keys.root_maxkeys kernel.panic kernel.panic_on_oops
	net.ipv4.ip_forward vm.overcommit_memory
)

# sandbox prints the process id of the cluster's process 1, or fails when it does not run. The number of its
# process namespace tells it from a later process with the same id.
sandbox() {
	local pid namespace
	read -r pid namespace 2>/dev/null <"$NIB_STATE/sandbox" || return 1
	[ "$(readlink "/proc/$pid/ns/pid")" = "$namespace" ] || return 1
	echo "$pid"
}

# host_rules ACTION (-A or -D) for the rules that let the node reach what the host reaches.
host_rules() {
	local comment=(-m comment --comment "$NIB_CGROUP")
	iptables -w -t nat "$1" POSTROUTING -s "$NIB_NODE_IP" ! -o "$NIB_LINK" "${comment[@]}" -j MASQUERADE
	iptables -w "${1/A/I}" FORWARD -i "$NIB_LINK" "${comment[@]}" -j ACCEPT
	iptables -w "${1/A/I}" FORWARD -o "$NIB_LINK" "${comment[@]}" -j ACCEPT
}

host_rules_left() {
	command -v iptables-save >/dev/null || return 1
	iptables-save 2>/dev/null | grep -e "--comment \"\?$NIB_CGROUP\"\?\( \|$\)"
}

cgroups_left() {
	find /sys/fs/cgroup -mindepth 1 -maxdepth 2 -type d -name "$NIB_CGROUP" 2>/dev/null | grep .
}

# await SECONDS COMMAND... repeats a command until it succeeds; fails when the time is over.
await() {
	local deadline=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		[ "$SECONDS" -lt "$deadline" ] || return 1
		sleep 0.2
	done
}

# image_file NAME:TAG prints where the image's tar file is.
image_file() {
	local name=${1##*/}
	echo "$NIB_CLUSTER/images/${name/:/-}.tar"
}

# pack_image NAME:TAG ROOT PROGRAM FILE makes a container image that holds the files under ROOT and runs PROGRAM; FILE
# gets a tar of an OCI layout that carries the name. A directory beside it is used on the way.
pack_image() {
	local layout=$4.layout
	umoci init --layout "$layout"
	umoci new --image "$layout:image"
	umoci insert --image "$layout:image" "$2" /
	umoci config --image "$layout:image" --config.entrypoint "$3"
	umoci gc --layout "$layout" >/dev/null
	jq --arg name "$1" '.manifests[].annotations["io.containerd.image.name"] = $name' "$layout/index.json" >"$layout/named"
	mv "$layout/named" "$layout/index.json"
	tar -C "$layout" -cf "$4" .
	rm -rf "$layout"
}
