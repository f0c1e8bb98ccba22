//! Which endpoint is used, and when another one.
//!
//! One connection is in use at a time, chosen by a race: the endpoints are asked one
//! after the other, [`STAGGER`] apart (at once where one refuses), and the first that
//! answers a linearizable read is taken, so a member without a leader never is. While none
//! answers, every endpoint is asked again each [`ROUND`] over a *new* connection: after an
//! outage the old one would wait for TCP's next retransmission, which may be half a minute.
//!
//! A call that gets no answer for [`SUSPICION`] starts such a race beside it. Only if
//! somebody else answers meanwhile is the silent connection given up; an etcd that is
//! slow on every call (seconds) is waited for. Anything that fails by the connection drops
//! it, and with it its token and certificates, which the next one reads afresh.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use etcd_client::{Client, ConnectOptions, GetOptions};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    error::{self, EtcdError},
    options::{Endpoint, EtcdOptions, OptionsError},
};

/// The longest wait for any one answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between the first questions to two endpoints.
const STAGGER: Duration = Duration::from_millis(100);
/// Between two questions to the same endpoint while none answers.
const ROUND: Duration = Duration::from_secs(1);
/// Silence after which others are asked as well.
const SUSPICION: Duration = Duration::from_secs(2);
/// What a silent endpoint is given once another one answered.
const GRACE: Duration = Duration::from_secs(1);
/// Between two looks at whether an idle connection still works.
const CHECK: Duration = Duration::from_secs(5);
/// HTTP/2 pings on it; etcd closes connections that ping more often than every 5 s.
const PING: Duration = Duration::from_secs(10);

/// The endpoints of one etcd cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    options: EtcdOptions,
    endpoints: Vec<Endpoint>,
    /// The key that is read to see whether an endpoint works.
    probe: String,
    state: Mutex<State>,
    /// Held while a connection is looked for, so that one search serves all calls.
    searching: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    chosen: Option<Connection>,
    /// Where the next search begins.
    first: usize,
    connections: u64,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A client holds credentials.
        f.debug_struct("State").finish_non_exhaustive()
    }
}

/// A connection that has answered.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    index: usize,
    /// Tells it from every other one.
    number: u64,
}

impl Cluster {
    /// Checks endpoints and certificate files; connects to nothing.
    pub(super) fn new(options: &EtcdOptions, probe: String) -> Result<Self, OptionsError> {
        let endpoints = options.endpoints.parse(options.has_identity())?;
        if options.has_identity() {
            options.tls()?;
        }
        Ok(Self {
            options: options.clone(),
            endpoints,
            probe,
            state: Mutex::default(),
            searching: tokio::sync::Mutex::default(),
        })
    }

    /// The endpoints without secrets, with commas between them.
    pub(super) fn names(&self) -> String {
        let names: Vec<&str> = self.endpoints.iter().map(|e| e.url.as_str()).collect();
        names.join(",")
    }

