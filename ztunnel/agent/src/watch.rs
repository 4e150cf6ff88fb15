//! The agent's two inputs (settled D3): pods from the CNI plugin, orders from control.

pub mod cni;
pub mod control;
