//! Wall time as people write it: days, hours and weeks of UTC.
//!
//! Nothing here reads a clock: seconds since 1970 come in. They make names and ages for people; nothing that must
//! be right depends on them (promise P9).

use core::fmt;

const DAY: u64 = 86400;
/// Days from 0000-03-01, with which years of the calculation begin, to 1970-01-01.
const DAYS_BEFORE_1970: u64 = 719_468;
/// Days of 400 years.
const ERA: u64 = 146_097;

/// A moment in UTC, to the second.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Utc {
    /// Year.
    pub year: u64,
    /// Month, from 1.
    pub month: u64,
    /// Day of the month, from 1.
    pub day: u64,
    /// Hour, 0..24.
    pub hour: u64,
    /// Minute.
    pub minute: u64,
    /// Second; leap seconds are not counted.
    pub second: u64,
}

impl Utc {
    /// So many seconds after 1970 began.
    pub fn at(unix_seconds: u64) -> Utc {
        let (days, rest) = (unix_seconds / DAY, unix_seconds % DAY);
        // Years that begin with March have their leap day at the end.
        let shifted = days + DAYS_BEFORE_1970;
        let (era, of_era) = (shifted / ERA, shifted % ERA);
        let year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let shifted_month = (5 * of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Utc {
            year: era * 400 + year + u64::from(month <= 2),
            month,
            day: of_year - (153 * shifted_month + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// As a part of a name: `2026-11-29T02-15-07Z`.
    pub fn name(&self) -> String {
        let Utc { year, month, day, hour, minute, second } = self;
        format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}Z")
    }
}

/// `2026-11-29 02:15:07 UTC`.
impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Utc { year, month, day, hour, minute, second } = self;
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

/// Year and week as ISO 8601 counts them: weeks begin on Monday, and belong to the year of their Thursday.
pub fn iso_week(unix_seconds: u64) -> (u64, u64) {
    let days = unix_seconds / DAY;
    // 1970 began on a Thursday.
    let weekday = (days + 3) % 7;
    let thursday = days + 3 - weekday;
    let year = Utc::at(thursday * DAY).year;
    let before = year - 1;
    let new_year = 365 * before + before / 4 - before / 100 + before / 400 - 719_162;
    (year, (thursday - new_year) / 7 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_that_date_prints() {
        // date -u -d @N '+%F %T'
        for (unix, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_795_918_507, "2026-11-29 02:15:07 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(Utc::at(unix).to_string(), text);
        }
        assert_eq!(Utc::at(1_795_918_507).name(), "2026-11-29T02-15-07Z");
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_one_before() {
        let mut last = Utc::at(0);
        for day in 1..ERA {
            let now = Utc::at(day * DAY);
            let is_next = match (now.year - last.year, now.month, now.day) {
                (0, month, 1) => month == last.month + 1 && last.day >= 28,
                (0, month, day) => month == last.month && day == last.day + 1,
                (1, 1, 1) => (last.month, last.day) == (12, 31),
                _ => false,
            };
            assert!(is_next, "{last} is followed by {now}");
            last = now;
        }
        assert_eq!((last.year, last.month, last.day), (2369, 12, 31));
    }

    #[test]
    fn weeks_are_those_that_date_prints() {
        // date -u -d @N '+%G-W%V'
        for (unix, week) in [
            (0, (1970, 1)),
            (1_795_918_507, (2026, 48)),
            (1_798_761_600, (2026, 53)), // 2027-01-01, a Friday
            (1_799_020_800, (2027, 1)),  // 2027-01-04, a Monday
            (1_230_508_800, (2009, 1)),  // 2008-12-29, a Monday
        ] {
            assert_eq!(iso_week(unix), week, "{}", Utc::at(unix));
        }
    }
}
