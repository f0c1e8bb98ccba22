use std::{collections::BTreeSet, time::SystemTime};

use proptest::prelude::*;
use rand::{SeedableRng, rngs::StdRng};
use rstest::rstest;

use super::*;
use crate::lease::LeaseAttributes;

const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 2);

fn config(rest: &str) -> NetworkConfig {
    format!(r#"{{{rest},"Backend":{{"Type":"vxlan"}}}}"#)
        .parse()
        .expect("valid")
}

fn usual() -> NetworkConfig {
    config(r#""Network":"10.3.0.0/16""#)
}

fn key(text: &str) -> SubnetKey {
    text.parse().expect("a key")
}

fn lease(subnet: &str, node: Ipv4Addr) -> Lease {
    Lease {
        key: key(subnet),
        attributes: LeaseAttributes::plain(node),
        expires: Some(SystemTime::UNIX_EPOCH),
    }
}

fn decide_with(
    config: &NetworkConfig,
    leases: &[Lease],
    previous: Option<&str>,
    seed: u64,
) -> Result<Decision, AllocationError> {
    let previous = previous.map(|text| text.parse().expect("a network"));
    decide(
        config,
        leases,
        OWN,
        previous,
        &mut StdRng::seed_from_u64(seed),
    )
}

#[test]
fn the_own_lease_is_used_again_whatever_its_backend() {
    let mut own = lease("10.3.7.0-24", OWN);
    own.attributes.backend_type = "host-gw".to_owned();
    let leases = [lease("10.3.6.0-24", OTHER), own.clone()];
    assert_eq!(
        decide_with(&usual(), &leases, Some("10.3.9.0/24"), 0),
        Ok(Decision::Refresh(own))
    );
}

#[test]
fn of_two_own_leases_the_first_by_key_text_counts() {
    let leases = [lease("10.3.9.0-24", OWN), lease("10.3.10.0-24", OWN)];
    assert_eq!(
        decide_with(&usual(), &leases, None, 0),
        Ok(Decision::Refresh(leases[1].clone()))
    );
}

#[test]
fn a_reservation_stays_a_reservation() {
    let mut reserved = lease("10.3.7.0-24", OWN);
    reserved.expires = None;
    assert_eq!(
        decide_with(&usual(), std::slice::from_ref(&reserved), None, 0),
        Ok(Decision::Refresh(reserved))
    );
}

#[rstest]
#[case::other_length("10.3.7.0-25")]
#[case::outside_the_range("10.3.0.0-24")]
#[case::other_network("10.4.7.0-24")]
#[case::with_ipv6("10.3.7.0-24&fd00::-64")]
fn an_own_lease_that_does_not_fit_is_replaced_and_stays_blocked(#[case] old: &str) {
    let leases = [lease(old, OWN)];
    // The previous subnet may be used if the old lease does not lie in it.
    let decision = decide_with(&usual(), &leases, Some("10.3.7.0/24"), 1).expect("free");
    let Decision::Replace { old: removed, new } = decision else {
        panic!("{decision:?} is no replacement");
    };
    assert_eq!(removed, key(old));
    assert!(usual().is_compatible(&new));
    assert!(!leases[0].key.overlaps(&new.v4), "{new}");
}

#[rstest]
#[case::free("10.3.9.0/24", &[], true)]
#[case::incompatible("10.3.9.0/25", &[], false)]
#[case::taken("10.3.9.0/24", &["10.3.9.0-24"], false)]
#[case::overlapped_by_a_larger("10.3.9.0/24", &["10.3.8.0-23"], false)]
#[case::overlapped_by_a_smaller("10.3.9.0/24", &["10.3.9.128-25"], false)]
#[case::beside_others("10.3.9.0/24", &["10.3.8.0-24", "10.3.10.0-24"], true)]
fn the_previous_subnet_is_used_if_it_is_free(
    #[case] previous: &str,
    #[case] taken: &[&str],
    #[case] used: bool,
) {
    let leases: Vec<Lease> = taken.iter().map(|key| lease(key, OTHER)).collect();
    // Subnets are drawn from the first hundred; a seed that draws this one proves nothing.
    let drawn = decide_with(&usual(), &leases, None, 3).expect("free");
    let wanted = Decision::Create(SubnetKey::from_v4(previous.parse().expect("a network")));
    assert_ne!(drawn, wanted);
    let decision = decide_with(&usual(), &leases, Some(previous), 3).expect("free");
    assert_eq!(decision == wanted, used, "{decision:?}");
}

#[test]
fn only_the_first_hundred_free_subnets_are_drawn_and_all_of_them() {
    let leases = [lease("10.3.1.0-24", OTHER)];
    let drawn: BTreeSet<SubnetKey> = (0..3000)
        .map(|seed| match decide_with(&usual(), &leases, None, seed) {
            Ok(Decision::Create(key)) => key,
            other => panic!("{other:?} is no creation"),
        })
        .collect();
    assert_eq!(drawn.len(), CANDIDATES);
    assert_eq!(drawn.first(), Some(&key("10.3.2.0-24")));
    assert_eq!(drawn.last(), Some(&key("10.3.101.0-24")));
}

#[test]
fn a_full_range_is_named() {
    let small = config(r#""Network":"10.0.0.0/24""#);
    let leases = [lease("10.0.0.64-26", OTHER), lease("10.0.0.128-25", OTHER)];
    let error = decide_with(&small, &leases, None, 0).expect_err("full");
    let text = error.to_string();
    assert!(text.contains("out of subnets"), "{text}");
    assert!(text.contains("2 leases"), "{text}");
    assert!(text.contains("10.0.0.64 to SubnetMax 10.0.0.192"), "{text}");
}

#[test]
fn an_inverted_range_has_no_subnet() {
    let inverted =
        config(r#""Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.2.0""#);
    assert!(decide_with(&inverted, &[], None, 0).is_err());
}

#[test]
fn the_last_addresses_there_are_can_be_handed_out() {
    let last = config(r#""Network":"240.0.0.0/4","SubnetLen":6,"SubnetMin":"252.0.0.0""#);
    assert_eq!(
        decide_with(&last, &[], None, 0),
        Ok(Decision::Create(key("252.0.0.0-6")))
    );
    assert!(decide_with(&last, &[lease("255.0.0.0-8", OTHER)], None, 0).is_err());
}

#[test]
fn a_lease_without_address_is_nobodys() {
    let leases = [lease("10.3.7.0-24", Ipv4Addr::UNSPECIFIED)];
    let mut rng = StdRng::seed_from_u64(0);
    let decision = decide(&usual(), &leases, Ipv4Addr::UNSPECIFIED, None, &mut rng);
    assert!(matches!(decision, Ok(Decision::Create(_))), "{decision:?}");
}

prop_compose! {
    fn any_lease()(third: u8, fourth: u8, len in 16u8..=30, own in prop::bool::weighted(0.05)) -> Lease {
        let subnet = Ipv4Net::new(Ipv4Addr::new(10, 3, third, fourth), len).expect("length");
        Lease {
            key: SubnetKey::from_v4(subnet),
            attributes: LeaseAttributes::plain(if own { OWN } else { OTHER }),
            expires: None,
        }
    }
}

proptest! {
    #[test]
    fn a_new_subnet_is_free_aligned_and_in_range(
        leases in prop::collection::vec(any_lease(), 0..60),
        len in 18u8..=30,
        previous: Option<u32>,
        seed: u64,
    ) {
        let config = config(&format!(r#""Network":"10.3.0.0/16","SubnetLen":{len}"#));
        let previous = previous
            .map(|bits| Ipv4Net::new((0x0a03_0000 | bits >> 16).into(), len).expect("length"));
        let decide_again = || {
            decide(&config, &leases, OWN, previous, &mut StdRng::seed_from_u64(seed))
        };
        let decision = decide_again();
        prop_assert_eq!(&decision, &decide_again(), "a seed decides");
        match decision {
            Ok(Decision::Refresh(lease)) => {
                prop_assert!(config.is_compatible(&lease.key));
                prop_assert_eq!(lease.attributes.public_ip, OWN);
            }
            Ok(Decision::Create(new) | Decision::Replace { new, .. }) => {
                prop_assert!(config.is_compatible(&new));
                prop_assert_eq!(new.v4, new.v4.trunc());
                prop_assert!(config.network.contains(&new.v4));
                prop_assert!(!leases.iter().any(|lease| lease.key.overlaps(&new.v4)));
            }
            Err(AllocationError::OutOfSubnets { .. }) => {
                // Nothing that a plain search finds was missed.
                let size = 1usize << (32 - len);
                let free = (u32::from(config.subnet_min)..=u32::from(config.subnet_max))
                    .step_by(size)
                    .map(|base| Ipv4Net::new(base.into(), len).expect("length"))
                    .find(|net| !leases.iter().any(|lease| lease.key.overlaps(net)));
                prop_assert_eq!(free, None);
            }
        }
    }
}
