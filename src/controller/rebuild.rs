//! When an image is built again though its specification did not change: at the times of a schedule, and for a new
//! release. Pure.

use std::time::Duration;

use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};
use jiff::{Timestamp, tz::TimeZone};
use sha2::{Digest, Sha256};

use super::validate::Refusal;
use crate::api::v1alpha1::{NodeImageBuildStatus, Rebuild, ReleaseStatus};

/// Builds of one schedule start within this time after it, each at a moment of its own.
const SPREAD: Duration = Duration::from_secs(300);
/// Time zone of schedules that name none.
const DEFAULT_ZONE: &str = "Etc/UTC";

/// Why a finished build may have to be followed by another one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Due {
    /// This scheduled time has come.
    Schedule(Timestamp),
    /// The release manifest is not the one that the newest build was compared with.
    Manifest,
}

/// Times to build at.
#[derive(Clone, Debug)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
    /// How long after each time of the cron expression this resource's turn is.
    offset: Duration,
}

impl Schedule {
    /// The schedule of the resource with this uid, if it has one.
    pub fn of(rebuild: &Rebuild, uid: &str) -> Result<Option<Self>, Refusal> {
        let Some(expression) = &rebuild.schedule else { return Ok(None) };
        let refused = |field: &str, found: &str, why: String| {
            Refusal::new("InvalidSpec", format!("spec.rebuild.{field} is `{found}`: {why}"))
        };
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(expression).map_err(|error| {
            refused("schedule", expression, format!("{error}; write five cron fields, e.g. 0 3 * * 1"))
        })?;
        let zone = rebuild.time_zone.as_deref().unwrap_or(DEFAULT_ZONE);
        let zone = TimeZone::get(zone).map_err(|_| {
            let why = "there is no such time zone; write a name of the time zone database, e.g. Europe/Berlin";
            refused("timeZone", zone, why.to_owned())
        })?;
        Ok(Some(Self { cron, zone, offset: offset(uid) }))
    }

    /// The first time after `now`; none if the expression never comes true, such as a 30 February.
    pub fn next(&self, now: Timestamp) -> Option<Timestamp> {
        let from = now.checked_sub(self.offset).ok()?.to_zoned(self.zone.clone());
        let next = self.cron.find_next_occurrence(&from, false).ok()?;
        next.timestamp().checked_add(self.offset).ok()
    }
}

/// A moment in [`SPREAD`], the same one whenever the same resource is asked for.
fn offset(uid: &str) -> Duration {
    let digest = Sha256::digest(uid);
    let number = u64::from_be_bytes(std::array::from_fn(|index| digest[index]));
    Duration::from_secs(number % SPREAD.as_secs())
}

/// Says what is wrong with the schedule, before anything is built.
pub fn check(rebuild: &Rebuild) -> Result<(), Refusal> {
    match Schedule::of(rebuild, "")? {
        Some(schedule) if schedule.next(Timestamp::now()).is_none() => Err(Refusal::new(
            "InvalidSpec",
            format!(
                "spec.rebuild.schedule is `{}`, which never comes: write a date that exists",
                rebuild.schedule.as_deref().unwrap_or_default()
            ),
        )),
        Some(_) | None => Ok(()),
    }
}

/// What a build would be made from now.
#[derive(Clone, Copy, Debug)]
pub struct Found<'f> {
    pub inputs_digest: &'f str,
    pub release: &'f ReleaseStatus,
    pub base: BaseNow<'f>,
}

/// What is known of the base before a build.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BaseNow<'f> {
    /// The specification has its digest, which is one of the inputs.
    Fixed,
    /// It has this digest now.
    Digest(&'f str),
    /// Only a build can tell.
    Unknown,
}

