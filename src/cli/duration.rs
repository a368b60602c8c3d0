//! Durations as Go programs write them: `1h30m`, `90s`.

use std::time::Duration;

/// Reads one of at most 136 years.
pub(super) fn parse(text: &str) -> Result<Duration, &'static str> {
    read(text).ok_or("write a duration such as 15m or 1h30m")
}

fn read(text: &str) -> Option<Duration> {
    // What reads it takes nothing for zero, and ends the program where a part is negative, or more than can be counted.
    const LONGEST: usize = 16;
    if text.is_empty() || text.len() > LONGEST || text.contains('-') {
        return None;
    }
    let duration = Duration::from(text.parse::<kube::core::Duration>().ok()?);
    u32::try_from(duration.as_secs()).ok().map(|_| duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_writes() {
        for (text, seconds) in [("90s", 90), ("1h30m", 5400), ("24h0m0s", 86_400), ("0s", 0)] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_none_without_a_panic() {
        for text in ["", "40", "m", "-5m", "1h-5m", "99999999999999999999h", "999999999999999h", "1193047h", "1x"] {
            assert!(parse(text).unwrap_err().contains("15m"), "{text}");
        }
    }
}
