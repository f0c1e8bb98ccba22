//! Lease attributes: what a node publishes about itself (contract section 5.2).

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    json_object::{JsonObject, WrongType, compact},
    mac::{InvalidMac, MacAddr},
};

/// `BackendType` of the vxlan backend.
pub const VXLAN: &str = "vxlan";

/// The value of a lease. The JSON text is byte-identical to flannel's: compact,
/// in the order of the fields here.
#[derive(Debug, Clone, Serialize)]
pub struct LeaseAttributes {
    /// Where other nodes reach this one.
    #[serde(rename = "PublicIP")]
    pub public_ip: Ipv4Addr,
    /// The same for an IPv6 underlay.
    #[serde(rename = "PublicIPv6")]
    pub public_ipv6: Option<Ipv6Addr>,
    /// `vxlan`, `host-gw`, …; empty when absent.
    #[serde(rename = "BackendType", skip_serializing_if = "String::is_empty")]
    pub backend_type: String,
    /// What the backend needs to know of the peer, without white space between tokens.
    #[serde(rename = "BackendData", skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<Box<RawValue>>,
    /// The same for the IPv6 tunnel.
    #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
    pub backend_v6_data: Option<Box<RawValue>>,
}

/// `BackendData` of a vxlan lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanData {
    /// VXLAN network identifier; old leases lack it.
    pub vni: Option<u32>,
    /// MAC address of the node's tunnel device.
    pub vtep_mac: MacAddr,
}

