//! The flows document as text for a person.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
};

use super::{
    classes,
    flows::{Direction, Flow, Flows},
    text::pressure,
};

const HEADINGS: [&str; 10] = [
    "PROTO",
    "POD",
    "PEER",
    "ON THE WIRE",
    "NODE",
    "OUT",
    "PACKETS",
    "IN",
    "PACKETS",
    "AGE",
];
/// Columns of numbers, which end where they begin elsewhere.
const NUMBERS: [usize; 3] = [6, 8, 9];

/// Renders the table, then what its words mean.
///
/// # Errors
/// Only what the writer itself fails with.
pub fn render(flows: &Flows) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let (sent, received) = (&flows.table_out, &flows.table_in);
    writeln!(
        out,
        "learned    {} out, {} in, of {} each{}",
        sent.flows,
        received.flows,
        sent.capacity,
        pressure(sent, received)
    )?;
    if let Some(reason) = &flows.held {
        writeln!(out, "held       NOTHING bypasses the stack: {reason}")?;
    } else if let Some(reason) = &flows.tcp_held {
        writeln!(out, "held       TCP DOES NOT bypass the stack: {reason}")?;
    }
    if flows.flows.len() < flows.matching {
        writeln!(
            out,
            "shown      {} of {}, those with most packets",
            flows.flows.len(),
            flows.matching
        )?;
    }
    if let Some(reason) = &flows.classes_off {
        writeln!(out, "classes    OFF: {reason}")?;
    }
    if flows.flows.is_empty() {
        classes::render(&mut out, &flows.classes)?;
        return Ok(out);
    }
    out.push('\n');
    let rows: Vec<[String; 10]> = flows.flows.iter().map(cells).collect();
    table(&mut out, &rows);
    legend(&mut out, &flows.flows)?;
    classes::render(&mut out, &flows.classes)?;
    Ok(out)
}

fn cells(flow: &Flow) -> [String; 10] {
    let ends = &flow.ends;
    let path = |direction: Option<&Direction>| match direction {
        None => "-".to_owned(),
        Some(direction) => direction.reason.map_or_else(
            || "fast".to_owned(),
            |why| format!("kernel:{}", why.label()),
        ),
    };
    let packets = |direction: Option<&Direction>| {
        direction.map_or_else(|| "-".to_owned(), |one| one.packets.to_string())
    };
    let age = flow
        .directions()
        .map(|direction| direction.age_seconds)
        .fold(0.0, f64::max);
    let wire = if ends.is_translated() {
        ends.wire.to_string()
    } else {
        "same".to_owned()
    };
    [
        ends.protocol.to_string(),
        ends.pod.to_string(),
        ends.peer.to_string(),
        wire,
        ends.node.to_string(),
        path(flow.sent.as_ref()),
        packets(flow.sent.as_ref()),
        path(flow.received.as_ref()),
        packets(flow.received.as_ref()),
        span(age),
    ]
}

