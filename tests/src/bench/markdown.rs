//! The results as Markdown tables, for people.

use std::fmt::Write as _;

use super::{
    growth::Curve,
    measure::{PROBES, Target},
    plot::data::{HEADLINES, speed},
    program::{LOADS, ProgramCost},
    results::{Report, Row},
    side::NETLINK,
    stats::{Better, Difference, Summary},
};

/// The whole report.
#[must_use]
pub fn report(report: &Report) -> String {
    let mut text = String::new();
    let settings = &report.settings;
    let mut say = |line: std::fmt::Arguments<'_>| {
        writeln!(text, "{line}").expect("a string takes everything");
    };
    say(format_args!("Machine: {}.", report.machine.describe()));
    say(format_args!(
        "{} rounds of {} s a side, sides in turn; both ends on CPU {} where they share one.\n",
        settings.rounds, settings.seconds, settings.cpu
    ));
    let glance = glance(report);
    if !glance.is_empty() {
        say(format_args!("### Speed at a glance\n\n{glance}"));
    }
    for target in [Target::Pod, Target::Service] {
        let rows: Vec<&Row> = report
            .results
            .iter()
            .filter(|row| row.to == target.name())
            .collect();
        if rows.is_empty() {
            continue;
        }
        say(format_args!(
            "### {}\n",
            match target {
                Target::Pod => "To the server's own address",
                Target::Service => "Through a ClusterIP",
            }
        ));
        for probe in &PROBES {
            let figures = probe.traffic.figures().iter();
            let names: Vec<String> = figures
                .map(|figure| format!("{}{}", probe.name, figure.suffix))
                .collect();
            let of_probe: Vec<&&Row> = rows
                .iter()
                .filter(|row| names.contains(&row.measure))
                .collect();
            if !of_probe.is_empty() {
                say(format_args!("{}", table(&of_probe)));
            }
        }
    }
    if !report.programs.is_empty() {
        say(format_args!(
            "### Programs\n\n{}",
            programs(&report.programs)
        ));
    }
    if !report.growth.is_empty() {
        say(format_args!("### Growth\n\n{}", growth(&report.growth)));
    }
    text
}

/// One row for each headline: how many times the speed of the kernel path.
fn glance(report: &Report) -> String {
    let mut sides: Vec<&str> = Vec::new();
    for row in &report.results {
        if !sides.contains(&row.side.as_str()) && row.side != NETLINK {
            sides.push(&row.side);
        }
    }
    let mut text = String::new();
    for (target, suffix) in [
        (Target::Pod, ""),
        (Target::Service, ", through a ClusterIP"),
    ] {
        for (measure, title) in HEADLINES {
            let row = |side: &str| report.row(measure, side, target.name());
            let Some(base) = row(NETLINK) else {
                continue;
            };
            let cells: Vec<String> = sides
                .iter()
                .map(|side| row(side).map_or(String::new(), cell))
                .collect();
            writeln!(
                text,
                "| {title}{suffix} | {} {} | {} |",
                number(base.median),
                base.unit,
                cells.join(" | ")
            )
            .expect("a string takes everything");
        }
    }
    if text.is_empty() {
        return text;
    }
    let rule = "---:|".repeat(sides.len());
    format!(
        "Times the speed of `{NETLINK}`; ~ where the spreads overlap, so that no difference may be claimed.\n\n\
         | | {NETLINK} | {} |\n|---|---:|{rule}\n{text}",
        sides.join(" | ")
    )
}

fn cell(row: &Row) -> String {
    let open = row.difference_to_netlink == Some(Difference::Open);
    speed(row).map_or(String::new(), |(value, _)| {
        format!("{}{value:.2}", if open { "~ " } else { "" })
    })
}

fn table(rows: &[&&Row]) -> String {
    let mut text = "| measure | side | median | min … max | × netlink | × host | × host-nf | |\n\
                    |---|---|---:|---:|---:|---:|---:|---|\n"
        .to_owned();
    for row in rows {
        let ratio = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
        let netlink = match (row.ratio_to_netlink, row.ratio_to_netlink_spread) {
            (Some(ratio), Some([min, max])) => format!("{ratio:.2} ({min:.2} … {max:.2})"),
            _ => String::new(),
        };
        writeln!(
            text,
            "| `{}` {} | {} | {} | {} … {} | {netlink} | {} | {} | {} |",
            row.measure,
            unit(row),
            row.side,
            number(row.median),
            number(row.min),
            number(row.max),
            ratio(row.ratio_to_host),
            ratio(row.ratio_to_host_nf),
            verdict(row),
        )
        .expect("a string takes everything");
    }
    text
}

fn unit(row: &Row) -> String {
    match row.better {
        Better::Higher => row.unit.clone(),
        Better::Lower => format!("{} ↓", row.unit),
    }
}

