//! The tunnel device `flannel.<VNI>` (contract sections 9.1 to 9.3 and 9.7).
//!
//! A device that fits is taken over as it is, with its MAC and MTU; any other of that
//! name is deleted and made anew. Once taken over, its MAC and MTU are what peers and pods were
//! told, so whoever changes them later is corrected.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};
use tracing::{info, warn};

use super::rtnl::{Request, Rtnl, RtnlError};
use crate::mac::MacAddr;

/// What the tunnel device is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// VXLAN network identifier, also the suffix of the name.
    pub vni: u32,
    /// UDP port in host byte order; `None` leaves the choice to the kernel (8472).
    pub port: Option<u16>,
    /// Interface index of the uplink.
    pub uplink_index: u32,
    /// Outer source: the own public address.
    pub local: Ipv4Addr,
    /// MTU in bytes, the tunnel's 50 already taken off. The kernel caps it at the uplink's minus 50.
    pub mtu: u32,
    /// Group-based-policy extension.
    pub gbp: bool,
    /// MAC learning.
    pub learning: bool,
    /// MAC for a device that has to be made; `None` draws a random one.
    pub mac: Option<MacAddr>,
    /// Network address of the own subnet, put on the device with /32; `None` while no lease
    /// is held, and then the device's addresses are left alone.
    pub address: Option<Ipv4Addr>,
    /// All pod addresses: other addresses of the device inside it are removed.
    pub network: Ipv4Net,
}

impl DeviceSpec {
    /// `flannel.<VNI>`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("flannel.{}", self.vni)
    }
}

/// The tunnel device as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// `flannel.<VNI>`.
    pub name: String,
    /// The MAC that peers are to be told.
    pub mac: MacAddr,
    /// The real MTU in bytes, after the kernel's cap.
    pub mtu: u32,
    /// Made by this call, not found.
    pub created: bool,
}

/// Why there is no working tunnel device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A step failed.
    #[error("cannot {action} {name}")]
    Step {
        /// The step.
        action: &'static str,
        /// The device's name.
        name: String,
        /// The kernel's answer.
        #[source]
        source: RtnlError,
    },
    /// Another device has the VNI and the port.
    #[error(
        "cannot create {name}: {holder} already uses VNI {vni} on the same UDP port; delete that device \
         (ip link delete {holder}) or choose another VNI or Port in the network config"
    )]
    VniTaken {
        /// The device's name.
        name: String,
        /// The VNI both want.
        vni: u32,
        /// The device that has it.
        holder: String,
    },
    /// Somebody deleted it while it was being set up.
    #[error("{name} disappeared while it was being set up")]
    Vanished {
        /// The device's name.
        name: String,
    },
}

/// What [`converge`] found and did.
#[derive(Debug)]
pub(super) struct Converged {
    pub(super) device: Device,
    /// Corrections of a device that was known before.
    pub(super) repaired: usize,
    /// Corrections that the kernel refused; the device works without them.
    pub(super) errors: Vec<DeviceError>,
}

