//! Addresses: `unix:/path/to/socket` or `host:port`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Longest path of a unix socket that Linux takes (108 bytes with the zero at the end).
const UNIX_PATH_MAX: usize = 107;

/// Where to listen or to connect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `host:port`; the host is looked up at each connect.
    Tcp(String),
}

/// Why a text is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither of the two forms.
    #[error("'{0}' is not an address: write unix:/path/of/socket or host:port")]
    Form(String),
    /// The port is none.
    #[error("'{0}' has no valid port: a port is a number from 1 to 65535 (0 to listen on any free one)")]
    Port(String),
    /// The path does not fit into the kernel's structure.
    #[error("the socket path '{path}' has {length} bytes; Linux takes {UNIX_PATH_MAX}: use a shorter directory")]
    PathTooLong {
        /// The path.
        path: String,
        /// Its length.
        length: usize,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.len() {
                0 => Err(AddressError::Form(text.into())),
                length if length > UNIX_PATH_MAX => Err(AddressError::PathTooLong { path: path.into(), length }),
                _ => Ok(Address::Unix(path.into())),
            };
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() => match port.parse::<u16>() {
                Ok(_) => Ok(Address::Tcp(text.into())),
                Err(_) => Err(AddressError::Port(text.into())),
            },
            _ => Err(AddressError::Form(text.into())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed_and_nonsense_is_explained() {
        for text in ["unix:/tmp/a.sock", "127.0.0.1:7000", "[::1]:7000", "host.example:0"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "7000", ":7000"] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Form(text.into())));
        }
        assert_eq!("host:http".parse::<Address>(), Err(AddressError::Port("host:http".into())));
        assert_eq!("host:70000".parse::<Address>(), Err(AddressError::Port("host:70000".into())));
        let long = format!("unix:/{}", "x".repeat(200));
        assert!(matches!(long.parse::<Address>(), Err(AddressError::PathTooLong { length: 201, .. })));
    }
}