/// A text that is no lease.
#[derive(Debug, thiserror::Error)]
pub enum AttributesError {
    /// No JSON object, or cut short; the text has line and column.
    #[error("no lease attributes: {0}")]
    Json(#[from] serde_json::Error),
    /// A known key holds something else than its type.
    #[error("bad lease attributes: {0}")]
    WrongType(#[from] WrongType),
}

/// Why a lease has no usable vxlan data.
#[derive(Debug, thiserror::Error)]
pub enum VxlanDataError {
    /// The lease carries no `BackendData`.
    #[error("BackendData is missing")]
    Missing,
    /// `BackendData` is no JSON object.
    #[error("BackendData is {value}, expected an object: {source}")]
    Json {
        /// The JSON text found.
        value: String,
        /// Why it is none.
        #[source]
        source: serde_json::Error,
    },
    /// `VNI` or `VtepMAC` is missing or has another type than it must.
    #[error("bad BackendData: {0}")]
    WrongType(#[from] WrongType),
    /// `VtepMAC` is missing.
    #[error("BackendData has no VtepMAC")]
    NoMac,
    /// `VtepMAC` is no Ethernet address (Windows nodes publish an empty one first).
    #[error("bad VtepMAC: {0}")]
    BadMac(#[from] InvalidMac),
}

impl LeaseAttributes {
    /// A lease without backend data, as flannel's `alloc` publishes it.
    #[must_use]
    pub fn plain(public_ip: Ipv4Addr) -> Self {
        Self {
            public_ip,
            public_ipv6: None,
            backend_type: String::new(),
            backend_data: None,
            backend_v6_data: None,
        }
    }

    /// The lease of a vxlan node on an IPv4 underlay.
    #[must_use]
    pub fn vxlan(public_ip: Ipv4Addr, data: VxlanData) -> Self {
        Self {
            backend_type: VXLAN.to_owned(),
            backend_data: Some(data.to_raw()),
            ..Self::plain(public_ip)
        }
    }

    /// Reads flannel's JSON: any order, any case of keys, unknown keys ignored.
    ///
    /// # Errors
    /// When the text is no JSON object or a known key has another type.
    pub fn from_json(text: &str) -> Result<Self, AttributesError> {
        let object = JsonObject::parse(text)?;
        let raw = |key| object.raw(key).map(compact);
        Ok(Self {
            public_ip: object
                .get("PublicIP", "an IPv4 address as text")?
                .unwrap_or(Ipv4Addr::UNSPECIFIED),
            public_ipv6: object.get("PublicIPv6", "an IPv6 address as text, or null")?,
            backend_type: object.get("BackendType", "text")?.unwrap_or_default(),
            backend_data: raw("BackendData"),
            backend_v6_data: raw("BackendV6Data"),
        })
    }

    /// Exactly the bytes that flannel would publish, without a newline.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain fields and valid JSON always serialise")
    }

    /// What a vxlan peer says about its tunnel device.
    ///
    /// # Errors
    /// When `BackendData` is missing, of another shape, or its MAC is none.
    pub fn vxlan_data(&self) -> Result<VxlanData, VxlanDataError> {
        let raw = self
            .backend_data
            .as_deref()
            .ok_or(VxlanDataError::Missing)?;
        let object = JsonObject::parse(raw.get()).map_err(|source| VxlanDataError::Json {
            value: raw.get().to_owned(),
            source,
        })?;
        let mac: String = object
            .get("VtepMAC", "text")?
            .ok_or(VxlanDataError::NoMac)?;
        Ok(VxlanData {
            vni: object.get("VNI", "a number")?,
            vtep_mac: mac.parse()?,
        })
    }
}

impl VxlanData {
    fn to_raw(self) -> Box<RawValue> {
        #[derive(Serialize)]
        struct Wire {
            #[serde(rename = "VNI", skip_serializing_if = "Option::is_none")]
            vni: Option<u32>,
            #[serde(rename = "VtepMAC")]
            vtep_mac: String,
        }
        serde_json::value::to_raw_value(&Wire {
            vni: self.vni,
            vtep_mac: self.vtep_mac.to_string(),
        })
        .expect("a number and a text always serialise")
    }
}

impl PartialEq for LeaseAttributes {
    fn eq(&self, other: &Self) -> bool {
        fn text(data: &Option<Box<RawValue>>) -> Option<&str> {
            data.as_deref().map(RawValue::get)
        }
        self.public_ip == other.public_ip
            && self.public_ipv6 == other.public_ipv6
            && self.backend_type == other.backend_type
            && text(&self.backend_data) == text(&other.backend_data)
            && text(&self.backend_v6_data) == text(&other.backend_v6_data)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const VXLAN_LEASE: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;

    #[test]
    fn a_vxlan_lease_is_written_as_flannel_writes_it() {
        let attributes = LeaseAttributes::vxlan(
            Ipv4Addr::new(192, 168, 64, 3),
            VxlanData {
                vni: Some(1),
                vtep_mac: "c6:d2:32:6f:8f:44".parse().expect("valid"),
            },
        );
        assert_eq!(attributes.to_json(), VXLAN_LEASE);
    }

    #[test]
    fn a_lease_without_backend_is_written_as_flannel_writes_it() {
        assert_eq!(
            LeaseAttributes::plain(Ipv4Addr::new(1, 2, 3, 4)).to_json(),
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#
        );
    }

    #[rstest]
    #[case(VXLAN_LEASE)]
    #[case(r#"{"PublicIP":"10.0.0.4","PublicIPv6":"2001:db8::4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"0a:5e:11:22:33:44"}}"#)]
    #[case(r#"{"PublicIP":"10.0.0.4","PublicIPv6":null,"BackendType":"host-gw"}"#)]
    #[case(r#"{"PublicIP":"10.0.0.4","PublicIPv6":null}"#)]
    #[case(r#"{"PublicIP":"10.0.0.4","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"aGVsbG8=","Port":51820}}"#)]
    #[case(r#"{"PublicIP":"10.0.0.4","PublicIPv6":null,"BackendType":"extension","BackendData":"a b"}"#)]
    fn flannels_bytes_survive_reading_and_writing(#[case] text: &str) {
        let attributes = LeaseAttributes::from_json(text).expect("valid");
        assert_eq!(attributes.to_json(), text);
    }

    #[rstest]
    #[case::other_order(r#"{"BackendData":{"VtepMAC":"c6:d2:32:6f:8f:44","VNI":1},"PublicIP":"10.0.0.4","BackendType":"vxlan"}"#)]
    #[case::unknown_fields(r#"{"PublicIP":"10.0.0.4","Colour":[1],"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44","X":{}}}"#)]
    #[case::other_case(r#"{"publicip":"10.0.0.4","backendtype":"vxlan","backenddata":{"vni":1,"vtepmac":"C6:D2:32:6F:8F:44"}}"#)]
    #[case::white_space(
        "{ \"PublicIP\" : \"10.0.0.4\",\n\"BackendType\":\"vxlan\", \"BackendData\": { \"VNI\": 1, \"VtepMAC\": \"c6:d2:32:6f:8f:44\" } }\n"
    )]
    fn a_reader_is_tolerant(#[case] text: &str) {
        let attributes = LeaseAttributes::from_json(text).expect("tolerable");
        assert_eq!(attributes.public_ip, Ipv4Addr::new(10, 0, 0, 4));
        assert_eq!(attributes.public_ipv6, None);
        let data = attributes.vxlan_data().expect("usable");
        assert_eq!(data.vni, Some(1));
        assert_eq!(data.vtep_mac.to_string(), "c6:d2:32:6f:8f:44");
    }

    #[test]
    fn an_old_lease_lacks_vni_and_address() {
        let attributes = LeaseAttributes::from_json(
            r#"{"BackendType":"vxlan","BackendData":{"VtepMAC":"c6:d2:32:6f:8f:44"}}"#,
        )
        .expect("tolerable");
        assert_eq!(attributes.public_ip, Ipv4Addr::UNSPECIFIED);
        assert_eq!(attributes.vxlan_data().expect("usable").vni, None);
    }

    #[test]
    fn white_space_is_no_difference() {
        let spaced = VXLAN_LEASE.replace(':', ": ").replace(": d2", ":d2");
        let spaced = spaced.replace(": 32", ":32").replace(": 6f", ":6f");
        let spaced = spaced.replace(": 8f", ":8f").replace(": 44", ":44");
        assert_ne!(spaced, VXLAN_LEASE);
        assert_eq!(
            LeaseAttributes::from_json(&spaced).expect("valid"),
            LeaseAttributes::from_json(VXLAN_LEASE).expect("valid")
        );
    }

    #[rstest]
    #[case("", "line 1 column 0")]
    #[case(&VXLAN_LEASE[..60], "line 1 column 60")]
    #[case("null", "expected a JSON object")]
    #[case(
        r#"{"PublicIP":"10.0.0.300"}"#,
        r#"PublicIP is "10.0.0.300", expected an IPv4"#
    )]
    #[case(r#"{"PublicIP":"1.2.3.4","BackendType":7}"#, "BackendType is 7")]
    fn a_bad_lease_says_what_is_wrong(#[case] text: &str, #[case] says: &str) {
        let error = LeaseAttributes::from_json(text).expect_err("bad");
        assert!(error.to_string().contains(says), "{error}");
    }

