//! The objects that a target names, found in Prism Central, or what is wrong with their names.

use super::{NutanixError, documents::Entity, prism::Prism, source};
use crate::contract::{ClusterReference, NutanixTarget};

/// Names that are shown where the wanted one is missing.
const NEAR_NAMES: usize = 3;
/// Prism Central lists itself among its clusters.
const PRISM_CENTRAL: &str = "PRISM_CENTRAL";

/// The cluster that stores the image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Cluster {
    pub(super) uuid: String,
    name: String,
    is_available: bool,
}

/// Finds the target's cluster.
pub(super) async fn cluster(prism: &Prism, target: &NutanixTarget) -> Result<Cluster, NutanixError> {
    let clusters = prism.list("cluster", None).await?;
    available(prism, find_cluster(&clusters, &target.cluster).map_err(|problem| not_found(prism, vec![problem]))?)
}

fn available(prism: &Prism, cluster: Cluster) -> Result<Cluster, NutanixError> {
    if cluster.is_available {
        return Ok(cluster);
    }
    Err(NutanixError::ClusterAway { server: prism.server.clone(), cluster: cluster.name })
}

/// Finds everything that the target names, and the image `source` to start from, and tells all that is wrong at once.
pub(super) async fn check(prism: &Prism, target: &NutanixTarget, source: Option<&str>) -> Result<(), NutanixError> {
    let clusters = prism.list("cluster", None).await?;
    let mut problems = vec![];
    let found = find_cluster(&clusters, &target.cluster).map_err(|problem| problems.push(problem)).ok();
    if let Some(subnet) = &target.subnet {
        let subnets = prism.list("subnet", None).await?;
        problems.extend(subnet_problem(&subnets, subnet, found.as_ref()));
    }
    for (name, value) in &target.categories {
        // What else the answer holds does not matter.
        let category: Option<serde_json::Value> = prism.get("read a category", &["categories", name, value]).await?;
        if category.is_none() {
            problems.push(format!("categories `{name}: {value}`: create the category and its value there first"));
        }
    }
    if let Some(name) = source {
        problems.extend(source::find(prism, name).await?.err());
    }
    match found {
        Some(cluster) if problems.is_empty() => available(prism, cluster).map(drop),
        _ => Err(not_found(prism, problems)),
    }
}

/// The cluster that a machine goes to, and the UUID of its subnet.
pub(super) async fn of_machine(prism: &Prism, target: &NutanixTarget) -> Result<(Cluster, String), NutanixError> {
    let cluster = cluster(prism, target).await?;
    let wanted = target.subnet.as_deref().unwrap_or_default();
    let subnets = prism.list("subnet", None).await?;
    let reachable = reachable(&subnets, wanted, &cluster);
    match &reachable[..] {
        [subnet] => Ok((cluster, subnet.metadata.uuid.clone())),
        [] => {
            let problem = subnet_problem(&subnets, wanted, Some(&cluster));
            Err(not_found(prism, problem.into_iter().collect()))
        }
        several => {
            let uuids: Vec<_> = several.iter().map(|subnet| subnet.metadata.uuid.as_str()).collect();
            let problem = format!("subnet `{wanted}`: there are several, give one another name: {}", uuids.join(", "));
            Err(not_found(prism, vec![problem]))
        }
    }
}

pub(super) fn not_found(prism: &Prism, problems: Vec<String>) -> NutanixError {
    NutanixError::NotFound { server: prism.server.clone(), problems }
}

fn find_cluster(clusters: &[Entity], wanted: &ClusterReference) -> Result<Cluster, String> {
    let elements: Vec<_> = clusters
        .iter()
        .filter(|cluster| !cluster.status.resources.config.service_list.iter().any(|service| service == PRISM_CENTRAL))
        .collect();
    let shown = |cluster: &&Entity| format!("{} ({})", cluster.status.name, cluster.metadata.uuid);
    let (field, value, found): (_, _, Vec<_>) = match wanted {
        ClusterReference::Name(name) => {
            ("cluster.name", name, elements.iter().copied().filter(|cluster| cluster.status.name == *name).collect())
        }
        ClusterReference::Uuid(uuid) => (
            "cluster.uuid",
            uuid,
            elements.iter().copied().filter(|cluster| cluster.metadata.uuid.eq_ignore_ascii_case(uuid)).collect(),
        ),
    };
    match found[..] {
        [cluster] => Ok(Cluster {
            uuid: cluster.metadata.uuid.clone(),
            name: cluster.status.name.clone(),
            // Where nothing is said nothing is wrong.
            is_available: cluster.status.resources.config.is_available != Some(false),
        }),
        [] => Err(format!("{field} `{value}`: {}", near(value, elements.iter().map(shown).collect()))),
        _ => {
            let all: Vec<_> = found.iter().map(shown).collect();
            Err(format!("{field} `{value}`: there are several, write cluster.uuid instead: {}", all.join(", ")))
        }
    }
}

/// The subnets of this name that machines of the cluster can be in.
fn reachable<'s>(subnets: &'s [Entity], wanted: &str, cluster: &Cluster) -> Vec<&'s Entity> {
    // An overlay subnet belongs to no cluster.
    let reaches = |subnet: &Entity| match &subnet.status.cluster_reference {
        Some(reference) => reference.uuid.eq_ignore_ascii_case(&cluster.uuid),
        None => true,
    };
    subnets.iter().filter(|subnet| subnet.status.name == wanted && reaches(subnet)).collect()
}

fn subnet_problem(subnets: &[Entity], wanted: &str, cluster: Option<&Cluster>) -> Option<String> {
    let is_there = subnets.iter().any(|subnet| subnet.status.name == wanted);
    if is_there && cluster.is_none_or(|cluster| !reachable(subnets, wanted, cluster).is_empty()) {
        return None;
    }
    Some(if is_there {
        format!("subnet `{wanted}`: it is a subnet of another cluster")
    } else {
        let names = subnets.iter().map(|subnet| subnet.status.name.clone()).collect();
        format!("subnet `{wanted}`: {}", near(wanted, names))
    })
}

/// What there is instead, the most alike first.
pub(super) fn near(wanted: &str, mut names: Vec<String>) -> String {
    if names.is_empty() {
        return "there is none that the user may see".to_owned();
    }
    names.sort_by_cached_key(|name| {
        (strsim::damerau_levenshtein(&name.to_lowercase(), &wanted.to_lowercase()), name.clone())
    });
    names.dedup();
    let more = names.len().saturating_sub(NEAR_NAMES);
    names.truncate(NEAR_NAMES);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("there is {}{more}", names.join(", "))
}
