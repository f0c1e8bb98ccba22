//! Following the uplink while the agent runs (contract section 23, row 14).
//!
//! The interface and the address in use stay the choice as long as both exist: another default
//! route or another address beside it moves nothing. When either is gone the operator's choice is
//! made again, until it succeeds; the last uplink is kept meanwhile, since nothing better is known.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::{Host, Uplink, UplinkChoice, UplinkError, read};
use crate::datapath::kernel_events::{self, KernelEvent};

/// A look at the uplink even when nothing was heard.
const SLOW_LOOK: Duration = Duration::from_secs(30);
/// The same while there is no usable uplink: routes are not listened to, they are too many.
const ANXIOUS_LOOK: Duration = Duration::from_millis(500);
/// How long the kernel has to be quiet before a look.
const QUIET: Duration = Duration::from_millis(2);
/// Stands for every interface in the filter of events.
const ANY: u32 = 0;

/// How things stand with the uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Followed {
    /// The uplink; where `fault` says that it cannot be used, the last one.
    pub uplink: Uplink,
    /// Why no packet can leave by it now, and what to do.
    pub fault: Option<String>,
}

impl From<Uplink> for Followed {
    fn from(uplink: Uplink) -> Self {
        Self {
            uplink,
            fault: None,
        }
    }
}

impl Host {
    /// The uplink in use with its present MTU, if it is still there.
    fn kept(&self, current: &Uplink) -> Option<Uplink> {
        let link = self.links.get(&current.index)?;
        let has_address = link
            .addresses
            .iter()
            .any(|address| address.ip == current.address);
        (has_address && link.mtu > 0).then(|| Uplink {
            name: link.name.clone(),
            mtu: link.mtu,
            mac: link.mac,
            ..current.clone()
        })
    }

    fn state_of(&self, uplink: Uplink) -> Followed {
        let is_up = self.links.get(&uplink.index).is_some_and(|link| link.up);
        let fault = (!is_up).then(|| {
            format!(
                "the uplink {name} is down (ip link set {name} up)",
                name = uplink.name
            )
        });
        Followed { uplink, fault }
    }

    fn lost(&self, current: &Uplink, cause: &UplinkError) -> Followed {
        let what = if self.links.contains_key(&current.index) {
            format!("address {}", current.address)
        } else {
            format!("interface {}", current.name)
        };
        Followed {
            uplink: current.clone(),
            fault: Some(format!(
                "the uplink's {what} is gone and there is no other: {cause}"
            )),
        }
    }
}

/// Follows the uplink in `state` until nobody listens to it any more.
///
/// # Errors
/// No socket to the kernel.
pub async fn keep(choice: UplinkChoice, state: watch::Sender<Followed>) -> std::io::Result<()> {
    // Listening comes before the first look, so nothing falls in between.
    let interesting = Arc::new(AtomicU32::new(ANY));
    let filter = Arc::clone(&interesting);
    let mut events = kernel_events::listen_to_links(move |event| {
        concerns(event, filter.load(Ordering::Relaxed))
    })?;
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    let mut last_unread = None;
    while !state.is_closed() {
        let current = state.borrow().clone();
        match look(&handle, &choice, &current.uplink).await {
            Ok(followed) => {
                last_unread = None;
                say(&current, &followed);
                state.send_if_modified(|known| {
                    let changed = *known != followed;
                    *known = followed;
                    changed
                });
            }
            Err(error) => {
                let text = error.to_string();
                if last_unread.as_ref() != Some(&text) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot look at the uplink; trying on"
                    );
                }
                last_unread = Some(text);
            }
        }
        let (watched, patience) = {
            let known = state.borrow();
            match known.fault {
                None => (known.uplink.index, SLOW_LOOK),
                Some(_) => (ANY, ANXIOUS_LOOK),
            }
        };
        interesting.store(watched, Ordering::Relaxed);
        wait(&mut events, patience).await;
    }
    Ok(())
}

/// An error only if the kernel could not be read.
async fn look(
    handle: &rtnetlink::Handle,
    choice: &UplinkChoice,
    current: &Uplink,
) -> Result<Followed, UplinkError> {
    let mut host = read::links(handle).await?;
    if let Some(uplink) = host.kept(current) {
        return Ok(host.state_of(uplink));
    }
    read::routes(handle, &mut host, choice).await?;
    Ok(match host.choose(choice) {
        Ok(uplink) => host.state_of(uplink),
        Err(cause) => host.lost(current, &cause),
    })
}

