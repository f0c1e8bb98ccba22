//! `/healthz` and `/readyz` (contract section 17), with real answers behind them (row 23.16).
//!
//! Healthy means that the agent's loop still turns; ready, that the first snapshot of peers is in
//! the kernel and the CNI plugin finds its subnet file.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::Instant,
};
use tracing::{debug, info, warn};

/// The loop turns at least every 10 s; a pass over thousands of peers takes a second.
const LONGEST_TURN: Duration = Duration::from_secs(60);
/// Probes are few; whoever opens more connections at a time waits.
const CONNECTIONS: usize = 32;
/// How long a client may take for its request.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the endpoints tell, noted by the parts of the agent.
#[derive(Debug, Default)]
pub struct Health {
    peers_are_programmed: AtomicBool,
    pods_can_start: AtomicBool,
    /// When the loop last turned; `None` before it started.
    turned: Mutex<Option<Instant>>,
}

impl Health {
    /// The reconcile loop turned.
    pub fn beat(&self) {
        *self.turned.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Every known peer is in the kernel; once said, it stays so.
    pub fn peers_are_programmed(&self) {
        self.peers_are_programmed.store(true, Ordering::Relaxed);
    }

    /// Whether the subnet file says what it should.
    pub fn pods_can_start(&self, can: bool) {
        self.pods_can_start.store(can, Ordering::Relaxed);
    }

    fn is_ready(&self) -> bool {
        self.peers_are_programmed.load(Ordering::Relaxed)
            && self.pods_can_start.load(Ordering::Relaxed)
    }

    fn hangs(&self) -> bool {
        let turned = *self.turned.lock().unwrap_or_else(PoisonError::into_inner);
        turned.is_some_and(|turned| turned.elapsed() > LONGEST_TURN)
    }

    fn answer(&self, path: &str) -> (StatusCode, &'static str) {
        match path {
            "/healthz" if self.hangs() => (
                StatusCode::SERVICE_UNAVAILABLE,
                "flanneld hangs: its loop has not turned for a minute",
            ),
            "/healthz" => (StatusCode::OK, "flanneld is running"),
            "/readyz" if self.is_ready() => (StatusCode::OK, "flanneld is ready"),
            "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, "flanneld is not ready yet"),
            _ => (StatusCode::NOT_FOUND, "404 page not found"),
        }
    }
}

/// Answers on `ip` (an address or a name) and `port` until the agent ends.
///
/// # Errors
/// Nobody can listen there.
pub async fn serve(ip: &str, port: u16, health: Arc<Health>) -> anyhow::Result<()> {
    let listener = TcpListener::bind((ip, port)).await.with_context(|| {
        format!("cannot serve health checks on {ip} port {port}: give --healthz-ip an address of this host and --healthz-port a free port, or 0 for none")
    })?;
    info!(ip, port, "health checks are answered");
    tokio::spawn(accept(listener, health));
    Ok(())
}

async fn accept(listener: TcpListener, health: Arc<Health>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let health = Arc::clone(&health);
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = converse(stream, &health).await {
                        debug!(%error, "health check ended");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, for instance: the listener itself is fine.
                warn!(%error, "cannot accept a health check");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, health: &Health) -> hyper::Result<()> {
    let answer = |request: Request<Incoming>| {
        let (status, text) = health.answer(request.uri().path());
        let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *response.status_mut() = status;
        std::future::ready(Ok::<_, Infallible>(response))
    };
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contract_17_paths_and_bodies() {
        let health = Health::default();
        let running = (StatusCode::OK, "flanneld is running");
        let not_ready = (StatusCode::SERVICE_UNAVAILABLE, "flanneld is not ready yet");
        assert_eq!(health.answer("/healthz"), running);
        assert_eq!(health.answer("/readyz"), not_ready);
        health.peers_are_programmed();
        assert_eq!(health.answer("/readyz"), not_ready, "no subnet file");
        health.pods_can_start(true);
        assert_eq!(
            health.answer("/readyz"),
            (StatusCode::OK, "flanneld is ready")
        );
        health.pods_can_start(false);
        assert_eq!(health.answer("/readyz"), not_ready);
        for other in ["/", "/healthz/", "/metrics"] {
            assert_eq!(health.answer(other).0, StatusCode::NOT_FOUND, "{other}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn row_23_16_a_loop_that_hangs_is_not_healthy() {
        let health = Health::default();
        tokio::time::advance(LONGEST_TURN * 2).await;
        assert_eq!(
            health.answer("/healthz").0,
            StatusCode::OK,
            "still starting"
        );
        health.beat();
        tokio::time::advance(LONGEST_TURN / 2).await;
        assert_eq!(health.answer("/healthz").0, StatusCode::OK);
        tokio::time::advance(LONGEST_TURN).await;
        assert_eq!(health.answer("/healthz").0, StatusCode::SERVICE_UNAVAILABLE);
        health.beat();
        assert_eq!(health.answer("/healthz").0, StatusCode::OK);
    }
}
