//! Images for bare metal machines.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A gzip-compressed raw disk that Tinkerbell writes to a machine's disk: `status.imageURL` is the value for
/// `TinkerbellDatacenterConfig.spec.osImageURL`. Write `{}`: it has no settings of its own.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BareMetal {}
