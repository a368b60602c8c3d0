//! Preloads the release's container images, by the image's own containerd (eksa-facts 6.2).

use std::path::Path;

use super::{
    bolt::{self, BoltError, Bucket, Entry},
    chroot::{BUILD_DIR, Chroot, FETCHED_DIR},
    tree::{Tree, TreeError, within},
};
use crate::{
    contract::{Classified, FailureClass, ResolvedRelease},
    process::ProcessError,
};

/// Only what importing needs: no network and no pods.
const CONFIGURATION: &str = "version = 2\ndisabled_plugins = [\n\
    \"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\",\n\
    \"io.containerd.nri.v1.nri\", \"io.containerd.internal.v1.opt\", \"io.containerd.internal.v1.tracing\",\n\
    \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.devmapper\"\n]\n";

/// Starts containerd, imports its arguments, strips the architecture from names (kubeadm asks for them without), and
/// prints all names. Process 1 of its own namespace: when it ends, containerd has ended.
const IMPORT: &str = r#"set -eu
log=/run/image-builder/containerd.log
containerd --config /run/image-builder/containerd.toml >"$log" 2>&1 &
daemon=$!
tries=0
until ctr version >/dev/null 2>&1; do
	tries=$((tries + 1))
	if ! kill -0 "$daemon" 2>/dev/null || [ "$tries" -gt 600 ]; then
		tail -n 5 "$log" >&2
		echo "containerd did not start" >&2
		exit 1
	fi
	sleep 0.1
done
for archive; do
	ctr --namespace k8s.io images import "$archive" >&2
done
for name in $(ctr --namespace k8s.io images list --quiet); do
	case $name in
	*-amd64:*)
		ctr --namespace k8s.io images tag --force "$name" "${name%-amd64:*}:${name##*-amd64:}" >&2
		ctr --namespace k8s.io images remove "$name" >&2
		;;
	esac
done
# What nothing needs goes now: containerd would remove it at some time of its own.
ctr --namespace k8s.io leases create --id image-builder >&2
ctr --namespace k8s.io leases delete --sync image-builder >&2
ctr --namespace k8s.io images list --quiet
kill "$daemon"
wait "$daemon" || true
"#;

/// Why images could not be preloaded.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("can not load the release's container images into the image")]
    Run { source: ProcessError },
    #[error(
        "the release's container images do not contain {image}, which its nodes start every pod with; they are: {found}"
    )]
    NoPauseImage { image: String, found: String },
    #[error("containerd's database {path} can not be read; the containerd of this release writes another kind of it")]
    Database { path: &'static str, source: BoltError },
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for ImportError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Run { source: ProcessError::Failed { output, .. } } if output.contains("no space left") => {
                FailureClass::Environment
            }
            Self::Run { source } => source.class(),
            Self::NoPauseImage { .. } | Self::Database { .. } => FailureClass::BadInput,
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Run { source: ProcessError::Failed { .. } } => "ImportFailed",
            Self::Run { source } => source.reason(),
            Self::NoPauseImage { .. } | Self::Database { .. } => "ArtifactUnusable",
            Self::Tree(error) => error.reason(),
        }
    }
}

/// Imports the archives, files of the fetched directory, and gives the names of all images.
pub(super) async fn preload(
    chroot: &Chroot,
    archives: &[std::path::PathBuf],
    release: &ResolvedRelease,
) -> Result<Vec<String>, ImportError> {
    within(chroot.root(), |tree| tree.write(&format!("{BUILD_DIR}/containerd.toml"), CONFIGURATION, 0o644))??;
    let archives: Vec<_> = archives
        .iter()
        .filter_map(|archive| archive.file_name())
        .map(|name| Path::new(FETCHED_DIR).join(name).to_string_lossy().into_owned())
        .collect();
    let mut args = vec!["-c", IMPORT, "import"];
    args.extend(archives.iter().map(String::as_str));
    let output = chroot.run("/bin/sh", &args).await.map_err(|source| ImportError::Run { source })?;
    let names: Vec<_> = output.stdout.lines().map(str::to_owned).collect();
    if !names.contains(&release.pause_image) {
        return Err(ImportError::NoPauseImage { image: release.pause_image.clone(), found: names.join(", ") });
    }
    Ok(names)
}

/// Where containerd keeps what it knows of images and of their unpacked layers.
const DATABASES: [&str; 2] = [
    "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db",
    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/metadata.db",
];

/// Where the layers of images are, each in a directory of its own.
const SNAPSHOTS: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
/// What overlayfs notes down of its own where a layer is written through it in a user namespace. As root containerd writes
/// layers without overlayfs, and a node does not read the notes.
const OVERLAY_NOTES: &str = "user.overlay.";