const fn verdict(row: &Row) -> &'static str {
    match row.difference_to_netlink {
        Some(Difference::Better) => "better",
        Some(Difference::Worse) => "worse",
        Some(Difference::Open) => "no difference: spreads overlap",
        None => "",
    }
}

/// Three to four digits that mean something.
#[must_use]
pub fn number(value: f64) -> String {
    match value.abs() {
        million if million >= 1_000_000.0 => format!("{:.2} M", value / 1_000_000.0),
        large if large >= 100_000.0 => format!("{:.1} k", value / 1000.0),
        large if large >= 1000.0 => format!("{:.2} k", value / 1000.0),
        middle if middle >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        small if small >= 0.01 || small == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

fn spread(summary: &Summary) -> String {
    format!(
        "{} ({} … {})",
        number(summary.median),
        number(summary.min),
        number(summary.max)
    )
}

fn programs(all: &[ProgramCost]) -> String {
    let mut text = "| side | program | instructions | machine code | verifier's steps ".to_owned();
    for (measure, target) in LOADS {
        let through = match target {
            Target::Pod => "",
            Target::Service => ", through a ClusterIP",
        };
        write!(text, "| under `{measure}`{through} ").expect("a string takes everything");
    }
    text += "| ns, single runs |\n|---|---|---:|---:|---:|";
    text += &"---:|".repeat(LOADS.len() + 1);
    text.push('\n');
    for one in all {
        write!(
            text,
            "| {} | `{}` | {} | {} B | {} ",
            one.side, one.program, one.instructions, one.machine_code, one.verified,
        )
        .expect("a string takes everything");
        for (measure, target) in LOADS {
            let mut loads = one.under_load.iter();
            let load = loads.find(|load| load.measure == measure && load.to == target.name());
            let load = load.map_or(String::new(), |load| {
                format!("{:.0} × {:.1}", load.ns, load.runs_per_transaction)
            });
            write!(text, "| {load} ").expect("a string takes everything");
        }
        let single = one.test_run_ns.as_ref().map_or(String::new(), spread);
        writeln!(text, "| {single} |").expect("a string takes everything");
    }
    text += "\n| side | map | entries at most | memory |\n|---|---|---:|---:|\n";
    let mut seen = std::collections::BTreeSet::new();
    for one in all {
        for map in &one.maps {
            if seen.insert((&one.side, &map.map)) {
                writeln!(
                    text,
                    "| {} | `{}` | {} | {:.1} KiB |",
                    one.side,
                    map.map,
                    map.entries,
                    map.bytes as f64 / 1024.0
                )
                .expect("a string takes everything");
            }
        }
    }
    text
}

fn growth(curves: &[Curve]) -> String {
    let mut text =
        "| measure | side | over | at: median (min … max) |\n|---|---|---|---|\n".to_owned();
    for curve in curves {
        let points: Vec<String> = curve
            .points
            .iter()
            .map(|point| format!("**{}**: {}", point.x, spread(&point.y)))
            .collect();
        writeln!(
            text,
            "| {}, {} | {} | {} | {} |",
            curve.measure,
            curve.unit,
            curve.side,
            curve.over,
            points.join("<br>")
        )
        .expect("a string takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::{
        rows,
        tests::{report, series},
    };

    #[test]
    fn overlapping_spreads_are_said_to_be_no_difference() {
        let all = rows(&[
            series("netlink", &[100.0, 120.0, 110.0]),
            series("direct", &[119.0, 130.0, 125.0]),
        ]);
        let text = table(&all.iter().collect::<Vec<_>>().iter().collect::<Vec<_>>());
        let direct = text.lines().last().expect("a line");
        assert!(direct.contains("no difference"), "{direct}");
        assert!(direct.contains("1.14 (1.08 … 1.19)"), "{direct}");
    }

    #[test]
    fn less_time_is_more_speed_at_a_glance() {
        let mut all = [
            series("netlink", &[20.0, 22.0]),
            series("learned", &[10.0, 11.0]),
            series("direct", &[19.0, 21.0]),
        ];
        for one in &mut all {
            one.measure = "tcp_rr_p50".to_owned();
            one.figure.better = Better::Lower;
        }
        let text = glance(&report(&all));
        let line = text.lines().last().expect("a line");
        assert!(line.ends_with("| 2.00 | ~ 1.05 |"), "{line}");
    }

    #[test]
    fn numbers_keep_what_means_something() {
        for (value, text) in [
            (1_000_000.0, "1.00 M"),
            (145_678.0, "145.7 k"),
            (1234.0, "1.23 k"),
            (123.4, "123"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.001_234, "0.0012"),
            (0.0, "0.00"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
