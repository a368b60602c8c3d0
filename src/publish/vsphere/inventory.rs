//! The inventory as a tree, and the objects in it that a target names. Pure.

use std::collections::BTreeMap;

use super::{
    packer::PackerPlace,
    soap::Moref,
    vim::{ImportPlace, Properties},
};
use crate::contract::VsphereTarget;

/// Kinds that are looked at: those that a target names, and those that stand between.
pub(super) const KINDS: &[&str] = &[
    "Datacenter",
    "Folder",
    "StoragePod",
    "ComputeResource",
    "ClusterComputeResource",
    "HostSystem",
    "ResourcePool",
    "Datastore",
    "Network",
    "DistributedVirtualPortgroup",
    "OpaqueNetwork",
];
const COMPUTE: &[&str] = &["ComputeResource", "ClusterComputeResource"];
const NETWORKS: &[&str] = &["Network", "DistributedVirtualPortgroup", "OpaqueNetwork"];
/// Names that a message lists.
const NEAR_NAMES: usize = 5;

/// All objects of [`KINDS`].
#[derive(Clone, Debug, Default)]
pub(super) struct Inventory(BTreeMap<Moref, Entity>);

#[derive(Clone, Debug)]
struct Entity {
    name: String,
    parent: Option<Moref>,
}

/// The objects that a target names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Place {
    pub(super) datacenter: Moref,
    pub(super) pool: Moref,
    /// Only where the target names a host of a cluster.
    pub(super) host: Option<Moref>,
    pub(super) folder: Moref,
    /// Inventory path of the folder.
    pub(super) folder_path: String,
    pub(super) datastore: Moref,
    pub(super) network: Moref,
}

impl Place {
    pub(super) fn for_import(&self) -> ImportPlace<'_> {
        let Self { datacenter: _, pool, host, folder, folder_path: _, datastore, network } = self;
        ImportPlace { pool, host: host.as_ref(), folder, datastore, network }
    }
}

impl Inventory {
    pub(super) fn new(objects: impl IntoIterator<Item = Properties>) -> Self {
        let entity = |object: Properties| {
            let name = object.text("name").unwrap_or_default().to_owned();
            let parent = object.get("parent").and_then(super::soap::Element::object);
            (object.object, Entity { name, parent })
        };
        Self(objects.into_iter().map(entity).collect())
    }

    /// The objects that `target` names, or everything that is wrong with its names.
    pub(super) fn resolve(&self, target: &VsphereTarget) -> Result<Place, Vec<String>> {
        let Some(datacenter) = self.datacenter(&target.datacenter) else {
            let all: Vec<_> = self.of_kind(&["Datacenter"]).collect();
            return Err(vec![self.absent("datacenter", &target.datacenter, "the vCenter", &all)]);
        };
        let datacenter = datacenter.clone();
        let mut problems = vec![];
        let mut keep = |found: Result<Moref, String>| found.map_err(|problem| problems.push(problem)).ok();
        let search = |root: &'static str| Search { inventory: self, datacenter: &datacenter, root };
        let compute = target.cluster.as_deref().map(|name| keep(search("host").compute(name)));
        let within = compute.clone().flatten();
        let pool = match (&target.resource_pool, &within) {
            (Some(name), _) => keep(search("host").pool(name, within.as_ref())),
            (None, Some(place)) => keep(self.root_pool(place).ok_or_else(|| {
                format!(
                    "cluster `{}` has no resource pool that the user may see",
                    target.cluster.as_deref().unwrap_or_default()
                )
            })),
            (None, None) => None,
        };
        let datastore = keep(search("datastore").one("datastore", &target.datastore, &["Datastore"]));
        let network = keep(search("network").one("network", &target.network, NETWORKS));
        let folder = match &target.folder {
            Some(name) => keep(search("vm").one("folder", name, &["Folder"])),
            None => keep(self.child(&datacenter, "vm").cloned().ok_or_else(|| {
                format!("datacenter `{}` has no folder for virtual machines that the user may see", target.datacenter)
            })),
        };
        match (pool, datastore, network, folder) {
            (Some(pool), Some(datastore), Some(network), Some(folder)) if problems.is_empty() => {
                let host = within.filter(|place| place.kind == "HostSystem");
                Ok(Place { datacenter, pool, host, folder_path: self.path(&folder), folder, datastore, network })
            }
            _ => Err(problems),
        }
    }