/// Makes the device what `spec` says, or, where `known` tells how it was, puts it back.
pub(super) async fn converge(
    rtnl: &mut Rtnl,
    spec: &DeviceSpec,
    known: Option<&Device>,
) -> Result<Converged, DeviceError> {
    let name = spec.name();
    let step = |action: &'static str| {
        let name = name.clone();
        move |source| DeviceError::Step {
            action,
            name,
            source,
        }
    };
    let mut repaired = 0;
    let mut errors = Vec::new();

    let mut found = find(rtnl, &name).await.map_err(step("look up"))?;
    if let Some(misfit) = found.as_ref().and_then(|link| link.misfit(spec)) {
        warn!(device = %name, %misfit, "deleting a device that does not fit");
        let link = found.take().expect("a misfit was found");
        delete_link(rtnl, link.index)
            .await
            .map_err(step("delete the misfit"))?;
    }
    let created = found.is_none();
    let link = match found {
        Some(link) => link,
        None => {
            let mac = known
                .map(|device| device.mac)
                .or(spec.mac)
                .unwrap_or_else(MacAddr::random_local);
            let mtu = known.map_or(spec.mtu, |device| device.mtu);
            create(rtnl, spec, mac, mtu).await?;
            accept_no_router_advertisements(&name);
            repaired += usize::from(known.is_some());
            find(rtnl, &name)
                .await
                .map_err(step("look up"))?
                .ok_or_else(|| DeviceError::Vanished { name: name.clone() })?
        }
    };
    if !created {
        accept_no_router_advertisements(&name);
    }

    let mut device = Device {
        index: link.index,
        name: name.clone(),
        mac: link.mac,
        mtu: link.mtu,
        created,
    };
    // Taken over from an earlier agent, but larger than packets may be now: they would be lost.
    if known.is_none() && link.mtu > spec.mtu {
        warn!(device = %name, found = link.mtu, wanted = spec.mtu, "lowering the MTU");
        set_link(rtnl, link.index, LinkAttribute::Mtu(spec.mtu))
            .await
            .map_err(step("set the MTU of"))?;
        device.mtu = spec.mtu;
    }
    if let Some(known) = known
        && !created
    {
        if known.mac != link.mac {
            warn!(device = %name, found = %link.mac, wanted = %known.mac, "putting the MAC back");
            let mac = LinkAttribute::Address(known.mac.0.to_vec());
            set_link(rtnl, link.index, mac)
                .await
                .map_err(step("set the MAC of"))?;
            device.mac = known.mac;
            repaired += 1;
        }
        if known.mtu != link.mtu {
            let mtu = LinkAttribute::Mtu(known.mtu);
            match set_link(rtnl, link.index, mtu).await {
                Ok(()) => {
                    warn!(device = %name, found = link.mtu, wanted = known.mtu, "put the MTU back");
                    device.mtu = known.mtu;
                    repaired += 1;
                }
                Err(error) => errors.push(step("set the MTU of")(error)),
            }
        }
    }

    if let Some(base) = spec.address {
        let changed = readdress(rtnl, link.index, base, spec.network)
            .await
            .map_err(step("set the address of"))?;
        if known.is_some() && !created && changed {
            repaired += 1;
        }
    }
    if !link.up {
        set_up(rtnl, link.index).await.map_err(step("set up"))?;
        if known.is_some() && !created {
            repaired += 1;
        }
    }
    if created {
        info!(device = %name, index = device.index, mac = %device.mac, mtu = device.mtu, "device created");
    }
    Ok(Converged {
        device,
        repaired,
        errors,
    })
}

/// What decides whether a device of our name may stay.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FoundLink {
    index: u32,
    mac: MacAddr,
    mtu: u32,
    up: bool,
    /// `None` for anything that is no VXLAN device.
    vxlan: Option<FoundVxlan>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FoundVxlan {
    vni: u32,
    lower: Option<u32>,
    local: Option<IpAddr>,
    port: Option<u16>,
    gbp: bool,
    l2miss: bool,
}

impl FoundLink {
    /// Why the device cannot be taken over, by the rules of contract section 9.2. Lower device,
    /// address, group and port count only where both sides name one.
    fn misfit(&self, spec: &DeviceSpec) -> Option<String> {
        let Some(vxlan) = &self.vxlan else {
            return Some("it is no VXLAN device".into());
        };
        let differs =
            |what: &str, found: &dyn std::fmt::Display, wanted: &dyn std::fmt::Display| {
                Some(format!("its {what} is {found}, not {wanted}"))
            };
        if vxlan.vni != spec.vni {
            return differs("VNI", &vxlan.vni, &spec.vni);
        }
        if let Some(lower) = vxlan.lower.filter(|lower| *lower != spec.uplink_index) {
            return differs("lower device", &lower, &spec.uplink_index);
        }
        if let Some(local) = vxlan.local.filter(|local| *local != spec.local) {
            return differs("local address", &local, &spec.local);
        }
        if let (Some(found), Some(wanted)) = (vxlan.port, spec.port)
            && found != wanted
        {
            return differs("port", &found, &wanted);
        }
        if vxlan.gbp != spec.gbp {
            return differs("GBP flag", &vxlan.gbp, &spec.gbp);
        }
        vxlan
            .l2miss
            .then(|| "it reports missing MACs (l2miss)".into())
    }