    #[rstest]
    #[case(r#"{"BackendType":"vxlan"}"#, "BackendData is missing")]
    #[case(r#"{"BackendData":null}"#, "BackendData is missing")]
    #[case(r#"{"BackendData":"x"}"#, r#"BackendData is "x", expected an object"#)]
    #[case(r#"{"BackendData":{"VNI":1}}"#, "no VtepMAC")]
    #[case(r#"{"BackendData":{"VNI":1,"VtepMAC":""}}"#, r#"bad VtepMAC: """#)]
    #[case(
        r#"{"BackendData":{"VtepMAC":"c6:d2:32:6f:8f"}}"#,
        r#"bad VtepMAC: "c6:d2:32:6f:8f""#
    )]
    #[case(r#"{"BackendData":{"VtepMAC":7}}"#, "VtepMAC is 7")]
    #[case(
        r#"{"BackendData":{"VNI":"1","VtepMAC":"c6:d2:32:6f:8f:44"}}"#,
        r#"VNI is "1""#
    )]
    fn bad_vxlan_data_says_what_is_wrong(#[case] text: &str, #[case] says: &str) {
        let attributes = LeaseAttributes::from_json(text).expect("a lease");
        let error = attributes.vxlan_data().expect_err("bad");
        assert!(error.to_string().contains(says), "{error}");
    }
}
