//! Rules put together expression by expression.

use super::{super::attribute::append, *};

/// An expression, its attributes given by kind.
fn expression(name: &str, attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut data = Vec::new();
    for (kind, value) in attributes {
        append(&mut data, *kind, value);
    }
    let mut bytes = Vec::new();
    append(&mut bytes, EXPRESSION_NAME, format!("{name}\0").as_bytes());
    append(&mut bytes, EXPRESSION_DATA, &data);
    bytes
}

fn number(value: u32) -> Vec<u8> {
    value.to_be_bytes().to_vec()
}

fn value(bytes: &[u8]) -> Vec<u8> {
    let mut nested = Vec::new();
    append(&mut nested, DATA_VALUE, bytes);
    nested
}

fn load(base: u32, offset: u32, length: u32) -> Vec<u8> {
    let numbers = [1, base, offset, length];
    let attributes: Vec<_> = (1..).zip(numbers.map(number)).collect();
    expression("payload", &attributes)
}

fn compare(order: u32, bytes: &[u8]) -> Vec<u8> {
    expression(
        "cmp",
        &[(1, number(1)), (2, number(order)), (3, value(bytes))],
    )
}

fn rule(expressions: &[Vec<u8>]) -> Vec<u8> {
    let mut list = Vec::new();
    for expression in expressions {
        append(&mut list, 1, expression);
    }
    let mut message = Vec::new();
    append(&mut message, RULE_HANDLE, &7_u64.to_be_bytes());
    append(&mut message, RULE_EXPRESSIONS, &list);
    message
}

fn reasons(message: &[u8]) -> Vec<String> {
    let context = Context {
        pods: Pods("10.244.0.0/16".parse().expect("a network")),
        sets: &BTreeMap::new(),
        ipsets: &Sets::default(),
    };
    read(message, "t", &context).reasons
}

fn limit() -> Vec<u8> {
    expression("limit", &[])
}

#[test]
fn expressions_that_this_kernel_may_lack_are_known() {
    for (name, expected) in [
        ("queue", "queue"),
        ("synproxy", "synproxy"),
        ("osf", "osf"),
        ("socket", "socket"),
        ("numgen", "numgen"),
        ("something new", "something new"),
    ] {
        assert_eq!(reasons(&rule(&[expression(name, &[])])), [expected]);
    }
}

#[test]
fn addresses_decide_who_meets_what_follows() {
    const NETWORK: u32 = 1;
    for (length, order, bytes, meets) in [
        (4, 0, &[10, 96, 0, 1][..], false),
        (4, 0, &[10, 244, 0, 1], true),
        (4, 1, &[10, 96, 0, 1], true),
        (2, 0, &[10, 96], false),
        (2, 0, &[10, 244], true),
        (2, 1, &[10, 244], false),
        (1, 1, &[10], false),
        (4, 5, &[10, 245, 0, 0], false),
        (4, 5, &[10, 244, 255, 0], true),
        (4, 3, &[10, 243, 255, 255], false),
        (4, 2, &[10, 244, 0, 0], false),
        (4, 4, &[10, 244, 255, 255], false),
    ] {
        let message = rule(&[load(NETWORK, 16, length), compare(order, bytes), limit()]);
        assert_eq!(!reasons(&message).is_empty(), meets, "{order} {bytes:?}");
        // A limit in front of the condition is used up by pods too.
        let message = rule(&[limit(), load(NETWORK, 16, length), compare(order, bytes)]);
        assert_eq!(reasons(&message), ["limit"]);
    }
}

#[test]
fn two_addresses_in_one_register_are_both_looked_at() {
    const NETWORK: u32 = 1;
    for (bytes, meets) in [
        ([10, 244, 1, 2, 10, 244, 2, 3], true),
        ([10, 244, 1, 2, 10, 96, 0, 1], false),
        ([192, 168, 1, 2, 10, 244, 2, 3], false),
    ] {
        let message = rule(&[load(NETWORK, 12, 8), compare(0, &bytes), limit()]);
        assert_eq!(!reasons(&message).is_empty(), meets, "{bytes:?}");
    }
}

#[test]
fn a_port_that_is_loaded_over_an_address_is_no_address() {
    const TRANSPORT: u32 = 2;
    let message = rule(&[
        load(1, 16, 4),
        load(TRANSPORT, 2, 2),
        compare(0, &[0, 80]),
        limit(),
    ]);
    assert_eq!(reasons(&message), ["limit"]);
}

#[test]
fn a_rule_that_is_cut_anywhere_is_survived() {
    let message = rule(&[load(1, 12, 8), compare(0, &[10, 244, 1, 2]), limit()]);
    for cut in 0..message.len() {
        let _ = reasons(&message[..cut]);
    }
}