/// Takes out of the layers what only a build in a user namespace leaves there, when containerd has ended.
pub(super) fn forget_overlays(tree: &Tree) -> Result<(), ImportError> {
    for snapshot in tree.list(SNAPSHOTS)? {
        let snapshot = format!("{SNAPSHOTS}/{snapshot}");
        tree.clear(&format!("{snapshot}/work"))?;
        tree.remove_attributes(&format!("{snapshot}/fs"), OVERLAY_NOTES)?;
    }
    Ok(())
}

/// Writes containerd's databases anew without the times of the build, when containerd has ended. `epoch` takes their place.
pub(super) fn settle(tree: &Tree, epoch: u32) -> Result<(), ImportError> {
    for path in DATABASES {
        let told = |source| ImportError::Database { path, source };
        let mut database = bolt::read(&tree.read_bytes(path)?).map_err(told)?;
        settle_times(&mut database, &time(epoch));
        let mode = tree.mode(path).unwrap_or(0o644);
        tree.write(path, bolt::write(&database), mode)?;
    }
    Ok(())
}

/// Sets every time that something was made or changed at.
fn settle_times(bucket: &mut Bucket, time: &[u8]) {
    for (key, entry) in &mut bucket.entries {
        match entry {
            Entry::Bucket(bucket) => settle_times(bucket, time),
            Entry::Value(value) => {
                // containerd's `boltutil`: times are what Go's `time.MarshalBinary` writes.
                if matches!(key.as_slice(), b"createdat" | b"updatedat") {
                    *value = time.to_vec();
                }
            }
        }
    }
}

/// As `time.MarshalBinary` of Go writes it: version 1, seconds since the year 1, nanoseconds, and -1 minutes for UTC.
fn time(epoch: u32) -> Vec<u8> {
    const YEAR_1_TO_1970: u64 = 62_135_596_800;
    let seconds = YEAR_1_TO_1970 + u64::from(epoch);
    [&[1][..], &seconds.to_be_bytes(), &0_u32.to_be_bytes(), &(-1_i16).to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn layers_keep_nothing_of_overlayfs() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        let layer = format!("{SNAPSHOTS}/7");
        tree.write(&format!("{layer}/fs/usr/bin/tool"), "x", 0o755).unwrap();
        tree.link(&format!("{layer}/fs/usr/nowhere"), "/gone").unwrap();
        tree.make_dir(&format!("{layer}/work/work"), 0).unwrap();
        for (path, name) in [
            ("usr", "user.overlay.impure"),
            ("usr/bin", "user.overlay.opaque"),
            ("usr/bin/tool", "user.overlay.origin"),
            ("usr/bin/tool", "user.own"),
        ] {
            xattr::set(tree.path(&format!("{layer}/fs/{path}")), name, b"y").unwrap();
        }
        forget_overlays(&tree).unwrap();
        let left = |path: &str| xattr::list(tree.path(&format!("{layer}/fs/{path}"))).unwrap().collect::<Vec<_>>();
        assert_eq!((left("usr"), left("usr/bin"), left("usr/bin/tool")), (vec![], vec![], vec!["user.own".into()]));
        assert_eq!(tree.list(&format!("{layer}/work")).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn databases_keep_everything_but_the_time_of_the_build() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        let value = |bytes: &[u8]| Entry::Value(bytes.to_vec());
        let image = |time: &[u8]| Bucket {
            sequence: 3,
            entries: BTreeMap::from([(b"createdat".to_vec(), value(time)), (b"size".to_vec(), value(b"7"))]),
        };
        for path in DATABASES {
            let bucket =
                Bucket { sequence: 0, entries: BTreeMap::from([(b"v1".to_vec(), Entry::Bucket(image(b"\x01then")))]) };
            tree.write(path, bolt::write(&bucket), 0o600).unwrap();
        }
        settle(&tree, 1_700_000_000).unwrap();
        for path in DATABASES {
            let read = bolt::read(&tree.read_bytes(path).unwrap()).unwrap();
            // 2023-11-14T22:13:20Z, as Go prints it in hexadecimal.
            let time = hex::decode("010000000edce5e80000000000ffff").unwrap();
            assert_eq!(read.entries[&b"v1"[..]], Entry::Bucket(image(&time)));
            assert_eq!(tree.mode(path), Some(0o600));
        }
        tree.write(DATABASES[1], "x", 0o600).unwrap();
        assert!(settle(&tree, 1).unwrap_err().to_string().contains("metadata.db"));
    }
}
