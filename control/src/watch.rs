//! Where objects come from: a folder of YAML.
//!
//! ```text
//! folder ──notify, poll──▶ Folder ──▶ Changes (all or nothing) ──▶ index
//! ```
//! Invariant: what is published is whole and valid. A folder with a mistake in it changes nothing: the
//! last good objects stay, and the mistake is named with file, line and remedy.

pub mod claims;
pub mod files;
mod mistake;
pub mod objects;