    fn parse(link: &LinkMessage) -> Self {
        let mut found = Self {
            index: link.header.index,
            mac: MacAddr::default(),
            mtu: 0,
            up: link.header.flags.contains(LinkFlags::Up),
            vxlan: None,
        };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => {
                    found.mac = MacAddr(bytes.as_slice().try_into().unwrap_or_default());
                }
                LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
                LinkAttribute::LinkInfo(infos) => {
                    found.vxlan = infos.iter().find_map(FoundVxlan::parse);
                }
                _ => {}
            }
        }
        found
    }
}

impl FoundVxlan {
    fn parse(info: &LinkInfo) -> Option<Self> {
        let LinkInfo::Data(InfoData::Vxlan(attributes)) = info else {
            return None;
        };
        let mut found = Self::default();
        for attribute in attributes {
            match attribute {
                InfoVxlan::Id(vni) => found.vni = *vni,
                InfoVxlan::Link(index) => found.lower = Some(*index).filter(|index| *index > 0),
                InfoVxlan::Local(address) => found.local = Some((*address).into()),
                InfoVxlan::Local6(address) => found.local = Some((*address).into()),
                InfoVxlan::Port(port) => found.port = Some(*port).filter(|port| *port > 0),
                InfoVxlan::Gbp => found.gbp = true,
                InfoVxlan::L2Miss(on) => found.l2miss = *on,
                _ => {}
            }
        }
        Some(found)
    }
}

async fn find(rtnl: &mut Rtnl, name: &str) -> Result<Option<FoundLink>, RtnlError> {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    let answer = rtnl.get(RouteNetlinkMessage::GetLink(message)).await?;
    Ok(answer.and_then(|object| match object {
        RouteNetlinkMessage::NewLink(link) => Some(FoundLink::parse(&link)),
        _ => None,
    }))
}

async fn create(
    rtnl: &mut Rtnl,
    spec: &DeviceSpec,
    mac: MacAddr,
    mtu: u32,
) -> Result<(), DeviceError> {
    let mut vxlan = vec![
        InfoVxlan::Id(spec.vni),
        InfoVxlan::Link(spec.uplink_index),
        InfoVxlan::Local(spec.local),
        InfoVxlan::Learning(spec.learning),
    ];
    vxlan.extend(spec.port.filter(|port| *port > 0).map(InfoVxlan::Port));
    if spec.gbp {
        vxlan.push(InfoVxlan::Gbp);
    }
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.name()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::TxQueueLen(0),
        LinkAttribute::Address(mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vxlan)),
        ]),
    ];
    let request = Request {
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    };
    let Err(source) = rtnl.change(request).await else {
        return Ok(());
    };
    if source.errno() == libc::EEXIST
        && let Ok(Some(holder)) = holder_of_vni(rtnl, spec.vni).await
    {
        return Err(DeviceError::VniTaken {
            name: spec.name(),
            vni: spec.vni,
            holder,
        });
    }
    Err(DeviceError::Step {
        action: "create",
        name: spec.name(),
        source,
    })
}

/// The name of a VXLAN device with that VNI.
async fn holder_of_vni(rtnl: &mut Rtnl, vni: u32) -> Result<Option<String>, RtnlError> {
    let links = rtnl
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .await?;
    Ok(links.iter().find_map(|object| {
        let RouteNetlinkMessage::NewLink(link) = object else {
            return None;
        };
        let found = FoundLink::parse(link).vxlan?;
        let name = link
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            })?;
        (found.vni == vni).then_some(name)
    }))
}

async fn delete_link(rtnl: &mut Rtnl, index: u32) -> Result<(), RtnlError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let request = Request {
        message: RouteNetlinkMessage::DelLink(message),
        flags: 0,
    };
    match rtnl.change(request).await {
        Err(error) if !error.is_gone() => Err(error),
        _ => Ok(()),
    }
}

async fn set_link(rtnl: &mut Rtnl, index: u32, attribute: LinkAttribute) -> Result<(), RtnlError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(attribute);
    rtnl.change(Request {
        message: RouteNetlinkMessage::SetLink(message),
        flags: 0,
    })
    .await
}

async fn set_up(rtnl: &mut Rtnl, index: u32) -> Result<(), RtnlError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    rtnl.change(Request {
        message: RouteNetlinkMessage::SetLink(message),
        flags: 0,
    })
    .await
}