/// Why a build is started, as the status has it; none if the newest build is made from just that.
pub fn cause(rebuild: &Rebuild, due: Due, status: &NodeImageBuildStatus, found: Found<'_>) -> Option<String> {
    let Found { inputs_digest, release, base } = found;
    let other_inputs = status.inputs_digest.as_deref() != Some(inputs_digest);
    let other_release = status.release.as_ref() != Some(release);
    match due {
        Due::Schedule(at) => {
            let other_base = match base {
                BaseNow::Fixed => false,
                BaseNow::Digest(digest) => status.base_digest.as_deref() != Some(digest),
                BaseNow::Unknown => true,
            };
            let again = rebuild.force || status.failure.is_some();
            (again || other_inputs || other_base).then(|| format!("schedule {}", second(at)))
        }
        Due::Manifest => (other_release && other_inputs)
            .then(|| format!("release {} {}", release.eksa_release, release.eksd_release)),
    }
}

fn second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn rebuild(schedule: &str, zone: Option<&str>) -> Rebuild {
        Rebuild { schedule: Some(schedule.into()), time_zone: zone.map(Into::into), ..Rebuild::default() }
    }

    /// The times of the expression itself, without the resource's offset.
    fn times(schedule: &str, zone: Option<&str>, after: &str, count: usize) -> Vec<String> {
        let mut schedule = Schedule::of(&rebuild(schedule, zone), "uid").unwrap().unwrap();
        schedule.offset = Duration::ZERO;
        let first: Timestamp = after.parse().unwrap();
        std::iter::successors(schedule.next(first), |last| schedule.next(*last))
            .take(count)
            .map(|at| at.to_string())
            .collect()
    }

    #[rstest]
    #[case::mondays("0 3 * * 1", None, "2026-11-26T10:00:00Z", &["2026-11-30T03:00:00Z", "2026-12-07T03:00:00Z"])]
    #[case::in_a_zone("0 3 * * 1", Some("Europe/Berlin"), "2026-11-26T10:00:00Z", &["2026-11-30T02:00:00Z"])]
    #[case::daily("@daily", None, "2026-11-26T10:00:00Z", &["2026-11-27T00:00:00Z"])]
    #[case::monthly("@monthly", None, "2026-11-26T10:00:00Z", &["2026-12-01T00:00:00Z"])]
    #[case::exactly_at_the_time("0 3 * * *", None, "2026-11-26T03:00:00Z", &["2026-11-27T03:00:00Z"])]
    #[case::leap_day("0 0 29 2 *", None, "2026-11-26T10:00:00Z", &["2028-02-29T00:00:00Z"])]
    // 02:30 does not exist there on that day, and exists twice in October.
    #[case::clock_goes_forward("30 2 * * *", Some("Europe/Berlin"), "2026-03-28T12:00:00Z",
        &["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"])]
    #[case::clock_goes_back("30 2 * * *", Some("Europe/Berlin"), "2026-10-24T12:00:00Z",
        &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"])]
    fn times_are_those_of_the_zone(
        #[case] schedule: &str,
        #[case] zone: Option<&str>,
        #[case] after: &str,
        #[case] expected: &[&str],
    ) {
        assert_eq!(times(schedule, zone, after, expected.len()), expected);
    }

    #[rstest]
    #[case("61 3 * * *", None, "spec.rebuild.schedule is `61 3 * * *`")]
    #[case("0 3 * * 1", Some("Mars/Olympus"), "spec.rebuild.timeZone is `Mars/Olympus`: there is no such time zone")]
    #[case("0 0 30 2 *", None, "which never comes")]
    #[case("0 0 3 * * *", None, "write five cron fields")]
    fn schedules_that_mean_nothing_are_refused(
        #[case] schedule: &str,
        #[case] zone: Option<&str>,
        #[case] message: &str,
    ) {
        let refusal = check(&rebuild(schedule, zone)).unwrap_err();
        assert!(refusal.message.contains(message), "{refusal:?}");
    }

    #[test]
    fn resources_of_one_schedule_start_apart_and_each_always_at_its_own_moment() {
        let now: Timestamp = "2026-11-26T10:00:00Z".parse().unwrap();
        let starts: std::collections::BTreeSet<_> = (0..100)
            .map(|n| {
                let uid = format!("uid-{n}");
                let next = || Schedule::of(&rebuild("0 3 * * *", None), &uid).unwrap().unwrap().next(now).unwrap();
                assert_eq!(next(), next());
                next()
            })
            .collect();
        assert!(starts.len() > 60, "{}", starts.len());
        let first: Timestamp = "2026-11-27T03:00:00Z".parse().unwrap();
        assert!(starts.iter().all(|at| *at >= first && at.duration_since(first).as_secs() < 300));
    }

    proptest! {
        #[test]
        fn the_next_time_is_later_and_nothing_lies_between(
            minute in 0..60u8, hour in 0..24u8, uid in "[a-z0-9]{8}", now in 1_700_000_000i64..2_000_000_000,
        ) {
            let schedule = Schedule::of(&rebuild(&format!("{minute} {hour} * * *"), None), &uid).unwrap().unwrap();
            let now = Timestamp::from_second(now).unwrap();
            let next = schedule.next(now).unwrap();
            prop_assert!(next > now && next.duration_since(now).as_secs() <= 24 * 3600);
            prop_assert_eq!(schedule.next(next).unwrap().duration_since(next).as_secs(), 24 * 3600);
        }
    }

    #[rstest]
    #[case::same(Due::Schedule(Timestamp::UNIX_EPOCH), false, "a", 47, BaseNow::Digest("sha256:1"), None)]
    #[case::unknown_base(
        Due::Schedule(Timestamp::UNIX_EPOCH),
        false,
        "a",
        47,
        BaseNow::Unknown,
        Some("schedule 1970-01-01T00:00:00Z")
    )]
    #[case::forced(
        Due::Schedule(Timestamp::UNIX_EPOCH),
        true,
        "a",
        47,
        BaseNow::Fixed,
        Some("schedule 1970-01-01T00:00:00Z")
    )]
    #[case::inputs(
        Due::Schedule(Timestamp::UNIX_EPOCH),
        false,
        "b",
        47,
        BaseNow::Fixed,
        Some("schedule 1970-01-01T00:00:00Z")
    )]
    #[case::base(
        Due::Schedule(Timestamp::UNIX_EPOCH),
        false,
        "a",
        47,
        BaseNow::Digest("sha256:2"),
        Some("schedule 1970-01-01T00:00:00Z")
    )]
    #[case::same_release(Due::Manifest, false, "a", 47, BaseNow::Fixed, None)]
    #[case::moved_mirror(Due::Manifest, true, "b", 47, BaseNow::Fixed, None)]
    #[case::new_release(Due::Manifest, false, "b", 48, BaseNow::Fixed, Some("release v0.26.1 kubernetes-1-31-eks-48"))]
    fn same_inputs_are_built_again_only_when_forced_or_nobody_knows(
        #[case] due: Due,
        #[case] force: bool,
        #[case] inputs_digest: &str,
        #[case] number: u64,
        #[case] base: BaseNow<'_>,
        #[case] expected: Option<&str>,
    ) {
        let release = |number| ReleaseStatus {
            eksa_release: "v0.26.1".into(),
            bundle_number: 112,
            eksd_release: format!("kubernetes-1-31-eks-{number}"),
            kubernetes_version: "v1.31.14".into(),
        };
        let status = NodeImageBuildStatus {
            inputs_digest: Some("a".into()),
            release: Some(release(47)),
            base_digest: Some("sha256:1".into()),
            ..NodeImageBuildStatus::default()
        };
        let rebuild = Rebuild { force, ..rebuild("@daily", None) };
        let release = release(number);
        let found = Found { inputs_digest, release: &release, base };
        assert_eq!(cause(&rebuild, due, &status, found).as_deref(), expected);
    }
}
