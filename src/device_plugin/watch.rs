//! Names that come and go in a directory.

use std::{
    ffi::OsStr,
    fmt, io,
    path::{Path, PathBuf},
};

use futures::TryStreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};

use super::DevicePluginError;

/// What tells that a name appears, or vanishes.
const COME: EventMask = EventMask::CREATE.union(EventMask::MOVED_TO);
const GO: EventMask = EventMask::DELETE.union(EventMask::MOVED_FROM);
/// Room for many events; one takes at most 16 bytes and a name of 256.
const BUFFER: usize = 4096;

/// A directory that is watched from when this is made, so that nothing that happens later is missed.
pub(super) struct Directory {
    path: PathBuf,
    events: EventStream<[u8; BUFFER]>,
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Directory {
    pub(super) fn watch(path: &Path) -> Result<Self, DevicePluginError> {
        let watch = || -> io::Result<_> {
            let inotify = Inotify::init()?;
            let names = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE;
            inotify.watches().add(path, names | WatchMask::ONLYDIR)?;
            inotify.into_event_stream([0; BUFFER])
        };
        match watch() {
            Ok(events) => Ok(Self { path: path.to_owned(), events }),
            Err(source) => Err(DevicePluginError::Watch { dir: path.to_owned(), source }),
        }
    }

    /// Waits until the name appears.
    pub(super) async fn appeared(&mut self, name: &str) -> Result<(), DevicePluginError> {
        self.seen(name, COME).await
    }

    /// Waits until the name appears or vanishes.
    pub(super) async fn changed(&mut self, name: &str) -> Result<(), DevicePluginError> {
        self.seen(name, COME | GO).await
    }

    async fn seen(&mut self, name: &str, what: EventMask) -> Result<(), DevicePluginError> {
        let failed = |source| DevicePluginError::Watch { dir: self.path.clone(), source };
        while let Some(event) = self.events.try_next().await.map_err(failed)? {
            if event.mask.contains(EventMask::IGNORED) {
                break;
            }
            let named = event.name.as_deref() == Some(OsStr::new(name));
            // Where the kernel had more to tell than it keeps, it may have been this.
            if event.mask.contains(EventMask::Q_OVERFLOW) || (named && event.mask.intersects(what)) {
                return Ok(());
            }
        }
        Err(DevicePluginError::Gone { dir: self.path.clone() })
    }
}
