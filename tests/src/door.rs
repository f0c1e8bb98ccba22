//! A TCP proxy whose bytes can be late, and that can be shut.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::namespace::Namespace;

/// How often a late chunk is looked at again, so that a shorter delay counts at once.
const STEP: Duration = Duration::from_millis(5);

/// An open door; its threads end with its connections and the process.
#[derive(Debug)]
pub struct Door {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Milliseconds that an answer takes longer.
    delay: AtomicU64,
    is_shut: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl Door {
    /// Listens inside `namespace` and leads to `to`.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn open(namespace: &Namespace, on: Ipv4Addr, to: SocketAddr) -> Result<Self> {
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        // Threads live in the namespace of the one that started them.
        let address = namespace.within(move || -> Result<SocketAddr> {
            let listener = TcpListener::bind((on, 0)).context("no port for a door")?;
            let address = listener.local_addr()?;
            thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    shared.admit(client, to);
                }
            });
            Ok(address)
        })??;
        Ok(Self { address, state })
    }

    /// Where it is, for `--etcd-endpoints`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Every answer comes so much later from now on, those under way included.
    pub fn delay(&self, time: Duration) {
        let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.state.delay.store(milliseconds, Ordering::Relaxed);
    }

    /// Ends every connection and admits no other.
    pub fn shut(&self) {
        self.state.is_shut.store(true, Ordering::Relaxed);
        for stream in self.state.streams().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Admits connections again.
    pub fn reopen(&self) {
        self.state.is_shut.store(false, Ordering::Relaxed);
    }
}

impl State {
    fn streams(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(self: &Arc<Self>, client: TcpStream, to: SocketAddr) {
        if self.is_shut.load(Ordering::Relaxed) {
            return;
        }
        let Ok(server) = TcpStream::connect(to) else {
            return;
        };
        let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else {
            return;
        };
        for stream in [&client, &server] {
            let _ = stream.set_nodelay(true);
            self.streams().extend(stream.try_clone());
        }
        let state = Arc::clone(self);
        thread::spawn(move || state.carry(client, server, false));
        let state = Arc::clone(self);
        thread::spawn(move || state.carry(server_too, client_too, true));
    }

    /// Until one side ends.
    fn carry(&self, mut from: TcpStream, to: TcpStream, may_be_late: bool) {
        let (sender, chunks) = channel::<(Instant, Vec<u8>)>();
        thread::scope(|scope| {
            scope.spawn(move || {
                if let Ok(writer) = to.try_clone() {
                    self.deliver(&chunks, writer, may_be_late);
                }
                let _ = to.shutdown(Shutdown::Both);
            });
            let mut buffer = vec![0; 65_536];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                let chunk = (Instant::now(), buffer[..length].to_vec());
                if sender.send(chunk).is_err() {
                    break;
                }
            }
            drop(sender);
            let _ = from.shutdown(Shutdown::Both);
        });
    }

    fn deliver(&self, chunks: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream, may_be_late: bool) {
        for (came, bytes) in chunks {
            while may_be_late
                && came.elapsed() < Duration::from_millis(self.delay.load(Ordering::Relaxed))
            {
                thread::sleep(STEP);
            }
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
    }
}
