# shellcheck shell=bash disable=SC2034,SC2154
# Sourced after env.sh and dev/lib.sh by the scripts in dev/images: what the images are made of.

NIB_BINARY=${NIB_BINARY:-${CARGO_TARGET_DIR:-$NIB_ROOT/target}/x86_64-unknown-linux-musl/release/image-builder}
# Apart from dev/cluster/images, whose files may be deleted and made again at any time.
images=$NIB_CACHE/container-images
layers=$images/layers

# Each packs one image; further arguments are those of dev/images/oci image.
operator_image() {
	"$NIB_ROOT/dev/images/oci" image "$1" --name "$NIB_OPERATOR_IMAGE" --layer "$layers/certificates.tar" --layer "$layers/binary.tar" \
		--entrypoint /usr/local/bin/image-builder --user 65532:65532 "${@:2}"
}
builder_image() {
	"$NIB_ROOT/dev/images/oci" image "$1" --name "$NIB_BUILDER_IMAGE" --layer "$layers/builder.tar" --layer "$layers/binary.tar" \
		--entrypoint /usr/local/bin/image-builder "${@:2}"
}
# Its user and entry point are those of the image that it stands in for.
upstream_image() {
	"$NIB_ROOT/dev/images/oci" image "$1" --name "$NIB_UPSTREAM_IMAGE" --layer "$layers/upstream.tar" --layer "$layers/upstream-home.tar" \
		--entrypoint /usr/bin/make --user 1000:1000 "${@:2}"
}

# load_images NAME... puts images into the development cluster. Layers that it has are not sent again.
load_images() (
	present=$("$NIB_ROOT/dev/ctr" content list --quiet)
	scratch=$(mktemp -d "$images/.load.XXXXXX")
	trap 'rm -rf "$scratch"' EXIT
	left_out=() files=()
	for digest in $present; do left_out+=(--leave-out "$digest"); done
	for name; do
		"${name}_image" "$scratch/$name.tar" "${left_out[@]}"
		files+=("$scratch/$name.tar")
	done
	"$NIB_ROOT/dev/load-image" "${files[@]}"
)
