//! Types of the conditions in the status. They follow kstatus, so that `kubectl wait`, Flux and Argo CD judge the
//! health of a `NodeImageBuild` without knowing it.

/// `True`: the image of the present specification is published. `False`: not yet, or it can not be; the reason says.
pub const READY: &str = "Ready";
/// `True` while a build is on its way; absent otherwise.
pub const RECONCILING: &str = "Reconciling";
/// `True` when nothing more happens until somebody acts; the message says what to do. Absent otherwise.
pub const STALLED: &str = "Stalled";
/// `True` while something that a build left in vCenter or Prism Central could not be removed; the message says why and
/// what to do. Absent otherwise. It says nothing about the image.
pub const CLEAN_UP_FAILED: &str = "CleanUpFailed";
/// `True` while older images that `spec.retention` would remove stay, because nobody can see whether a cluster uses them.
/// Absent otherwise. It says nothing about the newest image.
pub const RETENTION_BLOCKED: &str = "RetentionBlocked";