    /// Calls etcd, over another connection if one fails: for what may be done twice.
    pub(super) async fn call<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut attempt: u32 = 1;
        loop {
            let connection = self.connection().await?;
            let answer = self.ask(&connection, attempt, call(connection.client.clone()));
            match answer.await {
                Err(error)
                    if error.is_of_the_endpoint() && attempt as usize <= self.endpoints.len() =>
                {
                    tracing::debug!(%error, "asking another endpoint");
                    attempt += 1;
                }
                answer => return answer,
            }
        }
    }

    /// Calls etcd once: for transactions, whose second run would meet the traces of the
    /// first.
    pub(super) async fn call_once<T, F>(
        &self,
        call: impl FnOnce(Client) -> F,
    ) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let connection = self.connection().await?;
        self.ask(&connection, 1, call(connection.client.clone()))
            .await
    }

    /// Waits for an answer over `connection`, and drops the connection where it failed.
    pub(super) async fn ask<T>(
        &self,
        connection: &Connection,
        attempt: u32,
        answer: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, EtcdError> {
        let endpoint = &self.endpoints[connection.index].url;
        let answer = tokio::select! {
            biased;
            answer = answer => answer.map_err(|error| EtcdError::new(endpoint, &error)),
            // A long answer must not be given up for short ones again and again.
            () = self.overtaken(connection, SUSPICION * attempt) => {
                return Err(EtcdError::Overtaken(endpoint.clone()));
            }
            () = sleep(PATIENCE) => Err(self.no_answer(connection.index)),
        };
        if answer.as_ref().is_err_and(EtcdError::is_of_the_endpoint) {
            self.drop_connection(connection);
        }
        answer
    }

    /// The connection in use, or the first that answers.
    pub(super) async fn connection(&self) -> Result<Connection, EtcdError> {
        if let Some(connection) = self.state().chosen.clone() {
            return Ok(connection);
        }
        let _searching = self.searching.lock().await;
        if let Some(connection) = self.state().chosen.clone() {
            return Ok(connection);
        }
        let first = self.state().first;
        let found = self.search(first).await?;
        self.choose(&found);
        Ok(found)
    }

    /// Returns as soon as `connection` is not the one in use any more, because it or
    /// another call over it failed. Looks every [`CHECK`] whether it still answers.
    pub(super) async fn until_dropped(&self, connection: &Connection) {
        loop {
            sleep(CHECK).await;
            let probe = &self.probe;
            if self.is_in_use(connection)
                && let Err(error) = self
                    .ask(connection, 1, read(connection.client.clone(), probe))
                    .await
            {
                tracing::debug!(%error, "the connection to etcd is given up");
            }
            if !self.is_in_use(connection) {
                return;
            }
        }
    }

    /// No use going on with this connection.
    pub(super) fn drop_connection(&self, connection: &Connection) {
        let mut state = self.state();
        if state
            .chosen
            .as_ref()
            .is_some_and(|chosen| chosen.number == connection.number)
        {
            state.chosen = None;
            state.first = (connection.index + 1) % self.endpoints.len();
        }
    }

    pub(super) fn error(&self, connection: &Connection, message: &str) -> EtcdError {
        EtcdError::Unavailable {
            endpoint: self.endpoints[connection.index].url.clone(),
            message: message.to_owned(),
        }
    }

    fn is_in_use(&self, connection: &Connection) -> bool {
        let state = self.state();
        let chosen = state.chosen.as_ref();
        chosen.is_some_and(|chosen| chosen.number == connection.number)
    }

    fn choose(&self, found: &Connection) {
        let mut state = self.state();
        state.first = found.index;
        state.chosen = Some(found.clone());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn no_answer(&self, index: usize) -> EtcdError {
        EtcdError::NoAnswer {
            endpoint: self.endpoints[index].url.clone(),
            seconds: PATIENCE.as_secs(),
        }
    }

    /// Returns once another connection answered and `silent` had its [`GRACE`]; the other
    /// one is in use then.
    async fn overtaken(&self, silent: &Connection, after: Duration) {
        sleep(after).await;
        loop {
            match self.search((silent.index + 1) % self.endpoints.len()).await {
                Ok(found) => {
                    sleep(GRACE).await;
                    if self.is_in_use(silent) {
                        self.choose(&found);
                    }
                    return;
                }
                Err(_) => sleep(ROUND).await,
            }
        }
    }

    /// The first endpoint that answers, asked in order from `first`. Fails when each of
    /// them has refused, or none answers for [`PATIENCE`].
    async fn search(&self, first: usize) -> Result<Connection, EtcdError> {
        let count = self.endpoints.len();
        let order: Vec<usize> = (0..count).map(|i| (first + i) % count).collect();
        let mut unasked = order.iter();
        let mut pending = FuturesUnordered::new();
        let mut faults = BTreeMap::new();
        let end = Instant::now() + PATIENCE;
        let mut next = Instant::now();
        loop {
            tokio::select! {
                biased;
                Some((index, answer)) = pending.next(), if !pending.is_empty() => match answer {
                    Ok(connection) => return Ok(connection),
                    Err(error @ (EtcdError::Refused { .. } | EtcdError::Options(_))) => return Err(error),
                    Err(error) => {
                        faults.insert(index, error);
                        if unasked.len() > 0 {
                            next = Instant::now();
                        } else if pending.is_empty() {
                            return Err(no_endpoint(&faults));
                        }
                    }
                },
                () = sleep_until(next) => {
                    if let Some(index) = unasked.next() {
                        pending.push(self.try_endpoint(*index));
                        next = Instant::now() + if unasked.len() > 0 { STAGGER } else { ROUND };
                    } else {
                        pending.extend(order.iter().map(|index| self.try_endpoint(*index)));
                        next = Instant::now() + ROUND;
                    }
                }
                () = sleep_until(end) => {
                    for index in order {
                        faults.entry(index).or_insert_with(|| self.no_answer(index));
                    }
                    return Err(no_endpoint(&faults));
                }
            }
        }
    }

    /// A new connection, with a new token, over which one read was answered.
    async fn try_endpoint(&self, index: usize) -> (usize, Result<Connection, EtcdError>) {
        let attempt = async {
            let client = self.connect(&self.endpoints[index]).await?;
            match read(client.clone(), &self.probe).await {
                Err(error) if !error::is_permission(&error) => {
                    let endpoint = &self.endpoints[index];
                    let error = EtcdError::new(&endpoint.url, &error);
                    Err(match &self.options.cert_file {
                        Some(file) if endpoint.tls => error.suspecting(file),
                        _ => error,
                    })
                }
                _ => Ok(client),
            }
        };
        let answer = match timeout(PATIENCE, attempt).await {
            Ok(answer) => answer,
            Err(_) => Err(self.no_answer(index)),
        };
        let connection = answer.map(|client| {
            let mut state = self.state();
            state.connections += 1;
            Connection {
                client,
                index,
                number: state.connections,
            }
        });
        (index, connection)
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Client, EtcdError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(PATIENCE)
            .with_keep_alive(PING, PATIENCE)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if endpoint.tls {
            options = options.with_tls(self.options.tls()?);
        }
        let urls = [&endpoint.url];
        let anonymous = options.clone();
        let connected = match self.options.credentials() {
            Some((user, password)) => {
                match Client::connect(urls, Some(options.with_user(user, password))).await {
                    Err(error) if error::needs_no_user(&error) => {
                        Client::connect(urls, Some(anonymous)).await
                    }
                    connected => connected,
                }
            }
            None => Client::connect(urls, Some(anonymous)).await,
        };
        connected.map_err(|error| EtcdError::new(&endpoint.url, &error))
    }
}

/// A read that only a member with a leader answers.
async fn read(client: Client, key: &str) -> Result<(), etcd_client::Error> {
    let options = GetOptions::new().with_count_only();
    client.kv_client().get(key, Some(options)).await?;
    Ok(())
}

fn no_endpoint(faults: &BTreeMap<usize, EtcdError>) -> EtcdError {
    let faults: Vec<String> = faults.values().map(ToString::to_string).collect();
    EtcdError::NoEndpoint(faults.join("; "))
}
