//! Sizes as people write them: `10GiB`, `512M`, `1.5T`. Powers of 1024, with or without the `i`.

use core::fmt;

/// One kibibyte.
pub const KIB: u64 = 1 << 10;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;
/// One tebibyte.
pub const TIB: u64 = 1 << 40;

/// A size in bytes that prints as a person would write it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 6] =
            [(1 << 60, "EiB"), (1 << 50, "PiB"), (TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")];
        for (unit, name) in UNITS {
            if self.0 >= unit {
                return if self.0.is_multiple_of(unit) {
                    write!(f, "{} {name}", self.0 / unit)
                } else {
                    write!(f, "{:.1} {name}", self.0 as f64 / unit as f64)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// There is no number in front.
    #[error("'{0}' does not begin with a number; write a size like 512M, 10GiB or 1T")]
    NoNumber(String),
    /// What follows the number is no unit.
    #[error("'{0}' is not a unit of size; use B, K, M, G, T, P or E (powers of 1024)")]
    UnknownUnit(String),
    /// It does not fit into 64 bits.
    #[error("'{0}' is too large; sizes end below 2^64 bytes")]
    TooLarge(String),
}

/// Reads a size: a number, an optional fraction, an optional unit.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim());
    if number.is_empty() || number.matches('.').count() > 1 || number == "." {
        return Err(SizeError::NoNumber(text.into()));
    }
    let shift = match unit.to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(SizeError::UnknownUnit(unit.into())),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let too_large = || SizeError::TooLarge(text.into());
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_large())? };
    let mut bytes = whole.checked_mul(1u128 << shift).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        let fraction = &fraction[..fraction.len().min(18)];
        let value: u128 = fraction.parse().map_err(|_| too_large())?;
        bytes += (value << shift) / 10u128.pow(fraction.len() as u32);
    }
    u64::try_from(bytes).map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("10GiB"), Ok(10 * GIB));
        assert_eq!(parse_size("10g"), Ok(10 * GIB));
        assert_eq!(parse_size("1.5 T"), Ok(TIB + TIB / 2));
        assert_eq!(parse_size("512MB"), Ok(512 * MIB));
        assert!(matches!(parse_size("ten"), Err(SizeError::NoNumber(_))));
        assert!(matches!(parse_size("10 apples"), Err(SizeError::UnknownUnit(_))));
        assert!(matches!(parse_size("16E"), Err(SizeError::TooLarge(_))));
        assert!(matches!(parse_size("99999999999999999999999999999999999999999"), Err(SizeError::TooLarge(_))));
    }

    #[test]
    fn sizes_print_in_the_largest_unit() {
        assert_eq!(Size(10 * GIB).to_string(), "10 GiB");
        assert_eq!(Size(1536 * MIB).to_string(), "1.5 GiB");
        assert_eq!(Size(17).to_string(), "17 B");
    }
}