    /// A place in the words of upstream's templates. Packer looks for folders and pools below others, and for everything
    /// else where it is told to.
    pub(super) fn for_packer(&self, place: &Place) -> PackerPlace {
        let Place { datacenter, pool, host, folder: _, folder_path, datastore, network } = place;
        let compute = self.ancestors(pool).find(|object| COMPUTE.contains(&object.kind.as_str()));
        let compute = compute.map(|object| self.path(object)).unwrap_or_default();
        let below = |path: &str, above: &str| path.strip_prefix(above).unwrap_or(path).trim_matches('/').to_owned();
        let mut names = PackerPlace::from([
            ("datacenter", self.path(datacenter)),
            ("resource_pool", below(&self.path(pool), &format!("{compute}/Resources"))),
            ("cluster", compute),
            ("datastore", self.path(datastore)),
            ("network", self.path(network)),
            ("folder", below(folder_path, &format!("{}/vm", self.path(datacenter)))),
        ]);
        names.extend(host.as_ref().map(|host| ("host", self.path(host))));
        names
    }

    fn name<'i>(&'i self, object: &'i Moref) -> &'i str {
        self.0.get(object).map_or(&object.id, |entity| &entity.name)
    }

    /// The inventory path, e.g. `/dc1/vm/templates`.
    pub(super) fn path(&self, object: &Moref) -> String {
        let names: Vec<_> = self.ancestors(object).map(|object| self.name(object)).collect();
        names.into_iter().rev().fold(String::new(), |path, name| path + "/" + name)
    }

    /// The object and those above it, without the root.
    fn ancestors<'i>(&'i self, object: &'i Moref) -> impl Iterator<Item = &'i Moref> {
        let known = |object: &&'i Moref| self.0.get(*object).is_some_and(|entity| entity.parent.is_some());
        let parent = |object: &&'i Moref| self.0.get(*object).and_then(|entity| entity.parent.as_ref());
        // Bounds what a cycle could do.
        std::iter::successors(Some(object), parent).take(64).take_while(known)
    }

    fn of_kind<'i>(&'i self, kinds: &'i [&str]) -> impl Iterator<Item = &'i Moref> {
        self.0.keys().filter(|object| kinds.contains(&object.kind.as_str()))
    }

    fn child(&self, parent: &Moref, name: &str) -> Option<&Moref> {
        let mut children = self.0.iter().filter(|(_, entity)| entity.parent.as_ref() == Some(parent));
        children.find(|(_, entity)| entity.name == name).map(|(object, _)| object)
    }

    fn datacenter(&self, name: &str) -> Option<&Moref> {
        self.of_kind(&["Datacenter"]).find(|object| self.path(object) == name || same(self.name(object), name))
    }

    /// The pool of a cluster, a host, or the cluster that a host belongs to.
    fn root_pool(&self, place: &Moref) -> Option<Moref> {
        let compute = self.ancestors(place).find(|object| COMPUTE.contains(&object.kind.as_str()))?;
        let parent_of = |object: &Moref| self.0.get(object).and_then(|entity| entity.parent.as_ref());
        self.of_kind(&["ResourcePool"]).find(|pool| parent_of(pool) == Some(compute)).cloned()
    }

