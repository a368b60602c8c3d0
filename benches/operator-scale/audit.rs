//! What the operator under test asked of the API server, from the server's audit log.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::Path,
};

use jiff::Timestamp;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    stage: String,
    verb: String,
    stage_timestamp: Timestamp,
    #[serde(default)]
    object_ref: ObjectRef,
    response_status: Option<ResponseStatus>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ObjectRef {
    resource: String,
    subresource: Option<String>,
    namespace: String,
    name: String,
}

#[derive(Deserialize)]
struct ResponseStatus {
    code: u16,
}

/// The answered requests since the log had a length.
#[derive(Default)]
pub struct Requests {
    /// By verb and resource, e.g. `patch nodeimagebuilds/status`. A write that was refused counts as one.
    pub counts: BTreeMap<String, usize>,
    /// When the creation of each Job was answered, by its namespace and name.
    pub jobs: BTreeMap<(String, String), Timestamp>,
}

impl Requests {
    pub fn read(log: &Path, since: u64) -> Self {
        let mut file = BufReader::new(fs::File::open(log).unwrap());
        file.seek(SeekFrom::Start(since)).unwrap();
        let mut requests = Self::default();
        for line in file.lines() {
            // The last line may be half of one.
            let Ok(entry) = serde_json::from_str::<Entry>(&line.unwrap()) else { continue };
            if entry.stage != "ResponseComplete" || entry.verb == "watch" {
                continue;
            }
            let object = entry.object_ref;
            let subresource = object.subresource.map_or(String::new(), |name| format!("/{name}"));
            let request = format!("{} {}{subresource}", entry.verb, object.resource);
            if request == "create jobs" && entry.response_status.is_some_and(|status| status.code == 201) {
                requests.jobs.insert((object.namespace, object.name), entry.stage_timestamp);
            }
            *requests.counts.entry(request).or_default() += 1;
        }
        requests
    }

    /// Writes of builds: neither the lease, which is renewed however many builds there are, nor Events.
    pub fn writes(&self) -> usize {
        self.sum(|verb, resource| verb != "get" && verb != "list" && resource != "leases" && resource != "events")
    }

    pub fn events(&self) -> usize {
        self.sum(|verb, resource| verb != "list" && resource == "events")
    }

    pub fn reads(&self) -> usize {
        self.sum(|verb, resource| (verb == "get" || verb == "list") && resource != "leases")
    }

    fn sum(&self, counts: impl Fn(&str, &str) -> bool) -> usize {
        let fits = |request: &str| request.split_once(' ').is_some_and(|(verb, resource)| counts(verb, resource));
        self.counts.iter().filter(|(request, _)| fits(request)).map(|(_, count)| count).sum()
    }
}