fn table(out: &mut String, rows: &[[String; 10]]) {
    let headings = HEADINGS.map(str::to_owned);
    let width = |column: usize| {
        let cells = std::iter::once(&headings).chain(rows);
        cells.map(|row| row[column].len()).max().unwrap_or_default()
    };
    let widths: [usize; 10] = std::array::from_fn(width);
    for row in std::iter::once(&headings).chain(rows) {
        let cells = row.iter().zip(widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| {
            if NUMBERS.contains(&column) {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

/// The words that the table used.
fn legend(out: &mut String, flows: &[Flow]) -> fmt::Result {
    let reasons: BTreeSet<_> = flows
        .iter()
        .flat_map(Flow::directions)
        .filter_map(|direction| direction.reason)
        .collect();
    let is_half = flows
        .iter()
        .any(|flow| flow.sent.is_none() || flow.received.is_none());
    if reasons.is_empty() && !is_half {
        return Ok(());
    }
    out.push('\n');
    for why in reasons {
        writeln!(out, "kernel:{}  {}", why.label(), why.text())?;
    }
    if is_half {
        writeln!(
            out,
            "-  not learned in this direction: the stack carries what there is"
        )?;
    }
    Ok(())
}

/// Seconds in two units at most.
fn span(seconds: f64) -> String {
    let whole = seconds as u64;
    match whole {
        0..=59 => format!("{seconds:.1}s"),
        60..=3599 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..=86_399 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::flows::{Ends, Path, Protocol, Table, Why};

    fn direction(packets: u64, reason: Option<Why>) -> Option<Direction> {
        Some(Direction {
            path: if reason.is_some() {
                Path::Kernel
            } else {
                Path::Fast
            },
            reason,
            packets,
            age_seconds: 61.5,
            confirmed_seconds: 0.25,
        })
    }

    fn flow(protocol: Protocol, peer: &str, wire: &str) -> Flow {
        Flow {
            ends: Ends {
                protocol,
                pod: "10.1.1.2:40000".parse().expect("pod"),
                peer: peer.parse().expect("peer"),
                wire: wire.parse().expect("wire"),
                node: [192, 0, 2, 2].into(),
            },
            sent: direction(1234, None),
            received: direction(7, None),
        }
    }

    fn of(flows: Vec<Flow>) -> Flows {
        Flows {
            table_out: Table {
                flows: 2,
                capacity: 65_536,
                full: false,
            },
            table_in: Table::default(),
            held: None,
            tcp_held: None,
            matching: flows.len(),
            flows,
            classes: Vec::new(),
            classes_off: None,
        }
    }

    #[test]
    fn the_table_is_aligned_and_says_what_is_translated() {
        let service = flow(Protocol::Tcp, "10.96.0.10:80", "10.1.2.2:8080");
        let plain = Flow {
            received: None,
            ..flow(Protocol::Udp, "10.1.2.2:7", "10.1.2.2:7")
        };
        let text = render(&of(vec![service, plain])).expect("text");
        let expected = "\
learned    2 out, 0 in, of 65536 each

PROTO  POD             PEER           ON THE WIRE    NODE       OUT   PACKETS  IN    PACKETS    AGE
tcp    10.1.1.2:40000  10.96.0.10:80  10.1.2.2:8080  192.0.2.2  fast     1234  fast        7  1m01s
udp    10.1.1.2:40000  10.1.2.2:7     same           192.0.2.2  fast     1234  -           -  1m01s

-  not learned in this direction: the stack carries what there is
";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_keeps_a_flow_with_the_kernel_is_explained() {
        let stale = Flow {
            sent: direction(1, Some(Why::Stale)),
            ..flow(Protocol::Udp, "10.1.2.2:7", "10.1.2.2:7")
        };
        let text = render(&of(vec![stale])).expect("text");
        assert!(text.contains("  kernel:stale  "), "{text}");
        assert!(text.contains("\nkernel:stale  not confirmed"), "{text}");
        assert!(!text.contains("\n-  "), "both directions are there: {text}");
    }

    #[test]
    fn an_answer_says_what_it_leaves_out_and_what_is_held() {
        let one = flow(Protocol::Udp, "10.1.2.2:7", "10.1.2.2:7");
        let flows = Flows {
            matching: 500,
            held: Some("a queue".to_owned()),
            tcp_held: Some("sysctl".to_owned()),
            ..of(vec![one])
        };
        let text = render(&flows).expect("text");
        assert!(text.contains("shown      1 of 500"), "{text}");
        assert!(
            text.contains("NOTHING bypasses the stack: a queue"),
            "{text}"
        );
        assert!(!text.contains("sysctl"), "{text}");
        let empty = render(&of(Vec::new())).expect("text");
        assert!(!empty.contains("PROTO"), "{empty}");
    }

    #[test]
    fn spans_have_two_units_at_most() {
        let cases = [
            (0.04, "0.0s"),
            (59.94, "59.9s"),
            (3599.0, "59m59s"),
            (7260.0, "2h01m"),
            (90_000.0, "1d01h"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(span(seconds), expected);
        }
    }
}