    fn absent(&self, field: &str, wanted: &str, place: &str, candidates: &[&Moref]) -> String {
        let mut near: Vec<_> = candidates.iter().map(|object| (self.name(object), self.path(object))).collect();
        let last = wanted.rsplit('/').next().unwrap_or(wanted).to_lowercase();
        near.sort_by_cached_key(|(name, path)| {
            (strsim::damerau_levenshtein(&name.to_lowercase(), &last), path.clone())
        });
        near.dedup();
        let listed: Vec<_> = near.iter().take(NEAR_NAMES).map(|(_, path)| format!("`{path}`")).collect();
        let rest = match near.len().saturating_sub(NEAR_NAMES) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        if listed.is_empty() {
            return format!("{field} `{wanted}`: {place} has none that the user may see");
        }
        format!("{field} `{wanted}`: {place} has {}{rest}", listed.join(", "))
    }
}

/// vCenter writes some characters of a name as `%` and digits.
fn same(name: &str, wanted: &str) -> bool {
    name == wanted || name.replace("%2f", "/").replace("%5c", "\\").replace("%25", "%") == wanted
}

/// Looks for objects in one part of a datacenter.
#[derive(Clone, Copy)]
struct Search<'i> {
    inventory: &'i Inventory,
    datacenter: &'i Moref,
    /// The folder under the datacenter that holds all objects of the kind.
    root: &'static str,
}