fn say(before: &Followed, now: &Followed) {
    if before.fault != now.fault {
        match &now.fault {
            Some(fault) => error!(fault, "other nodes cannot be reached"),
            None => info!(interface = now.uplink.name, "the uplink is usable again"),
        }
    }
    if before.uplink != now.uplink {
        let Uplink {
            name,
            index,
            mtu,
            public_ip,
            ..
        } = &now.uplink;
        info!(interface = name, index, mtu, %public_ip, "the uplink changed");
    }
}

fn concerns(event: &KernelEvent, interface: u32) -> bool {
    let (KernelEvent::Links { origin, index, .. } | KernelEvent::Addresses { origin, index, .. }) =
        event
    else {
        return false;
    };
    origin.namespace.is_none() && (interface == ANY || interface == *index)
}

async fn wait(events: &mut mpsc::Receiver<KernelEvent>, patience: Duration) {
    let heard = kernel_events::next_batch(events, QUIET);
    if let Ok(None) = tokio::time::timeout(patience, heard).await {
        // The listener ended: only the clock is left.
        tokio::time::sleep(patience).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{super::*, *};
    use crate::datapath::kernel_events::Origin;

    fn link(name: &str, mtu: u32, addresses: &[[u8; 4]]) -> Link {
        Link {
            name: name.to_owned(),
            up: true,
            mtu,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            addresses: addresses
                .iter()
                .map(|address| Address {
                    ip: (*address).into(),
                    permanent: true,
                    temporary: false,
                    deprecated: false,
                })
                .collect(),
        }
    }

    fn host(links: &[(u32, Link)], default: u32) -> Host {
        Host {
            links: links.iter().cloned().collect(),
            defaults: vec![DefaultRoute::Through(default)],
            reach: BTreeMap::new(),
        }
    }

    const OLD: [u8; 4] = [192, 0, 2, 1];
    const NEW: [u8; 4] = [192, 0, 2, 9];

    fn eth0() -> Uplink {
        Uplink {
            name: "eth0".to_owned(),
            index: 2,
            mtu: 1500,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            address: OLD.into(),
            public_ip: OLD.into(),
        }
    }

    #[test]
    fn what_is_in_use_stays_while_it_is_there() {
        let better_elsewhere = host(
            &[
                (2, link("lan0", 1400, &[NEW, OLD])),
                (3, link("eth1", 9000, &[[198, 51, 100, 1]])),
            ],
            3,
        );
        let kept = better_elsewhere.kept(&eth0()).expect("it is there");
        assert_eq!(
            (kept.index, kept.address, kept.mtu, kept.name.as_str()),
            (2, OLD.into(), 1400, "lan0")
        );
    }

    #[test]
    fn without_interface_or_address_the_choice_is_made_again() {
        let readdressed = host(&[(2, link("eth0", 1500, &[NEW]))], 2);
        assert_eq!(readdressed.kept(&eth0()), None);
        let made_anew = host(&[(7, link("eth0", 1500, &[OLD]))], 7);
        assert_eq!(made_anew.kept(&eth0()), None);
        let chosen = made_anew.choose(&UplinkChoice::default()).expect("eth0");
        assert_eq!((chosen.index, chosen.public_ip), (7, OLD.into()));
    }

    #[test]
    fn faults_name_what_is_missing_and_keep_the_last_uplink() {
        let by_name = UplinkChoice {
            iface: vec!["eth0".to_owned()],
            ..UplinkChoice::default()
        };
        for (host, says) in [
            (
                host(&[(2, link("eth0", 1500, &[]))], 2),
                "address 192.0.2.1",
            ),
            (host(&[], 2), "interface eth0"),
        ] {
            let cause = host.choose(&by_name).expect_err("nothing to choose");
            let followed = host.lost(&eth0(), &cause);
            assert_eq!(followed.uplink, eth0());
            let fault = followed.fault.expect("a fault");
            assert!(fault.contains(says), "{fault}");
        }
        let mut down = host(&[(2, link("eth0", 1500, &[OLD]))], 2);
        down.links.get_mut(&2).expect("there").up = false;
        let fault = down.state_of(eth0()).fault.expect("down");
        assert!(fault.contains("ip link set eth0 up"), "{fault}");
    }

    #[test]
    fn only_the_uplinks_own_changes_wake_until_it_is_lost() {
        let event = |index, namespace| KernelEvent::Addresses {
            origin: Origin { namespace, port: 0 },
            index,
            removed: false,
        };
        assert!(concerns(&event(2, None), 2));
        assert!(!concerns(&event(3, None), 2));
        assert!(concerns(&event(3, None), ANY));
        assert!(!concerns(&event(2, Some(1)), ANY));
    }
}
