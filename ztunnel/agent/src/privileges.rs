//! What the agent may do: enter namespaces and program their networks, and nothing else.
//!
//! Invariant: once [`keep_two`] has run on a thread, that thread and those it starts have two capabilities,
//! and no program that it might start has more.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::{
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{
        CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs,
    },
};
use std::io;

/// Entering a namespace takes SYS_ADMIN; rules, marks and transparent sockets take NET_ADMIN.
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::NET_ADMIN);

/// What holds for the whole process: no core, no debugger, no new privileges, and as many descriptors as
/// the container allows, since every pod takes some.
pub fn close_process() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    set_no_new_privs(true)?;
    for capability in CapabilitySet::all().difference(KEPT).iter() {
        // One that this kernel does not know cannot be had either.
        if let Err(error) = remove_capability_from_bounding_set(capability)
            && error != rustix::io::Errno::INVAL
        {
            return Err(error.into());
        }
    }
    Ok(())
}

/// Leaves this thread the two capabilities that it needs.
pub fn keep_two() -> io::Result<()> {
    let sets = CapabilitySets {
        effective: KEPT,
        permitted: KEPT,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}
