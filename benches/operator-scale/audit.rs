//! What the operator under test asked of the API server, from the server's audit log.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::Path,
    time::Duration,
};

use jiff::Timestamp;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    stage: String,
    verb: String,
    request_received_timestamp: Timestamp,
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
    /// How each build was started, by its namespace and name.
    starts: BTreeMap<(String, String), Start>,
}

/// The requests that a build is started by: finalizer, Secret, Job.
#[derive(Default)]
pub struct Start {
    /// When each came and when it was answered.
    requests: Vec<(Timestamp, Timestamp)>,
}

impl Start {
    pub fn begin(&self) -> Timestamp {
        self.requests[0].0
    }

    /// When the Job was there.
    pub fn end(&self) -> Timestamp {
        self.requests[self.requests.len() - 1].1
    }

    /// How long the API server took for the requests.
    pub fn answering(&self) -> Duration {
        self.requests.iter().map(|(came, answered)| between(*came, *answered)).sum()
    }

    /// How long whoever sent them took from each answer to the next request.
    pub fn asking(&self) -> Duration {
        self.requests.windows(2).map(|pair| between(pair[0].1, pair[1].0)).sum()
    }
}

/// The time between two moments, none if they are the other way round.
pub fn between(begin: Timestamp, end: Timestamp) -> Duration {
    Duration::try_from(end.duration_since(begin)).unwrap_or_default()
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
            let build = match request.as_str() {
                "patch nodeimagebuilds" => Some(object.name.as_str()),
                // They have the name of their build and its id.
                "create secrets" | "create jobs" => object.name.rsplit_once('-').map(|(build, _)| build),
                _ => None,
            };
            if let (Some(build), Some(200 | 201)) = (build, entry.response_status.map(|status| status.code)) {
                let start = requests.starts.entry((object.namespace, build.to_owned())).or_default();
                start.requests.push((entry.request_received_timestamp, entry.stage_timestamp));
            }
            *requests.counts.entry(request).or_default() += 1;
        }
        requests
    }

    /// How a build was started, if its Job is there.
    pub fn start(&self, namespace: &str, build: &str) -> Option<&Start> {
        self.starts.get(&(namespace.to_owned(), build.to_owned())).filter(|start| start.requests.len() >= 3)
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
