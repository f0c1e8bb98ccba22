use super::*;

fn policy() -> Policy {
    Policy {
        network: "10.244.0.0/16".parse().expect("a network"),
        subnet: "10.244.1.0/24".parse().expect("a network"),
        masquerade: true,
        random_fully: true,
        forward: true,
    }
}

fn forward(state: &State) -> Option<String> {
    let found = state.rules.as_deref().unwrap_or_default();
    let judgement = judge(found, &policy(), Chain::Forward, System::Iptables, None);
    repair(&place(Chain::Forward), state, &judgement)
}

fn right() -> Vec<Option<Rule>> {
    let rules = policy().rules(Chain::Forward, System::Iptables);
    rules.into_iter().map(Some).collect()
}

const CHAIN: &str = r#":FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
"#;
const JUMP: &str = r#" FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
"#;

#[test]
fn what_is_in_order_is_not_touched() {
    let state = State {
        rules: Some(right()),
        jumps: 1,
    };
    assert_eq!(forward(&state), None);
}

#[test]
fn chain_and_jump_come_in_one_commit() {
    let expected = format!("*filter\n{CHAIN}-A{JUMP}COMMIT\n");
    assert_eq!(forward(&State::default()), Some(expected));
}

#[test]
fn a_wrong_chain_is_filled_anew_and_its_jump_stays_in_place() {
    let state = State {
        rules: Some(vec![None]),
        jumps: 1,
    };
    assert_eq!(forward(&state), Some(format!("*filter\n{CHAIN}COMMIT\n")));
}

#[test]
fn a_jump_is_there_exactly_once_and_the_right_chain_is_left_alone() {
    let state = |jumps| State {
        rules: Some(right()),
        jumps,
    };
    let none = forward(&state(0));
    assert_eq!(none, Some(format!("*filter\n-A{JUMP}COMMIT\n")));
    let three = forward(&state(3));
    assert_eq!(three, Some(format!("*filter\n-D{JUMP}-D{JUMP}COMMIT\n")));
}

#[test]
fn contract_14_5_jumps_go_before_chains_and_from_wherever_they_are() {
    let listed: Vec<String> = [
        "-P FORWARD ACCEPT",
        "-N FLANNEL-FWD",
        "-N OTHER",
        "-A FORWARD -j OTHER",
        "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD",
        "-A OTHER -o eth0 -j FLANNEL-FWD",
        "-A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT",
    ]
    .map(str::to_owned)
    .into();
    let names = ["FLANNEL-POSTRTG", "FLANNEL-FWD"];
    assert_eq!(
        removal("nat", &names, &listed).as_deref(),
        Some(
            "*nat\n-D FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n-D OTHER -o eth0 -j FLANNEL-FWD\n-F FLANNEL-FWD\n-X FLANNEL-FWD\nCOMMIT\n"
        )
    );
    assert_eq!(removal("nat", &["FLANNEL-POSTRTG"], &listed), None);
    assert_eq!(removal("nat", &names, &[]), None);
}

#[test]
fn both_families_have_their_programs() {
    let name = |variant, family| program(variant, family, "-restore");
    assert_eq!(name(Variant::Nft, Family::V4), "iptables-nft-restore");
    assert_eq!(name(Variant::Nft, Family::V6), "ip6tables-nft-restore");
    assert_eq!(
        name(Variant::Legacy, Family::V6),
        "ip6tables-legacy-restore"
    );
}
