//! The contract with flannel, row by row: `docs/compatibility.md` lists every row and its test.
//!
//! A test is named after its row: `s03_row05_…` is row 3.5 there. Rows whose test lies next to
//! the code are listed there too; here is what no other test asks.

mod agent;
mod document;
#[path = "../etcd_server/mod.rs"]
mod etcd_server;
mod files;
mod flags;
mod lifecycle;
mod mixed_registry;
#[path = "../namespace/mod.rs"]
mod namespace;
mod network_config;
mod registry;
mod uplink;
#[path = "../uplink_lookup/mod.rs"]
mod uplink_lookup;