impl<'i> Search<'i> {
    /// By name, by inventory path, or by a path below the kind's own folder.
    fn matches(self, name: &str, kinds: &'static [&'static str]) -> (Vec<&'i Moref>, Vec<&'i Moref>) {
        let inventory = self.inventory;
        let base = format!("{}/{}", inventory.path(self.datacenter), self.root);
        let all: Vec<_> =
            inventory.of_kind(kinds).filter(|object| inventory.path(object).starts_with(&format!("{base}/"))).collect();
        let is = |object: &&&Moref| {
            let path = inventory.path(object);
            same(inventory.name(object), name) || path == name || path == format!("{base}/{name}")
        };
        (all.iter().filter(is).copied().collect(), all)
    }

    fn choose(self, field: &str, name: &str, found: &[&'i Moref], all: &[&'i Moref]) -> Result<Moref, String> {
        match found {
            [one] => Ok((*one).clone()),
            [] => {
                let place = format!("datacenter `{}`", self.inventory.name(self.datacenter));
                Err(self.inventory.absent(field, name, &place, all))
            }
            several => {
                let mut paths: Vec<_> =
                    several.iter().map(|object| format!("`{}`", self.inventory.path(object))).collect();
                paths.sort();
                Err(format!("{field} `{name}` could be {}; write one of these paths", paths.join(" or ")))
            }
        }
    }

    fn one(self, field: &str, name: &str, kinds: &'static [&'static str]) -> Result<Moref, String> {
        let (found, all) = self.matches(name, kinds);
        self.choose(field, name, &found, &all)
    }

    /// A cluster, a host that stands alone, or one host of a cluster.
    fn compute(self, name: &str) -> Result<Moref, String> {
        let (found, all) = self.matches(name, COMPUTE);
        // A host that stands alone has the name of its compute resource.
        if found.is_empty()
            && let (hosts, _) = self.matches(name, &["HostSystem"])
            && !hosts.is_empty()
        {
            return self.choose("cluster", name, &hosts, &all);
        }
        self.choose("cluster", name, &found, &all)
    }

    fn pool(self, name: &str, within: Option<&Moref>) -> Result<Moref, String> {
        let (mut found, mut all) = self.matches(name, &["ResourcePool"]);
        let compute = within
            .and_then(|place| self.inventory.ancestors(place).find(|object| COMPUTE.contains(&object.kind.as_str())));
        if let Some(compute) = compute {
            let inside = |pool: &&Moref| self.inventory.ancestors(pool).any(|object| object == compute);
            found.retain(inside);
            all.retain(inside);
        }
        self.choose("resourcePool", name, &found, &all)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::contract::CredentialSlot;

    /// Objects by path, each below the longest path before it.
    fn inventory(objects: &[(&str, &str)]) -> Inventory {
        let root = Moref { kind: "Folder".into(), id: "root".into() };
        let mut tree = BTreeMap::from([(root.clone(), Entity { name: "Datacenters".into(), parent: None })]);
        for (kind, path) in objects {
            let (parent, name) = path.rsplit_once('/').unwrap();
            let known = |id: &str| tree.keys().find(|object| object.id == id).cloned();
            let parent = if parent.is_empty() { root.clone() } else { known(parent).expect(parent) };
            let object = Moref { kind: (*kind).into(), id: (*path).into() };
            tree.insert(object, Entity { name: name.into(), parent: Some(parent) });
        }
        Inventory(tree)
    }

    fn sample() -> Inventory {
        inventory(&[
            ("Datacenter", "/dc1"),
            ("Folder", "/dc1/vm"),
            ("Folder", "/dc1/vm/templates"),
            ("Folder", "/dc1/vm/team"),
            ("Folder", "/dc1/vm/team/templates"),
            ("Folder", "/dc1/host"),
            ("ClusterComputeResource", "/dc1/host/c1"),
            ("HostSystem", "/dc1/host/c1/h1"),
            ("ResourcePool", "/dc1/host/c1/Resources"),
            ("ResourcePool", "/dc1/host/c1/Resources/images"),
            ("ClusterComputeResource", "/dc1/host/c2"),
            ("ResourcePool", "/dc1/host/c2/Resources"),
            ("ResourcePool", "/dc1/host/c2/Resources/images"),
            ("ComputeResource", "/dc1/host/alone"),
            ("HostSystem", "/dc1/host/alone/alone"),
            ("ResourcePool", "/dc1/host/alone/Resources"),
            ("Folder", "/dc1/datastore"),
            ("StoragePod", "/dc1/datastore/pod"),
            ("Datastore", "/dc1/datastore/pod/ds1"),
            ("Datastore", "/dc1/datastore/ds2"),
            ("Folder", "/dc1/network"),
            ("Network", "/dc1/network/VM Network"),
            ("DistributedVirtualPortgroup", "/dc1/network/a%2fb"),
            ("Datacenter", "/dc2"),
            ("Folder", "/dc2/datastore"),
            ("Datastore", "/dc2/datastore/ds3"),
        ])
    }

    fn target() -> VsphereTarget {
        VsphereTarget {
            server: "vc".into(),
            slot: CredentialSlot("vsphere".into()),
            insecure: false,
            thumbprint: None,
            datacenter: "dc1".into(),
            cluster: Some("c1".into()),
            resource_pool: None,
            datastore: "ds1".into(),
            network: "VM Network".into(),
            folder: None,
            template_name: "t".into(),
            replace_existing: false,
            vmx_version: 15,
            convert_to_template: true,
            create_snapshot: false,
            content_library: None,
        }
    }

    #[rstest]
    #[case::cluster_alone(|_: &mut VsphereTarget| (), "/dc1/host/c1/Resources", None)]
    #[case::cluster_by_path(|t: &mut VsphereTarget| t.cluster = Some("/dc1/host/c2".into()), "/dc1/host/c2/Resources", None)]
    #[case::host_alone(|t: &mut VsphereTarget| t.cluster = Some("alone".into()), "/dc1/host/alone/Resources", None)]
    #[case::host_of_a_cluster(
        |t: &mut VsphereTarget| t.cluster = Some("h1".into()), "/dc1/host/c1/Resources", Some("/dc1/host/c1/h1"))]
    #[case::pool_within_cluster(
        |t: &mut VsphereTarget| t.resource_pool = Some("images".into()), "/dc1/host/c1/Resources/images", None)]
    #[case::pool_by_path(
        |t: &mut VsphereTarget| {
            t.cluster = None;
            t.resource_pool = Some("/dc1/host/c2/Resources/images".into());
        },
        "/dc1/host/c2/Resources/images", None)]
    #[case::pool_by_path_below_its_folder(
        |t: &mut VsphereTarget| { t.cluster = None; t.resource_pool = Some("c2/Resources/images".into()); },
        "/dc1/host/c2/Resources/images", None)]
    fn finds_the_place_to_import_to(
        #[case] change: fn(&mut VsphereTarget),
        #[case] pool: &str,
        #[case] host: Option<&str>,
    ) {
        let mut target = target();
        change(&mut target);
        let place = sample().resolve(&target).unwrap();
        assert_eq!((place.pool.id.as_str(), place.host.as_ref().map(|host| host.id.as_str())), (pool, host));
        assert_eq!(place.folder_path, "/dc1/vm");
        assert_eq!(place.datastore.id, "/dc1/datastore/pod/ds1");
    }

    #[rstest]
    #[case::cluster(|_: &mut VsphereTarget| (), ["/dc1/host/c1", "", ""], None)]
    #[case::pool_by_path(
        |t: &mut VsphereTarget| {
            t.cluster = None;
            t.resource_pool = Some("/dc1/host/c2/Resources/images".into());
        },
        ["/dc1/host/c2", "images", ""], None)]
    #[case::folder_by_path(
        |t: &mut VsphereTarget| t.folder = Some("/dc1/vm/team/templates".into()),
        ["/dc1/host/c1", "", "team/templates"], None)]
    #[case::host_of_a_cluster(
        |t: &mut VsphereTarget| t.cluster = Some("h1".into()), ["/dc1/host/c1", "", ""], Some("/dc1/host/c1/h1"))]
    fn packer_is_told_the_very_objects_that_were_found(
        #[case] change: fn(&mut VsphereTarget),
        #[case] expected: [&str; 3],
        #[case] host: Option<&str>,
    ) {
        let mut target = target();
        change(&mut target);
        let inventory = sample();
        let names = inventory.for_packer(&inventory.resolve(&target).unwrap());
        assert_eq!([&names["cluster"], &names["resource_pool"], &names["folder"]], expected);
        assert_eq!(names.get("host").map(String::as_str), host);
        let others = [&names["datacenter"], &names["datastore"], &names["network"]];
        assert_eq!(others, ["/dc1", "/dc1/datastore/pod/ds1", "/dc1/network/VM Network"]);
    }

    #[test]
    fn names_with_a_slash_are_found_as_people_write_them() {
        for network in ["a/b", "a%2fb", "/dc1/network/a%2fb"] {
            let place = sample().resolve(&VsphereTarget { network: network.into(), ..target() }).unwrap();
            assert_eq!(place.network.id, "/dc1/network/a%2fb");
        }
    }

    #[test]
    fn all_absent_names_are_told_at_once_with_the_near_ones() {
        let wrong = VsphereTarget {
            cluster: Some("C11".into()),
            datastore: "ds3".into(),
            network: "VM Netwrk".into(),
            folder: Some("templates".into()),
            ..target()
        };
        let problems = sample().resolve(&wrong).unwrap_err();
        let expected = [
            "cluster `C11`: datacenter `dc1` has `/dc1/host/c1`, `/dc1/host/c2`, `/dc1/host/alone`",
            "datastore `ds3`: datacenter `dc1` has `/dc1/datastore/ds2`, `/dc1/datastore/pod/ds1`",
            "network `VM Netwrk`: datacenter `dc1` has `/dc1/network/VM Network`, `/dc1/network/a%2fb`",
            "folder `templates` could be `/dc1/vm/team/templates` or `/dc1/vm/templates`; write one of these paths",
        ];
        assert_eq!(problems, expected);
        let problems = sample().resolve(&VsphereTarget { datacenter: "dc3".into(), ..target() }).unwrap_err();
        assert_eq!(problems, ["datacenter `dc3`: the vCenter has `/dc1`, `/dc2`"]);
    }

    #[test]
    fn a_pool_of_another_cluster_is_absent() {
        let wrong = VsphereTarget { cluster: Some("alone".into()), resource_pool: Some("images".into()), ..target() };
        let problems = sample().resolve(&wrong).unwrap_err();
        assert_eq!(problems, ["resourcePool `images`: datacenter `dc1` has `/dc1/host/alone/Resources`"]);
    }
}
