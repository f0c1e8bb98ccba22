//! The vxlan backend.
