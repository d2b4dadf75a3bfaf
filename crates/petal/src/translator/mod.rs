//! The three maps (paper 2.1): VDir and GMap are global, PMap is local to a disk.
//!
//! `<vdisk, offset>` -VDir-> `<family, (lineage, epoch), GMap>` -GMap-> `<slot, tuple of servers>`
//! -PMap, at such a server-> `<disk, address>`.

pub mod gmap;
pub mod vdir;
pub mod visible;