/// Makes `base`/32 the only address of the device inside `network`. Returns whether
/// anything had to be changed.
async fn readdress(
    rtnl: &mut Rtnl,
    index: u32,
    base: Ipv4Addr,
    network: Ipv4Net,
) -> Result<bool, RtnlError> {
    let mut filter = AddressMessage::default();
    filter.header.family = AddressFamily::Inet;
    filter.header.index = index;
    let found = rtnl.dump(RouteNetlinkMessage::GetAddress(filter)).await?;

    let mut present = false;
    let mut changes = Vec::new();
    for object in found {
        let RouteNetlinkMessage::NewAddress(found) = object else {
            continue;
        };
        let Some(address) = local_address(&found) else {
            continue;
        };
        if found.header.index != index || !network.contains(&address) {
            continue;
        }
        if address == base
            && found.header.prefix_len == 32
            && found.header.scope == AddressScope::Universe
        {
            present = true;
        } else {
            // Deleted before the right one is added: it may be the same address under
            // another prefix length.
            changes.push(Request {
                message: RouteNetlinkMessage::DelAddress(found),
                flags: 0,
            });
        }
    }
    if !present {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.index = index;
        message.attributes = vec![
            AddressAttribute::Local(base.into()),
            AddressAttribute::Address(base.into()),
        ];
        changes.push(Request {
            message: RouteNetlinkMessage::NewAddress(message),
            flags: NLM_F_CREATE,
        });
    }
    let changed = !changes.is_empty();
    for (_, error) in rtnl.batch(changes).await? {
        if !error.is_gone() && error.errno() != libc::EEXIST {
            return Err(error);
        }
    }
    Ok(changed)
}

/// The interface's own IPv4 address in an address message.
pub(in crate::datapath) fn local_address(message: &AddressMessage) -> Option<Ipv4Addr> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(IpAddr::V4(local)) => return Some(*local),
            AddressAttribute::Address(IpAddr::V4(peer)) => address = Some(*peer),
            _ => {}
        }
    }
    address
}

/// As flannel does (section 9.1); a kernel without IPv6 has no such file.
fn accept_no_router_advertisements(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/accept_ra");
    if let Err(error) = std::fs::write(&path, "0") {
        tracing::debug!(%path, %error, "cannot turn off router advertisements");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> DeviceSpec {
        DeviceSpec {
            vni: 1,
            port: None,
            uplink_index: 7,
            local: Ipv4Addr::new(192, 168, 50, 1),
            mtu: 1450,
            gbp: false,
            learning: false,
            mac: None,
            address: None,
            network: "10.244.0.0/16".parse().expect("a network"),
        }
    }

    fn found(change: impl FnOnce(&mut FoundVxlan)) -> FoundLink {
        let mut vxlan = FoundVxlan {
            vni: 1,
            lower: Some(7),
            local: Some(Ipv4Addr::new(192, 168, 50, 1).into()),
            port: Some(8472),
            ..FoundVxlan::default()
        };
        change(&mut vxlan);
        FoundLink {
            index: 9,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            mtu: 1400,
            up: true,
            vxlan: Some(vxlan),
        }
    }

    #[test]
    fn what_fits_is_decided_by_section_9_2() {
        let fits = |link: &FoundLink, spec: &DeviceSpec| link.misfit(spec).is_none();
        assert!(fits(&found(|_| {}), &spec()), "MTU and MAC do not count");
        assert!(fits(&found(|v| v.lower = None), &spec()));
        assert!(fits(&found(|v| v.local = None), &spec()));
        assert!(
            fits(&found(|v| v.port = Some(4789)), &spec()),
            "no port asked for"
        );

        let with_port = DeviceSpec {
            port: Some(8472),
            ..spec()
        };
        assert!(fits(&found(|_| {}), &with_port));
        assert!(!fits(&found(|v| v.port = Some(4789)), &with_port));
        assert!(!fits(&found(|v| v.vni = 2), &spec()));
        assert!(!fits(&found(|v| v.lower = Some(8)), &spec()));
        assert!(!fits(
            &found(|v| v.local = Some(Ipv4Addr::new(192, 168, 50, 9).into())),
            &spec()
        ));
        assert!(!fits(&found(|v| v.gbp = true), &spec()));
        assert!(!fits(&found(|v| v.l2miss = true), &spec()));

        let mut dummy = found(|_| {});
        dummy.vxlan = None;
        assert_eq!(
            dummy.misfit(&spec()).as_deref(),
            Some("it is no VXLAN device")
        );
    }
}
