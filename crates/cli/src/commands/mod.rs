//! The subcommands.

pub mod attach;
pub mod bench;
pub mod detach;
pub mod disk;
pub mod down;
pub mod history;
pub mod init;
pub mod inspect;
pub mod join;
pub mod log;
pub mod nbd;
pub mod server;
pub mod status;
pub mod up;
pub mod verify;
pub mod what_if;
