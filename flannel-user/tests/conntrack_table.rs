//! Conntrack's table against the real kernel, each test in a network namespace of its own.

mod namespace;

use std::{
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    time::Instant,
};

use flannel_user::datapath::conntrack_table::{
    ConntrackTable, Entry, TcpState, Tuple, status, tcp_flags,
};
use namespace::{in_new_namespace, run};

const ESTABLISHED_SECONDS: u32 = 432_000;

fn tuple(port: u16) -> Tuple {
    Tuple {
        source: SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, 2), port),
        destination: SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, 3), 80),
    }
}

fn inserted(table: &mut ConntrackTable, entry: Entry) {
    for result in table.insert(&[entry]) {
        result.expect("written");
    }
}

fn listed(filter: &str) -> Vec<String> {
    run(&format!("conntrack -L -p tcp {filter}"))
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn an_entry_is_written_as_the_kernel_would_have_made_it() {
    in_new_namespace(|| async {
        let mut table = ConntrackTable::open().expect("a socket");
        let entry = Entry::established(tuple(40_000), ESTABLISHED_SECONDS);
        inserted(&mut table, entry.clone());

        let lines = listed("");
        assert_eq!(lines.len(), 1, "{lines:?}");
        for part in [
            " ESTABLISHED src=10.244.1.2 dst=10.244.2.3 sport=40000 dport=80 ",
            " src=10.244.2.3 dst=10.244.1.2 sport=80 dport=40000 ",
            "[ASSURED]",
        ] {
            assert!(lines[0].contains(part), "{part} in {lines:?}");
        }

        let read = table
            .get(&tuple(40_000))
            .expect("an answer")
            .expect("it is there");
        assert_eq!(
            (read.original, read.reply, read.state),
            (entry.original, entry.reply, entry.state)
        );
        assert_eq!(read.status & entry.status, entry.status);
        assert!((ESTABLISHED_SECONDS - 5..=ESTABLISHED_SECONDS).contains(&read.timeout));
        let flags = tcp_flags::BE_LIBERAL | tcp_flags::SACK_PERM;
        assert_eq!(
            [read.flags_original.flags, read.flags_reply.flags].map(|one| one & flags),
            [flags; 2]
        );
        // By the other end's view it is the same one.
        let other = table.get(&tuple(40_000).reversed()).expect("an answer");
        assert_eq!(other.map(|entry| entry.id), Some(read.id));
        assert!(read.id.is_some());
        assert_eq!(table.get(&tuple(40_001)).expect("an answer"), None);
    });
}

#[test]
fn an_old_entry_becomes_the_new_connection() {
    in_new_namespace(|| async {
        let mut table = ConntrackTable::open().expect("a socket");
        let over = Entry {
            state: TcpState::TimeWait,
            ..Entry::established(tuple(40_000), 120)
        };
        for new in [
            Entry::established(tuple(40_000), ESTABLISHED_SECONDS),
            // Not even ASSURED is left of the old one.
            Entry::half_open(tuple(40_000), 60),
        ] {
            inserted(&mut table, over.clone());
            let before = table.get(&over.original).expect("an answer");
            assert_eq!(before.map(|entry| entry.state), Some(TcpState::TimeWait));
            inserted(&mut table, new.clone());
            let after = table
                .get(&over.original)
                .expect("an answer")
                .expect("it is there");
            assert_eq!(after.state, new.state);
            assert_eq!(after.status & status::ASSURED, new.status & status::ASSURED);
            assert!((new.timeout - 5..=new.timeout).contains(&after.timeout));
            assert_eq!(listed("").len(), 1);
        }
    });
}

#[test]
fn what_has_become_of_a_connection_is_written_over_it() {
    in_new_namespace(|| async {
        let mut table = ConntrackTable::open().expect("a socket");
        let lives = Entry::established(tuple(40_000), ESTABLISHED_SECONDS);
        inserted(&mut table, lives.clone());
        let over = Entry {
            state: TcpState::Close,
            timeout: 10,
            ..lives
        };
        // The last one as if it had not been answered, which the kernel does not write over.
        for now in [over, Entry::half_open(tuple(40_000), 60)] {
            let results = table.update(std::slice::from_ref(&now));
            assert!(matches!(results[..], [Ok(())]), "{results:?}");
            let read = table.get(&now.original).expect("an answer");
            let read = read.map(|entry| (entry.state, entry.timeout <= now.timeout));
            assert_eq!(read, Some((now.state, true)));
        }
    });
}

#[test]
fn what_is_deleted_is_gone_and_what_was_not_there_is_said() {
    in_new_namespace(|| async {
        let mut table = ConntrackTable::open().expect("a socket");
        for port in [1, 2] {
            inserted(&mut table, Entry::established(tuple(port), 60));
        }
        let results = table.delete(&[tuple(1), tuple(7), tuple(2)]);
        let results: Vec<bool> = results
            .into_iter()
            .map(|one| one.expect("an answer"))
            .collect();
        assert_eq!(results, [true, false, true]);
        assert_eq!(table.dump(|_| true).expect("an answer"), []);
    });
}

#[test]
fn each_refusal_stays_with_its_entry() {
    in_new_namespace(|| async {
        let mut table = ConntrackTable::open().expect("a socket");
        // Its answers would be those of another connection: refused.
        inserted(&mut table, Entry::established(tuple(500), 60));
        let entries: Vec<Entry> = (0..1000_u16)
            .map(|number| {
                let mut entry = Entry::established(tuple(2000 + number), 60);
                if number % 100 == 7 {
                    entry.reply = tuple(500).reversed();
                }
                entry
            })
            .collect();
        let results = table.insert(&entries);
        assert_eq!(results.len(), entries.len());
        for (number, result) in results.iter().enumerate() {
            match result {
                Err(error) => {
                    assert_eq!(number % 100, 7, "{error}");
                    assert_eq!(error.errno(), libc::EEXIST);
                }
                Ok(()) => assert_ne!(number % 100, 7),
            }
        }
        assert_eq!(table.dump(|_| true).expect("an answer").len(), 1 + 990);
    });
}

#[test]
fn translated_connections_show_who_answers() {
    in_new_namespace(|| async {
        run("ip addr add 10.244.1.2/24 dev lo");
        run("ip route add 10.96.0.0/16 dev lo");
        run(
            "iptables -t nat -A OUTPUT -d 10.96.0.1 -p tcp --dport 80 -j DNAT --to-destination 10.244.1.2:8080",
        );
        let listener = TcpListener::bind("10.244.1.2:8080").expect("listening");
        let stream = TcpStream::connect("10.96.0.1:80").expect("connected");
        let _server = listener.accept().expect("accepted");
        let direct = TcpStream::connect("10.244.1.2:8080").expect("connected");

        let mut table = ConntrackTable::open().expect("a socket");
        let all = table.dump(|_| true).expect("an answer");
        assert_eq!(all.len(), 2, "{all:?}");
        let translated = table.dump(Entry::is_translated).expect("an answer");
        let [entry] = &translated[..] else {
            panic!("one of {all:?}");
        };
        let client: SocketAddrV4 = match stream.local_addr() {
            Ok(std::net::SocketAddr::V4(client)) => client,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            entry.original,
            Tuple {
                source: client,
                destination: "10.96.0.1:80".parse().expect("an end"),
            }
        );
        assert_eq!(
            entry.reply,
            Tuple {
                source: "10.244.1.2:8080".parse().expect("an end"),
                destination: client,
            }
        );
        assert_eq!(entry.state, TcpState::Established);
        assert_ne!(entry.status & status::DST_NAT, 0);
        drop(direct);
    });
}

#[test]
fn ten_thousand_connections_go_in_batches() {
    in_new_namespace(|| async {
        let mut table = ConntrackTable::open().expect("a socket");
        let entries: Vec<Entry> = (0..10_000)
            .map(|port| Entry::established(tuple(10_000 + port), 600))
            .collect();
        let tuples: Vec<Tuple> = entries.iter().map(|entry| entry.original).collect();

        let started = Instant::now();
        let failed = table
            .insert(&entries)
            .iter()
            .filter(|one| one.is_err())
            .count();
        let inserted = started.elapsed();
        assert_eq!(failed, 0);

        let started = Instant::now();
        assert_eq!(table.dump(|_| true).expect("an answer").len(), 10_000);
        let dumped = started.elapsed();

        let started = Instant::now();
        let found = table.get_many(&tuples);
        let asked = started.elapsed();
        assert!(found.iter().all(|one| matches!(one, Ok(Some(_)))));

        let started = Instant::now();
        let gone = table.delete(&tuples);
        let deleted = started.elapsed();
        assert!(gone.iter().all(|one| matches!(one, Ok(true))));
        println!(
            "10,000 connections: inserted {inserted:?}, dumped {dumped:?}, asked {asked:?}, deleted {deleted:?}"
        );
        assert!(
            inserted.as_secs() < 5,
            "one at a time or worse: {inserted:?}"
        );
    });
}
