# shellcheck shell=bash disable=SC2034,SC2154
# Sourced after env.sh and dev/lib.sh by the scripts in dev/images: what the two images are made of.

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
	"$NIB_ROOT/dev/images/oci" image "$1" --name "$NIB_BUILDER_IMAGE" --layer "$layers/base.tar" --layer "$layers/binary.tar" \
		--entrypoint /usr/local/bin/image-builder "${@:2}"
}
